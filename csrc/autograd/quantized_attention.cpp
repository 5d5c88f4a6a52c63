// Differentiation of the private operator of quantized attention.
#include "ops/quantized_attention.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"
#include "ops/quantized_softmax.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedAttention : public torch::autograd::Function<QuantizedAttention> {
 public:
  static constexpr bool is_traceable = true;

  /// The lists are the quantizers' ranges, for autograd to see.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, at::TensorList, at::TensorList,
                               const OptionalTensor& mask, bool causal,
                               std::optional<int64_t> window, double scaling,
                               const QuantizerArguments& of_scores,
                               const QuantizerArguments& of_probabilities) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [context, statistics] = quantized_attention_op(query, key, value, mask, causal, window,
                                                        scaling, of_scores, of_probabilities);
    save(ctx, {query, key, value, context, statistics, mask.value_or(at::Tensor())},
         {of_scores, of_probabilities});
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["window"] = window;
    ctx->saved_data["scaling"] = scaling;
    ctx->mark_non_differentiable({statistics});
    return {context, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx, 3);
    if (!grads[0].defined()) return saved.none();
    const at::Tensor& mask = saved.tensor(5);
    return saved.in_order(quantized_attention_backward_op(
        grads[0], saved.tensor(0), saved.tensor(1), saved.tensor(2), saved.tensor(3),
        saved.tensor(4), mask.defined() ? OptionalTensor(mask) : std::nullopt,
        ctx->saved_data["causal"].toBool(), ctx->saved_data["window"].toOptional<int64_t>(),
        ctx->saved_data["scaling"].toDouble(), saved.quantizer(0), saved.quantizer(1),
        saved.needs<7>()));
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_attention_autograd(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& mask, bool causal, std::optional<int64_t> window, double scaling,
    const QuantizerArguments& of_scores, const QuantizerArguments& of_probabilities) {
  // Before anything is recorded for the backward.
  const QuantizerPair pair = check_quantized_attention(query, key, value, mask, causal, window,
                                                       of_scores, of_probabilities);
  check_differentiable("quantized_attention", {pair.before, pair.after});
  TORCH_CHECK(!mask.has_value() || !mask->requires_grad(),
              "asymq::quantized_attention: mask must not require grad, its gradient is not "
              "computed");
  const auto results =
      QuantizedAttention::apply(query, key, value, of_scores.ranges, of_probabilities.ranges, mask,
                                causal, window, scaling, of_scores, of_probabilities);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_attention", flat<quantized_attention_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_attention_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
