// The range that calibration starts from, of tensor operations: it is run once, not per step.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "asymq/fake_quantize.h"
#include "ops/checks.h"

namespace asymq {
namespace {

/// Where no more than this share of the larger end, a difference is rounding.
constexpr double kRounding = 1e-6;

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> range_of_extrema(const at::Tensor& min,
                                                                const at::Tensor& max, int64_t bits,
                                                                bool symmetric, bool force_zero,
                                                                double fallback, double eps,
                                                                bool full_range) {
  constexpr Where where{"range_of_extrema"};
  check_bits(where, bits);
  check_positive(where, "fallback", fallback);
  check_positive(where, "eps", eps);
  check_ends(where, min, max);
  TORCH_CHECK(min.scalar_type() == at::kFloat || min.scalar_type() == at::kDouble, where,
              ": min must be float32 or float64, got ", min.scalar_type());
  at::Tensor low = min.detach(), high = max.detach();
  TORCH_CHECK(symmetric || !full_range, where, ": full_range needs symmetric");
  const double least_width = (grid_steps<double>(static_cast<int>(bits)) + full_range) * eps;
  if (symmetric) {
    high = at::maximum(-low, high);
    const at::Tensor empty = high.eq(0);
    high = at::where(empty, fallback, high);
    const at::Tensor narrow = high.lt(least_width / 2);
    high = high.clamp_min(least_width / 2);
    return {-high, high, empty.logical_or(narrow)};
  }
  // Values that do not vary say nothing but their distance from 0.
  const at::Tensor with_zero =
      force_zero ? at::ones_like(low, low.options().dtype(at::kBool))
                 : (high - low).le(at::maximum(low.abs(), high.abs()) * kRounding);
  low = at::where(with_zero, low.clamp_max(0), low);
  high = at::where(with_zero, high.clamp_min(0), high);
  const at::Tensor empty = high.eq(low);
  low = at::where(empty, -fallback, low);
  high = at::where(empty, fallback, high);
  const at::Tensor least_high = low + least_width;
  return {low, at::maximum(high, least_high), empty.logical_or(high.lt(least_high))};
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("range_of_extrema", range_of_extrema);
}

}  // namespace asymq
