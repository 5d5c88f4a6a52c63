// Quantized softmax: which keys a query sees, shared by CPU and CUDA. No torch in here.
#pragma once

#include <cstdint>

#include "asymq/quant_math.h"

namespace asymq::detail {

/// Scores and probabilities of attention: [batch, heads, queries, keys], contiguous, with less than
/// 2^31 keys.
struct AttentionShape {
  int64_t batch, heads, queries, keys;

  ASYMQ_HOST_DEVICE int64_t rows() const { return batch * heads * queries; }
};

/// The keys that one query sees.
template <class T>
struct MaskRow {
  int begin, end;       ///< it sees keys from begin to end - 1 alone
  const bool* visible;  ///< null: all of them
  const T* added;       ///< to the quantized scores; null: nothing
  int64_t stride;       ///< of either, from key to key
  T hides;

  ASYMQ_HOST_DEVICE bool sees(int key) const {
    if (key < begin || key >= end) return false;
    if (visible != nullptr) return visible[key * stride];
    return added == nullptr || !(added[key * stride] <= hides);
  }

  /// What the softmax takes instead of the quantized score of a key that is seen.
  ASYMQ_HOST_DEVICE T apply(T quantized, int key) const {
    return added == nullptr ? quantized : quantized + added[key * stride];
  }
};

/// Which keys every query sees. T is the type the softmax computes in.
template <class T>
struct AttentionMask {
  bool causal;          ///< query q sees keys up to q + keys - queries alone
  int64_t window;       ///< of those the last `window`; 0: all
  const bool* visible;  ///< whether a key is seen; null: it is
  const T* added;       ///< added to the quantized scores; null: nothing
  T hides;              ///< what is added hides the key at this value and below: -1e4 or close
  int64_t strides[4];   ///< of either, along the axes of AttentionShape

  ASYMQ_HOST_DEVICE MaskRow<T> row(const AttentionShape& shape, int64_t index) const {
    const int64_t query = index % shape.queries;
    const int64_t offset = index / shape.queries / shape.heads * strides[0] +
                           index / shape.queries % shape.heads * strides[1] + query * strides[2];
    int64_t begin = 0, end = shape.keys;
    if (causal) {
      end = query + shape.keys - shape.queries + 1;
      end = end < 0 ? 0 : end;
      if (window > 0 && end > window) begin = end - window;
    }
    return {static_cast<int>(begin),
            static_cast<int>(end),
            visible == nullptr ? nullptr : visible + offset,
            added == nullptr ? nullptr : added + offset,
            strides[3],
            hides};
  }
};

/// The larger of a, a number, and b. A NaN b is passed over: it shows in the sum of exponentials.
template <class T>
ASYMQ_HOST_DEVICE T larger(T a, T b) {
#ifdef __CUDA_ARCH__
  return fmax(a, b);
#else
  return b > a ? b : a;
#endif
}

/// Gradient of a softmax's input (eq. p·(g - Σ g·p)) from that of its output.
template <class T>
ASYMQ_HOST_DEVICE T softmax_gradient(T probability, T grad, T dot) {
  return probability * (grad - dot);
}

}  // namespace asymq::detail
