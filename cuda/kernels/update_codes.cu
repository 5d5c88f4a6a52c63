// update_codes_: one pass over x and codes, cut as fake-quantize's forward. A vector of codes is
// written where one of them changed. Codes of more than 8 bits go element by element.
#include "kernels/device.cuh"
#include "kernels/update_codes.h"

namespace asymq::cuda {
namespace {

using detail::Layout;
using detail::RangePointers;

// Counts are integers: their sum is the same in any order.
using Count = unsigned long long;

template <class Code, class S, class G>
__device__ __forceinline__ Code code_of(S x, const G& grid, const CodeRange<Compute<S>>& limits) {
  return static_cast<Code>(
      static_cast<int>(quantize_element(widen(x), grid, limits.first, limits.last)));
}

/// `count` vectors, kInFlight at a time, the rest with fewer. Element i of each is on grids[i].
/// Returns how many codes changed.
template <int kCount, int kInFlight, class S, class Code, class Grids>
__device__ __forceinline__ int update_vectors(const S* x, Code* codes, int count, int64_t x_stride,
                                              int64_t code_stride, const Grids& grids,
                                              const CodeRange<Compute<S>>& limits) {
  int changed = 0;
  for (; count >= kInFlight; count -= kInFlight) {
    Vector<S, kCount> values[kInFlight];
    Vector<Code, kCount> before[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      values[u] = load_vector<kCount>(x + u * x_stride);
      before[u] = load_vector<kCount>(codes + u * code_stride);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      Vector<Code, kCount> now;
      int differing = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        now.values[i] = code_of<Code>(values[u].values[i], grids[i], limits);
        differing += now.values[i] != before[u].values[i];
      }
      if (differing != 0) store_vector(codes + u * code_stride, now);
      changed += differing;
    }
    x += kInFlight * x_stride;
    codes += kInFlight * code_stride;
  }
  if constexpr (kInFlight > 1) {
    changed += update_vectors<kCount, kInFlight / 2>(x, codes, count, x_stride, code_stride, grids,
                                                     limits);
  }
  return changed;
}

/// Adds up what the threads of a block count. All of them must call it, once.
template <int kThreads>
__device__ __forceinline__ void add_up(int changed, Count* total) {
  __shared__ int of_warps[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) {
    changed += __shfl_xor_sync(~0u, changed, step);
  }
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = changed;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kThreads / kWarp; ++warp) changed += of_warps[warp];
  if (changed != 0) atomicAdd(total, static_cast<Count>(changed));
}

// A warp takes up to 32 rows. Lane i makes the grid of the warp's row i, then 32 / lanes rows at a
// time are read by `lanes` lanes each.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kRowThreads)
    update_warp_rows(Plan plan, QuantizerKind kind, RangePointers<P> ranges,
                     const S* __restrict__ x, uint8_t* __restrict__ codes, Count* total) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, kVectorized>;
  const CodeRange<T> limits = code_range<T>(kind);
  const Shape& shape = plan.shape;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = blockIdx.x * int64_t{kRowThreads / kWarp} + threadIdx.x / kWarp;
  const int64_t first = warp * plan.rows_per_warp;
  const int rows = static_cast<int>(min(plan.rows_per_warp, shape.rows() - first));

  Grid<T> mine{};
  if (lane < rows) mine = make_grid<T>(kind, ranges.load(shape.channel(first + lane)));
  const int sublane = lane % plan.lanes;
  const int vectors = static_cast<int>(shape.inner) / kCount;
  const int count = (vectors - sublane + plan.lanes - 1) / plan.lanes;
  int changed = 0;
  for (int base = 0; base < rows; base += kWarp / plan.lanes) {
    const int row = base + lane / plan.lanes;
    const auto grid = shuffle(mine, row);
    if (row >= rows) continue;
    with_fast_division(grid, [&](const auto& fast) {
      const int stride = plan.lanes * kCount;
      changed +=
          update_vectors<kCount, kUnroll>(x + shape.x_offset(first + row) + sublane * kCount,
                                          codes + (first + row) * shape.inner + sublane * kCount,
                                          count, stride, stride, SameGrid{fast}, limits);
    });
  }
  add_up<kRowThreads>(changed, total);
}

// A block takes windows of one row, `pieces` windows apart.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kSpanThreads)
    update_spans(Plan plan, QuantizerKind kind, RangePointers<P> ranges, const S* __restrict__ x,
                 uint8_t* __restrict__ codes, Count* total) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, kVectorized>;
  const CodeRange<T> limits = code_range<T>(kind);
  const Shape& shape = plan.shape;
  const int64_t row = blockIdx.x / plan.pieces;
  const int64_t piece = blockIdx.x % plan.pieces;
  const int64_t vectors = shape.inner / kCount;
  x += shape.x_offset(row);
  codes += row * shape.inner;
  const auto grid = make_block_grid<T>(kind, ranges, shape.channel(row));
  int changed = 0;
  with_fast_division(grid, [&](const auto& fast) {
    constexpr int kStride = kSpanThreads * kCount;
    for_each_window<kUnroll>(plan, piece, vectors, [&](int64_t begin, int count) {
      changed += update_vectors<kCount, kUnroll>(x + begin * kCount, codes + begin * kCount, count,
                                                 kStride, kStride, SameGrid{fast}, limits);
    });
    const int64_t tail = vectors * kCount + threadIdx.x;
    if (piece == 0 && tail < shape.inner) {
      changed += update_vectors<1, 1>(x + tail, codes + tail, 1, 1, 1, SameGrid{fast}, limits);
    }
  });
  add_up<kSpanThreads>(changed, total);
}

// A thread owns kCount columns of a chunk of rows; the block makes its columns' grids together.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kColumnThreads)
    update_columns(Plan plan, QuantizerKind kind, RangePointers<P> ranges, const S* __restrict__ x,
                   uint8_t* __restrict__ codes, Count* total) {
  using T = Compute<S>;
  constexpr int kCount = kColumnWidth<S, kVectorized>;
  const CodeRange<T> limits = code_range<T>(kind);
  const ColumnTile<S, kCount> tile(plan);
  const Shape& shape = plan.shape;
  int changed = 0;
  tile.with_grids(kind, ranges, shape, [&](const auto* grids) {
    changed = update_vectors<kCount, kUnroll>(x + tile.row * shape.x_outer_stride + tile.column,
                                              codes + tile.row * shape.columns() + tile.column,
                                              tile.row_count, kColumnGroups * shape.x_outer_stride,
                                              kColumnGroups * shape.columns(), grids, limits);
  });
  add_up<kColumnThreads>(changed, total);
}

template <class S, class P, class Code>
__global__ void __launch_bounds__(kGenericThreads)
    update_generic(Layout layout, QuantizerKind kind, RangePointers<P> ranges,
                   const S* __restrict__ x, Code* __restrict__ codes, Count* total) {
  using T = Compute<S>;
  const CodeRange<T> limits = code_range<T>(kind);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int changed = 0;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < layout.numel; i += stride) {
    const Place place = place_of(layout, i);
    const auto grid = make_grid<T>(kind, ranges.load(place.range));
    changed +=
        update_vectors<1, 1>(x + place.x, codes + place.out, 1, 1, 1, SameGrid{grid}, limits);
  }
  add_up<kGenericThreads>(changed, total);
}

template <bool kVectorized, class S, class P>
void launch_shaped(const Plan& plan, const QuantizerKind& kind, const RangePointers<P>& ranges,
                   const S* x, uint8_t* codes, Count* total, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (plan.path == Path::kWarpRows) {
    update_warp_rows<kVectorized>
        <<<blocks, kRowThreads, 0, stream>>>(plan, kind, ranges, x, codes, total);
  } else if (plan.path == Path::kSpans) {
    update_spans<kVectorized>
        <<<blocks, kSpanThreads, 0, stream>>>(plan, kind, ranges, x, codes, total);
  } else {
    update_columns<kVectorized>
        <<<blocks, kColumnThreads, 0, stream>>>(plan, kind, ranges, x, codes, total);
  }
}

}  // namespace

template <class S, class P, class Code>
void launch_update_codes(const Plan& plan, const Layout& layout, const QuantizerKind& kind,
                         const RangePointers<P>& ranges, const S* x, Code* codes, int64_t* changed,
                         cudaStream_t stream) {
  auto* total = reinterpret_cast<Count*>(changed);
  cudaMemsetAsync(total, 0, sizeof(Count), stream);
  if constexpr (sizeof(Code) == 1) {
    if (plan.path != Path::kGeneric) {
      if (plan.vectorized) {
        launch_shaped<true>(plan, kind, ranges, x, codes, total, stream);
      } else {
        launch_shaped<false>(plan, kind, ranges, x, codes, total, stream);
      }
      return;
    }
  }
  const int64_t blocks = ceil_div(layout.numel, kGenericThreads);
  update_generic<<<std::min<int64_t>(blocks, 1 << 20), kGenericThreads, 0, stream>>>(
      layout, kind, ranges, x, codes, total);
}

#define ASYMQ_INSTANTIATE(Code, S, P)                                                   \
  template void launch_update_codes(const Plan&, const Layout&, const QuantizerKind&,   \
                                    const RangePointers<P>&, const S*, Code*, int64_t*, \
                                    cudaStream_t);
#define ASYMQ_INSTANTIATE_CODES(S, P) ASYMQ_FOR_EACH_CODE_SIZE(ASYMQ_INSTANTIATE, S, P)
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE_CODES)
#undef ASYMQ_INSTANTIATE_CODES
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
