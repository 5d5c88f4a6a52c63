// Checks of quantize, update_codes_ and dequantize.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/quantizer.h"

namespace asymq {

/// The dtype of quantize's codes.
at::ScalarType code_dtype(int64_t bits, bool symmetric);

QuantizerKind check_quantize(const at::Tensor& x, const at::Tensor& scale,
                             const OptionalTensor& offset, int64_t bits, double eps,
                             bool full_range);

/// Of codes that quantize gives for x, to be overwritten.
QuantizerKind check_update_codes(const at::Tensor& codes, const at::Tensor& x,
                                 const at::Tensor& scale, const OptionalTensor& offset,
                                 int64_t bits, double eps, bool full_range);

QuantizerKind check_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& offset, int64_t bits, double eps,
                               bool full_range);

}  // namespace asymq
