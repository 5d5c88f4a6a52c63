// The private operators behind quantized_attention.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// dL/dquery, dL/dkey, dL/dvalue, then the gradients of first and second of the scores' and the
/// probabilities' range.
using AttentionGradientTensors =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The context, and what quantized_softmax keeps of each row.
inline constexpr Op<"asymq::_quantized_attention",
                    std::tuple<at::Tensor, at::Tensor>(
                        const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                        const OptionalTensor& mask, bool causal, std::optional<int64_t> window,
                        double scaling, const QuantizerArguments& of_scores,
                        const QuantizerArguments& of_probabilities)>
    quantized_attention_op;

inline constexpr Op<"asymq::_quantized_attention_backward",
                    AttentionGradientTensors(
                        const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key,
                        const at::Tensor& value, const at::Tensor& out,
                        const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
                        std::optional<int64_t> window, double scaling,
                        const QuantizerArguments& of_scores,
                        const QuantizerArguments& of_probabilities, std::array<bool, 7> needs)>
    quantized_attention_backward_op;

/// Sizes may be symbolic.
QuantizerPair check_quantized_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const OptionalTensor& mask,
                                        bool causal, std::optional<int64_t> window,
                                        const QuantizerArguments& of_scores,
                                        const QuantizerArguments& of_probabilities);

/// The same, and of the upstream gradient.
QuantizerPair check_quantized_attention_backward(const at::Tensor& grad, const at::Tensor& query,
                                                 const at::Tensor& key, const at::Tensor& value,
                                                 const at::Tensor& out, const OptionalTensor& mask,
                                                 bool causal, std::optional<int64_t> window,
                                                 const QuantizerArguments& of_scores,
                                                 const QuantizerArguments& of_probabilities);

/// Of single operations: what runs where there is no kernel, and what tracing looks at.
std::tuple<at::Tensor, at::Tensor> quantized_attention_composite(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& mask, bool causal, std::optional<int64_t> window, double scaling,
    const QuantizerArguments& of_scores, const QuantizerArguments& of_probabilities);
AttentionGradientTensors quantized_attention_backward_composite(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, double scaling, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities, std::array<bool, 7> needs);

}  // namespace asymq
