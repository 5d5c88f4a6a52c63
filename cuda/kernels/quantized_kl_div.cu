// Quantized Kullback-Leibler divergence, forward and backward: a block takes a row of both logits
// and reads it once.
#include "kernels/quantized_kl_div.h"

#include "kernels/logits.cuh"
#include "kernels/quantizer_pair.cuh"

namespace asymq::cuda {
namespace {

constexpr int kUnroll = 2;  // vectors of either logits in flight per thread

/// Running largest value, and sums of e^(value - largest) and of that times how much the value is
/// above a second one.
template <class T>
struct DifferenceSum {
  T largest = -INFINITY;
  T sum = 0, weighted = 0;

  template <int kCount>
  __device__ __forceinline__ void add(const T (&values)[kCount], const T (&seconds)[kCount]) {
    T most = largest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) most = detail::larger(most, values[i]);
    rescale(most);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const T e = exp(values[i] - most);
      sum += e;
      // A teacher's -inf, a class that it excludes, adds nothing.
      weighted += e == T(0) ? T(0) : e * (values[i] - seconds[i]);
    }
  }

  __device__ __forceinline__ void add(DifferenceSum other) {
    const T most = detail::larger(largest, other.largest);
    rescale(most);
    other.rescale(most);
    sum += other.sum;
    weighted += other.weighted;
  }

  __device__ __forceinline__ DifferenceSum shuffled(int step) const {
    DifferenceSum other;
    other.largest = __shfl_xor_sync(~0u, largest, step);
    other.sum = __shfl_xor_sync(~0u, sum, step);
    other.weighted = __shfl_xor_sync(~0u, weighted, step);
    return other;
  }

 private:
  __device__ __forceinline__ void rescale(T most) {
    if (most != largest) {
      const T factor = exp(largest - most);
      sum *= factor;
      weighted *= factor;
    }
    largest = most;
  }
};

template <class S, class P>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks)
    kl_div_forward(KlDivOperands<S> op, QuantizerPointers<P> quantizer,
                   Compute<S>* __restrict__ losses, Compute<S>* __restrict__ statistics) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const int64_t index = blockIdx.x;
  T* const of_row = statistics + 4 * index;
  if (op.ignores(index)) {
    if (threadIdx.x == 0) losses[index] = of_row[0] = of_row[1] = of_row[2] = of_row[3] = 0;
    return;
  }
  const S* const row = op.logits + index * op.columns;
  const S* const teacher = op.teacher + index * op.teacher_stride;
  const T inverse = T(1) / op.temperature;
  const auto grid = make_block_grid<T>(quantizer.kind, quantizer.ranges, 0);
  with_fast_division(grid, [&](const auto& fast) {
    // With p of the teacher and d = (teacher - student) / temperature, the sum over classes is
    // Σ p·d + log Σ e^student - log Σ e^teacher.
    SumOfExponentials<T> student;
    DifferenceSum<T> of_teacher;
    const auto scaled = [&](S logit) {
      return fake_quantize_element(widen(logit), fast) * inverse;
    };
    for_each_piece<kCount, kUnroll>(
        row, op.classes, op.vectorized,
        [&](int offset, auto pieces) {
          constexpr int kPieces = decltype(pieces)::value;
          Vector<S, kCount> raw[kPieces], raw_teacher[kPieces];
          T x[kPieces * kCount], t[kPieces * kCount];
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
            raw[u] = load_vector<kCount>(row + offset + u * kLossThreads * kCount);
            raw_teacher[u] = load_unaligned<kCount>(teacher + offset + u * kLossThreads * kCount);
          }
#pragma unroll
          for (int i = 0; i < kPieces * kCount; ++i) {
            x[i] = scaled(raw[i / kCount].values[i % kCount]);
            t[i] = widen(raw_teacher[i / kCount].values[i % kCount]) * inverse;
          }
          student.add(x);
          of_teacher.add(t, x);
        },
        [&](int offset) {
          const T x[1] = {scaled(row[offset])}, t[1] = {widen(teacher[offset]) * inverse};
          student.add(x);
          of_teacher.add(t, x);
        });
    student = reduce_block(student);
    of_teacher = reduce_block(of_teacher);
    if (threadIdx.x != 0) return;
    const T log_student = log(student.sum), log_teacher = log(of_teacher.sum);
    of_row[0] = student.largest;
    of_row[1] = log_student;
    of_row[2] = of_teacher.largest;
    of_row[3] = log_teacher;
    // Differences of what is alike first: the loss is small where the logits are.
    const T divergence = of_teacher.weighted / of_teacher.sum +
                         (student.largest - of_teacher.largest) + log(student.sum / of_teacher.sum);
    losses[index] = op.temperature * op.temperature * divergence;
  });
}

template <class S, class P>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks)
    kl_div_backward(KlDivOperands<S> op, QuantizerPointers<P> quantizer,
                    const Compute<S>* __restrict__ grad, const Compute<S>* __restrict__ statistics,
                    S* __restrict__ dlogits, RangeGradients<Compute<S>, P> gradients) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const int64_t index = blockIdx.x;
  const S* const row = op.logits + index * op.columns;
  const S* const teacher = op.teacher + index * op.teacher_stride;
  S* const to = dlogits == nullptr ? nullptr : dlogits + index * op.columns;
  const bool ignored = op.ignores(index);
  const T g = grad[index] * op.temperature;
  const T inverse = T(1) / op.temperature;
  const T* const of_row = statistics + 4 * index;
  const T largest = of_row[0], log_sum = of_row[1];
  const T teacher_largest = of_row[2], teacher_log_sum = of_row[3];
  RowSums<T> sums;
  const auto grid = make_block_grid<T>(quantizer.kind, quantizer.ranges, 0);
  with_fast_division(grid, [&](const auto& fast) {
    const auto element = [&](S raw, S raw_teacher) {
      const T x = widen(raw);
      const T q = exp(fake_quantize_element(x, fast) * inverse - largest - log_sum);
      const T p = exp(widen(raw_teacher) * inverse - teacher_largest - teacher_log_sum);
      const auto term = fake_quantize_element_backward(ignored ? T(0) : g * (q - p), x, fast);
      add(sums.partial, term);
      return narrow<S>(term.x);
    };
    for_each_piece<kCount, kUnroll>(
        row, op.classes, op.vectorized,
        [&](int offset, auto pieces) {
          constexpr int kPieces = decltype(pieces)::value;
          Vector<S, kCount> values[kPieces], of_teacher[kPieces];
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
            values[u] = load_vector<kCount>(row + offset + u * kLossThreads * kCount);
            of_teacher[u] = load_unaligned<kCount>(teacher + offset + u * kLossThreads * kCount);
          }
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              values[u].values[i] = element(values[u].values[i], of_teacher[u].values[i]);
            }
            if (to != nullptr) {
              store_vector(to + offset + u * kLossThreads * kCount, values[u]);
            }
          }
          sums.end_of(kPieces);
        },
        [&](int offset) {
          const S value = element(row[offset], teacher[offset]);
          if (to != nullptr) to[offset] = value;
          sums.flush();
        });
    sums.flush();
  });
  if (to != nullptr) clear_padding(to, op.classes, op.columns);
  store_block_sums<kLossThreads>(gradients, sums.total);
}

}  // namespace

template <class S, class P>
void launch_kl_div_forward(const KlDivOperands<S>& operands, const QuantizerPointers<P>& quantizer,
                           Compute<S>* losses, Compute<S>* statistics, cudaStream_t stream) {
  kl_div_forward<<<static_cast<unsigned>(operands.rows), kLossThreads, 0, stream>>>(
      operands, quantizer, losses, statistics);
}

template <class S, class P>
void launch_kl_div_backward(const KlDivOperands<S>& operands, const QuantizerPointers<P>& quantizer,
                            const Compute<S>* grad, const Compute<S>* statistics, S* dlogits,
                            double* workspace, bool overlaps, cudaStream_t stream) {
  const auto gradients = make_range_gradients<Compute<S>>(quantizer, workspace, operands.rows);
  if (operands.rows > 0) {
    kl_div_backward<<<static_cast<unsigned>(operands.rows), kLossThreads, 0, stream>>>(
        operands, quantizer, grad, statistics, dlogits, gradients);
  }
  launch_finish(gradients, overlaps, stream);
}

#define ASYMQ_INSTANTIATE(S, P)                                                                 \
  template void launch_kl_div_forward(const KlDivOperands<S>&, const QuantizerPointers<P>&,     \
                                      Compute<S>*, Compute<S>*, cudaStream_t);                  \
  template void launch_kl_div_backward(const KlDivOperands<S>&, const QuantizerPointers<P>&,    \
                                       const Compute<S>*, const Compute<S>*, S*, double*, bool, \
                                       cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
