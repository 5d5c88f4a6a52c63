// What the kernels share: storage types, 16-byte accesses, places of elements, sums over threads.
#pragma once

#include <type_traits>

#include "asymq/detail/layout.h"
#include "kernels/plan.h"
#include "kernels/types.h"

namespace asymq::cuda {

/// Elements of one access: 16 bytes, or 1 element.
template <class S, bool kVectorized>
constexpr int kWidth = kVectorized ? 16 / sizeof(S) : 1;

/// Columns of one thread.
template <class S, bool kVectorized>
constexpr int kColumnWidth = kVectorized ? column_width(sizeof(S)) : 1;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class S>
__device__ __forceinline__ S narrow(Compute<S> value) {
  if constexpr (std::is_same_v<S, __half>) {
    return __float2half_rn(value);
  } else if constexpr (std::is_same_v<S, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else {
    return value;
  }
}

__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.0f, x); }
__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

template <class S, int kCount>
struct alignas(sizeof(S) * kCount) Vector {
  S values[kCount];
};

template <int kCount, class S>
__device__ __forceinline__ Vector<S, kCount> load_vector(const S* from) {
  return *reinterpret_cast<const Vector<S, kCount>*>(from);
}

template <int kCount, class S>
__device__ __forceinline__ void store_vector(S* to, const Vector<S, kCount>& vector) {
  *reinterpret_cast<Vector<S, kCount>*>(to) = vector;
}

/// Calls body(grid) with the grid in the form that divides fastest.
template <class T, class Body>
__device__ __forceinline__ void with_fast_division(const Grid<T>& grid, const Body& body) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_reciprocal(grid)) return body(make_reciprocal(grid));
  }
  body(grid);
}

template <class T>
__device__ __forceinline__ Grid<T> shuffle(const Grid<T>& grid, int lane) {
  return {__shfl_sync(~0u, grid.scale, lane), __shfl_sync(~0u, grid.lower, lane),
          __shfl_sync(~0u, grid.upper, lane)};
}

template <class A, class B>
__device__ __forceinline__ void add(Sums<A>& sums, const Sums<B>& terms) {
  sums.inside += terms.inside;
  sums.below += terms.below;
  sums.above += terms.above;
}

template <class T>
__device__ __forceinline__ void add(Sums<T>& sums, const ElementGradient<T>& term) {
  sums.inside = fma(term.x, term.rounding, sums.inside);
  sums.below += term.below;
  sums.above += term.above;
}

/// One grid for all elements of a vector, where others have an array of grids.
template <class G>
struct SameGrid {
  const G& grid;
  __device__ const G& operator[](int) const { return grid; }
};
template <class G>
SameGrid(const G&) -> SameGrid<G>;

/// Calls body(begin, count) for the windows of one piece of a span: this thread's first vector and
/// how many it has, kSpanThreads apart.
template <int kUnroll, class Body>
__device__ __forceinline__ void for_each_window(const Plan& plan, int64_t piece, int64_t vectors,
                                                const Body& body) {
  constexpr int kWindow = kSpanThreads * kUnroll;
  for (int64_t window = piece * kWindow; window < vectors; window += plan.pieces * kWindow) {
    const int64_t begin = window + threadIdx.x;
    const int64_t count = (vectors - begin + kSpanThreads - 1) / kSpanThreads;
    body(begin, static_cast<int>(min(count, int64_t{kUnroll})));
  }
}

/// The grid of one range, made by the first warp for the whole block.
template <class T, class P>
__device__ __forceinline__ Grid<T> make_block_grid(const QuantizerKind& kind,
                                                   const detail::RangePointers<P>& ranges,
                                                   int64_t range) {
  __shared__ Grid<T> grid;
  if (threadIdx.x < kWarp) {
    const Grid<T> made = make_grid<T>(kind, ranges.load(range));
    if (threadIdx.x == 0) grid = made;
  }
  __syncthreads();
  return grid;
}

/// The part of x that a block of a columns kernel works on.
template <class S, int kCount>
struct ColumnTile {
  static constexpr int kColumns = kWarp * kCount;
  int64_t piece, first_column;  // of the block
  int64_t column, row;          // where this thread starts
  int row_count;                // rows that it takes, kColumnGroups apart
  int offset;                   // of its columns in the tile

  __device__ explicit ColumnTile(const Plan& plan) {
    piece = blockIdx.x / plan.tiles;
    first_column = blockIdx.x % plan.tiles * kColumns;
    offset = threadIdx.x % kWarp * kCount;
    column = first_column + offset;
    const int64_t first_row = piece * plan.rows_per_piece;
    row = first_row + threadIdx.x / kWarp;
    const int64_t end_row = min(first_row + plan.rows_per_piece, plan.shape.outer);
    row_count = static_cast<int>((end_row - row + kColumnGroups - 1) / kColumnGroups);
  }

  /// Calls body(i) for the columns of the tile that exist, spread over the block.
  template <class Body>
  __device__ void for_each_column(const Shape& shape, const Body& body) const {
    for (int i = threadIdx.x; i < kColumns && first_column + i < shape.columns(); i += blockDim.x) {
      body(i);
    }
  }

  /// Makes the tile's grids, one per thread, and calls body(grids) with those of this thread's
  /// columns, in the form that divides fastest. All threads of the block must call it.
  template <class P, class Body>
  __device__ void with_grids(const QuantizerKind& kind, const detail::RangePointers<P>& ranges,
                             const Shape& shape, const Body& body) const {
    using T = Compute<S>;
    __shared__ Grid<T> shared[kColumns];
    bool fast = std::is_same_v<T, float>;
    for_each_column(shape, [&](int i) {
      shared[i] = make_grid<T>(kind, ranges.load((first_column + i) / shape.inner));
      if constexpr (std::is_same_v<T, float>) fast = has_reciprocal(shared[i]);
    });
    fast = __syncthreads_and(fast);
    if (column >= shape.columns()) return;
    if constexpr (std::is_same_v<T, float>) {
      if (fast) {
        ReciprocalGrid grids[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) grids[i] = make_reciprocal(shared[offset + i]);
        return body(grids);
      }
    }
    Grid<T> grids[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) grids[i] = shared[offset + i];
    body(grids);
  }
};

/// Sums over `lanes` neighbouring lanes, a power of two; all of them receive the result.
template <class T>
__device__ __forceinline__ Sums<T> sum_lanes(Sums<T> sums, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    add(sums,
        Sums<T>{__shfl_xor_sync(~0u, sums.inside, step), __shfl_xor_sync(~0u, sums.below, step),
                __shfl_xor_sync(~0u, sums.above, step)});
  }
  return sums;
}

/// Sums over a block of kThreads threads; thread 0 receives the result.
template <int kThreads>
__device__ __forceinline__ Sums<double> sum_block(Sums<double> sums) {
  __shared__ Sums<double> of_warps[kThreads / kWarp];
  sums = sum_lanes(sums, kWarp);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = sums;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / kWarp; ++warp) add(sums, of_warps[warp]);
  }
  return sums;
}

/// Offsets, in elements, of one element.
struct Place {
  int64_t x = 0, out = 0, range = 0;
};

/// The place of the element at `index` in the output's memory order.
__device__ __forceinline__ Place place_of(const detail::Layout& layout, int64_t index) {
  Place place{0, index, 0};
  for (int i = layout.ndim - 1; i >= 0; --i) {
    const detail::Dim& dim = layout.dims[i];
    const int64_t at = index % dim.size;
    index /= dim.size;
    place.x += at * dim.x_stride;
    place.range += at * dim.range_stride;
  }
  return place;
}

}  // namespace asymq::cuda
