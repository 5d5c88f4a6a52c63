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
  GluRowQuantizers<P> quantizers;
  const S* grad;
  const S* gate;
  const S* up;
  S* out;
  S* up_out;
  Sums<double>* partials;  ///< of gate, activation, up and product, each plan.blocks
};

/// One of the quantizers before the product, as every element meets it.
template <class S, class G>
struct Site {
  using T = Compute<S>;
  bool exists;
  G grid;

  __device__ __forceinline__ T quantize(T value) const {
    // Without a branch, so that `backward` has the quotient already.
    const T quantized = rounded<S>(fake_quantize_element(value, grid));
    return exists ? quantized : value;
  }

  __device__ __forceinline__ T backward(T grad, T value, Sums<T>& sums) const {
    const auto term = fake_quantize_element_backward(grad, value, grid);
    add(sums, term);
    return exists ? term.x : grad;
  }
};

template <class S, class G>
struct Sites {
  Site<S, G> gate, activation, up;
};

/// None of them.
template <class S>
struct NoSites {
  struct None {
    using T = Compute<S>;
    __device__ __forceinline__ T quantize(T value) const { return value; }
    __device__ __forceinline__ T backward(T grad, T, Sums<T>&) const { return grad; }
  };
  None gate, activation, up;
};

/// Calls body(sites) in the form that divides fastest.
template <bool kInner, class S, class P, class Body>
__device__ __forceinline__ void with_sites(const GluRowQuantizers<P>& quantizers,
                                           const Body& body) {
  using T = Compute<S>;
  if constexpr (!kInner) {
    body(NoSites<S>{});
  } else {
    const auto site = [](const RowQuantizer<P>& quantizer) -> Site<S, Grid<T>> {
      if (quantizer.ends == Ends::kNone) return {false, {T(1), T(0), T(0)}};
      return {true, make_grid<T>(quantizer.kind, quantizer.ranges.load(0))};
    };
    const auto gate = site(quantizers.gate), activation = site(quantizers.activation);
    const auto up = site(quantizers.up);
    if constexpr (std::is_same_v<T, float>) {
      if (has_reciprocal(gate.grid) && has_reciprocal(activation.grid) && has_reciprocal(up.grid)) {
        return body(Sites<S, ReciprocalGrid>{{gate.exists, make_reciprocal(gate.grid)},
                                             {activation.exists, make_reciprocal(activation.grid)},
                                             {up.exists, make_reciprocal(up.grid)}});
      }
    }
    body(Sites<S, Grid<T>>{gate, activation, up});
  }
}

/// What comes before the product's quantizer, of one element.
template <bool kTanh, class S, class Sites>
struct Product {
  using T = Compute<S>;
  T gate, sigmoid, activated, activation, up, product;  ///< the product is not rounded yet

  __device__ __forceinline__ Product(T given_gate, T given_up, const Sites& sites)
      : gate(sites.gate.quantize(given_gate)),
        sigmoid(Gate<kTanh, S>::sigmoid(gate)),
        activated(rounded<S>(gate * sigmoid)),
        activation(sites.activation.quantize(activated)),
        up(sites.up.quantize(given_up)),
        product(activation * up) {}
};

template <bool kTanh, bool kInner, class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 1) glu_forward(Glu<S, P> op) {
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>, kHeld = kGluVectors<kInner>;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizers.product);
  const int taken = plan.team * kHeld;  // vectors of a row that its team takes at a time
  with_sites<kInner, S>(op.quantizers, [&](const auto& sites) {
    using SitesType = std::decay_t<decltype(sites)>;
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
              [&](int, T gate, T up) {
                return Product<kTanh, S, SitesType>(gate, up, sites).product;
              },
              gate[u], up[u]);
        }
      };
      const bool once = plan.vectors <= taken;
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
        if (!once || !range.of_token()) multiply(begin);
        const auto store = [&](const auto& quantize) {
#pragma unroll
          for (int u = 0; u < kHeld; ++u) {
            const int at = begin + team.rank() + u * plan.team;
            if (at >= vectors) continue;
            store_words<S, true>(op.out + offset + at * kCount, quantize(products[u]));
          }
        };
        if (range.exists()) {
          with_fast_division(range.grid(), [&](const auto& grid) {
            store([&](const Words<S, true>& words) {
              return map_words<S>([&](int, T value) { return fake_quantize_element(value, grid); },
                                  words);
            });
          });
        } else {
          store([](const Words<S, true>& words) { return words; });
        }
      }
    }
  });
}

template <bool kTanh, bool kInner, class S, class P>
__global__ void __launch_bounds__(kTeamThreads, 1) glu_backward(Glu<S, P> op) {
  allow_overlap();
  using T = Compute<S>;
  constexpr int kCount = kWidth<S, true>, kHeld = kGluVectors<kInner>;
  const RowPlan& plan = op.plan;
  Team team(plan);
  RowRange<T, P> range(op.quantizers.product);
  const int taken = plan.team * kHeld;
  Sums<double> of_gate{}, of_activation{}, of_up{};
  with_sites<kInner, S>(op.quantizers, [&](const auto& sites) {
    using SitesType = std::decay_t<decltype(sites)>;
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
      const bool once = plan.vectors <= taken;
      if (range.of_token()) {
        Search<S, true> search;
        for (int begin = 0; begin < plan.vectors; begin += taken) {
          load(begin);
#pragma unroll
          for (int u = 0; u < kHeld; ++u) {
            if (begin + team.rank() + u * plan.team >= vectors) continue;
            search.include_vector(map_words<S>(
                [&](int, T gate, T up) {
                  return Product<kTanh, S, SitesType>(gate, up, sites).product;
                },
                gate[u], up[u]));
          }
        }
        range.find(team.extrema(search.result()));
      }
      Sums<T> sums_gate{}, sums_activation{}, sums_up{}, sums{};
      const auto differentiate = [&](int begin, const auto& quantize) {
        if (!once || !range.of_token()) load(begin);
#pragma unroll
        for (int u = 0; u < kHeld; ++u) {
          const int at = begin + team.rank() + u * plan.team;
          if (at >= vectors) continue;
          Words<S, true> dgate, dup;
          map_words_to<S>(
              dgate, dup,
              [&](T g, T given_gate, T given_up) -> Two<T> {
                const Product<kTanh, S, SitesType> of(given_gate, given_up, sites);
                const T dproduct = quantize(g, rounded<S>(of.product));
                const T dactivated =
                    sites.activation.backward(dproduct * of.up, of.activated, sums_activation);
                const T dgated = dactivated * Gate<kTanh, S>::slope(of.gate, of.sigmoid);
                return {sites.gate.backward(dgated, given_gate, sums_gate),
                        sites.up.backward(dproduct * of.activation, given_up, sums_up)};
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
      if constexpr (kInner) {
        add(of_gate, sums_gate);
        add(of_activation, sums_activation);
        add(of_up, sums_up);
      }
    }
  });
  const auto store = [&](const RowQuantizer<P>& quantizer, const Sums<double>& sums, int place) {
    if (quantizer.learns()) store_row_sums(sums, op.partials + place * plan.blocks);
  };
  if constexpr (kInner) {
    store(op.quantizers.gate, of_gate, 0);
    store(op.quantizers.activation, of_activation, 1);
    store(op.quantizers.up, of_up, 2);
  }
  store(op.quantizers.product, range.total(), 3);
}

// A block for each quantizer.
template <class S, class P>
__global__ void __launch_bounds__(kFinishThreads) glu_finish(Glu<S, P> op) {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
  const auto& [gate, activation, up, product] = op.quantizers;
  const RowQuantizer<P>& quantizer = blockIdx.x == 0   ? gate
                                     : blockIdx.x == 1 ? activation
                                     : blockIdx.x == 2 ? up
                                                       : product;
  if (!quantizer.learns()) return;
  finish_row_sums<Compute<S>>(quantizer, op.partials + blockIdx.x * op.plan.blocks, op.plan.blocks);
}

template <bool kBackward, bool kTanh, bool kInner, class S, class P>
void launch_kernel(const Glu<S, P>& op, cudaStream_t stream) {
  const auto kernel =
      kBackward ? glu_backward<kTanh, kInner, S, P> : glu_forward<kTanh, kInner, S, P>;
  kernel<<<static_cast<unsigned>(op.plan.blocks), op.plan.threads, 0, stream>>>(op);
}

template <bool kBackward, class S, class P>
void launch(const Glu<S, P>& op, bool tanh, cudaStream_t stream) {
  if (op.plan.blocks == 0) return;
  const auto kernel = op.quantizers.inner() ? tanh ? launch_kernel<kBackward, true, true, S, P>
                                                   : launch_kernel<kBackward, false, true, S, P>
                      : tanh ? launch_kernel<kBackward, true, false, S, P>
                                            : launch_kernel<kBackward, false, false, S, P>;
  kernel(op, stream);
}

}  // namespace

template <class S, class P>
void launch_glu_forward(const RowPlan& plan, const GluRowQuantizers<P>& quantizers, bool tanh,
                        const S* gate, const S* up, S* out, cudaStream_t stream) {
  launch<false>(Glu<S, P>{plan, quantizers, nullptr, gate, up, out}, tanh, stream);
}

template <class S, class P>
void launch_glu_backward(const RowPlan& plan, const GluRowQuantizers<P>& quantizers, bool tanh,
                         const S* grad, const S* gate, const S* up, S* dgate, S* dup,
                         double* workspace, cudaStream_t stream) {
  const Glu<S, P> op{plan, quantizers, grad, gate,
                     up,   dgate,      dup,  reinterpret_cast<Sums<double>*>(workspace)};
  launch<true>(op, tanh, stream);
  const auto& [of_gate, of_activation, of_up, of_product] = quantizers;
  if (of_gate.learns() || of_activation.learns() || of_up.learns() || of_product.learns()) {
    launch_overlapping<glu_finish<S, P>>(4, kFinishThreads, plan.overlaps && plan.blocks > 0,
                                         stream, op);
  }
}

#define ASYMQ_INSTANTIATE(S, P)                                                                 \
  template void launch_glu_forward(const RowPlan&, const GluRowQuantizers<P>&, bool, const S*,  \
                                   const S*, S*, cudaStream_t);                                 \
  template void launch_glu_backward(const RowPlan&, const GluRowQuantizers<P>&, bool, const S*, \
                                    const S*, const S*, S*, S*, double*, cudaStream_t);
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
