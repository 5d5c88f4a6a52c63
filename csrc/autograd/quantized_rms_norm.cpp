// Differentiation of the private quantized-RMSNorm operator.
#include "ops/quantized_rms_norm.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedRmsNorm : public torch::autograd::Function<QuantizedRmsNorm> {
 public:
  static constexpr bool is_traceable = true;

  /// The list is the quantizer's ranges, for autograd to see.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& weight,
                               at::TensorList, double eps, const QuantizerArguments& output) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [normalized, statistics] = quantized_rms_norm_op(x, weight, eps, output);
    save(ctx, {x, weight, statistics}, {output});
    ctx->mark_non_differentiable({statistics});
    return {normalized, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 2);
    if (!grads[0].defined()) return saved.none();
    return saved.in_order(quantized_rms_norm_backward_op(grads[0], saved.tensor(0), saved.tensor(1),
                                                         saved.tensor(2), saved.quantizer(0),
                                                         saved.needs<4>()));
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_rms_norm_autograd(const at::Tensor& x,
                                                               const at::Tensor& weight, double eps,
                                                               const QuantizerArguments& output) {
  // Before anything is recorded for the backward.
  check_differentiable("quantized_rms_norm", {check_quantized_rms_norm(x, weight, output)});
  const auto results = QuantizedRmsNorm::apply(x, weight, output.ranges, eps, output);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_rms_norm", flat<quantized_rms_norm_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_rms_norm_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
