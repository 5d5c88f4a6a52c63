// Rows that stay on chip with a team of threads, and the quantizer at their end, whose range may be
// that of the row itself.
#pragma once

#include "asymq/live_range.h"
#include "kernels/quantizer.h"
#include "kernels/range_gradients.cuh"
#include "kernels/words.cuh"

namespace asymq::cuda {

/// The threads that share a row. All threads of a block call the reductions together, also those
/// that have no row.
class Team {
 public:
  __device__ __forceinline__ explicit Team(const RowPlan& plan) : size_(plan.team) {}

  __device__ __forceinline__ int rank() const { return threadIdx.x % size_; }
  __device__ __forceinline__ int index() const { return threadIdx.x / size_; }

  template <class T>
  __device__ __forceinline__ T sum(T value) {
    for (int step = lanes() / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(~0u, value, step);
    }
    if (size_ <= kWarp) return value;
    value = share(value, T(0));
    for (int step = kMostWarps / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(~0u, value, step);
    }
    return value;
  }

  template <class T>
  __device__ __forceinline__ Extrema<T> extrema(Extrema<T> value) {
    value = over_lanes(value, lanes());
    return size_ <= kWarp ? value : over_lanes(share(value, no_extrema<T>()), kMostWarps);
  }

 private:
  static constexpr int kMostWarps = kTeamThreads / kWarp;
  int size_, turn_ = 0;

  __device__ __forceinline__ int lanes() const { return min(size_, kWarp); }

  /// What each warp has, one to each of as many lanes; `neutral` where there is no warp. The lanes
  /// beyond kMostWarps have what those before them have.
  template <class T>
  __device__ __forceinline__ T share(const T& value, const T& neutral) {
    // Two turns: whoever writes has passed the barrier behind which the others read the last but
    // one.
    __shared__ T of_warps[2][kMostWarps];
    T* shared = of_warps[turn_];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    const int warp = threadIdx.x % kMostWarps;
    return warp < size_ / kWarp ? shared[warp] : neutral;
  }
};

/// Rounded to the elements' type and back, as an operation that stores its result rounds.
template <class S>
__device__ __forceinline__ Compute<S> rounded(Compute<S> value) {
  return widen(narrow<S>(value));
}

/// A vector of body(i, element i of each of `words`...).
template <class S, class Body, class... W>
__device__ __forceinline__ Words<S, true> map_words(const Body& body, const W&... words) {
  Words<S, true> result;
#pragma unroll
  for (int i = 0; i < sizeof(result.values) / sizeof(result.values[0]); ++i) {
    if constexpr (kPaired<S, true>) {
      const float low = body(2 * i, widen_pair<S>(words.values[i]).x...);
      const float high = body(2 * i + 1, widen_pair<S>(words.values[i]).y...);
      result.values[i] = narrow_pair<S>({low, high});
    } else {
      result.values[i] = narrow<S>(body(i, widen(words.values[i])...));
    }
  }
  return result;
}

template <class T>
struct Two {
  T first, second;
};

/// Vectors of both numbers that body(element of each of `words`...) gives.
template <class S, class Body, class... W>
__device__ __forceinline__ void map_words_to(Words<S, true>& first, Words<S, true>& second,
                                             const Body& body, const W&... words) {
#pragma unroll
  for (int i = 0; i < sizeof(first.values) / sizeof(first.values[0]); ++i) {
    if constexpr (kPaired<S, true>) {
      const Two<float> low = body(widen_pair<S>(words.values[i]).x...);
      const Two<float> high = body(widen_pair<S>(words.values[i]).y...);
      first.values[i] = narrow_pair<S>({low.first, high.first});
      second.values[i] = narrow_pair<S>({low.second, high.second});
    } else {
      const Two<Compute<S>> both = body(widen(words.values[i])...);
      first.values[i] = narrow<S>(both.first);
      second.values[i] = narrow<S>(both.second);
    }
  }
}

/// Calls body(i, element i of each of `words`...).
template <class S, class Body, class... W>
__device__ __forceinline__ void visit_words(const Body& body, const W&... words) {
#pragma unroll
  for (int i = 0; i < sizeof(Words<S, true>) / sizeof(Word<S, true>); ++i) {
    if constexpr (kPaired<S, true>) {
      body(2 * i, widen_pair<S>(words.values[i]).x...);
      body(2 * i + 1, widen_pair<S>(words.values[i]).y...);
    } else {
      body(i, widen(words.values[i])...);
    }
  }
}

/// The quantizer at the end of rows, as one thread has it, and what its elements add to the
/// gradients: of a token's range, those of the applied factors in the first two sums.
template <class T, class P>
class RowRange {
 public:
  __device__ __forceinline__ explicit RowRange(const RowQuantizer<P>& quantizer)
      : quantizer_(quantizer) {
    if (quantizer.ends == Ends::kNone) return;
    const Range<P> range = quantizer.ranges.load(0);
    if (of_token()) {
      factors_ = apply_factors(quantizer.kind, range.first, range.second);
    } else {
      grid_ = make_grid<T>(quantizer.kind, range);
    }
  }

  __device__ __forceinline__ bool exists() const { return quantizer_.ends != Ends::kNone; }
  __device__ __forceinline__ bool of_token() const { return quantizer_.ends == Ends::kToken; }
  __device__ __forceinline__ const Grid<T>& grid() const { return grid_; }

  /// Of a token: what it is on a row with these extrema.
  __device__ __forceinline__ void find(const Extrema<T>& extrema) {
    ends_ = live_ends<P>(quantizer_.kind, true, extrema);
    effective_ = live_scale_offset(quantizer_.kind, factors_, ends_);
    grid_ = make_grid<T>(quantizer_.kind, effective_);
  }

  /// Adds a row's sums.
  __device__ __forceinline__ void add_row(const Sums<T>& sums) {
    if (!quantizer_.learns()) return;
    const Sums<double> wide{static_cast<double>(sums.inside), static_cast<double>(sums.below),
                            static_cast<double>(sums.above)};
    if (!of_token()) return add(total_, wide);
    const auto gradient = live_gradient(
        quantizer_.kind, {static_cast<double>(ends_.min), static_cast<double>(ends_.max)},
        make_grid_point<T>(quantizer_.kind, effective_), wide);
    total_.inside += gradient.first;
    total_.below += gradient.second;
  }

  __device__ __forceinline__ const Sums<double>& total() const { return total_; }

 private:
  const RowQuantizer<P>& quantizer_;
  Factors<P> factors_{};
  Extrema<P> ends_{};
  ScaleOffset<P> effective_{};
  Grid<T> grid_{};
  Sums<double> total_{};
};

/// Calls store(function) with what quantizes a vector; without a quantizer it returns the vector.
template <class S, class T, class P, class Store>
__device__ __forceinline__ void with_quantizer(const RowRange<T, P>& range, const Store& store) {
  if (!range.exists()) return store([](const Words<S, true>& words) { return words; });
  with_fast_division(range.grid(), [&](const auto& grid) {
    store([&](const Words<S, true>& words) {
      return map_words<S>([&](int, T value) { return fake_quantize_element(value, grid); }, words);
    });
  });
}

/// The block's part of a quantizer's sums, from those of its threads, to partials[block].
__device__ __forceinline__ void store_row_sums(const Sums<double>& of_thread,
                                               Sums<double>* partials) {
  __shared__ Sums<double> of_warps[kTeamThreads / kWarp];
  __syncthreads();
  const auto sums = sum_lanes(of_thread, kWarp);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x != 0) return;
  auto total = sums;
  for (int warp = 1; warp < blockDim.x / kWarp; ++warp) add(total, of_warps[warp]);
  partials[blockIdx.x] = total;
}

/// The gradients of a quantizer from the sums of all blocks, by a block of kFinishThreads.
template <class T, class P>
__device__ __forceinline__ void finish_row_sums(const RowQuantizer<P>& quantizer,
                                                const Sums<double>* partials, int64_t blocks) {
  Sums<double> sums{};
  for (int64_t i = threadIdx.x; i < blocks; i += kFinishThreads) add(sums, partials[i]);
  sums = sum_block<kFinishThreads>(sums);
  if (threadIdx.x != 0) return;
  const QuantizerKind& kind = quantizer.kind;
  const Range<P> range = quantizer.ranges.load(0);
  RangeGradient gradient;
  if (quantizer.ends == Ends::kToken) {
    gradient = {learned_gradient(kind, range.first, sums.inside),
                learned_gradient(kind, range.second, sums.below)};
  } else {
    gradient = range_gradient(kind, make_gradient_map<T>(kind, range), sums);
  }
  if (quantizer.first != nullptr) *quantizer.first = static_cast<P>(gradient.first);
  if (quantizer.second != nullptr) *quantizer.second = static_cast<P>(gradient.second);
}

}  // namespace asymq::cuda
