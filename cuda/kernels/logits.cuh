// What losses over rows of logits share: a block takes a row, however it is aligned, and sums
// exponentials while it reads.
#pragma once

#include "asymq/detail/softmax.h"
#include "kernels/device.cuh"

namespace asymq::cuda {

constexpr int kLossThreads = 512;
constexpr int kLossBlocks =
    2;  // resident blocks per multiprocessor that registers are allotted for

/// Calls visit(offset, pieces) for this thread's share of a row, `pieces` vectors at a time, a
/// compile-time constant of kUnroll or 1, kLossThreads apart from `offset` on; and
/// visit_one(offset) for elements that no 16-byte access reaches: rows start where they will.
/// vectorized: whether any does.
template <int kCount, int kUnroll, class S, class Visit, class VisitOne>
__device__ __forceinline__ void for_each_piece(const S* row, int classes, bool vectorized,
                                               const Visit& visit, const VisitOne& visit_one) {
  const auto misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(S));
  const int head = vectorized ? min((kCount - misaligned) % kCount, classes) : classes;
  const int vectors = (classes - head) / kCount;
  int vector = threadIdx.x;
  for (; vector + (kUnroll - 1) * kLossThreads < vectors; vector += kUnroll * kLossThreads) {
    visit(head + vector * kCount, std::integral_constant<int, kUnroll>{});
  }
  for (; vector < vectors; vector += kLossThreads) {
    visit(head + vector * kCount, std::integral_constant<int, 1>{});
  }
  for (int i = threadIdx.x; i < classes - vectors * kCount; i += kLossThreads) {
    visit_one(i < head ? i : i + vectors * kCount);
  }
}

/// A vector from anywhere: rows of two tensors may be aligned differently.
template <int kCount, class S>
__device__ __forceinline__ Vector<S, kCount> load_unaligned(const S* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Vector<S, kCount>) == 0) {
    return load_vector<kCount>(from);
  }
  Vector<S, kCount> vector;
#pragma unroll
  for (int i = 0; i < kCount; ++i) vector.values[i] = from[i];
  return vector;
}

/// Zeros behind a row's classes.
template <class S>
__device__ __forceinline__ void clear_padding(S* row, int classes, int columns) {
  for (int i = classes + threadIdx.x; i < columns; i += kLossThreads) row[i] = narrow<S>(0.0f);
}

/// Running largest value and sum of e^(value - largest).
template <class T>
struct SumOfExponentials {
  T largest = -INFINITY;
  T sum = 0;

  template <int kCount>
  __device__ __forceinline__ void add(const T (&values)[kCount]) {
    T most = largest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = detail::larger(most, values[i]);
    rescale(most);
#pragma unroll
    for (int i = 0; i < kCount; ++i) sum += exp(values[i] - most);
  }

  __device__ __forceinline__ void add(SumOfExponentials other) {
    const T most = detail::larger(largest, other.largest);
    rescale(most);
    other.rescale(most);
    sum += other.sum;
  }

  __device__ __forceinline__ SumOfExponentials shuffled(int step) const {
    SumOfExponentials other;
    other.largest = __shfl_xor_sync(~0u, largest, step);
    other.sum = __shfl_xor_sync(~0u, sum, step);
    return other;
  }

 private:
  __device__ __forceinline__ void rescale(T most) {
    // The comparison spares most of the exponentials, and -inf - -inf.
    if (most != largest) sum *= exp(largest - most);
    largest = most;
  }
};

/// A thread's sums over a row: in T for as many vectors as float sums may take, then in double.
template <class T>
struct RowSums {
  Sums<double> total{};
  Sums<T> partial{};
  int vectors = 0;

  /// Of `pieces` more vectors all terms are in `partial`.
  __device__ __forceinline__ void end_of(int pieces) {
    vectors += pieces;
    if (vectors >= kVectorsPerSum) flush();
  }

  __device__ __forceinline__ void flush() {
    add(total, partial);
    partial = {};
    vectors = 0;
  }
};

/// Of the whole block's; thread 0 receives the result.
template <class State>
__device__ __forceinline__ State reduce_block(State state) {
  __shared__ State of_warps[kLossThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) state.add(state.shuffled(step));
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = state;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kLossThreads / kWarp; ++warp) state.add(of_warps[warp]);
  }
  return state;
}

}  // namespace asymq::cuda
