// Differentiation of the private quantized-softmax operator.
#include "ops/quantized_softmax.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedSoftmax : public torch::autograd::Function<QuantizedSoftmax> {
 public:
  static constexpr bool is_traceable = true;

  /// The lists are the quantizers' ranges, for autograd to see.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& scores, at::TensorList,
                               at::TensorList, const OptionalTensor& mask, bool causal,
                               std::optional<int64_t> window, const QuantizerArguments& of_scores,
                               const QuantizerArguments& of_probabilities) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [probabilities, statistics] =
        quantized_softmax_op(scores, mask, causal, window, of_scores, of_probabilities);
    save(ctx, {scores, statistics, mask.value_or(at::Tensor())}, {of_scores, of_probabilities});
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["window"] = window;
    ctx->mark_non_differentiable({statistics});
    return {probabilities, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    if (!grads[0].defined()) return saved.none();
    const at::Tensor& mask = saved.tensor(2);
    return saved.in_order(quantized_softmax_backward_op(
        grads[0], saved.tensor(0), saved.tensor(1),
        mask.defined() ? OptionalTensor(mask) : std::nullopt, ctx->saved_data["causal"].toBool(),
        ctx->saved_data["window"].toOptional<int64_t>(), saved.quantizer(0), saved.quantizer(1),
        saved.needs<5>()));
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_softmax_autograd(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities) {
  // Before anything is recorded for the backward.
  const QuantizerPair pair =
      check_quantized_softmax(scores, mask, causal, window, of_scores, of_probabilities);
  check_differentiable("quantized_softmax", {pair.before, pair.after});
  TORCH_CHECK(!mask.has_value() || !mask->requires_grad(),
              "asymq::quantized_softmax: mask must not require grad, its gradient is not computed");
  const auto results = QuantizedSoftmax::apply(scores, of_scores.ranges, of_probabilities.ranges,
                                               mask, causal, window, of_scores, of_probabilities);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_softmax", flat<quantized_softmax_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_softmax_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
