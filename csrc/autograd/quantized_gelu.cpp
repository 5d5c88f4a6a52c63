// Differentiation of the private quantized-GELU operator.
#include "ops/quantized_gelu.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedGelu : public torch::autograd::Function<QuantizedGelu> {
 public:
  static constexpr bool is_traceable = true;

  /// The lists are the quantizers' ranges, for autograd to see.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList,
                            at::TensorList, const QuantizerArguments& input,
                            const QuantizerArguments& output) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    save(ctx, {x}, {input, output});
    return quantized_gelu_op(x, input, output);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    if (!grads[0].defined()) return saved.none();
    return saved.in_order(quantized_gelu_backward_op(grads[0], saved.tensor(0), saved.quantizer(0),
                                                     saved.quantizer(1), saved.needs<5>()));
  }
};

at::Tensor quantized_gelu_autograd(const at::Tensor& x, const QuantizerArguments& input,
                                   const QuantizerArguments& output) {
  // Before anything is recorded for the backward.
  const QuantizerPair pair = check_quantized_gelu(x, input, output);
  check_differentiable("quantized_gelu", {pair.before, pair.after});
  return QuantizedGelu::apply(x, input.ranges, output.ranges, input, output);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_gelu", flat<quantized_gelu_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_gelu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
