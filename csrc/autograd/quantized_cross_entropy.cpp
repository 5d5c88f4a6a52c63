// Differentiation of the private quantized cross-entropy operator.
#include "ops/quantized_cross_entropy.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedCrossEntropy : public torch::autograd::Function<QuantizedCrossEntropy> {
 public:
  static constexpr bool is_traceable = true;

  /// The list is the quantizer's ranges, for autograd to see.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& logits, at::TensorList,
                               const at::Tensor& labels, const QuantizerArguments& quantizer,
                               std::optional<int64_t> classes, int64_t ignore_index) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [losses, statistics] =
        quantized_cross_entropy_op(logits, labels, quantizer, classes, ignore_index);
    save(ctx, {logits, labels, statistics}, {quantizer});
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["classes"] = classes;
    ctx->mark_non_differentiable({statistics});
    return {losses, statistics};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Saved saved(ctx);
    if (!grads[0].defined()) return saved.none();
    return saved.in_order(quantized_cross_entropy_backward_op(
        grads[0], saved.tensor(0), saved.tensor(1), saved.tensor(2), saved.quantizer(0),
        ctx->saved_data["classes"].toOptional<int64_t>(), ctx->saved_data["ignore_index"].toInt(),
        saved.needs<3>()));
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_autograd(
    const at::Tensor& logits, const at::Tensor& labels, const QuantizerArguments& quantizer,
    std::optional<int64_t> classes, int64_t ignore_index) {
  // Before anything is recorded for the backward.
  check_differentiable("quantized_cross_entropy",
                       {check_quantized_cross_entropy(logits, labels, quantizer, classes)});
  const auto results = QuantizedCrossEntropy::apply(logits, quantizer.ranges, labels, quantizer,
                                                    classes, ignore_index);
  return {results[0], results[1]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_cross_entropy", flat<quantized_cross_entropy_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
