// Attention between two learnable quantizers, of the scores and of the probabilities.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// probabilities · value, where the probabilities are `quantized_softmax` of the scores
/// scaling · query · keyᵀ: mask, causal and window are its own.
///
/// query [batch, heads, queries, width], key [batch, key heads, keys, width], value [batch, key
/// heads, keys, value width]: of one dtype, float32, float64, bfloat16 or float16; a key head
/// serves heads / key heads consecutive ones. The result [batch, heads, queries, value width] has
/// the memory of [batch, queries, heads, value width], as layers behind it take the heads side by
/// side.
///
/// On CUDA of compute capability 8.0 and later, neither scores nor probabilities come to memory,
/// forward or backward, of bfloat16, float16, and float32 where torch allows TF32 in products,
/// with heads of up to 128 elements whose rows are multiples of 16 bytes. Scores are then not
/// rounded to the dtype, and probabilities once. Elsewhere both do, one after the other.
///
/// The backward saves query, key, value, the result and two numbers per query. Gradients are those
/// of the composition: straight-through at both quantizers, for query, key, value and both ranges'
/// learned parameters, equal from run to run.
at::Tensor quantized_attention(const at::Tensor& query, const at::Tensor& key,
                               const at::Tensor& value, const std::optional<at::Tensor>& mask,
                               bool causal, double scaling, const RangeArguments& scores_range,
                               const RangeArguments& probabilities_range,
                               std::optional<int64_t> window = std::nullopt);

}  // namespace asymq

#pragma GCC visibility pop
