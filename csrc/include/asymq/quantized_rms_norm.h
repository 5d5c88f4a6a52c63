// Normalization by the root mean square with a learnable quantizer after it.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// fake_quantize(weight · x / sqrt(mean(x²) + eps)) over the last axis (RMSNorm, Zhang and Sennrich
/// 2019), as transformers' LlamaRMSNorm computes it: the quotient in float32 (float64 for float64
/// x), rounded to x's dtype, times weight. Without a range the result is not quantized.
///
/// x [..., D]: float32, float64, bfloat16 or float16, any strides. weight [D]: of x's dtype; where
/// it has a quantizer, already quantized. The result is contiguous. On CUDA one kernel each way,
/// where D is a multiple of 16 bytes up to 32 KiB and the range is none, one, or that of the whole
/// token.
///
/// The backward saves x, weight and one number per row. Gradients are those of the composition, for
/// x, weight and the range's learned parameters.
at::Tensor quantized_rms_norm(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<RangeArguments>& output_range, double eps = 1e-6);

}  // namespace asymq

#pragma GCC visibility pop
