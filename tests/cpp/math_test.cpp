// The torch-free headers on their own: this file includes neither torch nor asymq.h.
#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>

#include "asymq/live_range.h"
#include "asymq/parameterization.h"
#include "asymq/quant_math.h"

#if defined(TORCH_VERSION) || defined(TORCH_CHECK)
#error "quant_math.h, parameterization.h or live_range.h includes torch"
#endif

namespace {

using asymq::Grid;
using asymq::QuantizerKind;
using asymq::Range;
using asymq::Sums;

int position_of(const std::string& name, bool full_range = false) {
  for (int i = 0; i < static_cast<int>(std::size(asymq::Parameterizations::traits)); ++i) {
    const asymq::Traits& traits = asymq::Parameterizations::traits[i];
    if (name == traits.name && full_range == traits.full_range) return i;
  }
  return -1;
}

template <class T>
class QuantMath : public testing::Test {};
using Types = testing::Types<float, double>;
TYPED_TEST_SUITE(QuantMath, Types);

TYPED_TEST(QuantMath, RoundsHalfToEven) {
  using T = TypeParam;
  EXPECT_EQ(asymq::round_half_even(T(0.5)), T(0));
  EXPECT_EQ(asymq::round_half_even(T(1.5)), T(2));
  EXPECT_EQ(asymq::round_half_even(T(-2.5)), T(-2));
  EXPECT_EQ(asymq::round_half_even(T(2.4999)), T(2));
}

TYPED_TEST(QuantMath, Element) {
  using T = TypeParam;
  const Grid<T> grid{T(0.5), T(-3), T(12)};
  EXPECT_EQ(asymq::fake_quantize_element(T(0.7), grid), T(0.5));
  EXPECT_EQ(asymq::fake_quantize_element(T(100), grid), T(6));
  EXPECT_EQ(asymq::fake_quantize_element(T(-100), grid), T(-1.5));
  EXPECT_TRUE(std::isnan(asymq::fake_quantize_element(std::numeric_limits<T>::quiet_NaN(), grid)));
}

TEST(Quotient, ByReciprocalIsTheDivision) {
  std::mt19937 random(0);
  const auto any_float = [&] { return std::bit_cast<float>(static_cast<uint32_t>(random())); };
  for (int i = 0; i < 1'000'000; ++i) {
    const Grid<float> grid{std::abs(any_float()), -8, 7};
    // Numerators of any size, and ones that are close to a tie or to a grid point.
    const float x = i % 2 == 0
                        ? any_float()
                        : std::nextafter(grid.scale * 0.5f * static_cast<float>(random() % 64),
                                         i % 4 == 1 ? 0.0f : 1e38f);
    if (!asymq::has_reciprocal(grid)) continue;
    const float got = asymq::quotient(x, asymq::make_reciprocal(grid)), want = x / grid.scale;
    const float size = std::abs(want);
    const std::string what = std::to_string(x) + " / " + std::to_string(grid.scale);
    // Very small quotients round to 0 and very large ones are outside the range in any case.
    if (size >= 0x1p126f) {
      ASSERT_GE(std::abs(got), 0x1p125f) << what;
    } else if (size >= 0x1p-20f) {
      ASSERT_EQ(got, want) << what;
    }
    ASSERT_EQ(std::isnan(got), std::isnan(want)) << what;
    ASSERT_TRUE(std::isnan(want) || std::signbit(got) == std::signbit(want)) << what;
  }
}

TYPED_TEST(QuantMath, ElementGradient) {
  using T = TypeParam;
  const Grid<T> grid{T(0.5), T(-3), T(12)};
  const auto inside = asymq::fake_quantize_element_backward(T(2), T(0.625), grid);
  EXPECT_EQ(inside.x, T(2));
  EXPECT_EQ(inside.rounding, T(1) - T(1.25));
  EXPECT_EQ(inside.below, T(0));
  EXPECT_EQ(inside.above, T(0));
  const T infinity = std::numeric_limits<T>::infinity();
  const auto above = asymq::fake_quantize_element_backward(infinity, infinity, grid);
  EXPECT_EQ(above.x, T(0));
  EXPECT_EQ(above.rounding, T(0));
  EXPECT_EQ(above.below, T(0));
  EXPECT_EQ(above.above, infinity);
}

TYPED_TEST(QuantMath, CodesAndBack) {
  using T = TypeParam;
  const asymq::Grid<T> grid{T(0.5), T(-3), T(12)}, symmetric{T(0.5), T(-7), T(7)};
  const T nan = std::numeric_limits<T>::quiet_NaN();
  EXPECT_EQ(asymq::quantize_element(T(0.7), grid, T(0), T(15)), T(4));
  EXPECT_EQ(asymq::quantize_element(T(-9), grid, T(0), T(15)), T(0));
  EXPECT_EQ(asymq::quantize_element(T(0.7), symmetric, T(-7), T(7)), T(1));
  EXPECT_EQ(asymq::quantize_element(nan, grid, T(0), T(15)), T(0));
  EXPECT_EQ(asymq::dequantize_element(T(4), T(0.5), T(-3)), T(0.5));
}

TEST(Parameterization, EachNameAppearsOnce) {
  EXPECT_EQ(std::size(asymq::Parameterizations::traits), 10u);
  for (const char* name : {"scale_offset", "min_max", "beta_gamma", "kscale_koffset",
                           "symmetric_scale", "symmetric_max", "symmetric_gamma"}) {
    EXPECT_GE(position_of(name), 0) << name;
  }
  for (const char* name : {"symmetric_scale", "symmetric_max", "symmetric_gamma"}) {
    EXPECT_GE(position_of(name, true), 0) << name;
  }
}

TEST(Parameterization, FullRangeHasOneMoreStepBelowZero) {
  const Range<float> range{4.0f, 0, 0, 0};
  const auto grid_of = [&](bool full_range) {
    return asymq::make_grid<float>(
        asymq::make_kind(position_of("symmetric_max", full_range), 4, 1e-8), range);
  };
  EXPECT_EQ(grid_of(true).scale, 0.5f);
  EXPECT_EQ(grid_of(true).lower, -8.0f);
  EXPECT_EQ(grid_of(true).upper, 7.0f);
  EXPECT_EQ(grid_of(false).scale, 8.0f / 15);
  EXPECT_EQ(grid_of(false).lower, -7.0f);
}

TEST(LiveRange, EndsOfATokenAndOfAWeight) {
  const QuantizerKind asymmetric = asymq::make_kind(position_of("beta_gamma"), 4, 1e-8);
  const QuantizerKind symmetric = asymq::make_kind(position_of("symmetric_gamma"), 4, 1e-8);
  const asymq::Extrema<float> positive{1, 3};
  const auto ends = [&](const QuantizerKind& kind, bool token) {
    const auto found = asymq::live_ends<float>(kind, token, positive);
    return std::pair(found.min, found.max);
  };
  EXPECT_EQ(ends(asymmetric, true), std::pair(0.0f, 3.0f));
  EXPECT_EQ(ends(asymmetric, false), std::pair(1.0f, 3.0f));
  EXPECT_EQ(ends(symmetric, true), std::pair(-3.0f, 3.0f));
  const float infinity = std::numeric_limits<float>::infinity();
  for (const auto& extrema : {asymq::Extrema<float>{-infinity, 1}, {0, infinity}, {NAN, 1}}) {
    for (const auto& kind : {asymmetric, symmetric}) {
      const auto found = asymq::live_ends<float>(kind, true, extrema);
      EXPECT_TRUE(std::isnan(found.min) && std::isnan(found.max));
    }
  }
}

TEST(LiveRange, ATokensLargestElementIsOnTheGrid) {
  const auto scale = [](bool token, bool full_range) {
    const auto position = position_of("symmetric_gamma", full_range);
    const auto kind = asymq::make_kind(position, 4, 1e-8, token);
    return asymq::live_scale_offset(kind, asymq::Factors<float>{1, 0}, {-7, 7}).scale;
  };
  EXPECT_EQ(scale(true, false), 1.0f);
  EXPECT_EQ(scale(false, false), 7.0f / 7.5f);
  EXPECT_EQ(scale(true, true), 7.0f / 8);
  EXPECT_EQ(scale(false, true), 7.0f / 8);
}

TEST(Parameterization, GuardKeepsNanAndRaisesTheRest) {
  EXPECT_EQ(asymq::guard_scale(-1.0f, 1e-8f), 1e-8f);
  EXPECT_EQ(asymq::guard_scale(2.0f, 1e-8f), 2.0f);
  EXPECT_TRUE(std::isnan(asymq::guard_scale(std::numeric_limits<float>::quiet_NaN(), 1e-8f)));
}

TEST(Parameterization, MinMaxGridAndGradient) {
  // s = 0.5 and z = -2.5, a tie: n = -2, zeta = 0.5.
  const QuantizerKind kind = asymq::make_kind(position_of("min_max"), 4, 1e-8);
  const Range<float> range{-1.25f, 6.25f, 0, 0};
  const Grid<float> grid = asymq::make_grid<float>(kind, range);
  EXPECT_EQ(grid.scale, 0.5f);
  EXPECT_EQ(grid.lower, -2.0f);
  EXPECT_EQ(grid.upper, 13.0f);
  const auto gradient = asymq::range_gradient(kind, asymq::make_gradient_map<float>(kind, range),
                                              Sums<double>{3, 5, 7});
  const double zeta = 0.5 / 15;
  EXPECT_DOUBLE_EQ(gradient.first, -3.0 / 15 + (1 - zeta) * 5 - zeta * 7);
  EXPECT_DOUBLE_EQ(gradient.second, 3.0 / 15 + zeta * 5 + (1 + zeta) * 7);
}

TEST(Parameterization, Links) {
  using asymq::Link;
  ASSERT_EQ(std::size(asymq::kLinks), 5u);
  for (int i = 0; i < static_cast<int>(std::size(asymq::kLinks)); ++i) {
    const Link link{i};
    EXPECT_EQ(asymq::find_link(asymq::kLinks[i].name), i);
    const double first = asymq::linked(link, asymq::first_factor(link));
    EXPECT_NEAR(first, link == Link::sigmoid ? 1 / (1 + std::exp(-4.0)) : 1.0, 1e-15);
    for (const double value : {-2.0, 0.3, 0.9, 3.5}) {
      constexpr double step = 1e-6;
      const double difference =
          (asymq::linked(link, value + step) - asymq::linked(link, value - step)) / (2 * step);
      const double expected = link == Link::clamp ? 1.0 : difference;
      EXPECT_NEAR(asymq::link_derivative(link, value), expected, 1e-6) << i << ' ' << value;
    }
    EXPECT_TRUE(std::isnan(asymq::linked(link, std::numeric_limits<double>::quiet_NaN())));
  }
  EXPECT_EQ(asymq::find_link("tanh"), -1);
  EXPECT_EQ(asymq::linked(Link::clamp, -3), 0.25);
  EXPECT_EQ(asymq::linked(Link::clamp, 9), 4);
  EXPECT_EQ(asymq::linked(Link::softplus, 1000), 1000);
  EXPECT_GT(asymq::linked(Link::softplus, -700), 0);
}

TEST(Parameterization, GradientScaleIsAFactor) {
  const Range<float> range{0.5f, -0.25f, -1.25f, 6.25f};
  const Sums<double> sums{3, 5, 7};
  const auto gradient = [&](double scale) {
    const auto kind =
        asymq::make_kind(position_of("beta_gamma"), 4, 1e-8, false, asymq::Link::exp, scale);
    return asymq::range_gradient(kind, asymq::make_gradient_map<float>(kind, range), sums);
  };
  EXPECT_EQ(gradient(0.25).first, 0.25 * gradient(1).first);
  EXPECT_EQ(gradient(0.25).second, 0.25 * gradient(1).second);
}

TEST(Parameterization, SigmoidDerivativeSurvivesSaturation) {
  EXPECT_GT(asymq::sigmoid_derivative(30.0), 0.0);
  EXPECT_NEAR(asymq::sigmoid_derivative(30.0) / std::exp(-30.0), 1.0, 1e-9);
  EXPECT_DOUBLE_EQ(asymq::sigmoid_derivative(-30.0), asymq::sigmoid_derivative(30.0));
}

}  // namespace
