// The mathematics of one element, shared by CPU and CUDA. No torch in here.
//
// Everything is written as compare-and-select: NaN then follows the straight path (it counts as
// inside the range) and an infinite gradient outside the range never meets a multiplication by 0.
// CPU and CUDA must agree bit for bit, so both are compiled without contracted multiply-adds.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ASYMQ_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ASYMQ_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace asymq {

/// Rounds half to even, the only rounding the quantizer knows.
template <class T>
ASYMQ_HOST_DEVICE T round_half_even(T value) {
  using std::rint;
  return rint(value);
}

/// Number of steps of a b-bit grid: k = 2^b - 1 (eq. 1).
template <class T>
ASYMQ_HOST_DEVICE T grid_steps(int bits) {
  return static_cast<T>((int64_t{1} << bits) - 1);
}

/// The grid of one range: representable values are scale * i for integers lower <= i <= upper.
/// T is the element's compute type: float, or double for float64 elements.
template <class T>
struct Grid {
  T scale;  ///< effective scale s; NaN if any parameter of the range is NaN
  T lower;  ///< n = rint(z), or -(k-1)/2 if symmetric
  T upper;  ///< p = n + k, or (k-1)/2 if symmetric
};

/// x / s, a true division: x * (1/s) differs near ties.
template <class T>
ASYMQ_HOST_DEVICE T quotient(T x, const Grid<T>& grid) {
  return x / grid.scale;
}

/// A grid for many divisions: `reciprocal` is 1/scale, correctly rounded.
struct ReciprocalGrid : Grid<float> {
  float reciprocal;
};

/// Whether `quotient` of a ReciprocalGrid may stand in for a division on this grid: no remainder
/// that matters underflows, and quotients past 2^127 are outside the range whatever they are.
ASYMQ_HOST_DEVICE bool has_reciprocal(const Grid<float>& grid) {
  using std::fabs;
  return grid.scale >= 0x1p-100f && grid.scale <= 0x1p126f && fabs(grid.lower) < 0x1p126f;
}

ASYMQ_HOST_DEVICE ReciprocalGrid make_reciprocal(const Grid<float>& grid) {
  return {grid, 1.0f / grid.scale};
}

/// x / s rounded as the division rounds it, for five multiply-adds: an estimate, corrected twice by
/// its exact remainder. The remainder's sign is chosen such that -0 stays -0.
ASYMQ_HOST_DEVICE float quotient(float x, const ReciprocalGrid& grid) {
  using std::fabs;
  using std::fma;
  const float estimate = x * grid.reciprocal;
  float result = fma(-fma(estimate, grid.scale, -x), grid.reciprocal, estimate);
  result = fma(-fma(result, grid.scale, -x), grid.reciprocal, result);
  return fabs(estimate) < 0x1p127f ? result : estimate;
}

/// x̂ = s * clip(rint(x / s), n, p) (eq. 1). G is Grid<T> or ReciprocalGrid.
template <class T, class G>
ASYMQ_HOST_DEVICE T fake_quantize_element(T x, const G& grid) {
  T index = round_half_even(quotient(x, grid));
  index = index < grid.lower ? grid.lower : index;
  index = index > grid.upper ? grid.upper : index;
  return grid.scale * index;
}

/// What one element adds to the backward pass.
template <class T>
struct ElementGradient {
  T x;         ///< dL/dx: g inside the range, else 0
  T rounding;  ///< e = rint(x/s) - x/s inside, else 0; the range's sum G_in takes x * rounding
  T below;     ///< g below the range, else 0
  T above;     ///< g above the range, else 0
};

/// Straight-through gradient of fake_quantize_element for an upstream gradient g. Every
/// parameterization's gradient is a linear map of the sums over x * rounding, below and above
/// (parameterization.h).
template <class T, class G>
ASYMQ_HOST_DEVICE ElementGradient<T> fake_quantize_element_backward(T g, T x, const G& grid) {
  const T exact = quotient(x, grid);
  const T index = round_half_even(exact);
  const bool below = index < grid.lower;
  const bool above = index > grid.upper;
  const bool inside = !below && !above;
  return {inside ? g : T(0), inside ? index - exact : T(0), below ? g : T(0), above ? g : T(0)};
}

/// Integer code of x on a grid whose codes are first to last: clip(rint(x/s) - rint(z), first,
/// last). NaN gives 0. The clip comes before any conversion to an integer type. The difference that
/// stands for rint(z) is exact: n = rint(z) + first, where one of the two is 0. G is Grid<T> or
/// ReciprocalGrid.
template <class T, class G>
ASYMQ_HOST_DEVICE T quantize_element(T x, const G& grid, T first, T last) {
  T code = round_half_even(quotient(x, grid)) - (grid.lower - first);
  code = code < first ? first : code;
  code = code > last ? last : code;
  return code == code ? code : T(0);
}

/// The value of a code on its grid: s * (code + origin).
template <class T>
ASYMQ_HOST_DEVICE T dequantize_element(T code, T scale, T origin) {
  return scale * (code + origin);
}

}  // namespace asymq
