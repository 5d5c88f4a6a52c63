// C++ callers of the private operators behind quantized_gelu. Each goes through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/arguments.h"

namespace asymq {

at::Tensor quantized_gelu_op(const at::Tensor& x, const QuantizerArguments& of_input,
                             const QuantizerArguments& of_output);

/// dL/dx, then the gradients of first and second of the input's and the output's range.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_op(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& of_input,
    const QuantizerArguments& of_output, std::array<bool, 5> needs);

}  // namespace asymq
