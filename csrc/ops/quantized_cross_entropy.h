// C++ callers of the private operators behind quantized_cross_entropy. Each goes through the
// dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/arguments.h"

namespace asymq {

/// Losses, and of each row the largest quantized logit and the logarithm of the sum of
/// e^(quantized logit - largest).
std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_op(const at::Tensor& logits,
                                                              const at::Tensor& labels,
                                                              const QuantizerArguments& quantizer,
                                                              int64_t ignore_index);

/// dL/dlogits, then the gradients of first and second of the range.
std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_cross_entropy_backward_op(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels,
    const at::Tensor& statistics, const QuantizerArguments& quantizer, int64_t ignore_index,
    std::array<bool, 3> needs);

}  // namespace asymq
