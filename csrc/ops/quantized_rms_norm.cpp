#include "ops/quantized_rms_norm.h"

#include <torch/library.h>

#include "asymq/quantized_rms_norm.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kRmsNorm = "quantized_rms_norm";

at::Tensor rms_norm_in_schema_order(const at::Tensor& x, const at::Tensor& weight, double eps,
                                    const std::optional<RangeArguments>& output) {
  return quantized_rms_norm(x, weight, output, eps);
}

}  // namespace

std::optional<CheckedQuantizer> check_quantized_rms_norm(const at::Tensor& x,
                                                         const at::Tensor& weight,
                                                         const QuantizerArguments& output) {
  constexpr Where where{kRmsNorm};
  check_elements(where, "x", x);
  TORCH_CHECK(
      x.dim() > 0, where,
      ": x must have at least one dimension, the last of which is normalized, got shape []");
  TORCH_CHECK(weight.dim() == 1 && weight.sym_size(0) == x.sym_size(-1), where,
              ": weight must have one element for each of the last axis of x, shape [",
              x.sym_size(-1), "], got ", weight.sym_sizes());
  TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(), where,
              ": weight must be ", x.scalar_type(), " on ", x.device(), " like x, got ",
              weight.scalar_type(), " on ", weight.device());
  return check_any_quantizer(kRmsNorm, "output's ", "x", x, output);
}

std::optional<CheckedQuantizer> check_quantized_rms_norm_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
    const QuantizerArguments& output) {
  check_grad({kRmsNorm}, "x", grad, x);
  return check_quantized_rms_norm(x, weight, output);
}

at::Tensor quantized_rms_norm(const at::Tensor& x, const at::Tensor& weight,
                              const std::optional<RangeArguments>& output_range, double eps) {
  check_positive({kRmsNorm}, "eps", eps);
  return std::get<0>(quantized_rms_norm_op(x, weight, eps, by_position(kRmsNorm, output_range)));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_rms_norm", flat<rms_norm_in_schema_order>);
}

}  // namespace asymq
