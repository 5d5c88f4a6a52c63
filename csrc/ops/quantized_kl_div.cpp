#include "ops/quantized_kl_div.h"

#include <torch/library.h>

#include "asymq/quantized_kl_div.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kKlDiv = "quantized_kl_div";

at::Tensor kl_div_in_schema_order(const at::Tensor& logits, const at::Tensor& teacher_logits,
                                  const OptionalTensor& labels, double temperature,
                                  int64_t ignore_index, const RangeArguments& range,
                                  std::optional<int64_t> classes) {
  return quantized_kl_div(logits, teacher_logits, range, labels, temperature, ignore_index,
                          classes);
}

}  // namespace

CheckedQuantizer check_quantized_kl_div(const at::Tensor& logits, const at::Tensor& teacher_logits,
                                        const OptionalTensor& labels,
                                        const QuantizerArguments& quantizer, double temperature,
                                        std::optional<int64_t> classes) {
  constexpr Where where{kKlDiv};
  check_logits(where, logits, classes);
  TORCH_CHECK(teacher_logits.scalar_type() == logits.scalar_type(), where,
              ": teacher_logits must have the logits' dtype ", logits.scalar_type(), ", got ",
              teacher_logits.scalar_type());
  const c10::SymInt shape[]{logits.sym_size(0),
                            classes.has_value() ? c10::SymInt(*classes) : logits.sym_size(1)};
  TORCH_CHECK(teacher_logits.sym_sizes() == c10::SymIntArrayRef(shape), where,
              ": teacher_logits must have the logits' shape ", c10::SymIntArrayRef(shape), ", got ",
              teacher_logits.sym_sizes());
  TORCH_CHECK(teacher_logits.device() == logits.device(), where,
              ": teacher_logits must be on the logits' device ", logits.device(), ", got ",
              teacher_logits.device());
  if (labels.has_value()) check_labels(where, *labels, logits);
  check_positive(where, "temperature", temperature);
  return check_quantizer(kKlDiv, "", "logits", logits, quantizer);
}

CheckedQuantizer check_quantized_kl_div_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& teacher_logits,
    const OptionalTensor& labels, const at::Tensor& statistics, const QuantizerArguments& quantizer,
    double temperature, std::optional<int64_t> classes) {
  check_grad({kKlDiv}, "losses", grad, statistics.select(1, 0));
  return check_quantized_kl_div(logits, teacher_logits, labels, quantizer, temperature, classes);
}

at::Tensor quantized_kl_div(const at::Tensor& logits, const at::Tensor& teacher_logits,
                            const RangeArguments& range, const OptionalTensor& labels,
                            double temperature, int64_t ignore_index,
                            std::optional<int64_t> classes) {
  return std::get<0>(quantized_kl_div_op(logits, teacher_logits, labels, by_position(kKlDiv, range),
                                         temperature, classes, ignore_index));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_kl_div", flat<kl_div_in_schema_order>);
}

}  // namespace asymq
