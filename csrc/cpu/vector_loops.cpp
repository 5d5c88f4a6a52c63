#include "cpu/vector_loops.h"

#include <bit>
#include <limits>

#include "asymq/detail/softmax.h"

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

template <class T>
ASYMQ_HOST_DEVICE void codes_run_impl(const T* x, T* out, int64_t n, Grid<T> grid,
                                      CodeRange<T> codes) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = quantize_element(x[i], grid, codes.first, codes.last);
  }
}

template <class T>
ASYMQ_HOST_DEVICE void codes_row_impl(const T* x, T* out, int64_t n, GridColumns<T> grids,
                                      CodeRange<T> codes) {
  const T *scale = grids.scale, *lower = grids.lower;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Grid<T> grid{scale[i], lower[i], T(0)};
    out[i] = quantize_element(x[i], grid, codes.first, codes.last);
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

/// Maps the bits of a floating number to an integer of the same order, and back. A NaN lies beyond
/// the infinity of its sign, so that it is an extremum itself.
template <class I>
ASYMQ_HOST_DEVICE I ordered(I bits) {
  return bits ^ ((bits >> (8 * sizeof(I) - 1)) & std::numeric_limits<I>::max());
}

/// S has as many bits as the signed integer I.
template <class I, class S>
ASYMQ_HOST_DEVICE Extrema<S> extrema_run_impl(const S* x, int64_t n) {
  I low = std::numeric_limits<I>::max(), high = std::numeric_limits<I>::min();
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int64_t i = 0; i < n; ++i) {
    const I key = ordered(std::bit_cast<I>(x[i]));
    low = key < low ? key : low;
    high = key > high ? key : high;
  }
  return {std::bit_cast<S>(ordered(low)), std::bit_cast<S>(ordered(high))};
}

template <class Half>
ASYMQ_HOST_DEVICE Extrema<float> extrema_run_impl(const Half* x, int64_t n,
                                                  float (*convert)(uint16_t)) {
  const Extrema<uint16_t> found = extrema_run_impl<int16_t>(bits(x), n);
  return {convert(found.min), convert(found.max)};
}

constexpr int kLanes = 16;  // partial results of a row, so that the loops vectorize

/// A reduction of term(0) to term(n - 1).
template <class T, class Combine, class Term>
ASYMQ_HOST_DEVICE T reduce(T first, int64_t n, const Combine& combine, const Term& term) {
  T lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = first;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = combine(lanes[lane], term(i + lane));
  }
  for (int lane = 0; i + lane < n; ++lane) lanes[lane] = combine(lanes[lane], term(i + lane));
  T result = first;
  for (const T lane : lanes) result = combine(result, lane);
  return result;
}

template <class T>
ASYMQ_HOST_DEVICE T largest_run_impl(const T* x, int64_t n) {
  return reduce(
      -std::numeric_limits<T>::infinity(), n,
      [](T a, T b) __attribute__((always_inline)) { return detail::larger(a, b); },
      [x](int64_t i) __attribute__((always_inline)) { return x[i]; });
}

template <class T, class Term>
ASYMQ_HOST_DEVICE T sum_of(int64_t n, const Term& term) {
  return reduce(
      T(0), n, [](T a, T b) __attribute__((always_inline)) { return a + b; }, term);
}

template <class T>
ASYMQ_HOST_DEVICE T sum_run_impl(const T* x, int64_t n) {
  return sum_of<T>(
      n, [x](int64_t i) __attribute__((always_inline)) { return x[i]; });
}

template <class T>
ASYMQ_HOST_DEVICE void softmax_gradient_run_impl(const T* probability, T* gradient, int64_t n) {
  const T dot = sum_of<T>(
      n, [=](int64_t i) __attribute__((always_inline)) { return gradient[i] * probability[i]; });
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    gradient[i] = detail::softmax_gradient(probability[i], gradient[i], dot);
  }
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

ASYMQ_CPU_DISPATCH void codes_run(const float* x, float* out, int64_t n, Grid<float> grid,
                                  CodeRange<float> codes) {
  codes_run_impl(x, out, n, grid, codes);
}

ASYMQ_CPU_DISPATCH void codes_run(const double* x, double* out, int64_t n, Grid<double> grid,
                                  CodeRange<double> codes) {
  codes_run_impl(x, out, n, grid, codes);
}

ASYMQ_CPU_DISPATCH void codes_row(const float* x, float* out, int64_t n, GridColumns<float> grids,
                                  CodeRange<float> codes) {
  codes_row_impl(x, out, n, grids, codes);
}

ASYMQ_CPU_DISPATCH void codes_row(const double* x, double* out, int64_t n,
                                  GridColumns<double> grids, CodeRange<double> codes) {
  codes_row_impl(x, out, n, grids, codes);
}

ASYMQ_CPU_DISPATCH Extrema<float> extrema_run(const float* x, int64_t n) {
  return extrema_run_impl<int32_t>(x, n);
}

ASYMQ_CPU_DISPATCH Extrema<double> extrema_run(const double* x, int64_t n) {
  return extrema_run_impl<int64_t>(x, n);
}

ASYMQ_CPU_DISPATCH Extrema<float> extrema_run(const c10::BFloat16* x, int64_t n) {
  return extrema_run_impl(x, n, c10::detail::f32_from_bits);
}

ASYMQ_CPU_DISPATCH Extrema<float> extrema_run(const c10::Half* x, int64_t n) {
  return extrema_run_impl(x, n, c10::detail::fp16_ieee_to_fp32_value);
}

ASYMQ_CPU_DISPATCH float largest_run(const float* x, int64_t n) { return largest_run_impl(x, n); }

ASYMQ_CPU_DISPATCH float sum_run(const float* x, int64_t n) { return sum_run_impl(x, n); }

ASYMQ_CPU_DISPATCH void subtract_run(float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) x[i] -= value;
}

ASYMQ_CPU_DISPATCH void divide_run(float* x, int64_t n, float value) {
  for (int64_t i = 0; i < n; ++i) x[i] /= value;
}

ASYMQ_CPU_DISPATCH void softmax_gradient_run(const float* probability, float* gradient, int64_t n) {
  softmax_gradient_run_impl(probability, gradient, n);
}

ASYMQ_CPU_DISPATCH double largest_run(const double* x, int64_t n) { return largest_run_impl(x, n); }

ASYMQ_CPU_DISPATCH double sum_run(const double* x, int64_t n) { return sum_run_impl(x, n); }

ASYMQ_CPU_DISPATCH void subtract_run(double* x, int64_t n, double value) {
  for (int64_t i = 0; i < n; ++i) x[i] -= value;
}

ASYMQ_CPU_DISPATCH void divide_run(double* x, int64_t n, double value) {
  for (int64_t i = 0; i < n; ++i) x[i] /= value;
}

ASYMQ_CPU_DISPATCH void softmax_gradient_run(const double* probability, double* gradient,
                                             int64_t n) {
  softmax_gradient_run_impl(probability, gradient, n);
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
