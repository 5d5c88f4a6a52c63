// A quantizer of any kind, or none, as one of the single operations of a composite.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <tuple>

#include "ops/fake_quantize.h"
#include "ops/fake_quantize_dynamic.h"
#include "ops/quantizer.h"

namespace asymq {

/// x in the type that its elements compute in.
inline at::Tensor widen(const at::Tensor& x) { return x.to(compute_dtype(x.scalar_type())); }

inline LiveQuantizer live(const CheckedQuantizer& quantizer) {
  return {quantizer.ranges.first, quantizer.ranges.second, quantizer.group,
          arguments_of(quantizer.kind), /*token=*/true};
}

/// Logits without the columns behind the classes, and a gradient with them.
inline at::Tensor of_classes(const at::Tensor& logits, std::optional<int64_t> classes) {
  return classes.has_value() ? logits.narrow(1, 0, *classes) : logits;
}
inline at::Tensor of_columns(const at::Tensor& dlogits, const at::Tensor& logits) {
  const c10::SymInt padding = logits.sym_size(1) - dlogits.sym_size(1);
  return padding == 0 ? dlogits : at::constant_pad_nd_symint(dlogits, {0, padding});
}

/// x on the quantizer's grid; x itself where there is none.
inline at::Tensor quantize(const at::Tensor& x, const std::optional<CheckedQuantizer>& quantizer) {
  if (!quantizer.has_value()) return x;
  if (quantizer->token) return fake_quantize_dynamic_op(x, live(*quantizer));
  return fake_quantize_op(x, quantizer->granular());
}

/// dL/dx, then the gradients that are wanted of first and second.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const std::optional<CheckedQuantizer>& quantizer,
    bool needs_first, bool needs_second) {
  if (!quantizer.has_value()) return {grad, at::Tensor(), at::Tensor()};
  const std::array<bool, 3> needs{true, needs_first, needs_second};
  if (quantizer->token) return fake_quantize_dynamic_backward_op(grad, x, live(*quantizer), needs);
  return fake_quantize_backward_op(grad, x, quantizer->granular(), needs);
}

}  // namespace asymq
