// The public function and the calls of its private operators.
#include "ops/quantized_gelu.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "asymq/quantized_gelu.h"

namespace asymq {
namespace {

using ForwardOp = at::Tensor(const at::Tensor&, at::TensorList, int64_t, int64_t, double,
                             at::TensorList, int64_t, int64_t, double);
using BackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, at::TensorList, int64_t, int64_t, double, at::TensorList,
    int64_t, int64_t, double, std::array<bool, 5>);

at::Tensor quantized_gelu_by_name(const at::Tensor& x, std::string_view input_parameterization,
                                  at::TensorList input_parameters, int64_t input_bits,
                                  bool input_symmetric, bool input_sigmoid, double input_eps,
                                  std::string_view output_parameterization,
                                  at::TensorList output_parameters, int64_t output_bits,
                                  bool output_symmetric, bool output_sigmoid, double output_eps) {
  return quantized_gelu(x,
                        {input_parameterization, input_parameters, input_bits, input_symmetric,
                         input_sigmoid, input_eps},
                        {output_parameterization, output_parameters, output_bits, output_symmetric,
                         output_sigmoid, output_eps});
}

}  // namespace

at::Tensor quantized_gelu_op(const at::Tensor& x, const QuantizerArguments& i,
                             const QuantizerArguments& o) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_gelu", "")
                             .typed<ForwardOp>();
  return op.call(x, i.ranges, i.parameterization, i.bits, i.eps, o.ranges, o.parameterization,
                 o.bits, o.eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_op(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& i,
    const QuantizerArguments& o, std::array<bool, 5> needs) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("asymq::_quantized_gelu_backward", "")
                             .typed<BackwardOp>();
  return op.call(grad, x, i.ranges, i.parameterization, i.bits, i.eps, o.ranges, o.parameterization,
                 o.bits, o.eps, needs);
}

at::Tensor quantized_gelu(const at::Tensor& x, const RangeArguments& input_range,
                          const RangeArguments& output_range) {
  constexpr const char* op = "quantized_gelu";
  return quantized_gelu_op(x, by_position(op, input_range), by_position(op, output_range));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_gelu", quantized_gelu_by_name);
}

}  // namespace asymq
