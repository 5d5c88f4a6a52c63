// Innermost loops of the CPU kernels over contiguous elements, compiled for several instruction
// sets and chosen at load time. Half types are widened block by block into these.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "asymq/live_range.h"

namespace asymq::cpu {

/// Grids of adjacent ranges, structure of arrays: element j of a row belongs to range j.
template <class T>
struct GridColumns {
  const T* scale;
  const T* lower;
  const T* upper;

  /// The same from a later column on.
  GridColumns from(int64_t columns) const {
    return {scale + columns, lower + columns, upper + columns};
  }
  Grid<T> first() const { return {*scale, *lower, *upper}; }
};

/// Sums of adjacent ranges, structure of arrays.
template <class T>
struct SumColumns {
  T* inside;
  T* below;
  T* above;
};

/// Sums are gathered in the compute type over at most this many terms each, then added in double:
/// longer float runs miss the accuracy that constant terms need.
constexpr int64_t kTermsPerSum = 32;

/// Elements that one call of backward_run may take: its 16 sums of kTermsPerSum terms.
constexpr int64_t kSumsPerRun = 16;
constexpr int64_t kMaxRun = kSumsPerRun * kTermsPerSum;

// forward_*: out[i] = fake_quantize(x[i]).
// backward_*: dx[i], and the terms of the sums added to `sums`. Either may be null: not wanted.
// *_run: all n elements in one range; backward_run takes n <= kMaxRun.
// *_row: element i in range i.
void forward_run(const float* x, float* out, int64_t n, Grid<float> grid);
void forward_run(const double* x, double* out, int64_t n, Grid<double> grid);
void forward_row(const float* x, float* out, int64_t n, GridColumns<float> grids);
void forward_row(const double* x, double* out, int64_t n, GridColumns<double> grids);
void backward_run(const float* grad, const float* x, float* dx, int64_t n, Grid<float> grid,
                  Sums<double>* sums);
void backward_run(const double* grad, const double* x, double* dx, int64_t n, Grid<double> grid,
                  Sums<double>* sums);
void backward_row(const float* grad, const float* x, float* dx, int64_t n, GridColumns<float> grids,
                  SumColumns<float> sums);
void backward_row(const double* grad, const double* x, double* dx, int64_t n,
                  GridColumns<double> grids, SumColumns<double> sums);

/// out[i] = the code of x[i], in the compute type.
void codes_run(const float* x, float* out, int64_t n, Grid<float> grid, CodeRange<float> codes);
void codes_run(const double* x, double* out, int64_t n, Grid<double> grid, CodeRange<double> codes);
void codes_row(const float* x, float* out, int64_t n, GridColumns<float> grids,
               CodeRange<float> codes);
void codes_row(const double* x, double* out, int64_t n, GridColumns<double> grids,
               CodeRange<double> codes);

/// The extrema of n > 0 elements.
Extrema<float> extrema_run(const float* x, int64_t n);
Extrema<double> extrema_run(const double* x, int64_t n);
Extrema<float> extrema_run(const c10::BFloat16* x, int64_t n);
Extrema<float> extrema_run(const c10::Half* x, int64_t n);

// Of a softmax's row. Sums are in a fixed order, whatever the vector width.
/// The largest number among n elements; -infinity of none. A NaN is passed over.
float largest_run(const float* x, int64_t n);
double largest_run(const double* x, int64_t n);
float sum_run(const float* x, int64_t n);
double sum_run(const double* x, int64_t n);
/// x[i] -= value, x[i] /= value.
void subtract_run(float* x, int64_t n, float value);
void subtract_run(double* x, int64_t n, double value);
void divide_run(float* x, int64_t n, float value);
void divide_run(double* x, int64_t n, double value);
/// Gradients of a softmax's output, in place, become those of its input.
void softmax_gradient_run(const float* probability, float* gradient, int64_t n);
void softmax_gradient_run(const double* probability, double* gradient, int64_t n);

void widen(const c10::BFloat16* from, float* to, int64_t n);
void widen(const c10::Half* from, float* to, int64_t n);
void narrow(const float* from, c10::BFloat16* to, int64_t n);
void narrow(const float* from, c10::Half* to, int64_t n);

}  // namespace asymq::cpu
