// Differentiation of the private quantized Kullback-Leibler operator.
#include "ops/quantized_kl_div.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedKlDiv : public torch::autograd::Function<QuantizedKlDiv> {
 public:
  static constexpr bool is_traceable = true;

  /// The list is the quantizer's ranges, for autograd to see.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, at::TensorList,
                               const at::Tensor& teacher_logits, const OptionalTensor& labels,
                               const QuantizerArguments& quantizer, double temperature,
                               std::optional<int64_t> classes, int64_t ignore_index) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [losses, statistics] = quantized_kl_div_op(logits, teacher_logits, labels, quantizer,
                                                    temperature, classes, ignore_index);
    save(ctx, {logits, teacher_logits, labels.value_or(at::Tensor()), statistics}, {quantizer});
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["classes"] = classes;
    ctx->mark_non_differentiable({statistics});
    return {losses, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    if (!grads[0].defined()) return saved.none();
    const at::Tensor& labels = saved.tensor(2);
    return saved.in_order(quantized_kl_div_backward_op(
        grads[0], saved.tensor(0), saved.tensor(1),
        labels.defined() ? OptionalTensor(labels) : std::nullopt, saved.tensor(3),
        saved.quantizer(0), ctx->saved_data["temperature"].toDouble(),
        ctx->saved_data["classes"].toOptional<int64_t>(), ctx->saved_data["ignore_index"].toInt(),
        saved.needs<3>()));
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_kl_div_autograd(
    const at::Tensor& logits, const at::Tensor& teacher_logits, const OptionalTensor& labels,
    const QuantizerArguments& quantizer, double temperature, std::optional<int64_t> classes,
    int64_t ignore_index) {
  // Before anything is recorded for the backward.
  check_differentiable(
      "quantized_kl_div",
      {check_quantized_kl_div(logits, teacher_logits, labels, quantizer, temperature, classes)});
  TORCH_CHECK(!teacher_logits.requires_grad(),
              "asymq::quantized_kl_div: teacher_logits must not require grad, its gradient is not "
              "computed: detach it");
  const auto results = QuantizedKlDiv::apply(logits, quantizer.ranges, teacher_logits, labels,
                                             quantizer, temperature, classes, ignore_index);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_kl_div", flat<quantized_kl_div_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_kl_div_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
