// Shapes, dtypes and strides of the quantized GELU's results, for tracing.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace asymq {
namespace {

at::Tensor quantized_gelu_meta(const at::Tensor& x, at::TensorList input_ranges,
                               int64_t input_parameterization, int64_t input_bits, double input_eps,
                               at::TensorList output_ranges, int64_t output_parameterization,
                               int64_t output_bits, double output_eps) {
  check_quantized_gelu(x, {input_ranges, input_parameterization, input_bits, input_eps},
                       {output_ranges, output_parameterization, output_bits, output_eps});
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, at::TensorList input_ranges,
    int64_t input_parameterization, int64_t input_bits, double input_eps,
    at::TensorList output_ranges, int64_t output_parameterization, int64_t output_bits,
    double output_eps, std::array<bool, 5> needs) {
  const QuantizerPair pair =
      check_quantized_gelu(x, {input_ranges, input_parameterization, input_bits, input_eps},
                           {output_ranges, output_parameterization, output_bits, output_eps});
  check_grad("quantized_gelu", "x", grad, x);
  const auto gradients = empty_gradients(pair, needs);
  return {needs[0] ? at::empty_like(x) : at::Tensor(), gradients[0], gradients[1], gradients[2],
          gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_quantized_gelu", quantized_gelu_meta);
  m.impl("_quantized_gelu_backward", quantized_gelu_backward_meta);
}

}  // namespace asymq
