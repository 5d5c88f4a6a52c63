// Fake-quantize backward: one pass over x and the upstream gradient writes dx and sums; where a
// range's elements are shared by several teams, a second small kernel adds their partial sums in
// fixed order.
#include "kernels/device.cuh"
#include "kernels/fake_quantize.h"
#include "kernels/range_gradients.cuh"

namespace asymq::cuda {
namespace {

using detail::Layout;
using detail::RangePointers;

/// Operands of one backward call; see launch_backward.
template <class S, class P>
struct Backward : RangeGradients<Compute<S>, P> {
  const S* grad;
  const S* x;
  S* dx;
};

/// Distances in x and in the tensors that are laid out like the output.
struct Steps {
  int64_t x, out;
};

/// Where the sums of a vector's elements go: all to one place, or element i to place i.
template <class Total>
struct SameSums {
  Sums<Total>& sums;

  template <class T, int kCount>
  __device__ __forceinline__ void add_vector(const ElementGradient<T> (&terms)[kCount]) const {
    Sums<T> of_vector{};
#pragma unroll
    for (int i = 0; i < kCount; ++i) add(of_vector, terms[i]);
    add(sums, of_vector);
  }
};

template <class T>
struct SumsPerElement {
  Sums<T>* sums;

  template <int kCount>
  __device__ __forceinline__ void add_vector(const ElementGradient<T> (&terms)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) add(sums[i], terms[i]);
  }
};

/// `count` vectors, kInFlight at a time, the rest with fewer. Element i of each is on grids[i]. A
/// thread's float sums may take kVectorsPerSum vectors.
template <int kCount, int kInFlight, class S, class Grids, class Totals>
__device__ __forceinline__ void backward_vectors(const S* grad, const S* x, S* dx, int count,
                                                 Steps stride, const Grids& grids,
                                                 const Totals& totals) {
  for (; count >= kInFlight; count -= kInFlight) {
    Vector<S, kCount> grads[kInFlight], values[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      grads[u] = load_vector<kCount>(grad + u * stride.out);
      values[u] = load_vector<kCount>(x + u * stride.x);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      ElementGradient<Compute<S>> terms[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        terms[i] = fake_quantize_element_backward(widen(grads[u].values[i]),
                                                  widen(values[u].values[i]), grids[i]);
        values[u].values[i] = narrow<S>(terms[i].x);
      }
      totals.add_vector(terms);
      if (dx != nullptr) store_vector(dx + u * stride.out, values[u]);
    }
    grad += kInFlight * stride.out;
    x += kInFlight * stride.x;
    if (dx != nullptr) dx += kInFlight * stride.out;
  }
  if constexpr (kInFlight > 1) {
    backward_vectors<kCount, kInFlight / 2>(grad, x, dx, count, stride, grids, totals);
  }
}

// As forward_warp_rows; lane i also keeps the sums of the warp's row i.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
    backward_warp_rows(Plan plan, Backward<S, P> op) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, kVectorized>;
  const Shape& shape = plan.shape;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = blockIdx.x * int64_t{kRowThreads / kWarp} + threadIdx.x / kWarp;
  const int64_t first = warp * plan.rows_per_warp;
  const int rows = static_cast<int>(min(plan.rows_per_warp, shape.rows() - first));
  if (rows <= 0) return;

  Grid<T> mine{};
  if (lane < rows) mine = make_grid<T>(op.kind, op.ranges.load(shape.channel(first + lane)));
  Sums<T> my_sums{};
  const int sublane = lane % plan.lanes;
  const int vectors = static_cast<int>(shape.inner) / kCount;
  const int count = (vectors - sublane + plan.lanes - 1) / plan.lanes;
  const int together = kWarp / plan.lanes;
  for (int base = 0; base < rows; base += together) {
    const int row = base + lane / plan.lanes;
    const auto grid = shuffle(mine, row);
    Sums<T> sums{};
    if (row < rows) {
      const int64_t out = (first + row) * shape.inner + sublane * kCount;
      const S* x = op.x + shape.x_offset(first + row) + sublane * kCount;
      with_fast_division(grid, [&](const auto& fast) {
        const int stride = plan.lanes * kCount;
        backward_vectors<kCount, kUnroll>(op.grad + out, x, op.dx ? op.dx + out : nullptr, count,
                                          {stride, stride}, SameGrid{fast}, SameSums<T>{sums});
      });
    }
    if (!op.needed()) continue;
    sums = sum_lanes(sums, plan.lanes);
    const int source = (lane - base) * plan.lanes;
    const Sums<T> received{__shfl_sync(~0u, sums.inside, source),
                           __shfl_sync(~0u, sums.below, source),
                           __shfl_sync(~0u, sums.above, source)};
    if (lane >= base && lane < base + together) my_sums = received;
  }
  if (op.needed() && lane < rows) {
    const int64_t row = first + lane;
    Sums<double> wide{};
    add(wide, my_sums);
    op.store_sums(shape.channel(row), row / shape.channels, 0, wide);
  }
}

// As forward_spans.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kSpanThreads, kSpanBlocks)
    backward_spans(Plan plan, Backward<S, P> op) {
  allow_overlap();
  constexpr int kCount = kWidth<S, kVectorized>;
  const Shape& shape = plan.shape;
  const int64_t row = blockIdx.x / plan.pieces;
  const int64_t piece = blockIdx.x % plan.pieces;
  const int64_t vectors = shape.inner / kCount;
  const int64_t range = shape.channel(row);
  const S* grad = op.grad + row * shape.inner;
  const S* x = op.x + shape.x_offset(row);
  S* dx = op.dx ? op.dx + row * shape.inner : nullptr;
  Sums<double> sums{};
  const auto grid = make_block_grid<Compute<S>>(op.kind, op.ranges, range);
  with_fast_division(grid, [&](const auto& fast) {
    constexpr int kStride = kSpanThreads * kCount;
    for_each_window<kSpanUnroll>(plan, piece, vectors, [&](int64_t begin, int count) {
      Sums<Compute<S>> partial{};
      backward_vectors<kCount, kSpanUnroll>(
          grad + begin * kCount, x + begin * kCount, dx ? dx + begin * kCount : nullptr, count,
          {kStride, kStride}, SameGrid{fast}, SameSums<Compute<S>>{partial});
      add(sums, partial);
    });
    const int64_t tail = vectors * kCount + threadIdx.x;
    if (piece == 0 && tail < shape.inner) {
      const auto term = fake_quantize_element_backward(widen(grad[tail]), widen(x[tail]), fast);
      if (dx != nullptr) dx[tail] = narrow<S>(term.x);
      Sums<Compute<S>> partial{};
      add(partial, term);
      add(sums, partial);
    }
  });
  if (!op.needed()) return;
  sums = sum_block<kSpanThreads>(sums);
  if (threadIdx.x == 0) op.store_sums(range, row / shape.channels, piece, sums);
}

// As forward_columns; then each thread adds up one column's sums of the block.
template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kColumnThreads, kColumnBlocks)
    backward_columns(Plan plan, Backward<S, P> op) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kColumnWidth<S, kVectorized>;
  const ColumnTile<S, kCount> tile(plan);
  const Shape& shape = plan.shape;
  __shared__ Sums<T> shared[kColumnGroups][tile.kColumns];
  tile.with_grids(op.kind, op.ranges, shape, [&](const auto* grids) {
    Sums<T> sums[kCount] = {};
    const int64_t out = tile.row * shape.columns() + tile.column;
    backward_vectors<kCount, kUnroll>(
        op.grad + out, op.x + tile.row * shape.x_outer_stride + tile.column,
        op.dx ? op.dx + out : nullptr, tile.row_count,
        {kColumnGroups * shape.x_outer_stride, kColumnGroups * shape.columns()}, grids,
        SumsPerElement<T>{sums});
#pragma unroll
    for (int i = 0; i < kCount; ++i) shared[threadIdx.x / kWarp][tile.offset + i] = sums[i];
  });
  if (!op.needed()) return;
  __syncthreads();
  tile.for_each_column(shape, [&](int i) {
    Sums<double> sums{};
    for (int group = 0; group < kColumnGroups; ++group) add(sums, shared[group][i]);
    const int64_t column = tile.first_column + i;
    op.store_sums(column / shape.inner, tile.piece, column % shape.inner, sums);
  });
}

// A block takes one piece of one range.
template <class S, class P>
__global__ void __launch_bounds__(kGenericThreads)
    backward_generic(Plan plan, Layout layout, Backward<S, P> op) {
  allow_overlap();
  const int64_t range = blockIdx.x / plan.pieces;
  const int64_t piece = blockIdx.x % plan.pieces;
  Place origin;
  for (int i = 0; i < layout.ndim; ++i) {
    const detail::Dim& dim = layout.dims[i];
    if (dim.range_stride == 0) continue;
    const int64_t at = range / dim.range_stride % dim.size;
    origin.x += at * dim.x_stride;
    origin.out += at * dim.out_stride;
  }
  const auto grid = make_grid<Compute<S>>(op.kind, op.ranges.load(range));
  const int64_t count = layout.numel / layout.ranges;
  const int64_t end = count * (piece + 1) / plan.pieces;
  Sums<double> sums{};
  for (int64_t j = count * piece / plan.pieces + threadIdx.x; j < end; j += kGenericThreads) {
    Place place = origin;
    int64_t index = j;
    for (int i = layout.ndim - 1; i >= 0; --i) {
      const detail::Dim& dim = layout.dims[i];
      if (dim.range_stride != 0) continue;
      const int64_t at = index % dim.size;
      index /= dim.size;
      place.x += at * dim.x_stride;
      place.out += at * dim.out_stride;
    }
    const auto term =
        fake_quantize_element_backward(widen(op.grad[place.out]), widen(op.x[place.x]), grid);
    if (op.dx != nullptr) op.dx[place.out] = narrow<S>(term.x);
    Sums<Compute<S>> partial{};
    add(partial, term);
    add(sums, partial);
  }
  if (!op.needed()) return;
  sums = sum_block<kGenericThreads>(sums);
  if (threadIdx.x == 0) op.store_sums(range, 0, piece, sums);
}

template <bool kVectorized, class S, class P>
void launch_shaped(const Plan& plan, const Backward<S, P>& op, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (plan.path == Path::kWarpRows) {
    backward_warp_rows<kVectorized><<<blocks, kRowThreads, 0, stream>>>(plan, op);
  } else if (plan.path == Path::kSpans) {
    backward_spans<kVectorized><<<blocks, kSpanThreads, 0, stream>>>(plan, op);
  } else {
    backward_columns<kVectorized><<<blocks, kColumnThreads, 0, stream>>>(plan, op);
  }
}

}  // namespace

template <class S, class P>
void launch_backward(const Plan& plan, const Layout& layout, const QuantizerKind& kind,
                     const RangePointers<P>& ranges, const S* grad, const S* x, S* dx, P* first,
                     P* second, double* workspace, cudaStream_t stream) {
  Backward<S, P> op{{kind, ranges, first, second, workspace, partial_sums(plan)}, grad, x, dx};
  // An empty x has no partial sums, but its ranges have gradients.
  if (layout.numel == 0) {
    op.partials.outer = 0;
  } else if (plan.path == Path::kGeneric) {
    const auto blocks = static_cast<unsigned>(layout.ranges * plan.pieces);
    backward_generic<<<blocks, kGenericThreads, 0, stream>>>(plan, layout, op);
  } else if (plan.vectorized) {
    launch_shaped<true>(plan, op, stream);
  } else {
    launch_shaped<false>(plan, op, stream);
  }
  if (op.needed() && op.partials.count() != 1) {
    launch_finish<Compute<S>, P>(layout.ranges, op, plan.overlaps, stream);
  }
}

#define ASYMQ_INSTANTIATE(S, P)                                                                   \
  template void launch_backward(const Plan&, const Layout&, const QuantizerKind&,                 \
                                const RangePointers<P>&, const S*, const S*, S*, P*, P*, double*, \
                                cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
