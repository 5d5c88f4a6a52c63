// The quantized gated linear unit: one pass over gate and up each way. Where the product's range is
// that of its row, the row stays in registers until it is known; longer rows are read again.
#include "kernels/quantized_glu.h"
#include "kernels/rows.cuh"

namespace asymq::cuda {
namespace {

// e^x; less exact where the result is rounded to 16 bits anyway.
template <class S>
__device__ __forceinline__ Compute<S> exponential(Compute<S> x) {
  if constexpr (sizeof(S) == 2) {
    return __expf(x);
  } else {
    return exp(x);
  }
}

/// x·σ(z) and its derivative, which cost one exponential and cancel nowhere: SiLU with z = x, or
/// GELU's tanh approximation, x/2 · (1 + tanh(z/2)), with z = 2·√(2/π)·(x + 0.044715·x³).
template <bool kTanh, class S>
struct Gate {
  using T = Compute<S>;
  static constexpr T kLinear = T(2 * 0.79788456080286535588);
  static constexpr T kCubic = T(0.044715) * kLinear;

  /// Far out it makes no difference, and no infinity meets a 0.
  static __device__ __forceinline__ T squared(T x) {
    const T square = x * x;
    return square < T(1e30) ? square : T(1e30);
  }

  static __device__ __forceinline__ T sigmoid(T x) {
    const T z = kTanh ? x * fma(kCubic, squared(x), kLinear) : x;
    return reciprocal(T(1) + exponential<S>(-z));
  }

  /// The derivative at x, where σ is `sigmoid`.
  static __device__ __forceinline__ T slope(T x, T sigmoid) {
    const T inner = kTanh ? fma(T(3) * kCubic, squared(x), kLinear) : T(1);
    return fma(x * sigmoid * (T(1) - sigmoid), inner, sigmoid);
  }
};

/// Operands of a call. Forward, `out` is the result; backward, dgate, and `up_out` is dup.
template <class S, class P>
struct Glu {
  RowPlan plan;
  RowQuantizer<P> quantizer;
  const S* grad;
  const S* gate;
  const S* up;
  S* out;
  S* up_out;
  Sums<double>* partials;  ///< plan.blocks
};

/// What comes before the quantizer, of one element.
template <bool kTanh, class S>
struct Product {
  using T = Compute<S>;
  T sigmoid, activation, product;  ///< the product is not rounded yet

  __device__ __forceinline__ Product(T gate, T up)
      : sigmoid(Gate<kTanh, S>::sigmoid(gate)),
        activation(rounded<S>(gate * sigmoid)),
        product(activation * up) {}
};

template <bool kTanh, class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 1) glu_forward(Glu<S, P> op) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>, kHeld = kGluVectors;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizer);
  const int taken = plan.team * kHeld;  // vectors of a row that its team takes at a time
  for (int64_t first = blockIdx.x * int64_t{plan.teams()}; first < plan.rows;
       first += gridDim.x * int64_t{plan.teams()}) {
    const int64_t row = first + team.index();
    const int64_t offset = row * plan.vectors * kCount;
    const int vectors = row < plan.rows ? plan.vectors : 0;
    Words<S, true> products[kHeld];
    const auto multiply = [&](int begin) {
      Words<S, true> gate[kHeld], up[kHeld];
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int at = begin + team.rank() + u * plan.team;
        if (at >= vectors) continue;
        gate[u] = load_words<S, true>(op.gate + offset + at * kCount);
        up[u] = load_words<S, true>(op.up + offset + at * kCount);
      }
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        if (begin + team.rank() + u * plan.team >= vectors) continue;
        products[u] = map_words<S>(
            [](int, T gate, T up) { return Product<kTanh, S>(gate, up).product; }, gate[u], up[u]);
      }
    };
    const bool held = range.of_token() && plan.vectors <= taken;
    if (range.of_token()) {
      Search<S, true> search;
      for (int begin = 0; begin < plan.vectors; begin += taken) {
        multiply(begin);
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          if (begin + team.rank() + u * plan.team < vectors) search.include_vector(products[u]);
        }
      }
      range.find(team.extrema(search.result()));
    }
    for (int begin = 0; begin < plan.vectors; begin += taken) {
      if (!held) multiply(begin);
      with_quantizer<S>(range, [&](const auto& quantize) {
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int at = begin + team.rank() + u * plan.team;
          if (at >= vectors) continue;
          store_words<S, true>(op.out + offset + at * kCount, quantize(products[u]));
        }
      });
    }
  }
}

template <bool kTanh, class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 1) glu_backward(Glu<S, P> op) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>, kHeld = kGluVectors;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizer);
  const int taken = plan.team * kHeld;
  for (int64_t first = blockIdx.x * int64_t{plan.teams()}; first < plan.rows;
       first += gridDim.x * int64_t{plan.teams()}) {
    const int64_t row = first + team.index();
    const int64_t offset = row * plan.vectors * kCount;
    const int vectors = row < plan.rows ? plan.vectors : 0;
    Words<S, true> gate[kHeld], up[kHeld], grad[kHeld];
    const auto load = [&](int begin) {
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int at = begin + team.rank() + u * plan.team;
        if (at >= vectors) continue;
        gate[u] = load_words<S, true>(op.gate + offset + at * kCount);
        up[u] = load_words<S, true>(op.up + offset + at * kCount);
        grad[u] = load_words<S, true>(op.grad + offset + at * kCount);
      }
    };
    const bool held = range.of_token() && plan.vectors <= taken;
    if (range.of_token()) {
      Search<S, true> search;
      for (int begin = 0; begin < plan.vectors; begin += taken) {
        load(begin);
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          if (begin + team.rank() + u * plan.team >= vectors) continue;
          search.include_vector(
              map_words<S>([](int, T gate, T up) { return Product<kTanh, S>(gate, up).product; },
                           gate[u], up[u]));
        }
      }
      range.find(team.extrema(search.result()));
    }
    Sums<T> sums{};
    const auto differentiate = [&](int begin, const auto& quantize) {
      if (!held) load(begin);
#pragma unroll
      for (int u = 0; u < kHeld; ++u) {
        const int at = begin + team.rank() + u * plan.team;
        if (at >= vectors) continue;
        Words<S, true> dgate, dup;
        map_words_to<S>(
            dgate, dup,
            [&](T g, T gate, T up) -> Two<T> {
              const Product<kTanh, S> of(gate, up);
              const T dproduct = quantize(g, rounded<S>(of.product));
              return {dproduct * up * Gate<kTanh, S>::slope(gate, of.sigmoid),
                      dproduct * of.activation};
            },
            grad[u], gate[u], up[u]);
        if (op.out != nullptr) store_words<S, true>(op.out + offset + at * kCount, dgate);
        if (op.up_out != nullptr) store_words<S, true>(op.up_out + offset + at * kCount, dup);
      }
    };
    for (int begin = 0; begin < plan.vectors; begin += taken) {
      if (range.exists()) {
        with_fast_division(range.grid(), [&](const auto& grid) {
          differentiate(begin, [&](T g, T product) {
            const auto term = fake_quantize_element_backward(g, product, grid);
            add(sums, term);
            return term.x;
          });
        });
      } else {
        differentiate(begin, [](T g, T) { return g; });
      }
    }
    if (vectors > 0) range.add_row(sums);
  }
  if (op.quantizer.learns()) store_row_sums(range.total(), op.partials);
}

template <class S, class P>
__global__ void __launch_bounds__(kFinishThreads) glu_finish(Glu<S, P> op) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  finish_row_sums<Compute<S>>(op.quantizer, op.partials, op.plan.blocks);
}

template <class S, class P>
using Kernel = void (*)(Glu<S, P>);

template <class S, class P>
void launch(Kernel<S, P> kernel, const Glu<S, P>& op, cudaStream_t stream) {
  if (op.plan.blocks == 0) return;
  kernel<<<static_cast<unsigned>(op.plan.blocks), op.plan.threads, 0, stream>>>(op);
}

}  // namespace

template <class S, class P>
void launch_glu_forward(const RowPlan& plan, const RowQuantizer<P>& product, bool tanh,
                        const S* gate, const S* up, S* out, cudaStream_t stream) {
  const Glu<S, P> op{plan, product, nullptr, gate, up, out, nullptr, nullptr};
  launch(tanh ? glu_forward<true, S, P> : glu_forward<false, S, P>, op, stream);
}

template <class S, class P>
void launch_glu_backward(const RowPlan& plan, const RowQuantizer<P>& product, bool tanh,
                         const S* grad, const S* gate, const S* up, S* dgate, S* dup,
                         double* workspace, cudaStream_t stream) {
  const Glu<S, P> op{plan, product, grad, gate,
                     up,   dgate,   dup,  reinterpret_cast<Sums<double>*>(workspace)};
  launch(tanh ? glu_backward<true, S, P> : glu_backward<false, S, P>, op, stream);
  if (product.learns()) {
    launch_overlapping<glu_finish<S, P>>(1, kFinishThreads, plan.overlaps && plan.blocks > 0,
                                         stream, op);
  }
}

#define ASYMQ_INSTANTIATE(S, P)                                                             \
  template void launch_glu_forward(const RowPlan&, const RowQuantizer<P>&, bool, const S*,  \
                                   const S*, S*, cudaStream_t);                             \
  template void launch_glu_backward(const RowPlan&, const RowQuantizer<P>&, bool, const S*, \
                                    const S*, const S*, S*, S*, double*, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
