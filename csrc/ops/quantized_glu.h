// The private operators behind quantized_glu.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// The function between the gate's quantizer and its own, as operators and kernels count them.
enum class GluActivation : int64_t { kSilu, kGeluTanh };

/// Of the gated operand, of its activation, of the other operand, and of the product.
struct GluArguments {
  QuantizerArguments gate, activation, up, product;
};

/// As those of each, one after the other.
template <>
struct Flat<const GluArguments&> {
  using One = Flat<const QuantizerArguments&>;
  using Types = decltype(std::tuple_cat(std::declval<One::Types>(), std::declval<One::Types>(),
                                        std::declval<One::Types>(), std::declval<One::Types>()));
  static Types write(const GluArguments& of) {
    return std::tuple_cat(One::write(of.gate), One::write(of.activation), One::write(of.up),
                          One::write(of.product));
  }
  template <class... Parts>
  static GluArguments read(const Parts&... parts) {
    constexpr size_t kEach = std::tuple_size_v<One::Types>;
    const std::tuple<const Parts&...> all(parts...);
    return {detail::read<const QuantizerArguments&, 0>(all),
            detail::read<const QuantizerArguments&, kEach>(all),
            detail::read<const QuantizerArguments&, 2 * kEach>(all),
            detail::read<const QuantizerArguments&, 3 * kEach>(all)};
  }
};

/// The same, checked.
struct GluQuantizers {
  std::optional<CheckedQuantizer> gate, activation, up, product;
};

/// dL/dgate, dL/dup, then the gradients of first and second of every range in this order.
using GluGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

inline constexpr Op<"asymq::_quantized_glu",
                    at::Tensor(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                               const GluArguments& quantizers)>
    quantized_glu_op;

inline constexpr Op<"asymq::_quantized_glu_backward",
                    GluGradients(const at::Tensor& grad, const at::Tensor& gate,
                                 const at::Tensor& up, int64_t activation,
                                 const GluArguments& quantizers, std::array<bool, 10> needs)>
    quantized_glu_backward_op;

/// Sizes may be symbolic.
GluQuantizers check_quantized_glu(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                  const GluArguments& quantizers);

/// The same, and of the upstream gradient.
GluQuantizers check_quantized_glu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, int64_t activation,
                                           const GluArguments& quantizers);

/// Of single operations: what runs where there is no kernel.
at::Tensor quantized_glu_composite(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                   const GluArguments& quantizers);
GluGradients quantized_glu_backward_composite(const at::Tensor& grad, const at::Tensor& gate,
                                              const at::Tensor& up, int64_t activation,
                                              const GluArguments& quantizers,
                                              std::array<bool, 10> needs);

}  // namespace asymq
