// Runs of contiguous elements cut into blocks that pass through buffers of the compute type.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/common.h"
#include "cpu/vector_loops.h"

namespace asymq::cpu {

constexpr int64_t kBlock = 512;
static_assert(kBlock <= kMaxRun);

/// loop(x, out, first, n) over blocks of contiguous elements, in the compute type.
template <class S, class Loop>
void forward_blocks(const S* x, S* out, int64_t n, const Loop& loop) {
  if constexpr (std::is_same_v<S, Compute<S>>) {
    loop(x, out, 0, n);
  } else {
    float buffer[kBlock];
    for (int64_t first = 0; first < n; first += kBlock) {
      const int64_t size = std::min(kBlock, n - first);
      widen(x + first, buffer, size);
      loop(buffer, buffer, first, size);
      narrow(buffer, out + first, size);
    }
  }
}

/// loop(grad, x, dx, first, n) over blocks of contiguous elements, in the compute type.
template <class S, class Loop>
void backward_blocks(const S* grad, const S* x, S* dx, int64_t n, const Loop& loop) {
  for (int64_t first = 0; first < n; first += kBlock) {
    const int64_t size = std::min(kBlock, n - first);
    if constexpr (std::is_same_v<S, Compute<S>>) {
      loop(grad + first, x + first, dx ? dx + first : nullptr, first, size);
    } else {
      float grad_buffer[kBlock], x_buffer[kBlock];
      widen(grad + first, grad_buffer, size);
      widen(x + first, x_buffer, size);
      loop(grad_buffer, x_buffer, dx ? x_buffer : nullptr, first, size);
      if (dx) narrow(x_buffer, dx + first, size);
    }
  }
}

}  // namespace asymq::cpu
