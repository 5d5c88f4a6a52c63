// Differentiation of the private quantized cross-entropy operator.
#include "ops/quantized_cross_entropy.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/kept_quantizer.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedCrossEntropy : public torch::autograd::Function<QuantizedCrossEntropy> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits,
                               at::TensorList ranges, const at::Tensor& labels,
                               const QuantizerArguments& quantizer, int64_t ignore_index) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [losses, statistics] = quantized_cross_entropy_op(logits, labels, quantizer, ignore_index);
    variable_list saved{logits, labels, statistics};
    saved.insert(saved.end(), ranges.begin(), ranges.end());
    ctx->save_for_backward(saved);
    keep(ctx, "logits", quantizer);
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->mark_non_differentiable({statistics});
    return {losses, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const QuantizerArguments quantizer = kept(ctx, "logits", saved, 3);
    variable_list result(1 + quantizer.ranges.size() + 3);
    if (!grads[0].defined()) return result;
    const auto needs = needed(ctx, quantizer, 1);
    const auto [dlogits, first, second] = quantized_cross_entropy_backward_op(
        grads[0], saved[0], saved[1], saved[2], quantizer, ctx->saved_data["ignore_index"].toInt(),
        {ctx->needs_input_grad(0), needs[0], needs[1]});
    result[0] = dlogits;
    result[1] = first;
    if (needs[1]) result[2] = second;
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_autograd(
    const at::Tensor& logits, const at::Tensor& labels, at::TensorList ranges,
    int64_t parameterization, int64_t bits, double eps, int64_t ignore_index) {
  const QuantizerArguments quantizer{ranges, parameterization, bits, eps};
  // Before anything is recorded for the backward.
  const auto checked = check_quantized_cross_entropy(logits, labels, quantizer);
  check_constants("quantized_cross_entropy", parameterization, checked.ranges);
  const auto results =
      QuantizedCrossEntropy::apply(logits, ranges, labels, quantizer, ignore_index);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_cross_entropy", quantized_cross_entropy_autograd);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
