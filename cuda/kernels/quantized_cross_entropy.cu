// Quantized cross-entropy, forward and backward: a block takes a row and reads it once.
#include "kernels/quantized_cross_entropy.h"

#include "kernels/logits.cuh"
#include "kernels/quantizer_pair.cuh"

namespace asymq::cuda {
namespace {

constexpr int kUnroll = 4;  // vectors in flight per thread

template <class S, class P>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks)
    cross_entropy_forward(CrossEntropyOperands<S> op, QuantizerPointers<P> quantizer,
                          Compute<S>* __restrict__ losses, Compute<S>* __restrict__ statistics) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const int64_t index = blockIdx.x;
  const S* const row = op.logits + index * op.columns;
  const int64_t label = op.labels[index];
  if (label == op.ignore_index) {
    if (threadIdx.x == 0) losses[index] = statistics[2 * index] = statistics[2 * index + 1] = 0;
    return;
  }
  const auto grid = make_block_grid<T>(quantizer.kind, quantizer.ranges, 0);
  with_fast_division(grid, [&](const auto& fast) {
    SumOfExponentials<T> state;
    for_each_piece<kCount, kUnroll>(
        row, op.classes, op.vectorized,
        [&](int offset, auto pieces) {
          constexpr int kPieces = decltype(pieces)::value;
          Vector<S, kCount> raw[kPieces];
          T values[kPieces * kCount];
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
            raw[u] = load_vector<kCount>(row + offset + u * kLossThreads * kCount);
          }
#pragma unroll
          for (int i = 0; i < kPieces * kCount; ++i) {
            values[i] = fake_quantize_element(widen(raw[i / kCount].values[i % kCount]), fast);
          }
          state.add(values);
        },
        [&](int offset) {
          const T values[1] = {fake_quantize_element(widen(row[offset]), fast)};
          state.add(values);
        });
    state = reduce_block(state);
    if (threadIdx.x != 0) return;
    const T log_sum = log(state.sum);
    statistics[2 * index] = state.largest;
    statistics[2 * index + 1] = log_sum;
    losses[index] = op.is_class(label)
                        ? log_sum - (fake_quantize_element(widen(row[label]), fast) - state.largest)
                        : T(NAN);
  });
}

template <class S, class P>
__global__ void __launch_bounds__(kLossThreads, kLossBlocks)
    cross_entropy_backward(CrossEntropyOperands<S> op, QuantizerPointers<P> quantizer,
                           const Compute<S>* __restrict__ grad,
                           const Compute<S>* __restrict__ statistics, S* __restrict__ dlogits,
                           RangeGradients<Compute<S>, P> gradients) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>;
  const int64_t index = blockIdx.x;
  const S* const row = op.logits + index * op.columns;
  S* const to = dlogits == nullptr ? nullptr : dlogits + index * op.columns;
  const int64_t label = op.labels[index];
  const bool ignored = label == op.ignore_index;
  const T g = op.is_class(label) ? grad[index] : T(NAN);
  const T largest = statistics[2 * index], log_sum = statistics[2 * index + 1];
  RowSums<T> sums;
  const auto grid = make_block_grid<T>(quantizer.kind, quantizer.ranges, 0);
  with_fast_division(grid, [&](const auto& fast) {
    const auto element = [&](S raw, int offset) {
      const T x = widen(raw);
      const T probability = exp(fake_quantize_element(x, fast) - largest - log_sum);
      const T gradient = g * (probability - (offset == label ? T(1) : T(0)));
      const auto term = fake_quantize_element_backward(ignored ? T(0) : gradient, x, fast);
      add(sums.partial, term);
      return narrow<S>(term.x);
    };
    for_each_piece<kCount, kUnroll>(
        row, op.classes, op.vectorized,
        [&](int offset, auto pieces) {
          constexpr int kPieces = decltype(pieces)::value;
          Vector<S, kCount> values[kPieces];
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
            values[u] = load_vector<kCount>(row + offset + u * kLossThreads * kCount);
          }
#pragma unroll
          for (int u = 0; u < kPieces; ++u) {
            const int first = offset + u * kLossThreads * kCount;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
              values[u].values[i] = element(values[u].values[i], first + i);
            }
            if (to != nullptr) store_vector(to + first, values[u]);
          }
          sums.end_of(kPieces);
        },
        [&](int offset) {
          const S value = element(row[offset], offset);
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
void launch_cross_entropy_forward(const CrossEntropyOperands<S>& operands,
                                  const QuantizerPointers<P>& quantizer, Compute<S>* losses,
                                  Compute<S>* statistics, cudaStream_t stream) {
  cross_entropy_forward<<<static_cast<unsigned>(operands.rows), kLossThreads, 0, stream>>>(
      operands, quantizer, losses, statistics);
}

template <class S, class P>
void launch_cross_entropy_backward(const CrossEntropyOperands<S>& operands,
                                   const QuantizerPointers<P>& quantizer, const Compute<S>* grad,
                                   const Compute<S>* statistics, S* dlogits, double* workspace,
                                   bool overlaps, cudaStream_t stream) {
  const auto gradients = make_range_gradients<Compute<S>>(quantizer, workspace, operands.rows);
  if (operands.rows > 0) {
    cross_entropy_backward<<<static_cast<unsigned>(operands.rows), kLossThreads, 0, stream>>>(
        operands, quantizer, grad, statistics, dlogits, gradients);
  }
  launch_finish(gradients, overlaps, stream);
}

#define ASYMQ_INSTANTIATE(S, P)                                                               \
  template void launch_cross_entropy_forward(const CrossEntropyOperands<S>&,                  \
                                             const QuantizerPointers<P>&, Compute<S>*,        \
                                             Compute<S>*, cudaStream_t);                      \
  template void launch_cross_entropy_backward(const CrossEntropyOperands<S>&,                 \
                                              const QuantizerPointers<P>&, const Compute<S>*, \
                                              const Compute<S>*, S*, double*, bool, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
