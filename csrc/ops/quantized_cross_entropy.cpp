#include "ops/quantized_cross_entropy.h"

#include <torch/library.h>

#include "asymq/quantized_cross_entropy.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kCrossEntropy = "quantized_cross_entropy";

at::Tensor cross_entropy_in_schema_order(const at::Tensor& logits, const at::Tensor& labels,
                                         int64_t ignore_index, const RangeArguments& range,
                                         std::optional<int64_t> classes) {
  return quantized_cross_entropy(logits, labels, range, ignore_index, classes);
}

}  // namespace

CheckedQuantizer check_quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                               const QuantizerArguments& quantizer,
                                               std::optional<int64_t> classes) {
  constexpr Where where{kCrossEntropy};
  check_logits(where, logits, classes);
  check_labels(where, labels, logits);
  return check_quantizer(kCrossEntropy, "", "logits", logits, quantizer);
}

CheckedQuantizer check_quantized_cross_entropy_backward(const at::Tensor& grad,
                                                        const at::Tensor& logits,
                                                        const at::Tensor& labels,
                                                        const at::Tensor& statistics,
                                                        const QuantizerArguments& quantizer,
                                                        std::optional<int64_t> classes) {
  check_grad({kCrossEntropy}, "losses", grad, statistics.select(1, 0));
  return check_quantized_cross_entropy(logits, labels, quantizer, classes);
}

at::Tensor quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                   const RangeArguments& range, int64_t ignore_index,
                                   std::optional<int64_t> classes) {
  return std::get<0>(quantized_cross_entropy_op(logits, labels, by_position(kCrossEntropy, range),
                                                classes, ignore_index));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_cross_entropy", flat<cross_entropy_in_schema_order>);
}

}  // namespace asymq
