// C++ callers of the private operators behind quantized_softmax. Each goes through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/arguments.h"

namespace asymq {

/// Probabilities, and of each row the largest masked score and the sum of exponentials.
std::tuple<at::Tensor, at::Tensor> quantized_softmax_op(const at::Tensor& scores,
                                                        const OptionalTensor& mask, bool causal,
                                                        const QuantizerArguments& of_scores,
                                                        const QuantizerArguments& of_probabilities);

/// dL/dscores, then the gradients of first and second of the scores' and the probabilities' range.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_op(const at::Tensor& grad, const at::Tensor& scores,
                              const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
                              const QuantizerArguments& of_scores,
                              const QuantizerArguments& of_probabilities,
                              std::array<bool, 5> needs);

}  // namespace asymq
