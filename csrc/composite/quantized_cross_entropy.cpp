// The quantized cross-entropy of single operations, in the compute type: what every device runs
// that has no kernel of its own for it, and what tracing looks at.
#include "ops/quantized_cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "composite/quantizer.h"

namespace asymq {
namespace {

void check_labels(const at::Tensor& labels, int64_t ignore_index, const at::Tensor& logits) {
  if (!labels.device().is_cpu()) return;
  const int64_t classes = logits.size(1);
  const at::Tensor dense = labels.contiguous();
  const auto* label = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < dense.numel(); ++i) {
    TORCH_CHECK_INDEX(label[i] == ignore_index || (label[i] >= 0 && label[i] < classes),
                      "asymq::quantized_cross_entropy: labels must be from 0 to ", classes - 1,
                      " or ignore_index, got ", label[i]);
  }
}

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_composite(
    const at::Tensor& columns, const at::Tensor& labels, const QuantizerArguments& quantizer,
    std::optional<int64_t> classes, int64_t ignore_index) {
  const auto checked = check_quantized_cross_entropy(columns, labels, quantizer, classes);
  const at::Tensor logits = of_classes(columns, classes);
  check_labels(labels, ignore_index, logits);
  const at::Tensor ignored = labels.eq(ignore_index);
  const at::Tensor quantized = fake_quantize_op(widen(logits), checked.granular());
  const at::Tensor largest = quantized.amax(1, /*keepdim=*/true);
  const at::Tensor shifted = quantized - largest;
  const at::Tensor log_sum = shifted.exp().sum(1, /*keepdim=*/true).log();
  const at::Tensor own = labels.masked_fill(ignored, 0).unsqueeze(1);
  const at::Tensor losses = (log_sum - shifted.gather(1, own)).squeeze(1).masked_fill(ignored, 0);
  return {losses, at::cat({largest, log_sum}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_cross_entropy_backward_composite(
    const at::Tensor& grad, const at::Tensor& columns, const at::Tensor& labels,
    const at::Tensor& statistics, const QuantizerArguments& quantizer,
    std::optional<int64_t> classes, int64_t ignore_index, std::array<bool, 3> needs) {
  const auto checked =
      check_quantized_cross_entropy_backward(grad, columns, labels, statistics, quantizer, classes);
  const at::Tensor logits = of_classes(columns, classes);
  const at::Tensor ignored = labels.eq(ignore_index);
  const at::Tensor wide = widen(logits);
  const at::Tensor quantized = fake_quantize_op(wide, checked.granular());
  at::Tensor dquantized =
      (quantized - statistics.narrow(1, 0, 1) - statistics.narrow(1, 1, 1)).exp();
  const at::Tensor own = labels.masked_fill(ignored, 0).unsqueeze(1);
  dquantized.scatter_add_(1, own, -at::ones_like(own, dquantized.options()));
  dquantized.mul_(grad.unsqueeze(1)).masked_fill_(ignored.unsqueeze(1), 0);
  auto [dlogits, first, second] =
      fake_quantize_backward_op(dquantized, wide, checked.granular(), needs);
  if (needs[0]) dlogits = of_columns(dlogits.to(logits.scalar_type()), columns);
  return {dlogits, first, second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_cross_entropy", flat<quantized_cross_entropy_composite>);
  m.impl("_quantized_cross_entropy_backward", flat<quantized_cross_entropy_backward_composite>);
}

}  // namespace asymq
