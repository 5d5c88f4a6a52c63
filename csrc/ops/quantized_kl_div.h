// The private operators behind quantized_kl_div.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// Losses, and of each row four numbers: of the quantized logits divided by the temperature the
/// largest and the logarithm of the sum of e^(each - largest), and both of the teacher's logits.
inline constexpr Op<"asymq::_quantized_kl_div",
                    std::tuple<at::Tensor, at::Tensor>(
                        const at::Tensor& logits, const at::Tensor& teacher_logits,
                        const OptionalTensor& labels, const QuantizerArguments& quantizer,
                        double temperature, std::optional<int64_t> classes, int64_t ignore_index)>
    quantized_kl_div_op;

/// dL/dlogits, then the gradients of first and second of the range.
inline constexpr Op<"asymq::_quantized_kl_div_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& logits,
                        const at::Tensor& teacher_logits, const OptionalTensor& labels,
                        const at::Tensor& statistics, const QuantizerArguments& quantizer,
                        double temperature, std::optional<int64_t> classes, int64_t ignore_index,
                        std::array<bool, 3> needs)>
    quantized_kl_div_backward_op;

/// Sizes may be symbolic; what the labels say is not looked at.
CheckedQuantizer check_quantized_kl_div(const at::Tensor& logits, const at::Tensor& teacher_logits,
                                        const OptionalTensor& labels,
                                        const QuantizerArguments& quantizer, double temperature,
                                        std::optional<int64_t> classes);

/// The same, and of the upstream gradient.
CheckedQuantizer check_quantized_kl_div_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& teacher_logits,
    const OptionalTensor& labels, const at::Tensor& statistics, const QuantizerArguments& quantizer,
    double temperature, std::optional<int64_t> classes);

}  // namespace asymq
