#include "ops/quantized_attention.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "asymq/quantized_attention.h"
#include "ops/checks.h"
#include "ops/quantized_softmax.h"

namespace asymq {
namespace {

constexpr const char* kAttention = "quantized_attention";

void check_heads(const char* name, const at::Tensor& heads, const at::Tensor& query) {
  constexpr Where where{kAttention};
  TORCH_CHECK(heads.dim() == 4, where, ": ", name,
              " must have 4 dimensions, [batch, heads, tokens, width], got shape ",
              heads.sym_sizes());
  check_elements(where, name, heads);
  TORCH_CHECK(heads.scalar_type() == query.scalar_type() && heads.device() == query.device(), where,
              ": ", name, " must have the query's dtype and device, ", query.scalar_type(), " on ",
              query.device(), ", got ", heads.scalar_type(), " on ", heads.device());
}

void check_shapes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  constexpr Where where{kAttention};
  check_heads("query", query, query);
  check_heads("key", key, query);
  check_heads("value", value, query);
  TORCH_CHECK(key.sym_size(0) == query.sym_size(0) && key.sym_size(3) == query.sym_size(3), where,
              ": key must have the query's batch and width, those of ", query.sym_sizes(),
              ", got shape ", key.sym_sizes());
  TORCH_CHECK(key.sym_size(1) > 0 && query.sym_size(1) % key.sym_size(1) == 0, where,
              ": the query's heads must be a multiple of the key's, got ", query.sym_size(1),
              " and ", key.sym_size(1));
  for (int axis = 0; axis < 3; ++axis) {
    TORCH_CHECK(value.sym_size(axis) == key.sym_size(axis), where,
                ": value must have the key's batch, heads and tokens, those of ", key.sym_sizes(),
                ", got shape ", value.sym_sizes());
  }
}

}  // namespace

QuantizerPair check_quantized_attention(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const OptionalTensor& mask,
                                        bool causal, std::optional<int64_t> window,
                                        const QuantizerArguments& of_scores,
                                        const QuantizerArguments& of_probabilities) {
  check_shapes(query, key, value);
  const c10::SymInt scores[] = {query.sym_size(0), query.sym_size(1), query.sym_size(2),
                                key.sym_size(2)};
  check_sight(kAttention, scores, query.device(), mask, causal, window);
  return check_quantizers(kAttention, "query", query, "scores' ", of_scores, "probabilities' ",
                          of_probabilities);
}

QuantizerPair check_quantized_attention_backward(const at::Tensor& grad, const at::Tensor& query,
                                                 const at::Tensor& key, const at::Tensor& value,
                                                 const at::Tensor& out, const OptionalTensor& mask,
                                                 bool causal, std::optional<int64_t> window,
                                                 const QuantizerArguments& of_scores,
                                                 const QuantizerArguments& of_probabilities) {
  check_grad({kAttention}, "the result", grad, out);
  return check_quantized_attention(query, key, value, mask, causal, window, of_scores,
                                   of_probabilities);
}

at::Tensor quantized_attention(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const OptionalTensor& mask, bool causal,
                               double scaling, const RangeArguments& scores_range,
                               const RangeArguments& probabilities_range,
                               std::optional<int64_t> window) {
  return std::get<0>(quantized_attention_op(query, key, value, mask, causal, window, scaling,
                                            by_position(kAttention, scores_range),
                                            by_position(kAttention, probabilities_range)));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_attention", flat<quantized_attention>);
}

}  // namespace asymq
