// C++ callers of the private operators. Each goes through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/arguments.h"

namespace asymq {

at::Tensor fake_quantize_op(const at::Tensor& x, const at::Tensor& first,
                            const std::optional<at::Tensor>& second,
                            const std::optional<at::Tensor>& min,
                            const std::optional<at::Tensor>& max, int64_t parameterization,
                            int64_t bits, double eps);

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_op(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& first,
    const std::optional<at::Tensor>& second, const std::optional<at::Tensor>& min,
    const std::optional<at::Tensor>& max, int64_t parameterization, int64_t bits, double eps,
    std::array<bool, 3> needs);

/// The same with a quantizer's arguments and their list of ranges.
inline at::Tensor fake_quantize_op(const at::Tensor& x, const QuantizerArguments& quantizer,
                                   const ListedRanges& ranges) {
  return fake_quantize_op(x, ranges.first, ranges.second, ranges.min, ranges.max,
                          quantizer.parameterization, quantizer.bits, quantizer.eps);
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_op(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& quantizer,
    const ListedRanges& ranges, std::array<bool, 3> needs) {
  return fake_quantize_backward_op(grad, x, ranges.first, ranges.second, ranges.min, ranges.max,
                                   quantizer.parameterization, quantizer.bits, quantizer.eps,
                                   needs);
}

}  // namespace asymq
