// Differentiation of the private operator of the quantized gated linear unit.
#include "ops/quantized_glu.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedGlu : public torch::autograd::Function<QuantizedGlu> {
 public:
  static constexpr bool is_traceable = true;

  /// The lists are the quantizers' ranges, for autograd to see.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate, const at::Tensor& up,
                            at::TensorList, at::TensorList, at::TensorList, at::TensorList,
                            int64_t activation, const GluArguments& of) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {gate, up}, {of.gate, of.activation, of.up, of.product});
    ctx->saved_data["activation"] = activation;
    return quantized_glu_op(gate, up, activation, of);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 2);
    if (!grads[0].defined()) return saved.none();
    return saved.in_order(quantized_glu_backward_op(
        grads[0], saved.tensor(0), saved.tensor(1), ctx->saved_data["activation"].toInt(),
        {saved.quantizer(0), saved.quantizer(1), saved.quantizer(2), saved.quantizer(3)},
        saved.needs<10>()));
  }
};

at::Tensor quantized_glu_autograd(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                  const GluArguments& of) {
  // Before anything is recorded for the backward.
  const auto checked = check_quantized_glu(gate, up, activation, of);
  check_differentiable("quantized_glu",
                       {checked.gate, checked.activation, checked.up, checked.product});
  return QuantizedGlu::apply(gate, up, of.gate.ranges, of.activation.ranges, of.up.ranges,
                             of.product.ranges, activation, of);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_glu", flat<quantized_glu_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_glu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
