// Differentiation of the private quantized-softmax operator.
#include "ops/quantized_softmax.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/kept_quantizer.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedSoftmax : public torch::autograd::Function<QuantizedSoftmax> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& scores,
                               at::TensorList scores_ranges, at::TensorList probabilities_ranges,
                               const OptionalTensor& mask, bool causal,
                               const QuantizerArguments& of_scores,
                               const QuantizerArguments& of_probabilities) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [probabilities, statistics] =
        quantized_softmax_op(scores, mask, causal, of_scores, of_probabilities);
    variable_list saved{scores, statistics, mask.value_or(at::Tensor())};
    saved.insert(saved.end(), scores_ranges.begin(), scores_ranges.end());
    saved.insert(saved.end(), probabilities_ranges.begin(), probabilities_ranges.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["causal"] = causal;
    keep(ctx, "scores", of_scores);
    keep(ctx, "probabilities", of_probabilities);
    ctx->mark_non_differentiable({statistics});
    return {probabilities, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const QuantizerArguments of_scores = kept(ctx, "scores", saved, 3);
    const size_t count = of_scores.ranges.size();
    const QuantizerArguments of_probabilities = kept(ctx, "probabilities", saved, 3 + count);
    variable_list result(1 + count + of_probabilities.ranges.size() + 4);
    if (!grads[0].defined()) return result;
    const auto s = needed(ctx, of_scores, 1), p = needed(ctx, of_probabilities, 1 + count);
    const auto [dscores, s_first, s_second, p_first, p_second] = quantized_softmax_backward_op(
        grads[0], saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt,
        ctx->saved_data["causal"].toBool(), of_scores, of_probabilities,
        {ctx->needs_input_grad(0), s[0], s[1], p[0], p[1]});
    result[0] = dscores;
    result[1] = s_first;
    if (s[1]) result[2] = s_second;
    result[1 + count] = p_first;
    if (p[1]) result[2 + count] = p_second;
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_softmax_autograd(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal, at::TensorList scores_ranges,
    int64_t scores_parameterization, int64_t scores_bits, double scores_eps,
    at::TensorList probabilities_ranges, int64_t probabilities_parameterization,
    int64_t probabilities_bits, double probabilities_eps) {
  const QuantizerArguments of_scores{scores_ranges, scores_parameterization, scores_bits,
                                     scores_eps};
  const QuantizerArguments of_probabilities{probabilities_ranges, probabilities_parameterization,
                                            probabilities_bits, probabilities_eps};
  // Before anything is recorded for the backward.
  const auto pair = check_quantized_softmax(scores, mask, of_scores, of_probabilities);
  TORCH_CHECK(!mask.has_value() || !mask->requires_grad(),
              "asymq::quantized_softmax: mask must not require grad, its gradient is not computed");
  check_constants("quantized_softmax", scores_parameterization, pair.before.ranges);
  check_constants("quantized_softmax", probabilities_parameterization, pair.after.ranges);
  const auto results = QuantizedSoftmax::apply(scores, scores_ranges, probabilities_ranges, mask,
                                               causal, of_scores, of_probabilities);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_softmax", quantized_softmax_autograd);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_softmax_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
