// The private operators behind quantized_cross_entropy.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// Losses, and of each row the largest quantized logit and the logarithm of the sum of
/// e^(quantized logit - largest).
inline constexpr Op<"asymq::_quantized_cross_entropy",
                    std::tuple<at::Tensor, at::Tensor>(
                        const at::Tensor& logits, const at::Tensor& labels,
                        const QuantizerArguments& quantizer, std::optional<int64_t> classes,
                        int64_t ignore_index)>
    quantized_cross_entropy_op;

/// dL/dlogits, then the gradients of first and second of the range.
inline constexpr Op<"asymq::_quantized_cross_entropy_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels,
                        const at::Tensor& statistics, const QuantizerArguments& quantizer,
                        std::optional<int64_t> classes, int64_t ignore_index,
                        std::array<bool, 3> needs)>
    quantized_cross_entropy_backward_op;

/// Sizes may be symbolic; what the labels say is not looked at.
CheckedQuantizer check_quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                               const QuantizerArguments& quantizer,
                                               std::optional<int64_t> classes);

/// The same, and of the upstream gradient.
CheckedQuantizer check_quantized_cross_entropy_backward(const at::Tensor& grad,
                                                        const at::Tensor& logits,
                                                        const at::Tensor& labels,
                                                        const at::Tensor& statistics,
                                                        const QuantizerArguments& quantizer,
                                                        std::optional<int64_t> classes);

}  // namespace asymq
