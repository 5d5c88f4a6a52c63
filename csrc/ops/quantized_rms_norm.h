// The private operators behind quantized_rms_norm.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// dL/dx, dL/dweight, then the gradients of first and second of the range.
using RmsNormGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// The result, and of each row 1 / sqrt(mean square + eps), of the shape [..., 1].
inline constexpr Op<"asymq::_quantized_rms_norm", std::tuple<at::Tensor, at::Tensor>(
                                                      const at::Tensor& x, const at::Tensor& weight,
                                                      double eps, const QuantizerArguments& output)>
    quantized_rms_norm_op;

inline constexpr Op<"asymq::_quantized_rms_norm_backward",
                    RmsNormGradients(const at::Tensor& grad, const at::Tensor& x,
                                     const at::Tensor& weight, const at::Tensor& statistics,
                                     const QuantizerArguments& output, std::array<bool, 4> needs)>
    quantized_rms_norm_backward_op;

/// Sizes may be symbolic.
std::optional<CheckedQuantizer> check_quantized_rms_norm(const at::Tensor& x,
                                                         const at::Tensor& weight,
                                                         const QuantizerArguments& output);

/// The same, and of the upstream gradient.
std::optional<CheckedQuantizer> check_quantized_rms_norm_backward(const at::Tensor& grad,
                                                                  const at::Tensor& x,
                                                                  const at::Tensor& weight,
                                                                  const QuantizerArguments& output);

/// Of single operations: what runs where there is no kernel.
std::tuple<at::Tensor, at::Tensor> quantized_rms_norm_composite(const at::Tensor& x,
                                                                const at::Tensor& weight,
                                                                double eps,
                                                                const QuantizerArguments& output);
RmsNormGradients quantized_rms_norm_backward_composite(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& weight,
                                                       const at::Tensor& statistics,
                                                       const QuantizerArguments& output,
                                                       std::array<bool, 4> needs);

}  // namespace asymq
