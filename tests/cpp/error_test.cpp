// Every wrong argument raises, and the message names the operator, the argument and what it got.
#include "support.h"

namespace asymq_test {
namespace {

class ErrorTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    x = at::randn({3, 5}).to(device());
    min = at::full({1}, -1.0f).to(device());
    max = at::full({1}, 1.0f).to(device());
  }
  void expect_min_max_error(const Tensor& x, const Tensor& min, const Tensor& max, int64_t bits,
                            std::vector<std::string> parts) {
    parts.push_back("fake_quantize_min_max");
    expect_error([&] { asymq::fake_quantize_min_max(x, min, max, bits); }, parts);
  }
  Tensor x, min, max;
};
ASYMQ_ON_EVERY_DEVICE(ErrorTest);

TEST_P(ErrorTest, Bits) {
  for (const int64_t bits : {-1, 0, 1, 17})
    expect_min_max_error(x, min, max, bits, {"bits", std::to_string(bits)});
  expect_error([&] { asymq::quantize(x, max, std::nullopt, 17); }, {"quantize", "bits", "17"});
  expect_error(
      [&] {
        asymq::effective_scale_offset("min_max", {min, max}, 1);
      },
      {"effective_scale_offset", "bits", "1"});
}

TEST_P(ErrorTest, Types) {
  expect_min_max_error(x.to(at::kLong), min, max, 4, {"x", "float32", "Long"});
  expect_min_max_error(x, min.to(at::kHalf), max.to(at::kHalf), 4, {"min", "float32", "Half"});
  expect_min_max_error(x, min.to(at::kDouble), max.to(at::kDouble), 4,
                       {"min", "float32", "Double"});
  expect_min_max_error(x.to(at::kDouble), min, max.to(at::kDouble), 4, {"max"});
}

TEST_P(ErrorTest, Shapes) {
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{5}, {2, 1}, {3, 5, 1}, {6, 1}, {1, 2}, {0, 1}}) {
    const Tensor range = at::ones(shape).to(device());
    std::ostringstream text;
    text << at::IntArrayRef(shape);
    expect_min_max_error(x, -range, range, 4, {"[3, 5]", text.str()});
    expect_error([&] { asymq::quantize(x, range, std::nullopt, 4); },
                 {"quantize", "[3, 5]", text.str()});
  }
  expect_min_max_error(x, min.expand({3, 1}), max, 4, {"[3, 1]", "[1]"});
}

TEST_P(ErrorTest, Devices) {
  if (device().is_cpu()) GTEST_SKIP() << "needs two devices";
  expect_min_max_error(x, min.cpu(), max, 4, {"min", "cpu", "cuda"});
  expect_min_max_error(x.cpu(), min, max, 4, {"min", "cpu", "cuda"});
}

TEST_P(ErrorTest, ConstantsThatRequireGrad) {
  const Tensor one = at::ones({1}).to(device());
  const Tensor learned = max.clone().requires_grad_();
  expect_error(
      [&] { asymq::fake_quantize_beta_gamma(x, one, one, min.clone().requires_grad_(), max, 4); },
      {"fake_quantize_beta_gamma", "min", "grad"});
  expect_error([&] { asymq::fake_quantize_beta_gamma(x, one, one, min, learned, 4); },
               {"fake_quantize_beta_gamma", "max", "grad"});
  expect_error([&] { asymq::fake_quantize_symmetric_gamma(x, one, learned, 4); },
               {"fake_quantize_symmetric_gamma", "max", "grad"});
}

TEST_P(ErrorTest, Links) {
  const Tensor one = at::ones({1}).to(device());
  const auto beta_gamma = [&](bool sigmoid, std::string_view link, double gradient_scale) {
    return [=, this] {
      asymq::fake_quantize_beta_gamma(x, one, one, min, max, 4, sigmoid, kEps, link,
                                      gradient_scale);
    };
  };
  expect_error(beta_gamma(false, "tanh", 1), {"fake_quantize_beta_gamma", "softplus", "got tanh"});
  expect_error(beta_gamma(true, "exp", 1), {"fake_quantize_beta_gamma", "sigmoid", "link exp"});
  for (const double scale : {0.0, -1.0, std::numeric_limits<double>::infinity()}) {
    expect_error(beta_gamma(false, "exp", scale),
                 {"fake_quantize_beta_gamma", "gradient_scale", "positive"});
    expect_error([&] { asymq::fake_quantize_min_max(x, min, max, 4, kEps, scale); },
                 {"fake_quantize_min_max", "gradient_scale", "positive"});
  }
  expect_error(
      [&] {
        asymq::effective_scale_offset("min_max", {min, max}, 4, false, false, kEps, false, "exp");
      },
      {"effective_scale_offset", "link exp", "min_max"});
}

TEST_P(ErrorTest, Codes) {
  expect_error([&] { asymq::dequantize(x, max, std::nullopt, 4); }, {"dequantize", "codes"});
}

TEST_P(ErrorTest, EffectiveScaleOffset) {
  expect_error(
      [&] {
        asymq::effective_scale_offset("alpha", {min, max}, 4);
      },
      {"effective_scale_offset", "alpha"});
  expect_error([&] { asymq::effective_scale_offset("min_max", {min}, 4); },
               {"effective_scale_offset", "min_max"});
  expect_error(
      [&] { asymq::effective_scale_offset("kscale_koffset", {max}, 4, /*symmetric=*/true); },
      {"effective_scale_offset", "kscale_koffset"});
  expect_error(
      [&] {
        asymq::effective_scale_offset("min_max", {min, max}, 4, false, /*sigmoid=*/true);
      },
      {"effective_scale_offset", "sigmoid"});
}

TEST_P(ErrorTest, ParametersOfRange) {
  const auto expect = [](const char* parameterization, const Tensor& low, const Tensor& high,
                         int64_t bits, bool symmetric, bool sigmoid,
                         std::vector<std::string> parts) {
    parts.push_back("asymq::parameters_of_range");
    expect_error(
        [&] { asymq::parameters_of_range(parameterization, low, high, bits, symmetric, sigmoid); },
        parts);
  };
  expect("alpha", min, max, 4, false, false, {"parameterization", "alpha"});
  expect("min_max", min, max, 4, false, true, {"sigmoid", "min_max"});
  expect("kscale_koffset", min, max, 4, true, false, {"symmetric", "kscale_koffset"});
  expect("min_max", min, max, 1, false, false, {"bits", "1"});
  expect("min_max", min.to(at::kInt), max, 4, false, false, {"min", "floating", "Int"});
  expect("min_max", min, max.to(at::kDouble), 4, false, false, {"max", "Float", "Double"});
  expect("min_max", min, max.expand({3, 1}), 4, false, false, {"max", "[1]", "[3, 1]"});
  if (!device().is_cpu()) {
    expect("min_max", min, max.cpu(), 4, false, false, {"max", "cuda", "cpu"});
  }
}

}  // namespace
}  // namespace asymq_test
