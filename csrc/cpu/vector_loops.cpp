#include "cpu/vector_loops.h"

// Baseline x86-64 has no vector rounding instruction. Other architectures have one in their
// baseline, and sanitizers instrument the resolvers that run before they are ready.
#if defined(__x86_64__) && !defined(ASYMQ_NO_CPU_DISPATCH)
#define ASYMQ_CPU_DISPATCH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define ASYMQ_CPU_DISPATCH
#endif

namespace asymq::cpu {
namespace {

template <class T>
ASYMQ_HOST_DEVICE void forward_run_impl(const T* x, T* out, int64_t n, Grid<T> grid) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = fake_quantize_element(x[i], grid);
}

template <class T>
ASYMQ_HOST_DEVICE void forward_row_impl(const T* x, T* out, int64_t n, GridColumns<T> grids) {
  // Plain pointers: the compiler does not vectorise loads through the struct.
  const T *scale = grids.scale, *lower = grids.lower, *upper = grids.upper;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = fake_quantize_element(x[i], Grid<T>{scale[i], lower[i], upper[i]});
  }
}

// The number of partial sums is fixed, whatever the vector width: results do not depend on the
// processor.
template <bool kInput, bool kSums, class T>
ASYMQ_HOST_DEVICE void backward_run_impl(const T* grad, const T* x, T* dx, int64_t n, Grid<T> grid,
                                         Sums<double>* sums) {
  T inside[kSumsPerRun] = {}, below[kSumsPerRun] = {}, above[kSumsPerRun] = {};
  const auto add = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const ElementGradient<T> term = fake_quantize_element_backward(grad[i], x[i], grid);
    if constexpr (kSums) {
      inside[lane] += term.x * term.rounding;
      below[lane] += term.below;
      above[lane] += term.above;
    }
    if constexpr (kInput) dx[i] = term.x;
  };
  int64_t i = 0;
  for (; i + kSumsPerRun <= n; i += kSumsPerRun) {
#pragma omp simd
    for (int64_t lane = 0; lane < kSumsPerRun; ++lane) add(i + lane, lane);
  }
  for (int64_t lane = 0; i + lane < n; ++lane) add(i + lane, lane);
  if constexpr (kSums) {
    Sums<double> run{};
    for (int64_t lane = 0; lane < kSumsPerRun; ++lane) {
      run.inside += inside[lane];
      run.below += below[lane];
      run.above += above[lane];
    }
    sums->inside += run.inside;
    sums->below += run.below;
    sums->above += run.above;
  }
}

template <class T>
ASYMQ_HOST_DEVICE void backward_run_select(const T* grad, const T* x, T* dx, int64_t n,
                                           Grid<T> grid, Sums<double>* sums) {
  if (dx == nullptr) {
    backward_run_impl<false, true>(grad, x, dx, n, grid, sums);
  } else if (sums == nullptr) {
    backward_run_impl<true, false>(grad, x, dx, n, grid, sums);
  } else {
    backward_run_impl<true, true>(grad, x, dx, n, grid, sums);
  }
}

template <bool kInput, bool kSums, class T>
ASYMQ_HOST_DEVICE void backward_row_impl(const T* grad, const T* x, T* dx, int64_t n,
                                         GridColumns<T> grids, SumColumns<T> sums) {
  const T *scale = grids.scale, *lower = grids.lower, *upper = grids.upper;
  T *inside = sums.inside, *below = sums.below, *above = sums.above;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Grid<T> grid{scale[i], lower[i], upper[i]};
    const ElementGradient<T> term = fake_quantize_element_backward(grad[i], x[i], grid);
    if constexpr (kSums) {
      inside[i] += term.x * term.rounding;
      below[i] += term.below;
      above[i] += term.above;
    }
    if constexpr (kInput) dx[i] = term.x;
  }
}

template <class T>
ASYMQ_HOST_DEVICE void backward_row_select(const T* grad, const T* x, T* dx, int64_t n,
                                           GridColumns<T> grids, SumColumns<T> sums) {
  if (dx == nullptr) {
    backward_row_impl<false, true>(grad, x, dx, n, grids, sums);
  } else if (sums.inside == nullptr) {
    backward_row_impl<true, false>(grad, x, dx, n, grids, sums);
  } else {
    backward_row_impl<true, true>(grad, x, dx, n, grids, sums);
  }
}

/// Lanes enough to hide the latency of comparisons.
constexpr int64_t kExtremaLanes = 64;

template <class T>
ASYMQ_HOST_DEVICE Extrema<T> extrema_run_impl(const T* x, int64_t n) {
  const T first = x[0];
  T low[kExtremaLanes], high[kExtremaLanes], nan[kExtremaLanes];
  for (int64_t lane = 0; lane < kExtremaLanes; ++lane) low[lane] = high[lane] = nan[lane] = first;
  // Comparisons pass over a NaN, so that it is kept apart.
  const auto see = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    low[lane] = x[i] < low[lane] ? x[i] : low[lane];
    high[lane] = x[i] > high[lane] ? x[i] : high[lane];
    nan[lane] = x[i] == x[i] ? nan[lane] : x[i];
  };
  int64_t i = 0;
  for (; i + kExtremaLanes <= n; i += kExtremaLanes) {
#pragma omp simd
    for (int64_t lane = 0; lane < kExtremaLanes; ++lane) see(i + lane, lane);
  }
  for (int64_t lane = 0; i + lane < n; ++lane) see(i + lane, lane);
  Extrema<T> all{first, first};
  for (int64_t lane = 0; lane < kExtremaLanes; ++lane) {
    all.min = low[lane] < all.min ? low[lane] : all.min;
    all.max = high[lane] > all.max ? high[lane] : all.max;
    if (nan[lane] != nan[lane]) return {nan[lane], nan[lane]};
  }
  return all;
}

template <class Half>
const uint16_t* bits(const Half* values) {
  return reinterpret_cast<const uint16_t*>(values);
}

template <class Half>
uint16_t* bits(Half* values) {
  return reinterpret_cast<uint16_t*>(values);
}

// On the bits, because the compiler does not vectorise loops over c10's half classes.
template <class From, class To>
ASYMQ_HOST_DEVICE void convert_impl(const From* from, To* to, int64_t n, To (*convert)(From)) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = convert(from[i]);
}

}  // namespace

ASYMQ_CPU_DISPATCH void forward_run(const float* x, float* out, int64_t n, Grid<float> grid) {
  forward_run_impl(x, out, n, grid);
}

ASYMQ_CPU_DISPATCH void forward_run(const double* x, double* out, int64_t n, Grid<double> grid) {
  forward_run_impl(x, out, n, grid);
}

ASYMQ_CPU_DISPATCH void forward_row(const float* x, float* out, int64_t n,
                                    GridColumns<float> grids) {
  forward_row_impl(x, out, n, grids);
}

ASYMQ_CPU_DISPATCH void forward_row(const double* x, double* out, int64_t n,
                                    GridColumns<double> grids) {
  forward_row_impl(x, out, n, grids);
}

ASYMQ_CPU_DISPATCH void backward_run(const float* grad, const float* x, float* dx, int64_t n,
                                     Grid<float> grid, Sums<double>* sums) {
  backward_run_select(grad, x, dx, n, grid, sums);
}

ASYMQ_CPU_DISPATCH void backward_run(const double* grad, const double* x, double* dx, int64_t n,
                                     Grid<double> grid, Sums<double>* sums) {
  backward_run_select(grad, x, dx, n, grid, sums);
}

ASYMQ_CPU_DISPATCH void backward_row(const float* grad, const float* x, float* dx, int64_t n,
                                     GridColumns<float> grids, SumColumns<float> sums) {
  backward_row_select(grad, x, dx, n, grids, sums);
}

ASYMQ_CPU_DISPATCH void backward_row(const double* grad, const double* x, double* dx, int64_t n,
                                     GridColumns<double> grids, SumColumns<double> sums) {
  backward_row_select(grad, x, dx, n, grids, sums);
}

ASYMQ_CPU_DISPATCH Extrema<float> extrema_run(const float* x, int64_t n) {
  return extrema_run_impl(x, n);
}

ASYMQ_CPU_DISPATCH Extrema<double> extrema_run(const double* x, int64_t n) {
  return extrema_run_impl(x, n);
}

ASYMQ_CPU_DISPATCH void widen(const c10::BFloat16* from, float* to, int64_t n) {
  convert_impl(bits(from), to, n, c10::detail::f32_from_bits);
}

ASYMQ_CPU_DISPATCH void widen(const c10::Half* from, float* to, int64_t n) {
  convert_impl(bits(from), to, n, c10::detail::fp16_ieee_to_fp32_value);
}

ASYMQ_CPU_DISPATCH void narrow(const float* from, c10::BFloat16* to, int64_t n) {
  convert_impl(from, bits(to), n, c10::detail::round_to_nearest_even);
}

ASYMQ_CPU_DISPATCH void narrow(const float* from, c10::Half* to, int64_t n) {
  convert_impl(from, bits(to), n, c10::detail::fp16_ieee_from_fp32_value);
}

}  // namespace asymq::cpu
