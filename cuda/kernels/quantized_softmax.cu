// Quantized softmax, forward and backward: one pass each. A warp takes a row, keeps what it can of
// it in registers and computes the rest again; keys that causality or a window hides are never
// read, but for the rest of a vector.
//
// For a hidden key, too, everything is computed, and 0 then selected in its place: a branch per
// element would make the elements of a vector wait for each other.
#include "kernels/device.cuh"
#include "kernels/quantized_softmax.h"
#include "kernels/quantizer_pair.cuh"

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

/// A lane's share of one row of scores: vectors lane, lane + 32, ... of kCount elements, from the
/// first that is seen on. kMasked:
/// there may be a mask beside the causal one.
template <int kCount, bool kMasked, class S, class G>
struct RowOfScores {
  using T = Compute<S>;
  /// Vectors kept in registers. Rarer rows (odd ones, ranges without a reciprocal) keep none: their
  /// code would be most of the library.
  static constexpr bool kKeeps = kCount > 1 && std::is_same_v<G, ReciprocalGrid>;
  static constexpr int kKept = kKeeps ? kKeptElements / kCount : 0;
  static constexpr int kSlots = kKeeps ? kKept : 1;
  static constexpr T kHidden = -INFINITY;
  static constexpr unsigned kAll = (1u << kCount) - 1;

  const S* scores;
  MaskRow<T> mask;
  const G& grid;
  unsigned kept_seen = 0;  ///< `seen` of the kept vectors, one after the other

  template <class P>
  __device__ RowOfScores(const SoftmaxOperands<S, P>& op, int64_t index, const G& grid)
      : scores(op.scores + index * op.shape.keys), mask(op.mask.row(op.shape, index)), grid(grid) {
#pragma unroll
    for (int i = 0; i < kKept; ++i)
      kept_seen |= seen(first_vector() + i * kWarp + lane()) << (i * kCount);
  }

  __device__ int lane() const { return threadIdx.x % kWarp; }
  /// Vectors from the first to seen_vectors() - 1 have keys that may be seen.
  __device__ int first_vector() const { return mask.begin / kCount; }
  __device__ int seen_vectors() const { return (mask.end + kCount - 1) / kCount; }

  /// Which keys of a vector are seen: bit i is that of element i.
  __device__ unsigned seen(int vector) const {
    const int before_end = mask.end - vector * kCount;
    unsigned bits = before_end >= kCount ? kAll : before_end <= 0 ? 0 : (1u << before_end) - 1;
    if (vector == first_vector()) bits &= kAll << mask.begin % kCount;
    if constexpr (kMasked) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if ((bits >> i & 1) && !mask.sees(vector * kCount + i)) bits &= ~(1u << i);
      }
    }
    return bits;
  }

  /// A vector of a row of scores or gradients; 0 where no key of it is seen.
  __device__ Vector<S, kCount> load(const S* from, int vector, unsigned seen) const {
    Vector<S, kCount> values{};
    if (seen != 0) values = load_vector<kCount>(from + int64_t{vector} * kCount);
    return values;
  }

  /// Makes hidden elements `value`.
  template <class V>
  __device__ __forceinline__ static void hide(V (&values)[kCount], unsigned seen, V value) {
    if (seen == kAll) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = seen >> i & 1 ? values[i] : value;
  }

  /// What the softmax takes: quantized and masked scores, kHidden where the key is not seen.
  __device__ void mask_scores(const Vector<S, kCount>& values, int vector, unsigned seen,
                              T (&to)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      to[i] = fake_quantize_element(widen(values.values[i]), grid);
    }
    if (kMasked && mask.added != nullptr) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (seen >> i & 1) to[i] = mask.apply(to[i], vector * kCount + i);
      }
    }
    hide(to, seen, kHidden);
  }

  /// Calls visit(position, vector, seen) for the vectors that are kept and may be seen, and
  /// visit_rest(vector, seen) for those that are not kept. All lanes of a warp step together.
  template <class Visit, class VisitRest>
  __device__ void for_each(const Visit& visit, const VisitRest& visit_rest) const {
    const int first = first_vector(), vectors = seen_vectors();
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      if (first + i * kWarp < vectors)
        visit(i, first + i * kWarp + lane(), kept_seen >> (i * kCount) & kAll);
    }
    for (int vector = first + kKept * kWarp + lane(); vector < vectors; vector += kWarp) {
      visit_rest(vector, seen(vector));
    }
  }
};

/// Zeros in the vectors of a row of which no key is seen, each of the warp's lanes some.
template <int kCount, class S, class Row>
__device__ __forceinline__ void store_zeros(S* to, const Row& row, int64_t keys) {
  const auto store = [&](int first, int64_t last) {
    for (int vector = first + row.lane(); vector < last; vector += kWarp) {
      store_vector(to + int64_t{vector} * kCount, Vector<S, kCount>{});
    }
  };
  store(0, row.first_vector());
  store(row.seen_vectors(), keys / kCount);
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
  row.for_each(
      [&](int i, int vector, unsigned seen) { raw[i] = row.load(row.scores, vector, seen); },
      [](int, unsigned) {});
  const auto masked = [&](int vector, unsigned seen, T(&values)[kCount]) {
    row.mask_scores(row.load(row.scores, vector, seen), vector, seen, values);
  };
  const auto find_largest = [&](const T(&values)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) largest = detail::larger(largest, values[j]);
  };
  row.for_each(
      [&](int i, int vector, unsigned seen) {
        row.mask_scores(raw[i], vector, seen, kept[i]);
        find_largest(kept[i]);
      },
      [&](int vector, unsigned seen) {
        T values[kCount];
        masked(vector, seen, values);
        find_largest(values);
      });
  largest = warp_max(largest);

  T sum = 0;
  // Hidden keys add nothing. A row without any keeps its sum of 0.
  const T subtracted = largest == Row::kHidden ? T(0) : largest;
  const auto add_exponentials = [&](T(&values)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values[j] = exp(values[j] - subtracted);
      sum += values[j];
    }
  };
  row.for_each([&](int i, int, unsigned) { add_exponentials(kept[i]); },
               [&](int vector, unsigned seen) {
                 T values[kCount];
                 masked(vector, seen, values);
                 add_exponentials(values);
               });
  sum = warp_sum(sum);
  if (row.lane() == 0) {
    statistics[2 * index] = largest;
    statistics[2 * index + 1] = sum;
  }

  out += index * keys;
  const auto by_sum = divider(sum);
  const auto store = [&](int vector, unsigned seen, const T(&exponentials)[kCount]) {
    if (vector >= row.seen_vectors()) return;
    Vector<S, kCount> values;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      values.values[j] =
          narrow<S>(fake_quantize_element(by_sum(exponentials[j]), probabilities_grid));
    }
    Row::hide(values.values, seen, narrow<S>(T(0)));
    store_vector(out + int64_t{vector} * kCount, values);
  };
  row.for_each([&](int i, int vector, unsigned seen) { store(vector, seen, kept[i]); },
               [&](int vector, unsigned seen) {
                 T values[kCount];
                 masked(vector, seen, values);
#pragma unroll
                 for (int j = 0; j < kCount; ++j) values[j] = exp(values[j] - subtracted);
                 store(vector, seen, values);
               });
  store_zeros<kCount>(out, row, keys);
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
  // A row without any key has no largest score.
  const T largest = statistics[2 * index];
  const T subtracted = largest == Row::kHidden ? T(0) : largest;
  const auto by_sum = divider(statistics[2 * index + 1]);
  grad += index * keys;

  // Unquantized probabilities, and the gradients of them: 0 where hidden.
  const auto probabilities_of = [&](const Vector<S, kCount>& raw, const Vector<S, kCount>& upstream,
                                    int vector, unsigned seen, T(&probabilities)[kCount],
                                    T(&gradients)[kCount], Sums<T>& partial) {
    row.mask_scores(raw, vector, seen, probabilities);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const T probability = by_sum(exp(probabilities[j] - subtracted));
      const bool hidden = !(seen >> j & 1);
      probabilities[j] = hidden ? T(0) : probability;
      const auto term = fake_quantize_element_backward(hidden ? T(0) : widen(upstream.values[j]),
                                                       probabilities[j], probabilities_grid);
      gradients[j] = term.x;
      add(partial, term);
    }
  };
  T dot = 0;
  const auto add_to_dot = [&](const T(&p)[kCount], const T(&g)[kCount]) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) dot += g[j] * p[j];
  };
  Vector<S, kCount> raw[Row::kSlots], upstream[Row::kSlots];
  T probabilities[Row::kSlots][kCount], gradients[Row::kSlots][kCount];
  Sums<T> partial{};
  row.for_each(
      [&](int i, int vector, unsigned seen) {
        raw[i] = row.load(row.scores, vector, seen);
        upstream[i] = row.load(grad, vector, seen);
      },
      [](int, unsigned) {});
  row.for_each(
      [&](int i, int vector, unsigned seen) {
        probabilities_of(raw[i], upstream[i], vector, seen, probabilities[i], gradients[i],
                         partial);
        add_to_dot(probabilities[i], gradients[i]);
      },
      [&](int vector, unsigned seen) {
        T p[kCount], g[kCount];
        Sums<T> of_vector{};
        probabilities_of(row.load(row.scores, vector, seen), row.load(grad, vector, seen), vector,
                         seen, p, g, of_vector);
        add(sums.after, of_vector);
        add_to_dot(p, g);
      });
  add(sums.after, partial);
  dot = warp_sum(dot);

  partial = {};
  const auto finish_vector = [&](const Vector<S, kCount>& scores, int vector, unsigned seen,
                                 const T(&p)[kCount], const T(&g)[kCount], Sums<T>& to) {
    Vector<S, kCount> values;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      // A hidden score, which may be NaN, adds to no sum.
      const bool hidden = !(seen >> j & 1);
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
      [&](int i, int vector, unsigned seen) {
        // Read again, from the cache: registers are scarcer.
        finish_vector(row.load(row.scores, vector, seen), vector, seen, probabilities[i],
                      gradients[i], partial);
      },
      [&](int vector, unsigned seen) {
        const auto scores = row.load(row.scores, vector, seen);
        T p[kCount], g[kCount];
        Sums<T> ignored{}, of_vector{};
        probabilities_of(scores, row.load(grad, vector, seen), vector, seen, p, g, ignored);
        finish_vector(scores, vector, seen, p, g, of_vector);
        add(sums.before, of_vector);
      });
  add(sums.before, partial);
  if (dscores != nullptr) store_zeros<kCount>(dscores + index * keys, row, keys);
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
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
