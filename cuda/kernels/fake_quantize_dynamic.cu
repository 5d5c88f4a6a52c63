// Fake-quantize on live ranges. A group is read once and stays on chip, in registers of the lanes
// of a warp or of a block, while its range is found and used; longer groups are read twice. The
// backward pass finds the range again.
#include "asymq/live_range.h"
#include "kernels/device.cuh"
#include "kernels/fake_quantize_dynamic.h"
#include "kernels/range_gradients.cuh"
#include "kernels/words.cuh"

namespace asymq::cuda {
namespace {

/// Over a block; all of its threads receive the result. To be called once.
template <class T>
__device__ __forceinline__ Extrema<T> over_block(Extrema<T> extrema) {
  __shared__ Extrema<T> of_warps[kWarp];
  const int lane = threadIdx.x % kWarp;
  extrema = over_lanes(extrema, kWarp);
  if (lane == 0) of_warps[threadIdx.x / kWarp] = extrema;
  __syncthreads();
  return over_lanes(lane < blockDim.x / kWarp ? of_warps[lane] : no_extrema<T>(), kWarp);
}

using cuda::add;

__device__ __forceinline__ void add(RangeGradient& total, const RangeGradient& term) {
  total.first += term.first;
  total.second += term.second;
}

__device__ __forceinline__ RangeGradient sum_lanes(RangeGradient sums, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    add(sums, {__shfl_xor_sync(~0u, sums.first, step), __shfl_xor_sync(~0u, sums.second, step)});
  }
  return sums;
}

/// Over the lanes in the same place of the block's warps; those of the first receive the result.
__device__ __forceinline__ RangeGradient sum_warps(RangeGradient sums) {
  __shared__ RangeGradient shared[kDynamicThreads];
  shared[threadIdx.x] = sums;
  __syncthreads();
  if (threadIdx.x < kWarp) {
    for (int i = threadIdx.x + kWarp; i < blockDim.x; i += kWarp) add(sums, shared[i]);
  }
  return sums;
}

/// Operands of a call. Forward, `out` is x̂ and `grad` is not used; backward, `out` is dx.
template <class S, class P>
struct Dynamic {
  DynamicPlan plan;
  LiveFactors<P> factors;
  const S* grad;
  const S* x;
  S* out;
  P* first;  ///< gradients of factors; null where not wanted
  P* second;
  RangeGradient* partials;
  Extrema<double>* extrema;  ///< of pieces, those of a group side by side

  __host__ __device__ bool needs_sums() const { return first != nullptr || second != nullptr; }

  __device__ void store_gradient(int64_t factor, const RangeGradient& total) const {
    const auto gradient = [&](const P* learned, double sum) {
      return static_cast<P>(learned_gradient(factors.kind, learned[factor], sum));
    };
    if (first != nullptr) first[factor] = gradient(factors.first, total.first);
    if (second != nullptr) second[factor] = gradient(factors.second, total.second);
  }
};

/// A group's factors. Before its elements are loaded, so that no link needs registers beside them.
template <class S, class P>
__device__ __forceinline__ Factors<P> factors_of(const Dynamic<S, P>& op, int64_t group) {
  const int64_t i = op.plan.factors == 1               ? 0
                    : op.plan.factors == op.plan.count ? group
                                                       : group % op.plan.factors;
  const P second = op.factors.second != nullptr ? op.factors.second[i] : P(0);
  return apply_factors(op.factors.kind, op.factors.first[i], second);
}

/// The range of one group.
template <class T, class P>
struct LiveRange {
  QuantizerKind kind;
  Extrema<P> ends;
  ScaleOffset<P> effective;

  template <class S>
  __device__ __forceinline__ LiveRange(const Dynamic<S, P>& op, const Factors<P>& factors,
                                       const Extrema<T>& extrema)
      : kind(op.factors.kind),
        ends(live_ends<P>(kind, op.factors.token, extrema)),
        effective(live_scale_offset(kind, factors, ends)) {}

  __device__ __forceinline__ Grid<T> grid() const { return make_grid<T>(kind, effective); }

  template <class Total>
  __device__ __forceinline__ RangeGradient gradient(const Sums<Total>& sums) const {
    return live_gradient(kind, {static_cast<double>(ends.min), static_cast<double>(ends.max)},
                         make_grid_point<T>(kind, effective),
                         {static_cast<double>(sums.inside), static_cast<double>(sums.below),
                          static_cast<double>(sums.above)});
  }
};

/// x̂ of an element, or its dL/dx, whose terms go to the sums.
template <bool kBackward, class T, class G>
__device__ __forceinline__ T element(T x, T grad, const G& grid, Sums<T>& sums) {
  if constexpr (kBackward) {
    const ElementGradient<T> term = fake_quantize_element_backward(grad, x, grid);
    add(sums, term);
    return term.x;
  } else {
    return fake_quantize_element(x, grid);
  }
}

/// The same of a vector. grads: not used forward.
template <bool kBackward, class S, bool kVectorized, class G>
__device__ __forceinline__ Words<S, kVectorized> elements(const Words<S, kVectorized>& x,
                                                          const Words<S, kVectorized>& grads,
                                                          const G& grid, Sums<Compute<S>>& sums) {
  using T = Compute<S>;
  Words<S, kVectorized> result;
#pragma unroll
  for (int i = 0; i < sizeof(result.values) / sizeof(result.values[0]); ++i) {
    if constexpr (kPaired<S, kVectorized>) {
      const float2 value = widen_pair<S>(x.values[i]), grad = widen_pair<S>(grads.values[i]);
      const float low = element<kBackward>(value.x, grad.x, grid, sums);
      const float high = element<kBackward>(value.y, grad.y, grid, sums);
      result.values[i] = narrow_pair<S>({low, high});
    } else {
      const T grad = kBackward ? widen(grads.values[i]) : T(0);
      result.values[i] = narrow<S>(element<kBackward>(widen(x.values[i]), grad, grid, sums));
    }
  }
  return result;
}

/// Up to kVectors of a group's vectors, `stride` apart, as one thread has them: the first at
/// `offset`, in elements, and those from `vectors` on not there.
template <bool kBackward, bool kVectorized, int kVectors, class S, class P>
struct Held {
  using T = Compute<S>;
  static constexpr int kCount = kWidth<S, kVectorized>;
  const Dynamic<S, P>& op;
  int64_t offset;
  int first, stride, vectors;
  Words<S, kVectorized> values[kVectors], grads[kBackward ? kVectors : 1];

  __device__ __forceinline__ bool has(int u) const { return first + u * stride < vectors; }

  __device__ __forceinline__ void load() {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (has(u)) values[u] = load_words<S, kVectorized>(op.x + offset + u * stride * kCount);
    }
    if constexpr (kBackward) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        if (has(u)) grads[u] = load_words<S, kVectorized>(op.grad + offset + u * stride * kCount);
      }
    }
  }

  __device__ __forceinline__ Extrema<T> extrema() const {
    Search<S, kVectorized> search;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (has(u)) search.include_vector(values[u]);
    }
    return search.result();
  }

  __device__ __forceinline__ Sums<T> quantize(const Grid<T>& grid) const {
    Sums<T> sums{};
    with_fast_division(grid, [&](const auto& fast) {
#pragma unroll
      for (int u = 0; u < kVectors; ++u) {
        if (!has(u)) continue;
        const auto result =
            elements<kBackward, S, kVectorized>(values[u], grads[kBackward ? u : 0], fast, sums);
        if (op.out != nullptr) {
          store_words<S, kVectorized>(op.out + offset + u * stride * kCount, result);
        }
      }
    });
    return sums;
  }
};

// Lanes hold a group, a warp neighbouring groups.
template <bool kBackward, bool kVectorized, int kVectors, class S, class P>
__global__ void __launch_bounds__(kWarp* kDynamicWarps, kBackward ? 2 : 4)
    dynamic_lanes(Dynamic<S, P> op) {
  if (kBackward) allow_overlap();
  const DynamicPlan& plan = op.plan;
  const int lane = threadIdx.x % kWarp, sublane = lane % plan.lanes;
  const int64_t tiles = plan.tiles();
  const int64_t row = blockIdx.x / tiles * kDynamicWarps + threadIdx.x / kWarp;
  const int64_t group =
      row * plan.period + blockIdx.x % tiles * plan.groups_per_warp() + lane / plan.lanes;
  const bool exists = group < plan.count;
  using Vectors = Held<kBackward, kVectorized, kVectors, S, P>;
  Vectors held{op, group * plan.size + sublane * Vectors::kCount, sublane, plan.lanes,
               exists ? static_cast<int>(plan.size) / Vectors::kCount : 0};
  const auto factors = factors_of(op, exists ? group : 0);
  held.load();
  const auto extrema = over_lanes(held.extrema(), plan.lanes);
  RangeGradient total{};
  if (exists) {
    const LiveRange<Compute<S>, P> range(op, factors, extrema);
    const auto sums = held.quantize(range.grid());
    if constexpr (kBackward) {
      if (op.needs_sums()) total = range.gradient(sums);
    }
  }
  if constexpr (kBackward) {
    if (!op.needs_sums()) return;
    total = sum_lanes(total, plan.factors == 1 && !plan.own_factors() ? kWarp : plan.lanes);
    if (plan.own_factors()) {
      if (exists && sublane == 0) op.store_gradient(group, total);
      return;
    }
    total = sum_warps(total);
    if (plan.factors == 1) {
      if (threadIdx.x == 0) op.partials[blockIdx.x] = total;
    } else if (threadIdx.x < kWarp && sublane == 0) {
      op.partials[blockIdx.x * int64_t{plan.groups_per_warp()} + lane / plan.lanes] = total;
    }
  }
}

template <class S, class P>
__device__ __forceinline__ void store_block_total(const Dynamic<S, P>& op, int64_t group,
                                                  RangeGradient total) {
  total = sum_warps(sum_lanes(total, kWarp));
  if (threadIdx.x != 0) return;
  if (op.plan.own_factors()) {
    op.store_gradient(group, total);
  } else {
    op.partials[blockIdx.x] = total;
  }
}

// A block holds a group, its warps neighbouring parts.
template <bool kBackward, bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kDynamicThreads, kBackward ? 1 : 2)
    dynamic_block(Dynamic<S, P> op) {
  if (kBackward) allow_overlap();
  const int64_t group = blockIdx.x;
  const int first = threadIdx.x / kWarp * (kWarp * kBlockVectors) + threadIdx.x % kWarp;
  using Vectors = Held<kBackward, kVectorized, kBlockVectors, S, P>;
  Vectors held{op, group * op.plan.size + first * Vectors::kCount, first, kWarp,
               static_cast<int>(op.plan.size) / Vectors::kCount};
  const auto factors = factors_of(op, group);
  held.load();
  const LiveRange<Compute<S>, P> range(op, factors, over_block(held.extrema()));
  const auto sums = held.quantize(range.grid());
  if constexpr (kBackward) {
    if (op.needs_sums()) store_block_total(op, group, range.gradient(sums));
  }
}

/// Calls body(held) for this thread's vectors of a piece of a group, some at a time, not loaded.
template <bool kBackward, bool kVectorized, class S, class P, class Body>
__device__ __forceinline__ void for_each_window(const Dynamic<S, P>& op, int64_t group,
                                                int64_t piece, const Body& body) {
  using Vectors = Held<kBackward, kVectorized, kLaneVectors, S, P>;
  constexpr int kWindow = kDynamicThreads * kLaneVectors;
  const int64_t vectors = op.plan.size / Vectors::kCount;
  const int64_t end = vectors * (piece + 1) / op.plan.pieces;
  const int first = threadIdx.x;
  for (int64_t window = vectors * piece / op.plan.pieces; window < end; window += kWindow) {
    body(Vectors{op, group * op.plan.size + (window + first) * Vectors::kCount, first,
                 kDynamicThreads, static_cast<int>(min(end - window, int64_t{kWindow}))});
  }
}

template <bool kVectorized, class S, class P>
__device__ __forceinline__ Extrema<Compute<S>> piece_extrema(const Dynamic<S, P>& op, int64_t group,
                                                             int64_t piece) {
  auto extrema = no_extrema<Compute<S>>();
  for_each_window<false, kVectorized>(op, group, piece, [&](auto held) {
    held.load();
    include(extrema, held.extrema());
  });
  return over_block(extrema);
}

template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kDynamicThreads, 2) dynamic_extrema(Dynamic<S, P> op) {
  const int64_t group = blockIdx.x % op.plan.count, piece = blockIdx.x / op.plan.count;
  const auto extrema = piece_extrema<kVectorized>(op, group, piece);
  if (threadIdx.x == 0) {
    op.extrema[group * op.plan.pieces + piece] = {static_cast<double>(extrema.min),
                                                  static_cast<double>(extrema.max)};
  }
}

// A block reads a group twice, or, where the extrema of the pieces are known, a piece once.
template <bool kBackward, bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kDynamicThreads, kBackward ? 1 : 2)
    dynamic_long(Dynamic<S, P> op) {
  if (kBackward) allow_overlap();
  using T = Compute<S>;
  const int64_t group = blockIdx.x % op.plan.count, piece = blockIdx.x / op.plan.count;
  const auto factors = factors_of(op, group);
  Extrema<T> extrema;
  if (op.plan.pieces == 1) {
    extrema = piece_extrema<kVectorized>(op, group, piece);
  } else {
    extrema = no_extrema<T>();
    for (int64_t i = threadIdx.x % kWarp; i < op.plan.pieces; i += kWarp) {
      const Extrema<double> found = op.extrema[group * op.plan.pieces + i];
      include(extrema, {static_cast<T>(found.min), static_cast<T>(found.max)});
    }
    extrema = over_lanes(extrema, kWarp);
  }
  const LiveRange<T, P> range(op, factors, extrema);
  const Grid<T> grid = range.grid();
  Sums<double> sums{};
  for_each_window<kBackward, kVectorized>(op, group, piece, [&](auto held) {
    held.load();
    add(sums, held.quantize(grid));
  });
  if constexpr (kBackward) {
    if (op.needs_sums()) store_block_total(op, group, range.gradient(sums));
  }
}

constexpr int kTotalThreads = 1024;

/// Adds up partial sums: blockDim.x factors by blockDim.y threads each.
template <class S, class P>
__global__ void __launch_bounds__(kTotalThreads) dynamic_total(Dynamic<S, P> op) {
  const int64_t factor = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t factors = op.plan.factors;
  RangeGradient total{};
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  if (factor < factors) {
#pragma unroll 4
    for (int64_t i = threadIdx.y * factors + factor; i < op.plan.entries();
         i += blockDim.y * factors) {
      add(total, op.partials[i]);
    }
  }
  __shared__ RangeGradient shared[kTotalThreads];
  const int me = threadIdx.y * blockDim.x + threadIdx.x;
  shared[me] = total;
  for (int step = blockDim.y / 2; step > 0; step /= 2) {
    __syncthreads();
    if (threadIdx.y < step) add(shared[me], shared[me + step * blockDim.x]);
  }
  if (threadIdx.y == 0 && factor < factors) op.store_gradient(factor, shared[me]);
}

template <bool kBackward, bool kVectorized, class S, class P>
void launch_kernels(const Dynamic<S, P>& op, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(op.plan.blocks);
  const auto threads = static_cast<unsigned>(op.plan.threads);
  if (op.plan.path == DynamicPath::kLanes && op.plan.is_short) {
    dynamic_lanes<kBackward, kVectorized, kShortVectors><<<blocks, threads, 0, stream>>>(op);
  } else if (op.plan.path == DynamicPath::kLanes) {
    dynamic_lanes<kBackward, kVectorized, kLaneVectors><<<blocks, threads, 0, stream>>>(op);
  } else if (op.plan.path == DynamicPath::kBlock) {
    dynamic_block<kBackward, kVectorized><<<blocks, threads, 0, stream>>>(op);
  } else {
    if (op.plan.pieces > 1) dynamic_extrema<kVectorized><<<blocks, threads, 0, stream>>>(op);
    dynamic_long<kBackward, kVectorized><<<blocks, threads, 0, stream>>>(op);
  }
}

template <bool kBackward, class S, class P>
void launch(const Dynamic<S, P>& op, cudaStream_t stream) {
  if (op.plan.blocks > 0) {
    if (op.plan.vectorized) {
      launch_kernels<kBackward, true>(op, stream);
    } else {
      launch_kernels<kBackward, false>(op, stream);
    }
  }
  if (!op.needs_sums() || op.plan.own_factors()) return;
  // Few factors side by side: there are blocks for many multiprocessors then.
  unsigned width = 1;
  while (width < 8 && width < op.plan.factors) width *= 2;
  launch_overlapping<dynamic_total<S, P>>(static_cast<unsigned>(ceil_div(op.plan.factors, width)),
                                          dim3(width, kTotalThreads / width),
                                          op.plan.overlaps && op.plan.blocks > 0, stream, op);
}

}  // namespace

template <class S, class P>
void launch_dynamic_forward(const DynamicPlan& plan, const LiveFactors<P>& factors, const S* x,
                            S* out, double* workspace, cudaStream_t stream) {
  auto* extrema = reinterpret_cast<Extrema<double>*>(workspace);
  launch<false>(Dynamic<S, P>{plan, factors, nullptr, x, out, nullptr, nullptr, nullptr, extrema},
                stream);
}

template <class S, class P>
void launch_dynamic_backward(const DynamicPlan& plan, const LiveFactors<P>& factors, const S* grad,
                             const S* x, S* dx, P* first, P* second, double* workspace,
                             cudaStream_t stream) {
  auto* extrema = reinterpret_cast<Extrema<double>*>(workspace);
  auto* partials = reinterpret_cast<RangeGradient*>(workspace + plan.extrema());
  launch<true>(Dynamic<S, P>{plan, factors, grad, x, dx, first, second, partials, extrema}, stream);
}

#define ASYMQ_INSTANTIATE(S, P)                                                                 \
  template void launch_dynamic_forward(const DynamicPlan&, const LiveFactors<P>&, const S*, S*, \
                                       double*, cudaStream_t);                                  \
  template void launch_dynamic_backward(const DynamicPlan&, const LiveFactors<P>&, const S*,    \
                                        const S*, S*, P*, P*, double*, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
