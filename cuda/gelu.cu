// Quantized GELU, forward and backward: one pass each over a dense tensor.
#include "kernels.h"
#include "quantizer_pair.cuh"

namespace asymq::cuda {
namespace {

// GELU(x) = x/2 · (1 + tanh(√(2/π) · (x + 0.044715·x³))), in the order of torch's own kernel.
template <class T>
struct GeluConstants {
  static constexpr T kInner = T(0.79788456080286535588);  // √(2/π)
  static constexpr T kCubic = T(0.044715);
};

template <class T>
__device__ __forceinline__ T gelu(T x) {
  using C = GeluConstants<T>;
  const T inner = C::kInner * (x + C::kCubic * (x * x * x));
  return T(0.5) * x * (T(1) + tanh(inner));
}

template <class T>
__device__ __forceinline__ T gelu_gradient(T g, T x) {
  using C = GeluConstants<T>;
  const T squared = x * x;
  const T t = tanh(C::kInner * (x + C::kCubic * (squared * x)));
  const T left = T(0.5) * x, right = T(1) + t;
  const T inner_slope = C::kInner * (T(1) + T(3) * C::kCubic * squared);
  return g * (T(0.5) * right + left * (T(1) - t * t) * inner_slope);
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
      return narrow<S>(
          fake_quantize_element(gelu(fake_quantize_element(widen(value), before)), after));
    };
    for_each_window<kSpanUnroll>(plan, blockIdx.x, vectors, [&](int64_t begin, int count) {
      Vector<S, kCount> values[kSpanUnroll];
#pragma unroll
      for (int u = 0; u < kSpanUnroll; ++u) {
        if (u < count) values[u] = load_vector<kCount>(x + (begin + u * kSpanThreads) * kCount);
      }
#pragma unroll
      for (int u = 0; u < kSpanUnroll; ++u) {
        if (u >= count) break;
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
      const T quantized = fake_quantize_element(widen(value), before);
      const auto of_output = fake_quantize_element_backward(widen(g), gelu(quantized), after);
      add(partial.after, of_output);
      const auto of_input = fake_quantize_element_backward(gelu_gradient(of_output.x, quantized),
                                                           widen(value), before);
      add(partial.before, of_input);
      return narrow<S>(of_input.x);
    };
    const auto add_partial = [&](const SumsPair<T>& partial) {
      add(sums.before, partial.before);
      add(sums.after, partial.after);
    };
    for_each_window<kSpanUnroll>(plan, blockIdx.x, vectors, [&](int64_t begin, int count) {
      Vector<S, kCount> grads[kSpanUnroll], values[kSpanUnroll];
#pragma unroll
      for (int u = 0; u < kSpanUnroll; ++u) {
        if (u >= count) break;
        grads[u] = load_vector<kCount>(grad + (begin + u * kSpanThreads) * kCount);
        values[u] = load_vector<kCount>(x + (begin + u * kSpanThreads) * kCount);
      }
      SumsPair<T> partial{};
#pragma unroll
      for (int u = 0; u < kSpanUnroll; ++u) {
        if (u >= count) break;
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
ASYMQ_INSTANTIATE(float, float)
ASYMQ_INSTANTIATE(__half, float)
ASYMQ_INSTANTIATE(__nv_bfloat16, float)
ASYMQ_INSTANTIATE(double, float)
ASYMQ_INSTANTIATE(double, double)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
