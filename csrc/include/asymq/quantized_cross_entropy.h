// Cross-entropy over logits that a learnable quantizer rounds, on CUDA in one kernel each way.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// The loss of every row: -log softmax(fake_quantize(logits))[label], and 0 where the label is
/// ignore_index. Their mean over the other rows is what torch's cross_entropy calls "mean".
///
/// logits [tokens, classes]: float32, float64, bfloat16 or float16, at least one class. labels
/// [tokens]: int64. Returns [tokens] in float32 (float64 for float64 logits), which is also what
/// all arithmetic is in. A label that is neither a class nor ignore_index is an error on the CPU;
/// on CUDA, which would have to wait for it, its row's loss and gradients are NaN.
///
/// classes: where there are fewer than columns, the rest makes rows start aligned: it counts for
/// nothing, and its gradient is 0.
///
/// The backward saves the logits and two numbers per row. Gradients are those of the composition,
/// for the logits and the range's learned parameters.
at::Tensor quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                   const RangeArguments& range, int64_t ignore_index = -100,
                                   std::optional<int64_t> classes = std::nullopt);

}  // namespace asymq

#pragma GCC visibility pop
