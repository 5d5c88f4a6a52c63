// Kullback-Leibler divergence of logits that a learnable quantizer rounds from a teacher's, on CUDA
// in one kernel each way.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// The loss of distillation of every row (Hinton et al. 2015), with p = softmax(teacher_logits / T)
/// and q = softmax(fake_quantize(logits) / T): T² · Σ p · (log p - log q), and 0 where the label is
/// ignore_index.
///
/// logits, teacher_logits [tokens, classes]: float32, float64, bfloat16 or float16, both alike, at
/// least one class; the teacher's must not require grad. labels [tokens]: int64; without them all
/// rows count, and no other label than ignore_index means anything. temperature: T, positive.
/// Returns [tokens] in float32 (float64 for float64 logits), which is also what all arithmetic is
/// in.
///
/// classes: where there are fewer than columns of the logits, the rest makes rows start aligned: it
/// counts for nothing, and its gradient is 0. The teacher's have no such columns.
///
/// The backward saves both logits and four numbers per row. Gradients are those of the composition,
/// T · (q - p) straight-through for the logits, and for the range's learned parameters.
at::Tensor quantized_kl_div(const at::Tensor& logits, const at::Tensor& teacher_logits,
                            const RangeArguments& range,
                            const std::optional<at::Tensor>& labels = std::nullopt,
                            double temperature = 1, int64_t ignore_index = -100,
                            std::optional<int64_t> classes = std::nullopt);

}  // namespace asymq

#pragma GCC visibility pop
