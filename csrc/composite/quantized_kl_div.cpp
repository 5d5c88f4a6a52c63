// The quantized Kullback-Leibler divergence of single operations, in the compute type: what every
// device runs that has no kernel of its own for it, and what tracing looks at.
#include "ops/quantized_kl_div.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "composite/quantizer.h"

namespace asymq {
namespace {

/// log softmax of rows, and what it takes: the largest element and the logarithm of the sum of
/// exponentials, [rows, 1] each.
struct LogSoftmax {
  explicit LogSoftmax(const at::Tensor& rows) : largest(rows.amax(1, /*keepdim=*/true)) {
    const at::Tensor shifted = rows - largest;
    log_sum = shifted.exp().sum(1, /*keepdim=*/true).log();
    value = shifted - log_sum;
  }
  at::Tensor largest, log_sum, value;
};

std::tuple<at::Tensor, at::Tensor> quantized_kl_div_composite(
    const at::Tensor& columns, const at::Tensor& teacher_logits, const OptionalTensor& labels,
    const QuantizerArguments& quantizer, double temperature, std::optional<int64_t> classes,
    int64_t ignore_index) {
  const auto checked =
      check_quantized_kl_div(columns, teacher_logits, labels, quantizer, temperature, classes);
  const at::Tensor logits = of_classes(columns, classes);
  const LogSoftmax student(fake_quantize_op(widen(logits), checked.granular()) / temperature);
  const LogSoftmax teacher(widen(teacher_logits) / temperature);
  const at::Tensor p = teacher.value.exp();
  // A teacher's -inf, a class that it excludes, adds nothing.
  const at::Tensor terms = (p * (teacher.value - student.value)).masked_fill(p.eq(0), 0);
  at::Tensor losses = terms.sum(1) * (temperature * temperature);
  if (labels.has_value()) losses = losses.masked_fill(labels->eq(ignore_index), 0);
  return {losses, at::cat({student.largest, student.log_sum, teacher.largest, teacher.log_sum}, 1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_kl_div_backward_composite(
    const at::Tensor& grad, const at::Tensor& columns, const at::Tensor& teacher_logits,
    const OptionalTensor& labels, const at::Tensor& statistics, const QuantizerArguments& quantizer,
    double temperature, std::optional<int64_t> classes, int64_t ignore_index,
    std::array<bool, 3> needs) {
  const auto checked = check_quantized_kl_div_backward(grad, columns, teacher_logits, labels,
                                                       statistics, quantizer, temperature, classes);
  const at::Tensor logits = of_classes(columns, classes);
  const at::Tensor wide = widen(logits);
  const auto probabilities = [&](const at::Tensor& of, int64_t first) {
    const at::Tensor shifted = of / temperature - statistics.narrow(1, first, 1);
    return (shifted - statistics.narrow(1, first + 1, 1)).exp();
  };
  at::Tensor dquantized = probabilities(fake_quantize_op(wide, checked.granular()), 0) -
                          probabilities(widen(teacher_logits), 2);
  dquantized = dquantized * (grad * temperature).unsqueeze(1);
  if (labels.has_value()) {
    dquantized = dquantized.masked_fill(labels->eq(ignore_index).unsqueeze(1), 0);
  }
  auto [dlogits, first, second] =
      fake_quantize_backward_op(dquantized, wide, checked.granular(), needs);
  if (needs[0]) dlogits = of_columns(dlogits.to(logits.scalar_type()), columns);
  return {dlogits, first, second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_kl_div", flat<quantized_kl_div_composite>);
  m.impl("_quantized_kl_div_backward", flat<quantized_kl_div_backward_composite>);
}

}  // namespace asymq
