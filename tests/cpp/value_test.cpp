// Values that break quantizers: ties, NaN, infinities, signed zeros, denormals and degenerate
// ranges.
#include <limits>

#include "support.h"

namespace asymq_test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class ValueTest : public DeviceTest {
 protected:
  Tensor tensor(const std::vector<float>& values) const { return at::tensor(values).to(device()); }
};
ASYMQ_ON_EVERY_DEVICE(ValueTest);

TEST_P(ValueTest, TiesRoundToEven) {
  // Scale 1/4 is exact, so x = (i + 1/2)/4 is a tie.
  const Tensor x = tensor({-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875});
  const Tensor scale = tensor({0.25}), offset = tensor({-8});
  const Tensor xhat = asymq::fake_quantize_scale_offset(x, scale, offset, 4);
  EXPECT_TRUE(
      at::equal(xhat.cpu(), at::tensor({-1.0f, -0.5f, -0.5f, -0.0f, 0.0f, 0.5f, 0.5f, 1.0f})));
}

TEST_P(ValueTest, RangeIsClosedOnTheRoundedValue) {
  // n = -8 and p = 7: x/s = 7.5 rounds to 8, above; x/s = 7.49 rounds to 7, inside; -8.5 rounds to
  // -8, inside.
  const Tensor x = tensor({7.49, 7.5, -8.5, -8.51});
  const Result result =
      evaluate(op_named("scale_offset"), x, {tensor({1}), tensor({-8})}, at::ones_like(x), 4);
  EXPECT_TRUE(at::equal(result.dx.cpu(), at::tensor({1.0f, 0.0f, 1.0f, 0.0f})));
}

TEST_P(ValueTest, OffsetRoundsHalfToEven) {
  // min = -5, max = 5 and 8 bits: z = -127.5 is a tie and goes to -128.
  const Tensor codes = asymq::quantize(tensor({0}), tensor({10.0f / 255}), tensor({-127.5}), 8);
  EXPECT_EQ(codes.item<int>(), 128);
  expect_matches_oracle(op_named("min_max"), at::linspace(-6, 6, 1001).to(device()),
                        {tensor({-5}), tensor({5})}, at::randn({1001}).to(device()), 8);
}

TEST_P(ValueTest, SpecialValues) {
  const float denormal = std::numeric_limits<float>::denorm_min(),
              least = std::numeric_limits<float>::min();
  const float most = std::numeric_limits<float>::max();
  const Tensor x =
      tensor({kInf, -kInf, 0.0f, -0.0f, denormal, -denormal, least, -least, most, -most, 1, -1});
  const Tensor g = at::arange(1, 13, at::kFloat).to(device());
  for (const Op& op : ops()) {
    expect_matches_oracle(op, x, parameters_of_range(op, -2, 3, 8), g, 8);
    expect_matches_oracle(op, x.to(at::kDouble), parameters_of_range(op, -2, 3, 8),
                          g.to(at::kDouble), 8);
    expect_matches_oracle(op, x.to(at::kBFloat16), parameters_of_range(op, -2, 3, 8),
                          g.to(at::kBFloat16), 8);
  }
}

TEST_P(ValueTest, ArbitraryBitPatterns) {
  const Tensor bits = at::randint(std::numeric_limits<int32_t>::min(),
                                  std::numeric_limits<int32_t>::max(), {1 << 16}, at::kInt);
  const Tensor x = bits.view(at::kFloat), small = bits.view(at::kBFloat16),
               half = bits.view(at::kHalf);
  for (const Op& op : ops()) {
    for (const Tensor& values : {x, small, half}) {
      const Tensor g = at::randn(values.sizes()).to(device(), values.scalar_type());
      const Tensors parameters = parameters_of_range(op, -2, 3, 8);
      expect_matches_oracle(op, values.to(device()), parameters, g, 8);
      expect_matches_oracle(op, values.nan_to_num(1, 2, -2).to(device()), parameters, g, 8);
    }
  }
}

TEST_P(ValueTest, NanStaysVisible) {
  const Tensor x = tensor({-5, 0.3, kNan, 5}), g = tensor({1, 2, 3, 4});
  for (const Op& op : ops()) {
    const Result result = evaluate(op, x, parameters_of_range(op, -2, 3, 4), g, 4);
    EXPECT_TRUE(std::isnan(result.xhat[2].item<float>())) << op;
    EXPECT_EQ(result.dx[2].item<float>(), 3) << op;
    EXPECT_TRUE(result.xhat.isnan().sum().item<int64_t>() == 1) << op;
    // Only dL/dz has no inside term.
    const bool has_offset = op.kind == Kind::scale_offset || op.kind == Kind::kscale_koffset;
    for (size_t i = 0; i < op.learnable; ++i) {
      EXPECT_EQ(std::isnan(result.grads[i].item<float>()), !(has_offset && i == 1))
          << op << " parameter " << i;
    }
  }
}

TEST_P(ValueTest, NanRangeGivesNanEverywhere) {
  const Tensor x = tensor({-kInf, -5, 0, 0.3, 5, kInf});
  for (const Op& op : ops()) {
    for (size_t i = 0; i < op.parameters; ++i) {
      Tensors parameters = parameters_of_range(op, -2, 3, 4);
      parameters[i] = at::full_like(parameters[i], kNan);
      const Result result = evaluate(op, x, parameters, at::ones_like(x), 4);
      EXPECT_TRUE(result.xhat.isnan().all().item<bool>()) << op << " parameter " << i;
      for (const Tensor& grad : result.grads) {
        EXPECT_TRUE(grad.isnan().all().item<bool>()) << op << " parameter " << i;
      }
    }
  }
}

TEST_P(ValueTest, UpstreamOutsideNeverReachesDxOrTheInsideSum) {
  const Tensor x = tensor({-9, 0.3, 9});
  for (const float bad : {kInf, kNan}) {
    const Tensor g = tensor({bad, 1, bad});
    for (const Op& op : ops()) {
      const Result result = evaluate(op, x, parameters_of_range(op, -2, 3, 4), g, 4);
      EXPECT_TRUE(at::equal(result.dx.cpu(), at::tensor({0.0f, 1.0f, 0.0f}))) << op;
    }
  }
  // Above the range dL/dz has a term and dL/dx none; an infinite x keeps every gradient finite.
  const Result saturated = evaluate(op_named("min_max"), tensor({kInf, -kInf}),
                                    {tensor({-2}), tensor({3})}, tensor({1, 1}), 4);
  EXPECT_TRUE(saturated.grads[0].isfinite().all().item<bool>());
  EXPECT_TRUE(saturated.grads[1].isfinite().all().item<bool>());
}

TEST_P(ValueTest, DegenerateRanges) {
  const Tensor x =
      at::cat({at::randn({200}) * 3, at::tensor({0.0f, 1.0f, -1.0f, 1e4f, 1e-9f, -1e-7f})})
          .to(device());
  const Tensor g = at::randn({206}).to(device());
  struct Ends {
    double min, max;
  };
  for (const Ends ends :
       {Ends{1, 1}, Ends{0, 0}, Ends{1, -1}, Ends{5, -0.1}, Ends{1000, 1000}, Ends{-1000, -1001},
        Ends{1e4, 1e4 + 1}, Ends{-1e30, 1e30}, Ends{0.5, 2}, Ends{-3, -1}, Ends{-1e-9, 1e-9}}) {
    for (const Op& op : ops()) {
      SCOPED_TRACE(std::to_string(ends.min) + " " + std::to_string(ends.max));
      const Tensors parameters = parameters_of_range(op, ends.min, ends.max, 8);
      expect_matches_oracle(op, x, parameters, g, 8);
      const Result result = evaluate(op, x, parameters, g, 8);
      for (const Tensor& grad : result.grads) EXPECT_TRUE(grad.isfinite().all().item<bool>()) << op;
    }
  }
}

TEST_P(ValueTest, CollapsedMinMaxGradientsStayOfTheSizeOfTheUpstream) {
  const Tensor x = at::randn({1000}).to(device()), g = at::randn({1000}).to(device());
  for (const double end : {1.0, -7.0, 1e6}) {
    const Result result =
        evaluate(op_named("min_max"), x, {tensor({float(end)}), tensor({float(end) - 1})}, g, 4);
    const double bound = 1.1 * g.abs().sum().item<double>();
    for (const Tensor& grad : result.grads) EXPECT_LE(std::abs(grad.item<double>()), bound);
  }
}

TEST_P(ValueTest, EpsIsTheLeastScale) {
  const Tensor x = at::linspace(-1, 1, 100).to(device());
  for (const Op& op : ops()) {
    expect_matches_oracle(op, x, parameters_of_range(op, -1e-3, 1e-3, 4), at::ones_like(x), 4,
                          /*eps=*/1e-2);
  }
  EXPECT_TRUE(bit_equal(asymq::fake_quantize_symmetric_scale(x, tensor({-3}), 4, 0.125),
                        asymq::fake_quantize_symmetric_scale(x, tensor({0.125}), 4)));
}

}  // namespace
}  // namespace asymq_test
