// What the kernels share that have a quantizer before and one after another function, each with one
// range: grids, and sums of every block that `finish` adds up.
#pragma once

#include "kernels/quantizer.h"
#include "kernels/range_gradients.cuh"

namespace asymq::cuda {

template <class T>
struct GridPair {
  Grid<T> before, after;
};

/// Both grids of a call, made by two warps for the whole block.
template <class T, class P>
__device__ __forceinline__ GridPair<T> make_block_grids(const QuantizerPointers<P>& before,
                                                        const QuantizerPointers<P>& after) {
  __shared__ GridPair<T> grids;
  if (threadIdx.x == 0) grids.before = make_grid<T>(before.kind, before.ranges.load(0));
  if (threadIdx.x == kWarp) grids.after = make_grid<T>(after.kind, after.ranges.load(0));
  __syncthreads();
  return grids;
}

/// Calls body(grid before, grid after) in the form that divides fastest.
template <class T, class Body>
__device__ __forceinline__ void with_fast_divisions(const GridPair<T>& grids, const Body& body) {
  if constexpr (std::is_same_v<T, float>) {
    if (has_reciprocal(grids.before) && has_reciprocal(grids.after)) {
      return body(make_reciprocal(grids.before), make_reciprocal(grids.after));
    }
  }
  body(grids.before, grids.after);
}

template <class T>
struct SumsPair {
  Sums<T> before, after;
};

template <class T, class P>
struct RangeGradientsPair {
  RangeGradients<T, P> before, after;
};

/// `workspace` holds 3 doubles per block, one after the other.
template <class T, class P>
RangeGradients<T, P> make_range_gradients(const QuantizerPointers<P>& quantizer, double* workspace,
                                          int64_t blocks) {
  return {quantizer.kind,   quantizer.ranges, quantizer.first,
          quantizer.second, workspace,        {blocks, 1, 3, 3, 3, 1}};
}

/// `workspace` holds 6 doubles per block.
template <class T, class P>
RangeGradientsPair<T, P> make_range_gradients(const QuantizerPointers<P>& before,
                                              const QuantizerPointers<P>& after, double* workspace,
                                              int64_t blocks) {
  return {make_range_gradients<T>(before, workspace, blocks),
          make_range_gradients<T>(after, workspace + 3 * blocks, blocks)};
}

/// The block's part of the sums, from those of its kThreads threads.
template <int kThreads, class T, class P>
__device__ __forceinline__ void store_block_sums(const RangeGradients<T, P>& gradients,
                                                 const Sums<double>& of_thread) {
  if (!gradients.needed()) return;
  const auto total = sum_block<kThreads>(of_thread);
  if (threadIdx.x == 0) gradients.store_sums(0, blockIdx.x, 0, total);
}

template <int kThreads, class T, class P>
__device__ __forceinline__ void store_block_sums(const RangeGradientsPair<T, P>& gradients,
                                                 const SumsPair<double>& of_thread) {
  store_block_sums<kThreads>(gradients.before, of_thread.before);
  __syncthreads();
  store_block_sums<kThreads>(gradients.after, of_thread.after);
}

/// Launches `finish` where there is something to add up.
template <class T, class P>
void launch_finish(const RangeGradients<T, P>& gradients, bool overlaps, cudaStream_t stream) {
  if (gradients.needed() && gradients.partials.count() != 1) {
    launch_finish(1, gradients, overlaps, stream);
  }
}

template <class T, class P>
void launch_finish(const RangeGradientsPair<T, P>& gradients, bool overlaps, cudaStream_t stream) {
  launch_finish(gradients.before, overlaps, stream);
  launch_finish(gradients.after, overlaps, stream);
}

}  // namespace asymq::cuda
