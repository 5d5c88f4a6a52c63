#include "ops/quantized_cross_entropy.h"

#include <torch/library.h>

#include <limits>

#include "asymq/quantized_cross_entropy.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kOp = "quantized_cross_entropy";

at::Tensor in_schema_order(const at::Tensor& logits, const at::Tensor& labels, int64_t ignore_index,
                           const RangeArguments& range) {
  return quantized_cross_entropy(logits, labels, range, ignore_index);
}

}  // namespace

CheckedQuantizer check_quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                               const QuantizerArguments& quantizer) {
  constexpr Where where{kOp};
  TORCH_CHECK(logits.dim() == 2, where,
              ": logits must have 2 dimensions, [tokens, classes], got shape ", logits.sym_sizes());
  check_elements(where, "logits", logits);
  TORCH_CHECK(logits.sym_size(1) >= 1, where, ": logits must have at least one class, got shape ",
              logits.sym_sizes());
  TORCH_CHECK(logits.sym_size(1) <= std::numeric_limits<int>::max(), where,
              ": logits must have less than 2^31 classes, got ", logits.sym_size(1));
  TORCH_CHECK(labels.scalar_type() == at::kLong, where, ": labels must be int64, got ",
              labels.scalar_type());
  TORCH_CHECK(labels.dim() == 1 && labels.sym_size(0) == logits.sym_size(0), where,
              ": labels must have one element per row of the logits, shape [", logits.sym_size(0),
              "], got ", labels.sym_sizes());
  TORCH_CHECK(labels.device() == logits.device(), where, ": labels must be on the logits' device ",
              logits.device(), ", got ", labels.device());
  return check_quantizer(kOp, "", "logits", logits, quantizer);
}

CheckedQuantizer check_quantized_cross_entropy_backward(const at::Tensor& grad,
                                                        const at::Tensor& logits,
                                                        const at::Tensor& labels,
                                                        const at::Tensor& statistics,
                                                        const QuantizerArguments& quantizer) {
  check_grad({kOp}, "losses", grad, statistics.select(1, 0));
  return check_quantized_cross_entropy(logits, labels, quantizer);
}

at::Tensor quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                   const RangeArguments& range, int64_t ignore_index) {
  return std::get<0>(
      quantized_cross_entropy_op(logits, labels, by_position(kOp, range), ignore_index));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_cross_entropy", flat<in_schema_order>);
}

}  // namespace asymq
