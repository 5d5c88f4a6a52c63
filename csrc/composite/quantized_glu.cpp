// The quantized gated linear unit of single operations: what every device runs that has no kernel
// of its own for it, and what tracing looks at.
#include "ops/quantized_glu.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "composite/quantizer.h"

namespace asymq {
namespace {

bool is_silu(int64_t activation) {
  return activation == static_cast<int64_t>(GluActivation::kSilu);
}

/// Every tensor of the forward.
struct Steps {
  at::Tensor gate, activated, activation, up, product;

  Steps(const at::Tensor& given_gate, const at::Tensor& given_up, int64_t function,
        const GluQuantizers& quantizers)
      : gate(quantize(given_gate, quantizers.gate)),
        activated(is_silu(function) ? at::silu(gate) : at::gelu(gate, "tanh")),
        activation(quantize(activated, quantizers.activation)),
        up(quantize(given_up, quantizers.up)),
        product((activation * up).contiguous()) {}
};

}  // namespace

at::Tensor quantized_glu_composite(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                   const QuantizerArguments& of_gate,
                                   const QuantizerArguments& of_activation,
                                   const QuantizerArguments& of_up,
                                   const QuantizerArguments& of_product) {
  const auto quantizers =
      check_quantized_glu(gate, up, activation, of_gate, of_activation, of_up, of_product);
  return quantize(Steps(gate, up, activation, quantizers).product, quantizers.product);
}

GluGradients quantized_glu_backward_composite(
    const at::Tensor& grad, const at::Tensor& gate, const at::Tensor& up, int64_t activation,
    const QuantizerArguments& of_gate, const QuantizerArguments& of_activation,
    const QuantizerArguments& of_up, const QuantizerArguments& of_product,
    std::array<bool, 10> needs) {
  const auto quantizers = check_quantized_glu_backward(grad, gate, up, activation, of_gate,
                                                       of_activation, of_up, of_product);
  const Steps steps(gate, up, activation, quantizers);
  const auto [dproduct, product_first, product_second] =
      quantize_backward(grad, steps.product, quantizers.product, needs[8], needs[9]);
  const auto [dup, up_first, up_second] =
      quantize_backward(dproduct * steps.activation, up, quantizers.up, needs[6], needs[7]);
  const auto [dactivated, activation_first, activation_second] =
      quantize_backward(dproduct * steps.up, steps.activated, quantizers.activation, needs[4],
                        needs[5]);
  const at::Tensor through = is_silu(activation)
                                 ? at::silu_backward(dactivated, steps.gate)
                                 : at::gelu_backward(dactivated, steps.gate, "tanh");
  const auto [dgate, gate_first, gate_second] =
      quantize_backward(through, gate, quantizers.gate, needs[2], needs[3]);
  return {needs[0] ? dgate.contiguous() : at::Tensor(),
          needs[1] ? dup.contiguous() : at::Tensor(),
          gate_first,
          gate_second,
          activation_first,
          activation_second,
          up_first,
          up_second,
          product_first,
          product_second};
}

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_glu", flat<quantized_glu_composite>);
  m.impl("_quantized_glu_backward", flat<quantized_glu_backward_composite>);
}

}  // namespace asymq
