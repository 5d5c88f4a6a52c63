// Gradients of ranges from sums: what a pass over the elements stores, and the small kernel after
// it that adds up partial sums in fixed order where a range's elements are shared by several teams.
#pragma once

#include "kernels/device.cuh"
#include "kernels/plan.h"

namespace asymq::cuda {

/// Lets the next kernel be launched while this one still runs, one that waits for its end by
/// itself.
__device__ __forceinline__ void allow_overlap() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

/// Where the sums of a call's ranges go, and what they become. T is the elements' compute type.
template <class T, class P>
struct RangeGradients {
  QuantizerKind kind;
  detail::RangePointers<P> ranges;
  P* first;  ///< of the learned parameters; null where not wanted
  P* second;
  double* workspace;  ///< of the partial sums; not used where there is one partial per range
  PartialSums partials;

  /// Whether any sums are.
  __host__ __device__ bool needed() const { return first != nullptr || second != nullptr; }

  __device__ RangeGradientMap gradient_map(int64_t range) const {
    return make_gradient_map<T>(kind, ranges.load(range));
  }

  __device__ void store_gradient(int64_t range, const RangeGradientMap& map,
                                 const Sums<double>& sums) const {
    const RangeGradient gradient = range_gradient(kind, map, sums);
    if (first != nullptr) first[range] = static_cast<P>(gradient.first);
    if (second != nullptr) second[range] = static_cast<P>(gradient.second);
  }

  /// Sums of partial (outer, inner) of a range: the gradient itself where there is only one.
  __device__ void store_sums(int64_t range, int64_t outer, int64_t inner,
                             const Sums<double>& sums) const {
    if (partials.count() == 1) {
      store_gradient(range, gradient_map(range), sums);
      return;
    }
    double* to = workspace + outer * partials.outer_stride + range * partials.range_stride +
                 inner * partials.inner_stride;
    to[0] = sums.inside;
    to[partials.sum_stride] = sums.below;
    to[2 * partials.sum_stride] = sums.above;
  }
};

constexpr int kFinishThreads = 256;

/// Adds up partial sums: blockDim.x ranges by blockDim.y threads each, kFinishThreads together.
template <class T, class P>
__global__ void __launch_bounds__(kFinishThreads)
    finish(int64_t ranges, RangeGradients<T, P> gradients) {
  const PartialSums& partials = gradients.partials;
  const int64_t range = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  // 32-bit indices: a division of 64-bit ones would take longer than the sums.
  const auto count = static_cast<unsigned>(partials.count());
  const auto inner = static_cast<unsigned>(partials.inner);
  Sums<double> sums{};
  RangeGradientMap map;
  if (threadIdx.y == 0 && range < ranges) map = gradients.gradient_map(range);
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  if (range < ranges) {
    const double* from = gradients.workspace + range * partials.range_stride;
    for (unsigned i = threadIdx.y; i < count; i += blockDim.y) {
      const double* at =
          from + i / inner * partials.outer_stride + i % inner * partials.inner_stride;
      add(sums, Sums<double>{at[0], at[partials.sum_stride], at[2 * partials.sum_stride]});
    }
  }
  __shared__ Sums<double> shared[kFinishThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  shared[me] = sums;
  for (int step = blockDim.y / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.y < step) add(shared[me], shared[me + step * blockDim.x]);
  }
  if (threadIdx.y == 0 && range < ranges) gradients.store_gradient(range, map, shared[me]);
}

/// Whether the code of a kernel that waits for the pass before it does so on the device: code for
/// 9.0 and later does, also where the driver compiled it from PTX; code for 8.0 run on a later
/// device does not.
template <auto* kernel>
bool waits() {
  static const bool result = [] {
    cudaFuncAttributes attributes{};
    return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess && attributes.ptxVersion >= 90;
  }();
  return result;
}

/// Launches a kernel that waits where it needs what the pass before it left. overlaps: while that
/// still runs.
template <auto* kernel, class... Arguments>
void launch_overlapping(unsigned blocks, dim3 threads, bool overlaps, cudaStream_t stream,
                        const Arguments&... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps && waits<kernel>() ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class T, class P>
void launch_finish(int64_t ranges, const RangeGradients<T, P>& gradients, bool overlaps,
                   cudaStream_t stream) {
  unsigned width = 1;
  while (width < kWarp && width < ranges) width *= 2;
  launch_overlapping<finish<T, P>>(static_cast<unsigned>(ceil_div(ranges, width)),
                                   dim3(width, kFinishThreads / width), overlaps, stream, ranges,
                                   gradients);
}

}  // namespace asymq::cuda
