// Fake-quantize forward.
#include "kernels/device.cuh"
#include "kernels/fake_quantize.h"

namespace asymq::cuda {
namespace {

using detail::Layout;
using detail::RangePointers;

/// `count` vectors, kInFlight at a time, the rest with fewer. Element i of each is on grids[i].
template <int kCount, int kInFlight, class S, class Grids>
__device__ __forceinline__ void forward_vectors(const S* x, S* out, int count, int64_t x_stride,
                                                int64_t out_stride, const Grids& grids) {
  for (; count >= kInFlight; count -= kInFlight) {
    Vector<S, kCount> values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) values[u] = load_vector<kCount>(x + u * x_stride);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        S& value = values[u].values[i];
        value = narrow<S>(fake_quantize_element(widen(value), grids[i]));
      }
      store_vector(out + u * out_stride, values[u]);
    }
    x += kInFlight * x_stride;
    out += kInFlight * out_stride;
  }
  if constexpr (kInFlight > 1) {
    forward_vectors<kCount, kInFlight / 2>(x, out, count, x_stride, out_stride, grids);
  }
}

// A warp takes up to 32 rows. Lane i makes the grid of the warp's row i, then 32 / lanes rows at a
// time are read by `lanes` lanes each.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kRowThreads)
    forward_warp_rows(Plan plan, QuantizerKind kind, RangePointers<P> ranges,
                      const S* __restrict__ x, S* __restrict__ out) {
  constexpr int kCount = kWidth<S, kVectorized>;
  const Shape& shape = plan.shape;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = blockIdx.x * int64_t{kRowThreads / kWarp} + threadIdx.x / kWarp;
  const int64_t first = warp * plan.rows_per_warp;
  const int rows = static_cast<int>(min(plan.rows_per_warp, shape.rows() - first));
  if (rows <= 0) return;

  Grid<Compute<S>> mine{};
  if (lane < rows) mine = make_grid<Compute<S>>(kind, ranges.load(shape.channel(first + lane)));
  const int sublane = lane % plan.lanes;
  const int vectors = static_cast<int>(shape.inner) / kCount;
  const int count = (vectors - sublane + plan.lanes - 1) / plan.lanes;
  for (int base = 0; base < rows; base += kWarp / plan.lanes) {
    const int row = base + lane / plan.lanes;
    const auto grid = shuffle(mine, row);
    if (row >= rows) continue;
    with_fast_division(grid, [&](const auto& fast) {
      const int stride = plan.lanes * kCount;
      forward_vectors<kCount, kUnroll>(x + shape.x_offset(first + row) + sublane * kCount,
                                       out + (first + row) * shape.inner + sublane * kCount, count,
                                       stride, stride, SameGrid{fast});
    });
  }
}

// A block takes windows of one row, `pieces` windows apart.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kSpanThreads)
    forward_spans(Plan plan, QuantizerKind kind, RangePointers<P> ranges, const S* __restrict__ x,
                  S* __restrict__ out) {
  constexpr int kCount = kWidth<S, kVectorized>;
  const Shape& shape = plan.shape;
  const int64_t row = blockIdx.x / plan.pieces;
  const int64_t piece = blockIdx.x % plan.pieces;
  const int64_t vectors = shape.inner / kCount;
  x += shape.x_offset(row);
  out += row * shape.inner;
  const auto grid = make_block_grid<Compute<S>>(kind, ranges, shape.channel(row));
  with_fast_division(grid, [&](const auto& fast) {
    constexpr int kStride = kSpanThreads * kCount;
    for_each_window<kUnroll>(plan, piece, vectors, [&](int64_t begin, int count) {
      forward_vectors<kCount, kUnroll>(x + begin * kCount, out + begin * kCount, count, kStride,
                                       kStride, SameGrid{fast});
    });
    const int64_t tail = vectors * kCount + threadIdx.x;
    if (piece == 0 && tail < shape.inner) {
      out[tail] = narrow<S>(fake_quantize_element(widen(x[tail]), fast));
    }
  });
}

// A thread owns kCount columns of a chunk of rows; the block makes its columns' grids together.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kColumnThreads)
    forward_columns(Plan plan, QuantizerKind kind, RangePointers<P> ranges, const S* __restrict__ x,
                    S* __restrict__ out) {
  constexpr int kCount = kColumnWidth<S, kVectorized>;
  const ColumnTile<S, kCount> tile(plan);
  const Shape& shape = plan.shape;
  tile.with_grids(kind, ranges, shape, [&](const auto* grids) {
    forward_vectors<kCount, kUnroll>(x + tile.row * shape.x_outer_stride + tile.column,
                                     out + tile.row * shape.columns() + tile.column, tile.row_count,
                                     kColumnGroups * shape.x_outer_stride,
                                     kColumnGroups * shape.columns(), grids);
  });
}

template <class S, class P>
__global__ void __launch_bounds__(kGenericThreads)
    forward_generic(Layout layout, QuantizerKind kind, RangePointers<P> ranges,
                    const S* __restrict__ x, S* __restrict__ out) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < layout.numel; i += stride) {
    const Place place = place_of(layout, i);
    const auto grid = make_grid<Compute<S>>(kind, ranges.load(place.range));
    out[place.out] = narrow<S>(fake_quantize_element(widen(x[place.x]), grid));
  }
}

template <bool kVectorized, class S, class P>
void launch_shaped(const Plan& plan, const QuantizerKind& kind, const RangePointers<P>& ranges,
                   const S* x, S* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (plan.path == Path::kWarpRows) {
    forward_warp_rows<kVectorized><<<blocks, kRowThreads, 0, stream>>>(plan, kind, ranges, x, out);
  } else if (plan.path == Path::kSpans) {
    forward_spans<kVectorized><<<blocks, kSpanThreads, 0, stream>>>(plan, kind, ranges, x, out);
  } else {
    forward_columns<kVectorized><<<blocks, kColumnThreads, 0, stream>>>(plan, kind, ranges, x, out);
  }
}

}  // namespace

template <class S, class P>
void launch_forward(const Plan& plan, const Layout& layout, const QuantizerKind& kind,
                    const RangePointers<P>& ranges, const S* x, S* out, cudaStream_t stream) {
  if (plan.path == Path::kGeneric) {
    const int64_t blocks = ceil_div(layout.numel, kGenericThreads);
    forward_generic<<<std::min<int64_t>(blocks, 1 << 20), kGenericThreads, 0, stream>>>(
        layout, kind, ranges, x, out);
  } else if (plan.vectorized) {
    launch_shaped<true>(plan, kind, ranges, x, out, stream);
  } else {
    launch_shaped<false>(plan, kind, ranges, x, out, stream);
  }
}

#define ASYMQ_INSTANTIATE(S, P)                                                  \
  template void launch_forward(const Plan&, const Layout&, const QuantizerKind&, \
                               const RangePointers<P>&, const S*, S*, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
