// GELU between two learnable quantizers, in one kernel each way.
#pragma once

#include <ATen/core/Tensor.h>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// fake_quantize(gelu(fake_quantize(x))), with the tanh approximation of GELU (torch's
/// approximate="tanh", transformers' "gelu_new").
///
/// x: float32, float64, bfloat16 or float16, any shape and strides. The result has the strides of
/// empty_like(x). All arithmetic is in float32 (float64 for float64 x), with one rounding to x's
/// dtype at the end.
///
/// The backward saves x alone. Gradients are those of the composition: straight-through at both
/// quantizers, for x and both ranges' learned parameters.
at::Tensor quantized_gelu(const at::Tensor& x, const RangeArguments& input_range,
                          const RangeArguments& output_range);

}  // namespace asymq

#pragma GCC visibility pop
