// Softmax between two learnable quantizers, as attention has it, in one kernel each way.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// Quantized probabilities of attention: fake-quantizes the scores, masks them, takes the softmax
/// over the keys, fake-quantizes it, and gives hidden keys the probability 0 (a range whose lower
/// end is positive would lift them above it).
///
/// scores [batch, heads, queries, keys]: float32, float64, bfloat16 or float16. All arithmetic is
/// in float32 (float64 for float64 scores), with one rounding to the scores' dtype at the end.
/// mask: bool (true: the query sees the key) or floating (added to the quantized scores), broadcast
/// against the scores, without gradient. Of a floating one, -1e4 and less, as its dtype has it,
/// hides the key; what is above, such as ALiBi's biases, makes scores.
/// causal: query q sees keys up to q + keys - queries, in addition to the mask; with a window, of
/// those the last `window` alone (sliding attention).
/// A query that sees no key has the probability 0 for all, and no gradient.
///
/// The backward saves the scores and two numbers per row. Gradients are those of the composition:
/// straight-through at both quantizers, for the scores and both ranges' learned parameters.
at::Tensor quantized_softmax(const at::Tensor& scores, const std::optional<at::Tensor>& mask,
                             bool causal, const RangeArguments& scores_range,
                             const RangeArguments& probabilities_range,
                             std::optional<int64_t> window = std::nullopt);

}  // namespace asymq

#pragma GCC visibility pop
