// The functions of asymq. The modules, which bring torch::nn along, are in asymq/nn.h.
#pragma once

#include "asymq/fake_quantize.h"
#include "asymq/quantized_attention.h"
#include "asymq/quantized_cross_entropy.h"
#include "asymq/quantized_gelu.h"
#include "asymq/quantized_glu.h"
#include "asymq/quantized_kl_div.h"
#include "asymq/quantized_rms_norm.h"
#include "asymq/quantized_softmax.h"
