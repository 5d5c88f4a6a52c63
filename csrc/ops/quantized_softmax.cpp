// The public function and the calls of its private operators.
#include "ops/quantized_softmax.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "asymq/quantized_softmax.h"

namespace asymq {
namespace {

using ForwardOp = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&, bool,
                                                     at::TensorList, int64_t, int64_t, double,
                                                     at::TensorList, int64_t, int64_t, double);
using BackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&, bool,
    at::TensorList, int64_t, int64_t, double, at::TensorList, int64_t, int64_t, double,
    std::array<bool, 5>);

at::Tensor quantized_softmax_by_name(const at::Tensor& scores, const OptionalTensor& mask,
                                     bool causal, std::string_view scores_parameterization,
                                     at::TensorList scores_parameters, int64_t scores_bits,
                                     bool scores_symmetric, bool scores_sigmoid, double scores_eps,
                                     std::string_view probabilities_parameterization,
                                     at::TensorList probabilities_parameters,
                                     int64_t probabilities_bits, bool probabilities_symmetric,
                                     bool probabilities_sigmoid, double probabilities_eps) {
  return quantized_softmax(
      scores, mask, causal,
      {scores_parameterization, scores_parameters, scores_bits, scores_symmetric, scores_sigmoid,
       scores_eps},
      {probabilities_parameterization, probabilities_parameters, probabilities_bits,
       probabilities_symmetric, probabilities_sigmoid, probabilities_eps});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantized_softmax_op(const at::Tensor& scores,
                                                        const OptionalTensor& mask, bool causal,
                                                        const QuantizerArguments& s,
                                                        const QuantizerArguments& p) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_softmax", "")
                             .typed<ForwardOp>();
  return op.call(scores, mask, causal, s.ranges, s.parameterization, s.bits, s.eps, p.ranges,
                 p.parameterization, p.bits, p.eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_op(const at::Tensor& grad, const at::Tensor& scores,
                              const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
                              const QuantizerArguments& s, const QuantizerArguments& p,
                              std::array<bool, 5> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_softmax_backward", "")
                             .typed<BackwardOp>();
  return op.call(grad, scores, statistics, mask, causal, s.ranges, s.parameterization, s.bits,
                 s.eps, p.ranges, p.parameterization, p.bits, p.eps, needs);
}

at::Tensor quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask, bool causal,
                             const RangeArguments& scores_range,
                             const RangeArguments& probabilities_range) {
  constexpr const char* op = "quantized_softmax";
  return std::get<0>(quantized_softmax_op(scores, mask, causal, by_position(op, scores_range),
                                          by_position(op, probabilities_range)));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_softmax", quantized_softmax_by_name);
}

}  // namespace asymq
