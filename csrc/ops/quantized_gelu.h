// The private operators behind quantized_gelu.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

inline constexpr Op<"asymq::_quantized_gelu",
                    at::Tensor(const at::Tensor& x, const QuantizerArguments& input,
                               const QuantizerArguments& output)>
    quantized_gelu_op;

/// dL/dx, then the gradients of first and second of the input's and the output's range.
inline constexpr Op<"asymq::_quantized_gelu_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& x,
                        const QuantizerArguments& input, const QuantizerArguments& output,
                        std::array<bool, 5> needs)>
    quantized_gelu_backward_op;

/// Sizes may be symbolic.
QuantizerPair check_quantized_gelu(const at::Tensor& x, const QuantizerArguments& input,
                                   const QuantizerArguments& output);

/// The same, and of the upstream gradient.
QuantizerPair check_quantized_gelu_backward(const at::Tensor& grad, const at::Tensor& x,
                                            const QuantizerArguments& input,
                                            const QuantizerArguments& output);

}  // namespace asymq
