#include "ops/quantized_glu.h"

#include <torch/library.h>

#include "asymq/quantized_glu.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kGlu = "quantized_glu";

at::Tensor glu_in_schema_order(const at::Tensor& gate, const at::Tensor& up,
                               std::string_view activation,
                               const std::optional<RangeArguments>& of_gate,
                               const std::optional<RangeArguments>& of_activation,
                               const std::optional<RangeArguments>& of_up,
                               const std::optional<RangeArguments>& of_product) {
  return quantized_glu(gate, up, of_product, activation, of_gate, of_activation, of_up);
}

int64_t activation_by_name(std::string_view name) {
  TORCH_CHECK(name == "silu" || name == "gelu_tanh", "asymq::", kGlu,
              ": activation must be silu or gelu_tanh, got ", name);
  return static_cast<int64_t>(name == "silu" ? GluActivation::kSilu : GluActivation::kGeluTanh);
}

}  // namespace

GluQuantizers check_quantized_glu(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                  const GluArguments& of) {
  constexpr Where where{kGlu};
  TORCH_CHECK(activation == static_cast<int64_t>(GluActivation::kSilu) ||
                  activation == static_cast<int64_t>(GluActivation::kGeluTanh),
              where, ": activation must be 0 (silu) or 1 (gelu_tanh), got ", activation);
  check_elements(where, "gate", gate);
  TORCH_CHECK(up.sym_sizes() == gate.sym_sizes(), where, ": up must have gate's shape ",
              gate.sym_sizes(), ", got ", up.sym_sizes());
  TORCH_CHECK(up.scalar_type() == gate.scalar_type() && up.device() == gate.device(), where,
              ": up must be ", gate.scalar_type(), " on ", gate.device(), " like gate, got ",
              up.scalar_type(), " on ", up.device());
  return {check_any_quantizer(kGlu, "gate's ", "gate", gate, of.gate),
          check_any_quantizer(kGlu, "activation's ", "gate", gate, of.activation),
          check_any_quantizer(kGlu, "up's ", "up", up, of.up),
          check_any_quantizer(kGlu, "product's ", "gate", gate, of.product)};
}

GluQuantizers check_quantized_glu_backward(const at::Tensor& grad, const at::Tensor& gate,
                                           const at::Tensor& up, int64_t activation,
                                           const GluArguments& of) {
  check_grad({kGlu}, "gate", grad, gate);
  return check_quantized_glu(gate, up, activation, of);
}

at::Tensor quantized_glu(const at::Tensor& gate, const at::Tensor& up,
                         const std::optional<RangeArguments>& product_range,
                         std::string_view activation,
                         const std::optional<RangeArguments>& gate_range,
                         const std::optional<RangeArguments>& activation_range,
                         const std::optional<RangeArguments>& up_range) {
  return quantized_glu_op(gate, up, activation_by_name(activation),
                          {by_position(kGlu, gate_range), by_position(kGlu, activation_range),
                           by_position(kGlu, up_range), by_position(kGlu, product_range)});
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_glu", flat<glu_in_schema_order>);
}

}  // namespace asymq
