// Shapes, dtypes and strides of the quantized softmax's results, for tracing.
#include "ops/quantized_softmax.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/gradients.h"

namespace asymq {
namespace {

std::tuple<at::Tensor, at::Tensor> quantized_softmax_meta(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities) {
  check_quantized_softmax(scores, mask, causal, window, of_scores, of_probabilities);
  const auto sizes = scores.sym_sizes();
  return {at::empty_symint(sizes, scores.options()),
          at::empty_symint({sizes[0], sizes[1], sizes[2], 2},
                           scores.options().dtype(compute_dtype(scores.scalar_type())))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_meta(const at::Tensor& grad, const at::Tensor& scores, const at::Tensor&,
                                const OptionalTensor& mask, bool causal,
                                std::optional<int64_t> window, const QuantizerArguments& of_scores,
                                const QuantizerArguments& of_probabilities,
                                std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_softmax_backward(grad, scores, mask, causal, window,
                                                              of_scores, of_probabilities);
  const auto gradients = empty_gradients(pair, needs);
  return {needs[0] ? at::empty_symint(scores.sym_sizes(), scores.options()) : at::Tensor(),
          gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_quantized_softmax", flat<quantized_softmax_meta>);
  m.impl("_quantized_softmax_backward", flat<quantized_softmax_backward_meta>);
}

}  // namespace asymq
