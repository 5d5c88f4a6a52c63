// Quantized RMSNorm: a row stays in registers between its sum of squares, its extrema and its
// quantization. The backward pass computes the row again from x and its one statistic, and keeps
// the sums of its columns for the weight from row to row.
#include "kernels/quantized_rms_norm.h"
#include "kernels/rows.cuh"

namespace asymq::cuda {
namespace {

/// Operands of a call. Forward, `out` is the result and `grad` is not used; backward, `out` is dx.
template <class S, class P>
struct RmsNorm {
  using T = Compute<S>;
  RowPlan plan;
  RowQuantizer<P> quantizer;
  const S* grad;
  const S* x;
  const S* weight;
  S* out;
  T* statistics;
  double eps;
  S* dweight;
  Sums<double>* partials;
  T* weight_sums;  ///< of teams, a row each

  __host__ __device__ int size() const { return plan.vectors * kWidth<S, true>; }
};

/// A thread's vectors of a row, `team` apart.
template <class S>
struct RowVectors {
  using Vectors = Words<S, true>;
  static constexpr int kCount = kWidth<S, true>;
  Vectors words[kRmsNormVectors];

  /// from: the row. Nothing beyond `vectors`.
  __device__ __forceinline__ void load(const S* from, int rank, int team, int vectors) {
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * team;
      words[u] = at < vectors ? load_words<S, true>(from + at * kCount) : Vectors{};
    }
  }
};

template <class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 2) rms_norm_forward(RmsNorm<S, P> op) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizer);
  const int rank = team.rank(), teams = plan.teams();
  for (int64_t first = blockIdx.x * int64_t{teams}; first < plan.rows; first += gridDim.x * teams) {
    const int64_t row = first + team.index(), offset = row * op.size();
    const int vectors = row < plan.rows ? plan.vectors : 0;
    RowVectors<S> x;
    x.load(op.x + offset, rank, plan.team, vectors);
    T squares = 0;
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      visit_words<S>([&](int, T value) { squares = fma(value, value, squares); }, x.words[u]);
    }
    const T statistic = rsqrt(team.sum(squares) / op.size() + static_cast<T>(op.eps));
    Search<S, true> search;
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * plan.team;
      if (at >= vectors) continue;
      const auto weight = load_words<S, true>(op.weight + at * kCount);
      x.words[u] = map_words<S>(
          [&](int, T value, T w) { return rounded<S>(value * statistic) * w; }, x.words[u], weight);
      search.include_vector(x.words[u]);
    }
    if (range.of_token()) range.find(team.extrema(search.result()));
    with_quantizer<S>(range, [&](const auto& quantize) {
#pragma unroll
      for (int u = 0; u < kRmsNormVectors; ++u) {
        const int at = rank + u * plan.team;
        if (at < vectors) store_words<S, true>(op.out + offset + at * kCount, quantize(x.words[u]));
      }
    });
    if (vectors > 0 && rank == 0) op.statistics[row] = statistic;
  }
}

template <class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 1) rms_norm_backward(RmsNorm<S, P> op) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizer);
  const int rank = team.rank(), teams = plan.teams();
  T of_weight[kRmsNormVectors * kCount] = {};
  for (int64_t first = blockIdx.x * int64_t{teams}; first < plan.rows; first += gridDim.x * teams) {
    const int64_t row = first + team.index(), offset = row * op.size();
    const int vectors = row < plan.rows ? plan.vectors : 0;
    RowVectors<S> x, grad;  // grad: then dL/d(what is quantized)
    x.load(op.x + offset, rank, plan.team, vectors);
    grad.load(op.grad + offset, rank, plan.team, vectors);
    const T statistic = vectors > 0 ? op.statistics[row] : T(0);

    const auto normalized = [&](T value) { return rounded<S>(value * statistic); };
    Words<S, true> weighted[kRmsNormVectors];
    Search<S, true> search;
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * plan.team;
      if (at >= vectors) continue;
      const auto weight = load_words<S, true>(op.weight + at * kCount);
      weighted[u] = map_words<S>([&](int, T value, T w) { return normalized(value) * w; },
                                 x.words[u], weight);
      search.include_vector(weighted[u]);
    }
    if (range.of_token()) range.find(team.extrema(search.result()));
    if (range.exists()) {
      Sums<T> sums{};
      with_fast_division(range.grid(), [&](const auto& grid) {
#pragma unroll
        for (int u = 0; u < kRmsNormVectors; ++u) {
          if (rank + u * plan.team >= vectors) continue;
          grad.words[u] = map_words<S>(
              [&](int, T g, T value) {
                const auto term = fake_quantize_element_backward(g, value, grid);
                add(sums, term);
                return term.x;
              },
              grad.words[u], weighted[u]);
        }
      });
      if (vectors > 0) range.add_row(sums);
    }
    T along = 0;  // Σ dL/d(normalized) · x
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * plan.team;
      if (at >= vectors) continue;
      const auto weight = load_words<S, true>(op.weight + at * kCount);
      visit_words<S>(
          [&](int i, T g, T value, T w) {
            along = fma(g * w, value, along);
            T& sum = of_weight[u * kCount + i];
            sum = fma(g, normalized(value), sum);
          },
          grad.words[u], x.words[u], weight);
    }
    if (op.out == nullptr) continue;
    along = team.sum(along) / op.size() * statistic * statistic;
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * plan.team;
      if (at >= vectors) continue;
      const auto weight = load_words<S, true>(op.weight + at * kCount);
      store_words<S, true>(
          op.out + offset + at * kCount,
          map_words<S>([&](int, T g, T value, T w) { return statistic * (g * w - value * along); },
                       grad.words[u], x.words[u], weight));
    }
  }
  if (op.dweight != nullptr) {
    // The teams of a warp add up theirs; more threads are one team.
    const int entry = plan.team < kWarp ? threadIdx.x / kWarp : team.index();
    T* sums = op.weight_sums + (blockIdx.x * (op.plan.entries() / gridDim.x) + entry) * op.size();
#pragma unroll
    for (int u = 0; u < kRmsNormVectors; ++u) {
      const int at = rank + u * plan.team;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        T sum = of_weight[u * kCount + i];
        for (int step = kWarp / 2; step >= plan.team; step /= 2) {
          sum += __shfl_xor_sync(~0u, sum, step);
        }
        if (at < plan.vectors) sums[at * kCount + i] = sum;
      }
    }
  }
  if (op.quantizer.learns()) store_row_sums(range.total(), op.partials);
}

/// Columns of dweight that a block adds up.
constexpr int kColumns = kWarp;

// Adds up what the teams left: a block for some columns each, the last one for the range.
template <class S, class P>
__global__ void __launch_bounds__(kFinishThreads) rms_norm_finish(RmsNorm<S, P> op) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  if (blockIdx.x == gridDim.x - 1) {
    if (op.quantizer.learns()) {
      finish_row_sums<Compute<S>>(op.quantizer, op.partials, op.plan.blocks);
    }
    return;
  }
  constexpr int kGroups = kFinishThreads / kColumns;
  __shared__ double shared[kGroups][kColumns];
  const int lane = threadIdx.x % kColumns, group = threadIdx.x / kColumns;
  const int column = blockIdx.x * kColumns + lane;
  double sum = 0;
  if (column < op.size()) {
#pragma unroll 4
    for (int64_t i = group; i < op.plan.entries(); i += kGroups) {
      sum += op.weight_sums[i * op.size() + column];
    }
  }
  shared[group][lane] = sum;
  __syncthreads();
  if (group != 0 || column >= op.size()) return;
  for (int i = 1; i < kGroups; ++i) sum += shared[i][lane];
  op.dweight[column] = narrow<S>(static_cast<Compute<S>>(sum));
}

}  // namespace

template <class S, class P>
void launch_rms_norm_forward(const RowPlan& plan, const RowQuantizer<P>& output, const S* x,
                             const S* weight, double eps, S* out, Compute<S>* statistics,
                             cudaStream_t stream) {
  RmsNorm<S, P> op{plan,       output, nullptr, x,       weight, out,
                   statistics, eps,    nullptr, nullptr, nullptr};
  if (plan.blocks == 0) return;
  rms_norm_forward<<<static_cast<unsigned>(plan.blocks), plan.threads, 0, stream>>>(op);
}

template <class S, class P>
void launch_rms_norm_backward(const RowPlan& plan, const RowQuantizer<P>& output, const S* grad,
                              const S* x, const S* weight, const Compute<S>* statistics, S* dx,
                              S* dweight, double* workspace, Compute<S>* weight_sums,
                              cudaStream_t stream) {
  auto* partials = reinterpret_cast<Sums<double>*>(workspace);
  RmsNorm<S, P> op{
      plan, output,  grad,     x,          weight, dx, const_cast<Compute<S>*>(statistics),
      0,    dweight, partials, weight_sums};
  if (plan.blocks > 0) {
    rms_norm_backward<<<static_cast<unsigned>(plan.blocks), plan.threads, 0, stream>>>(op);
  }
  const int columns = dweight == nullptr ? 0 : static_cast<int>(ceil_div(op.size(), kColumns));
  if (columns > 0 || output.learns()) {
    launch_overlapping<rms_norm_finish<S, P>>(static_cast<unsigned>(columns + 1), kFinishThreads,
                                              plan.overlaps && plan.blocks > 0, stream, op);
  }
}

#define ASYMQ_INSTANTIATE(S, P)                                                                  \
  template void launch_rms_norm_forward(const RowPlan&, const RowQuantizer<P>&, const S*,        \
                                        const S*, double, S*, Compute<S>*, cudaStream_t);        \
  template void launch_rms_norm_backward(const RowPlan&, const RowQuantizer<P>&, const S*,       \
                                         const S*, const S*, const Compute<S>*, S*, S*, double*, \
                                         Compute<S>*, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
