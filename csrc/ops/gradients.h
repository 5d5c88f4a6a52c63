// Where the gradients of ranges go.
#pragma once

#include <ATen/Functions.h>

#include <array>

#include "ops/quantizer.h"

namespace asymq {

/// Tensors for the gradients of a pair's learned parameters, first and second of the one before,
/// then of the one after; undefined where they are not wanted. needs: of the pair's operator, which
/// asks for its tensor's gradient first.
inline std::array<at::Tensor, 4> empty_gradients(const QuantizerPair& pair,
                                                 const std::array<bool, 5>& needs) {
  std::array<at::Tensor, 4> gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::Tensor& range = (i < 2 ? pair.before : pair.after).ranges.first;
    if (needs[1 + i]) gradients[i] = at::empty_symint(range.sym_sizes(), range.options());
  }
  return gradients;
}

}  // namespace asymq
