// range_of_extrema: first ranges from what was seen.
#include "support.h"

namespace asymq_test {
namespace {

class RangeTest : public DeviceTest {
 protected:
  struct Case {
    double min, max;
    double low, high;
    bool without_width = false;
  };
  void check(const std::vector<Case>& cases, int64_t bits, bool symmetric, bool force_zero) const {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
      const auto column = [&](double Case::*member) {
        std::vector<double> values;
        for (const Case& c : cases) values.push_back(c.*member);
        return at::tensor(values, at::kDouble).to(device(), dtype).unsqueeze(1);
      };
      const auto [low, high, without_width] = asymq::range_of_extrema(
          column(&Case::min), column(&Case::max), bits, symmetric, force_zero, /*fallback=*/0.5);
      const Tensor magnitude = at::ones_like(low) * 1e-9;
      EXPECT_TRUE(close(low, column(&Case::low), column(&Case::low).abs() + magnitude));
      EXPECT_TRUE(close(high, column(&Case::high), column(&Case::high).abs() + magnitude));
      for (size_t i = 0; i < cases.size(); ++i) {
        EXPECT_EQ(without_width[i].item<bool>(), cases[i].without_width) << i;
      }
    }
  }
};
ASYMQ_ON_EVERY_DEVICE(RangeTest);

TEST_P(RangeTest, Symmetric) {
  check({{-1, 3, -3, 3},
         {-4, 3, -4, 4},
         {1, 2, -2, 2},
         {0, 0, -0.5, 0.5, true},
         {0, 1e-7, -1e-7, 1e-7},
         {-1e-8, 0, -7.5e-8, 7.5e-8, true}},
        4, true, true);
}

TEST_P(RangeTest, WithZero) {
  check({{-1, 3, -1, 3},
         {1, 2, 0, 2},
         {-2, -1, -2, 0},
         {2, 2, 0, 2},
         {0, 0, -0.5, 0.5, true},
         {0, 2e-7, 0, 2e-7},
         {-1e-8, 1e-8, -1e-8, 1.4e-7, true}},
        4, false, true);
}

TEST_P(RangeTest, WithoutZero) {
  check({{-1, 3, -1, 3},
         {1, 2, 1, 2},
         {2, 2, 0, 2},
         {-2, -2, -2, 0},
         {1, 1.0000005, 0, 1.0000005},
         {0, 0, -0.5, 0.5, true},
         {3e-7, 4e-7, 3e-7, 4.5e-7, true}},
        4, false, false);
}

TEST_P(RangeTest, ResultsAreNewAndWithoutGradient) {
  const Tensor min = at::full({3}, -1.0, device()).requires_grad_();
  const Tensor max = at::full({3}, 1.0, device()).requires_grad_();
  const auto [low, high, without_width] = asymq::range_of_extrema(min, max, 8);
  EXPECT_FALSE(low.is_alias_of(min) || high.is_alias_of(max));
  EXPECT_FALSE(low.requires_grad() || high.requires_grad());
  EXPECT_EQ(without_width.scalar_type(), at::kBool);
}

TEST_P(RangeTest, Errors) {
  const Tensor one = at::ones({1}, device());
  const auto expect = [&](const Tensor& min, const Tensor& max, int64_t bits, double fallback,
                          double eps, std::vector<std::string> parts) {
    parts.push_back("asymq::range_of_extrema: ");
    expect_error([&] { asymq::range_of_extrema(min, max, bits, false, true, fallback, eps); },
                 parts);
  };
  expect(one, one, 17, 1, kEps, {"bits", "17"});
  expect(one, one, 4, 0, kEps, {"fallback must be positive", "got 0"});
  expect(one, one, 4, 1, NAN, {"eps must be positive", "nan"});
  expect(one.to(at::kHalf), one.to(at::kHalf), 4, 1, kEps, {"min must be float32", "Half"});
  expect(one, one.to(at::kDouble), 4, 1, kEps, {"max", "Float", "Double"});
  expect(one, at::ones({2}, device()), 4, 1, kEps, {"max", "[1]", "[2]"});
}

}  // namespace
}  // namespace asymq_test
