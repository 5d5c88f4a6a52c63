// The private operators behind quantized_glu.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// The function between the gate's quantizer and its own, as operators and kernels count them.
enum class GluActivation : int64_t { kSilu, kGeluTanh };

/// Of the gated operand, of its activation, of the other operand, and of the product.
struct GluQuantizers {
  std::optional<CheckedQuantizer> gate, activation, up, product;
};

/// dL/dgate, dL/dup, then the gradients of first and second of every range in this order.
using GluGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline constexpr Op<"asymq::_quantized_glu",
                    at::Tensor(
                        const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                        const QuantizerArguments& of_gate, const QuantizerArguments& of_activation,
                        const QuantizerArguments& of_up, const QuantizerArguments& of_product)>
    quantized_glu_op;

inline constexpr Op<"asymq::_quantized_glu_backward",
                    GluGradients(
                        const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up,
                        int64_t activation, const QuantizerArguments& of_gate,
                        const QuantizerArguments& of_activation, const QuantizerArguments& of_up,
                        const QuantizerArguments& of_product, std::array<bool, 10> needs)>
    quantized_glu_backward_op;

/// Sizes may be symbolic.
GluQuantizers check_quantized_glu(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                  const QuantizerArguments& of_gate,
                                  const QuantizerArguments& of_activation,
                                  const QuantizerArguments& of_up,
                                  const QuantizerArguments& of_product);

/// The same, and of the upstream gradient.
GluQuantizers check_quantized_glu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, int64_t activation,
                                           const QuantizerArguments& of_gate,
                                           const QuantizerArguments& of_activation,
                                           const QuantizerArguments& of_up,
                                           const QuantizerArguments& of_product);

/// Of single operations: what runs where there is no kernel.
at::Tensor quantized_glu_composite(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                   const QuantizerArguments& of_gate,
                                   const QuantizerArguments& of_activation,
                                   const QuantizerArguments& of_up,
                                   const QuantizerArguments& of_product);
GluGradients quantized_glu_backward_composite(const at::Tensor& grad, const at::Tensor& gate,
                                              const at::Tensor& up, int64_t activation,
                                              const QuantizerArguments& of_gate,
                                              const QuantizerArguments& of_activation,
                                              const QuantizerArguments& of_up,
                                              const QuantizerArguments& of_product,
                                              std::array<bool, 10> needs);

}  // namespace asymq
