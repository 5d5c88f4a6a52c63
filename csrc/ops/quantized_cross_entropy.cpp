// The public function and the calls of its private operators.
#include "ops/quantized_cross_entropy.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "asymq/quantized_cross_entropy.h"

namespace asymq {
namespace {

using ForwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&,
                                                     at::TensorList, int64_t, int64_t, double,
                                                     int64_t);
using BackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, at::TensorList,
    int64_t, int64_t, double, int64_t, std::array<bool, 3>);

at::Tensor quantized_cross_entropy_by_name(const at::Tensor& logits, const at::Tensor& labels,
                                           int64_t ignore_index, std::string_view parameterization,
                                           at::TensorList parameters, int64_t bits, bool symmetric,
                                           bool sigmoid, double eps) {
  return quantized_cross_entropy(
      logits, labels, {parameterization, parameters, bits, symmetric, sigmoid, eps}, ignore_index);
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_op(const at::Tensor& logits,
                                                              const at::Tensor& labels,
                                                              const QuantizerArguments& q,
                                                              int64_t ignore_index) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_cross_entropy", "")
                             .typed<ForwardOp>();
  return op.call(logits, labels, q.ranges, q.parameterization, q.bits, q.eps, ignore_index);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_cross_entropy_backward_op(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels,
    const at::Tensor& statistics, const QuantizerArguments& q, int64_t ignore_index,
    std::array<bool, 3> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_cross_entropy_backward", "")
                             .typed<BackwardOp>();
  return op.call(grad, logits, labels, statistics, q.ranges, q.parameterization, q.bits, q.eps,
                 ignore_index, needs);
}

at::Tensor quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                   const RangeArguments& range, int64_t ignore_index) {
  return std::get<0>(quantized_cross_entropy_op(
      logits, labels, by_position("quantized_cross_entropy", range), ignore_index));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_cross_entropy", quantized_cross_entropy_by_name);
}

}  // namespace asymq
