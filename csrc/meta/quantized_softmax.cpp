// Shapes, dtypes and strides of the quantized softmax's results, for tracing.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace asymq {
namespace {

std::tuple<at::Tensor, at::Tensor> quantized_softmax_meta(
    const at::Tensor& scores, const OptionalTensor& mask, bool, at::TensorList scores_ranges,
    int64_t scores_parameterization, int64_t scores_bits, double scores_eps,
    at::TensorList probabilities_ranges, int64_t probabilities_parameterization,
    int64_t probabilities_bits, double probabilities_eps) {
  check_quantized_softmax(scores, mask,
                          {scores_ranges, scores_parameterization, scores_bits, scores_eps},
                          {probabilities_ranges, probabilities_parameterization, probabilities_bits,
                           probabilities_eps});
  const auto sizes = scores.sym_sizes();
  return {at::empty_symint(sizes, scores.options()),
          at::empty_symint({sizes[0], sizes[1], sizes[2], 2},
                           scores.options().dtype(compute_dtype(scores.scalar_type())))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_meta(const at::Tensor& grad, const at::Tensor& scores, const at::Tensor&,
                                const OptionalTensor& mask, bool, at::TensorList scores_ranges,
                                int64_t scores_parameterization, int64_t scores_bits,
                                double scores_eps, at::TensorList probabilities_ranges,
                                int64_t probabilities_parameterization, int64_t probabilities_bits,
                                double probabilities_eps, std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_softmax(
      scores, mask, {scores_ranges, scores_parameterization, scores_bits, scores_eps},
      {probabilities_ranges, probabilities_parameterization, probabilities_bits,
       probabilities_eps});
  check_grad("quantized_softmax", "scores", grad, scores);
  const auto gradients = empty_gradients(pair, needs);
  return {needs[0] ? at::empty_symint(scores.sym_sizes(), scores.options()) : at::Tensor(),
          gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_quantized_softmax", quantized_softmax_meta);
  m.impl("_quantized_softmax_backward", quantized_softmax_backward_meta);
}

}  // namespace asymq
