// Differentiation of the private quantized-softmax operator.
#include "ops/quantized_softmax.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// What one quantizer has beside its learned parameters.
struct Constants {
  std::vector<at::Tensor> tensors;
  int64_t parameterization, bits;
  double eps;
};

/// The constant range tensors, which must not ask for a gradient.
std::vector<at::Tensor> constants_of(const ListedRanges& ranges, const Traits& traits) {
  std::vector<at::Tensor> tensors;
  const auto add = [&](const char* name, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    TORCH_CHECK(!tensor->requires_grad(), "asymq::quantized_softmax: ", traits.name, ": ", name,
                " must not require grad: it is a constant of this parameterization");
    tensors.push_back(*tensor);
  };
  add("min", ranges.min);
  add("max", ranges.max);
  return tensors;
}

/// The range tensors of a quantizer as the operators take them.
std::vector<at::Tensor> ranges_of(const at::Tensor& first, const OptionalTensor& second,
                                  const std::vector<at::Tensor>& constants) {
  std::vector<at::Tensor> ranges{first};
  if (second.has_value()) ranges.push_back(*second);
  ranges.insert(ranges.end(), constants.begin(), constants.end());
  return ranges;
}

class QuantizedSoftmax : public torch::autograd::Function<QuantizedSoftmax> {
 public:
  static constexpr bool is_traceable = true;

  static variable_list forward(AutogradContext* ctx, const at::Tensor& scores,
                               const at::Tensor& scores_first,
                               const at::Tensor& probabilities_first,
                               const OptionalTensor& scores_second,
                               const OptionalTensor& probabilities_second,
                               const OptionalTensor& mask, bool causal, const Constants& of_scores,
                               const Constants& of_probabilities) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto scores_ranges = ranges_of(scores_first, scores_second, of_scores.tensors);
    const auto probabilities_ranges =
        ranges_of(probabilities_first, probabilities_second, of_probabilities.tensors);
    auto [probabilities, statistics] = quantized_softmax_op(
        scores, mask, causal,
        {scores_ranges, of_scores.parameterization, of_scores.bits, of_scores.eps},
        {probabilities_ranges, of_probabilities.parameterization, of_probabilities.bits,
         of_probabilities.eps});
    variable_list saved{scores, statistics, mask.value_or(at::Tensor())};
    saved.insert(saved.end(), scores_ranges.begin(), scores_ranges.end());
    saved.insert(saved.end(), probabilities_ranges.begin(), probabilities_ranges.end());
    ctx->save_for_backward(saved);
    ctx->saved_data["causal"] = causal;
    ctx->saved_data["scores_second"] = scores_second.has_value();
    ctx->saved_data["probabilities_second"] = probabilities_second.has_value();
    ctx->saved_data["scores_ranges"] = static_cast<int64_t>(scores_ranges.size());
    ctx->saved_data["scores_parameterization"] = of_scores.parameterization;
    ctx->saved_data["scores_bits"] = of_scores.bits;
    ctx->saved_data["scores_eps"] = of_scores.eps;
    ctx->saved_data["probabilities_parameterization"] = of_probabilities.parameterization;
    ctx->saved_data["probabilities_bits"] = of_probabilities.bits;
    ctx->saved_data["probabilities_eps"] = of_probabilities.eps;
    ctx->mark_non_differentiable({statistics});
    return {probabilities, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(9);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const at::TensorList ranges = at::TensorList(saved).slice(3);
    const auto count = static_cast<size_t>(ctx->saved_data["scores_ranges"].toInt());
    const auto data = [&](const char* name) { return ctx->saved_data[name]; };
    // Arguments that were not given do not count.
    size_t edge = 3;
    const auto needs_second = [&](const char* name) {
      return data(name).toBool() && ctx->needs_input_grad(edge++);
    };
    const bool scores_second = needs_second("scores_second");
    const bool probabilities_second = needs_second("probabilities_second");
    const std::array<bool, 5> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    scores_second, ctx->needs_input_grad(2), probabilities_second};
    std::tie(result[0], result[1], result[3], result[2], result[4]) = quantized_softmax_backward_op(
        grads[0], saved[0], saved[1], saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt,
        data("causal").toBool(),
        {ranges.slice(0, count), data("scores_parameterization").toInt(),
         data("scores_bits").toInt(), data("scores_eps").toDouble()},
        {ranges.slice(count), data("probabilities_parameterization").toInt(),
         data("probabilities_bits").toInt(), data("probabilities_eps").toDouble()},
        needs);
    return result;
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_softmax_autograd(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal, at::TensorList scores_ranges,
    int64_t scores_parameterization, int64_t scores_bits, double scores_eps,
    at::TensorList probabilities_ranges, int64_t probabilities_parameterization,
    int64_t probabilities_bits, double probabilities_eps) {
  // Before anything is recorded for the backward.
  const SoftmaxKinds kinds = check_quantized_softmax(
      scores, mask, {scores_ranges, scores_parameterization, scores_bits, scores_eps},
      {probabilities_ranges, probabilities_parameterization, probabilities_bits,
       probabilities_eps});
  TORCH_CHECK(!mask.has_value() || !mask->requires_grad(),
              "asymq::quantized_softmax: mask must not require grad, its gradient is not computed");
  const ListedRanges& s = kinds.scores_ranges;
  const ListedRanges& p = kinds.probabilities_ranges;
  const Constants of_scores{constants_of(s, traits_of(scores_parameterization)),
                            scores_parameterization, scores_bits, scores_eps};
  const Constants of_probabilities{constants_of(p, traits_of(probabilities_parameterization)),
                                   probabilities_parameterization, probabilities_bits,
                                   probabilities_eps};
  const auto results = QuantizedSoftmax::apply(scores, s.first, p.first, s.second, p.second, mask,
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
