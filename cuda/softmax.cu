// Quantized softmax, forward and backward: one pass each. A warp takes a row, keeps what it can of
// it in registers and computes the rest again; keys past a causal row's end are never read.
//
// What is not wanted of a hidden key is computed all the same and then not selected: a branch per
// element would keep the elements of a vector from overlapping.
#include "device.cuh"
#include "kernels.h"
#include "quantizer_pair.cuh"

namespace asymq::cuda {
namespace {

using detail::MaskRow;

constexpr int kKeptElements = 32;  // of a row per lane: 1,024 a row

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    value = detail::larger(value, __shfl_xor_sync(~0u, value, step));
  }
  return value;
}

/// Divides exponentials by their sum. In float an estimate is corrected once by its exact
/// remainder: nearly always the rounding of a division, and always well within an exponential's own
/// error.
struct DivideBySum {
  float sum, reciprocal;
  __device__ explicit DivideBySum(float sum) : sum(sum), reciprocal(1.0f / sum) {}
  __device__ __forceinline__ float operator()(float e) const {
    const float estimate = e * reciprocal;
    return fma(-fma(estimate, sum, -e), reciprocal, estimate);
  }
};
struct DivideByDoubleSum {
  double sum;
  __device__ __forceinline__ double operator()(double e) const { return e / sum; }
};
__device__ __forceinline__ DivideBySum divider(float sum) { return DivideBySum(sum); }
__device__ __forceinline__ DivideByDoubleSum divider(double sum) { return {sum}; }

/// A lane's share of one row of scores: vectors lane, lane + 32, ... of kCount elements. kMasked:
/// there may be a mask beside the causal one.
template <int kCount, bool kMasked, class S, class G>
struct RowOfScores {
  using T = Compute<S>;
  /// Vectors kept in registers. Rarer rows (masked or odd ones, ranges without a reciprocal) keep
  /// none: their code would be most of the library.
  static constexpr bool kKeeps = !kMasked && std::is_same_v<G, ReciprocalGrid>;
  static constexpr int kKept = kKeeps ? kKeptElements / kCount : 0;
  static constexpr int kSlots = kKeeps ? kKept : 1;
  static constexpr T kHidden = -INFINITY;

  const S* scores;
  MaskRow<T> mask;
  const G& grid;

  template <class P>
  __device__ RowOfScores(const SoftmaxOperands<S, P>& op, int64_t index, const G& grid)
      : scores(op.scores + index * op.shape.keys), mask(op.mask.row(op.shape, index)), grid(grid) {
    if constexpr (!kMasked) {
      mask.visible = nullptr;
      mask.added = nullptr;
    }
  }

  __device__ int lane() const { return threadIdx.x % kWarp; }
  /// Vectors of which any key may be seen.
  __device__ int seen_vectors() const { return (mask.end + kCount - 1) / kCount; }
  /// Makes those of a vector's elements `value` that lie past the row's end.
  template <class V>
  __device__ __forceinline__ void fill_past_end(V (&values)[kCount], int vector, V value) const {
    if ((vector + 1) * kCount <= mask.end) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (vector * kCount + i >= mask.end) values[i] = value;
    }
  }
  /// A vector of a row of scores or gradients; 0 where no key of it is seen.
  __device__ Vector<S, kCount> load(const S* from, int vector) const {
    Vector<S, kCount> values{};
    if (vector < seen_vectors() && mask.sees_any(vector * kCount, kCount)) {
      values = load_vector<kCount>(from + int64_t{vector} * kCount);
    }
    return values;
  }
  __device__ Vector<S, kCount> load(int vector) const { return load(scores, vector); }

  /// Whether the exponential or probability is that of a hidden key: those before the row's end are
  /// marked by -1, which no other has.
  __device__ bool hidden(T e, int key) const { return kMasked ? e < T(0) : key >= mask.end; }
  /// e^(score - largest).
  __device__ static T exponential(T score, T largest) {
    const T e = exp(score - largest);
    return kMasked && score == kHidden ? T(-1) : e;
  }

  /// What the softmax takes: quantized and masked scores, kHidden where the key is not seen.
  __device__ void mask_scores(const Vector<S, kCount>& values, int vector, T (&to)[kCount]) const {
    T quantized[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      quantized[i] = fake_quantize_element(widen(values.values[i]), grid);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int key = vector * kCount + i;
      to[i] = !kMasked ? quantized[i] : mask.sees(key) ? mask.apply(quantized[i], key) : kHidden;
    }
    fill_past_end(to, vector, kHidden);
  }

  /// Calls visit(position, vector) for the vectors that are kept and may be seen, and
  /// visit_rest(vector) for those that are not kept. All lanes of a warp step together.
  template <class Visit, class VisitRest>
  __device__ void for_each(const Visit& visit, const VisitRest& visit_rest) const {
    const int seen = seen_vectors();
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (i * kWarp < seen) visit(i, i * kWarp + lane());
    }
    for (int vector = kKept * kWarp + lane(); vector < seen; vector += kWarp) visit_rest(vector);
  }
};

/// Zeros from a vector of a row on, each of the warp's lanes some.
template <int kCount, class S>
__device__ __forceinline__ void store_zeros(S* row, int vector, int64_t keys) {
  for (vector += threadIdx.x % kWarp; vector < keys / kCount; vector += kWarp) {
    store_vector(row + int64_t{vector} * kCount, Vector<S, kCount>{});
  }
}

template <int kCount, bool kMasked, class S, class P, class G>
__device__ __forceinline__ void forward_row(const SoftmaxOperands<S, P>& op, int64_t index,
                                            const G& scores_grid, const G& probabilities_grid,
                                            S* out, Compute<S>* statistics) {
  using T = Compute<S>;
  using Row = RowOfScores<kCount, kMasked, S, G>;
  const int64_t keys = op.shape.keys;
  const Row row(op, index, scores_grid);
  Vector<S, kCount> raw[Row::kSlots];
  T kept[Row::kSlots][kCount];
  T largest = Row::kHidden;
  row.for_each([&](int i, int vector) { raw[i] = row.load(vector); }, [](int) {});
  row.for_each(
      [&](int i, int vector) {
        row.mask_scores(raw[i], vector, kept[i]);
#pragma unroll
        for (int j = 0; j < kCount; ++j) largest = detail::larger(largest, kept[i][j]);
      },
      [&](int vector) {
        T values[kCount];
        row.mask_scores(row.load(vector), vector, values);
#pragma unroll
        for (int j = 0; j < kCount; ++j) largest = detail::larger(largest, values[j]);
      });
  largest = warp_max(largest);

  T sum = 0;
  const auto add_exponentials = [&](T(&values)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] = Row::exponential(values[j], largest);
      sum += kMasked && values[j] < T(0) ? T(0) : values[j];
    }
  };
  row.for_each([&](int i, int) { add_exponentials(kept[i]); },
               [&](int vector) {
                 T values[kCount];
                 row.mask_scores(row.load(vector), vector, values);
                 add_exponentials(values);
               });
  sum = warp_sum(sum);
  if (row.lane() == 0) {
    statistics[2 * index] = largest;
    statistics[2 * index + 1] = sum;
  }

  out += index * keys;
  const auto by_sum = divider(sum);
  const auto store = [&](int vector, const T(&exponentials)[kCount]) {
    if (vector >= row.seen_vectors()) return;
    Vector<S, kCount> values;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const T probability = by_sum(exponentials[j]);
      const T quantized = fake_quantize_element(probability, probabilities_grid);
      values.values[j] = narrow<S>(kMasked && exponentials[j] < T(0) ? T(0) : quantized);
    }
    row.fill_past_end(values.values, vector, narrow<S>(T(0)));
    store_vector(out + int64_t{vector} * kCount, values);
  };
  row.for_each([&](int i, int vector) { store(vector, kept[i]); },
               [&](int vector) {
                 T values[kCount];
                 row.mask_scores(row.load(vector), vector, values);
#pragma unroll
                 for (int j = 0; j < kCount; ++j) values[j] = Row::exponential(values[j], largest);
                 store(vector, values);
               });
  store_zeros<kCount>(out, row.seen_vectors(), keys);
}

template <int kCount, bool kMasked, class S, class P, class G>
__device__ __forceinline__ void backward_row(const SoftmaxOperands<S, P>& op, int64_t index,
                                             const G& scores_grid, const G& probabilities_grid,
                                             const S* grad, const Compute<S>* statistics,
                                             S* dscores, SumsPair<double>& sums) {
  using T = Compute<S>;
  using Row = RowOfScores<kCount, kMasked, S, G>;
  const int64_t keys = op.shape.keys;
  const Row row(op, index, scores_grid);
  const T largest = statistics[2 * index];
  const auto by_sum = divider(statistics[2 * index + 1]);
  grad += index * keys;

  // Unquantized probabilities, -1 where hidden, and the gradients of them.
  const auto probabilities_of = [&](const Vector<S, kCount>& raw, const Vector<S, kCount>& upstream,
                                    int vector, T(&probabilities)[kCount], T(&gradients)[kCount],
                                    Sums<T>& partial) {
    row.mask_scores(raw, vector, probabilities);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const T e = Row::exponential(probabilities[j], largest);
      const bool hidden = row.hidden(e, vector * kCount + j);
      const T probability = by_sum(e);
      probabilities[j] = hidden ? e : probability;
      const auto term =
          fake_quantize_element_backward(hidden ? T(0) : widen(upstream.values[j]),
                                         hidden ? T(0) : probability, probabilities_grid);
      gradients[j] = term.x;
      add(partial, term);
    }
  };
  Vector<S, kCount> raw[Row::kSlots], upstream[Row::kSlots];
  T probabilities[Row::kSlots][kCount], gradients[Row::kSlots][kCount];
  T dot = 0;
  Sums<T> partial{};
  row.for_each(
      [&](int i, int vector) {
        raw[i] = row.load(vector);
        upstream[i] = row.load(grad, vector);
      },
      [](int) {});
  row.for_each(
      [&](int i, int vector) {
        probabilities_of(raw[i], upstream[i], vector, probabilities[i], gradients[i], partial);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
          dot += gradients[i][j] * probabilities[i][j];
        }
      },
      [&](int vector) {
        T p[kCount], g[kCount];
        Sums<T> of_vector{};
        probabilities_of(row.load(vector), row.load(grad, vector), vector, p, g, of_vector);
        add(sums.after, of_vector);
#pragma unroll
        for (int j = 0; j < kCount; ++j) dot += g[j] * p[j];
      });
  add(sums.after, partial);
  dot = warp_sum(dot);

  partial = {};
  const auto finish_vector = [&](const Vector<S, kCount>& scores, int vector, const T(&p)[kCount],
                                 const T(&g)[kCount], Sums<T>& to) {
    Vector<S, kCount> values;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      // A hidden score, which may be NaN, adds to no sum.
      const bool hidden = row.hidden(p[j], vector * kCount + j);
      const auto term =
          fake_quantize_element_backward(hidden ? T(0) : detail::softmax_gradient(p[j], g[j], dot),
                                         hidden ? T(0) : widen(scores.values[j]), scores_grid);
      values.values[j] = narrow<S>(term.x);
      add(to, term);
    }
    if (dscores != nullptr && vector < row.seen_vectors()) {
      store_vector(dscores + index * keys + int64_t{vector} * kCount, values);
    }
  };
  row.for_each(
      [&](int i, int vector) {
        // Read again, from the cache: registers are scarcer.
        finish_vector(row.load(vector), vector, probabilities[i], gradients[i], partial);
      },
      [&](int vector) {
        const auto scores = row.load(vector);
        T p[kCount], g[kCount];
        Sums<T> ignored{}, of_vector{};
        probabilities_of(scores, row.load(grad, vector), vector, p, g, ignored);
        finish_vector(scores, vector, p, g, of_vector);
        add(sums.before, of_vector);
      });
  add(sums.before, partial);
  if (dscores != nullptr) store_zeros<kCount>(dscores + index * keys, row.seen_vectors(), keys);
}

/// The rows of this thread's warp: calls body(row).
template <class S, class P, class Body>
__device__ __forceinline__ void for_each_row(const SoftmaxPlan& plan,
                                             const SoftmaxOperands<S, P>& op, const Body& body) {
  const int64_t warp = blockIdx.x * int64_t{kSoftmaxThreads / kWarp} + threadIdx.x / kWarp;
  const int64_t first = warp * plan.rows_per_warp;
  const int64_t last = min(first + plan.rows_per_warp, op.shape.rows());
  for (int64_t row = first; row < last; ++row) body(row);
}

template <int kCount, bool kMasked, class S, class P>
__global__ void __launch_bounds__(kSoftmaxThreads, kSoftmaxForwardBlocks)
    softmax_forward(SoftmaxPlan plan, SoftmaxOperands<S, P> op, S* __restrict__ out,
                    Compute<S>* __restrict__ statistics) {
  const auto grids = make_block_grids<Compute<S>>(op.scores_quantizer, op.probabilities_quantizer);
  with_fast_divisions(grids, [&](const auto& scores_grid, const auto& probabilities_grid) {
    for_each_row(plan, op, [&](int64_t row) {
      forward_row<kCount, kMasked>(op, row, scores_grid, probabilities_grid, out, statistics);
    });
  });
}

template <int kCount, bool kMasked, class S, class P>
__global__ void __launch_bounds__(kSoftmaxThreads, kSoftmaxBlocks)
    softmax_backward(SoftmaxPlan plan, SoftmaxOperands<S, P> op, const S* __restrict__ grad,
                     const Compute<S>* __restrict__ statistics, S* __restrict__ dscores,
                     RangeGradientsPair<Compute<S>, P> gradients) {
  allow_overlap();
  const auto grids = make_block_grids<Compute<S>>(op.scores_quantizer, op.probabilities_quantizer);
  SumsPair<double> sums{};
  with_fast_divisions(grids, [&](const auto& scores_grid, const auto& probabilities_grid) {
    for_each_row(plan, op, [&](int64_t row) {
      backward_row<kCount, kMasked>(op, row, scores_grid, probabilities_grid, grad, statistics,
                                    dscores, sums);
    });
  });
  store_block_sums<kSoftmaxThreads>(gradients, sums);
}

/// Calls launch(width, masked), two compile-time constants, for the kernel that serves a call.
template <class S, class P, class Launch>
void select_kernel(const SoftmaxPlan& plan, const SoftmaxOperands<S, P>& operands,
                   const Launch& launch) {
  using Width = std::integral_constant<int, kWidth<S, true>>;
  const bool masked = operands.mask.visible != nullptr || operands.mask.added != nullptr;
  if (!plan.vectorized) {
    launch(std::integral_constant<int, 1>{}, std::true_type{});
  } else if (masked) {
    launch(Width{}, std::true_type{});
  } else {
    launch(Width{}, std::false_type{});
  }
}

}  // namespace

template <class S, class P>
void launch_softmax_forward(const SoftmaxPlan& plan, const SoftmaxOperands<S, P>& operands, S* out,
                            Compute<S>* statistics, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  select_kernel(plan, operands, [&](auto width, auto masked) {
    softmax_forward<width(), masked()>
        <<<blocks, kSoftmaxThreads, 0, stream>>>(plan, operands, out, statistics);
  });
}

template <class S, class P>
void launch_softmax_backward(const SoftmaxPlan& plan, const SoftmaxOperands<S, P>& operands,
                             const S* grad, const Compute<S>* statistics, S* dscores,
                             double* workspace, cudaStream_t stream) {
  const auto gradients = make_range_gradients<Compute<S>>(
      operands.scores_quantizer, operands.probabilities_quantizer, workspace, plan.blocks);
  const auto blocks = static_cast<unsigned>(plan.blocks);
  if (blocks > 0) {
    select_kernel(plan, operands, [&](auto width, auto masked) {
      softmax_backward<width(), masked()><<<blocks, kSoftmaxThreads, 0, stream>>>(
          plan, operands, grad, statistics, dscores, gradients);
    });
  }
  launch_finish(gradients, plan.overlaps, stream);
}

#define ASYMQ_INSTANTIATE(S, P)                                                              \
  template void launch_softmax_forward(const SoftmaxPlan&, const SoftmaxOperands<S, P>&, S*, \
                                       Compute<S>*, cudaStream_t);                           \
  template void launch_softmax_backward(const SoftmaxPlan&, const SoftmaxOperands<S, P>&,    \
                                        const S*, const Compute<S>*, S*, double*, cudaStream_t);
ASYMQ_INSTANTIATE(float, float)
ASYMQ_INSTANTIATE(__half, float)
ASYMQ_INSTANTIATE(__nv_bfloat16, float)
ASYMQ_INSTANTIATE(double, float)
ASYMQ_INSTANTIATE(double, double)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
