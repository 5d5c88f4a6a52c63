// Shapes, dtypes and strides of the quantized GELU's results, for tracing.
#include "ops/quantized_gelu.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/gradients.h"

namespace asymq {
namespace {

at::Tensor quantized_gelu_meta(const at::Tensor& x, const QuantizerArguments& input,
                               const QuantizerArguments& output) {
  check_quantized_gelu(x, input, output);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& input,
    const QuantizerArguments& output, std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_gelu_backward(grad, x, input, output);
  const auto gradients = empty_gradients(pair, needs);
  return {needs[0] ? at::empty_like(x) : at::Tensor(), gradients[0], gradients[1], gradients[2],
          gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_quantized_gelu", flat<quantized_gelu_meta>);
  m.impl("_quantized_gelu_backward", flat<quantized_gelu_backward_meta>);
}

}  // namespace asymq
