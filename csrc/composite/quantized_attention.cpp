// Quantized attention of single operations: what every device runs where it has no kernel of its
// own for it, and what tracing looks at.
#include "ops/quantized_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/quantized_softmax.h"

namespace asymq {
namespace {

/// x of all heads, [batch, heads, m, n], as rows of the key heads, [batch, key heads, rows, n]: one
/// head of `of_keys` serves as many consecutive heads of x as there are, without a copy for each.
at::Tensor by_key_head(const at::Tensor& x, const at::Tensor& of_keys) {
  if (x.sym_size(1) == of_keys.sym_size(1)) return x;
  const auto rows = x.sym_size(1) / of_keys.sym_size(1) * x.sym_size(2);
  return x.reshape_symint({x.sym_size(0), of_keys.sym_size(1), rows, x.sym_size(3)});
}

/// x @ of_keys, of all heads.
at::Tensor multiply_heads(const at::Tensor& x, const at::Tensor& of_keys) {
  return at::matmul(by_key_head(x, of_keys), of_keys)
      .view_symint({x.sym_size(0), x.sym_size(1), x.sym_size(2), of_keys.sym_size(3)});
}

/// aᵀ @ b, summed over the heads that a key head serves.
at::Tensor multiply_summed(const at::Tensor& a, const at::Tensor& b, const at::Tensor& of_keys) {
  return at::matmul(by_key_head(a, of_keys).transpose(-1, -2), by_key_head(b, of_keys));
}

/// With the memory of [batch, tokens, heads, width].
at::Tensor heads_inside(const at::Tensor& x) {
  return x.transpose(1, 2).contiguous().transpose(1, 2);
}

at::Tensor scores_of(const at::Tensor& query, const at::Tensor& key, double scaling) {
  // Scaling the queries spares a pass over the scores.
  return multiply_heads(query * scaling, key.transpose(-1, -2));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantized_attention_composite(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& mask, bool causal, std::optional<int64_t> window, double scaling,
    const QuantizerArguments& of_scores, const QuantizerArguments& of_probabilities) {
  check_quantized_attention(query, key, value, mask, causal, window, of_scores, of_probabilities);
  const auto [probabilities, statistics] = quantized_softmax_op(
      scores_of(query, key, scaling), mask, causal, window, of_scores, of_probabilities);
  return {heads_inside(multiply_heads(probabilities, value)), statistics};
}

AttentionGradientTensors quantized_attention_backward_composite(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, double scaling, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities, std::array<bool, 7> needs) {
  check_quantized_attention_backward(grad, query, key, value, out, mask, causal, window, of_scores,
                                     of_probabilities);
  const at::Tensor scores = scores_of(query, key, scaling);
  AttentionGradientTensors gradients;
  auto& [dquery, dkey, dvalue, scores_first, scores_second, first, second] = gradients;
  if (needs[2]) {
    const at::Tensor probabilities = std::get<0>(
        quantized_softmax_op(scores, mask, causal, window, of_scores, of_probabilities));
    dvalue = heads_inside(multiply_summed(probabilities, grad, value));
  }
  const std::array<bool, 5> of_softmax{needs[0] || needs[1], needs[3], needs[4], needs[5],
                                       needs[6]};
  if (std::none_of(of_softmax.begin(), of_softmax.end(), [](bool need) { return need; })) {
    return gradients;
  }
  at::Tensor dscores;
  std::tie(dscores, scores_first, scores_second, first, second) = quantized_softmax_backward_op(
      multiply_heads(grad, value.transpose(-1, -2)), scores, statistics, mask, causal, window,
      of_scores, of_probabilities, of_softmax);
  if (needs[0]) dquery = heads_inside(multiply_heads(dscores, key) * scaling);
  if (needs[1]) dkey = heads_inside(multiply_summed(dscores, query * scaling, key));
  return gradients;
}

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_attention", flat<quantized_attention_composite>);
  m.impl("_quantized_attention_backward", flat<quantized_attention_backward_composite>);
}

}  // namespace asymq
