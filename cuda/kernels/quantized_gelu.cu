// Quantized GELU, forward and backward: one pass each over a dense tensor.
#include "kernels/quantized_gelu.h"
#include "kernels/quantizer_pair.cuh"

namespace asymq::cuda {
namespace {

/// GELU's tanh approximation, x/2 · (1 + tanh(u)) with u = √(2/π)·(x + 0.044715·x³), and its
/// derivative. It is x·σ(2u), which costs one exponential and cancels nowhere.
template <class T>
struct Gelu {
  T value, slope;

  __device__ __forceinline__ explicit Gelu(T x) {
    constexpr T kLinear = T(2 * 0.79788456080286535588);  // 2·√(2/π)
    constexpr T kCubic = T(0.044715) * kLinear;
    const T squared = x * x;
    const T sigmoid = reciprocal(T(1) + exp(-x * fma(kCubic, squared, kLinear)));
    value = x * sigmoid;
    slope = sigmoid + value * (T(1) - sigmoid) * fma(T(3) * kCubic, squared, kLinear);
  }
};

/// Calls visit(first vector, pieces) for this thread's part of a dense tensor: `pieces` vectors, a
/// compile-time constant, kSpanThreads apart.
template <class Visit>
__device__ __forceinline__ void for_each_piece(const Plan& plan, int64_t vectors,
                                               const Visit& visit) {
  for_each_window<kSpanUnroll>(plan, blockIdx.x, vectors, [&](int64_t begin, int count) {
    if (count == kSpanUnroll) return visit(begin, std::integral_constant<int, kSpanUnroll>{});
    for (int u = 0; u < count; ++u) {
      visit(begin + u * kSpanThreads, std::integral_constant<int, 1>{});
    }
  });
}

template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kSpanThreads)
    gelu_forward(Plan plan, QuantizerPointers<P> input, QuantizerPointers<P> output,
                 const S* __restrict__ x, S* __restrict__ out) {
  constexpr int kCount = kWidth<S, kVectorized>;
  const int64_t vectors = plan.shape.inner / kCount;
  const auto grids = make_block_grids<Compute<S>>(input, output);
  with_fast_divisions(grids, [&](const auto& before, const auto& after) {
    const auto element = [&](S value) {
      const Gelu gelu(fake_quantize_element(widen(value), before));
      return narrow<S>(fake_quantize_element(gelu.value, after));
    };
    for_each_piece(plan, vectors, [&](int64_t begin, auto pieces) {
      constexpr int kPieces = decltype(pieces)::value;
      Vector<S, kCount> values[kPieces];
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        values[u] = load_vector<kCount>(x + (begin + u * kSpanThreads) * kCount);
      }
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) values[u].values[i] = element(values[u].values[i]);
        store_vector(out + (begin + u * kSpanThreads) * kCount, values[u]);
      }
    });
    const int64_t tail = vectors * kCount + threadIdx.x;
    if (blockIdx.x == 0 && tail < plan.shape.inner) out[tail] = element(x[tail]);
  });
}

template <bool kVectorized, class S, class P>
__global__ void __launch_bounds__(kSpanThreads, kSpanBlocks)
    gelu_backward(Plan plan, QuantizerPointers<P> input, QuantizerPointers<P> output,
                  const S* __restrict__ grad, const S* __restrict__ x, S* __restrict__ dx,
                  RangeGradientsPair<Compute<S>, P> gradients) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, kVectorized>;
  const int64_t vectors = plan.shape.inner / kCount;
  SumsPair<double> sums{};
  const auto grids = make_block_grids<T>(input, output);
  with_fast_divisions(grids, [&](const auto& before, const auto& after) {
    const auto element = [&](S g, S value, SumsPair<T>& partial) {
      const Gelu gelu(fake_quantize_element(widen(value), before));
      const auto of_output = fake_quantize_element_backward(widen(g), gelu.value, after);
      add(partial.after, of_output);
      const auto of_input =
          fake_quantize_element_backward(of_output.x * gelu.slope, widen(value), before);
      add(partial.before, of_input);
      return narrow<S>(of_input.x);
    };
    const auto add_partial = [&](const SumsPair<T>& partial) {
      add(sums.before, partial.before);
      add(sums.after, partial.after);
    };
    for_each_piece(plan, vectors, [&](int64_t begin, auto pieces) {
      constexpr int kPieces = decltype(pieces)::value;
      Vector<S, kCount> grads[kPieces], values[kPieces];
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        grads[u] = load_vector<kCount>(grad + (begin + u * kSpanThreads) * kCount);
        values[u] = load_vector<kCount>(x + (begin + u * kSpanThreads) * kCount);
      }
      SumsPair<T> partial{};
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          S& value = values[u].values[i];
          value = element(grads[u].values[i], value, partial);
        }
        if (dx != nullptr) store_vector(dx + (begin + u * kSpanThreads) * kCount, values[u]);
      }
      add_partial(partial);
    });
    const int64_t tail = vectors * kCount + threadIdx.x;
    if (blockIdx.x == 0 && tail < plan.shape.inner) {
      SumsPair<T> partial{};
      const S value = element(grad[tail], x[tail], partial);
      if (dx != nullptr) dx[tail] = value;
      add_partial(partial);
    }
  });
  store_block_sums<kSpanThreads>(gradients, sums);
}

}  // namespace

template <class S, class P>
void launch_gelu_forward(const Plan& plan, const QuantizerPointers<P>& input,
                         const QuantizerPointers<P>& output, const S* x, S* out,
                         cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(plan.blocks);
  const auto kernel = plan.vectorized ? gelu_forward<true, S, P> : gelu_forward<false, S, P>;
  kernel<<<blocks, kSpanThreads, 0, stream>>>(plan, input, output, x, out);
}

template <class S, class P>
void launch_gelu_backward(const Plan& plan, const QuantizerPointers<P>& input,
                          const QuantizerPointers<P>& output, const S* grad, const S* x, S* dx,
                          double* workspace, cudaStream_t stream) {
  const auto gradients = make_range_gradients<Compute<S>>(input, output, workspace, plan.blocks);
  if (plan.blocks > 0) {
    const auto blocks = static_cast<unsigned>(plan.blocks);
    const auto kernel = plan.vectorized ? gelu_backward<true, S, P> : gelu_backward<false, S, P>;
    kernel<<<blocks, kSpanThreads, 0, stream>>>(plan, input, output, grad, x, dx, gradients);
  }
  launch_finish(gradients, plan.overlaps, stream);
}

#define ASYMQ_INSTANTIATE(S, P)                                                                    \
  template void launch_gelu_forward(const Plan&, const QuantizerPointers<P>&,                      \
                                    const QuantizerPointers<P>&, const S*, S*, cudaStream_t);      \
  template void launch_gelu_backward(const Plan&, const QuantizerPointers<P>&,                     \
                                     const QuantizerPointers<P>&, const S*, const S*, S*, double*, \
                                     cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
