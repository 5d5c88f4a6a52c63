// Live ranges against the oracle of static ones, whose constants are the extrema of every group.
#include <ATen/Parallel.h>

#include "support.h"

namespace asymq_test {
namespace {

class DynamicTest : public DeviceTest {};
ASYMQ_ON_EVERY_DEVICE(DynamicTest);

// The options of one call; asymmetric without `symmetric`.
struct Options {
  bool symmetric, full_range;
  std::optional<int64_t> group;
  int64_t factors;
};

Tensor call(const Options& options, const Tensor& x, const Tensors& p, int64_t bits) {
  if (options.symmetric) {
    return asymq::fake_quantize_dynamic_symmetric_gamma(x, p[0], options.group, bits, false,
                                                        options.full_range);
  }
  return asymq::fake_quantize_dynamic_beta_gamma(x, p[0], p[1], options.group, bits);
}

// x̂, dL/dx and the gradients of the factors, of scales or ends that were made by hand.
Expected expected_of(const Options& options, const Tensor& x_any, const Tensors& factors,
                     const Tensor& upstream, int64_t bits) {
  const Tensor x_cpu = x_any.detach().cpu().contiguous();
  const int64_t size = options.group.value_or(x_cpu.size(-1));
  const Tensor x = x_cpu.reshape({-1, size}), g = upstream.cpu().contiguous().reshape({-1, size});
  const auto type = factors[0].scalar_type();
  const Tensor low = x.amin(1, true).to(type).clamp_max(0),
               high = x.amax(1, true).to(type).clamp_min(0);
  const auto spread = [&](const Tensor& factor) {
    return factor.detach().cpu().repeat({x.size(0) / factor.numel()}).reshape({-1, 1});
  };
  const auto back = [&](Expected found, Tensors by) {
    found.xhat = found.xhat.reshape(x_any.sizes());
    found.dx = found.dx.reshape(x_any.sizes());
    for (size_t i = 0; i < by.size(); ++i) {
      for (Tensor* each : {&found.grads[i], &found.magnitudes[i]}) {
        const Tensor size = each == &found.grads[i] ? by[i] : by[i].abs();
        *each = (*each * size).reshape({-1, options.factors}).sum(0);
      }
    }
    return found;
  };
  if (!options.symmetric) {
    const Tensors parameters = {spread(factors[0]), spread(factors[1]), low, high};
    const Tensor one = at::ones({1}, at::kDouble);
    return back(oracle(op_named("beta_gamma"), x, parameters, g, bits), {one, one});
  }
  const double levels = static_cast<double>(int64_t{1} << bits);
  const double h = options.full_range ? levels / 2 : levels / 2 - 1;
  const Tensor max = at::maximum(-low, high);
  const Op& op = op_named(options.full_range ? "symmetric_scale_full_range" : "symmetric_scale");
  return back(oracle(op, x, {spread(factors[0]) * max / h}, g, bits), {max.to(at::kDouble) / h});
}

void expect_matches(const Options& options, const Tensor& x, const Tensor& g, int64_t bits,
                    at::ScalarType type = at::kFloat) {
  Tensors factors;
  for (int i = 0; i < (options.symmetric ? 1 : 2); ++i) {
    factors.push_back((0.6 + at::rand({options.factors}, type) / 2).to(x.device()));
  }
  Tensors inputs = {x.detach().requires_grad_()};
  for (const Tensor& factor : factors) inputs.push_back(factor.detach().requires_grad_());
  const Tensor xhat = call(options, inputs[0], {inputs.begin() + 1, inputs.end()}, bits);
  const Tensors grads = torch::autograd::grad({xhat}, inputs, {g});
  EXPECT_EQ(xhat.strides(), at::empty_like(x).strides());
  EXPECT_EQ(grads[0].strides(), at::empty_like(x).strides());
  const Expected want = expected_of(options, x, factors, g, bits);
  EXPECT_TRUE(at::equal(xhat.detach().cpu(), want.xhat));
  EXPECT_TRUE(at::equal(grads[0].cpu(), want.dx));
  for (size_t i = 0; i < factors.size(); ++i) {
    EXPECT_TRUE(close(grads[1 + i], want.grads[i], want.magnitudes[i])) << "factor " << i;
  }
}

TEST_P(DynamicTest, EveryShapeAndType) {
  const std::vector<std::pair<std::vector<int64_t>, std::optional<int64_t>>> shapes = {
      {{1}, std::nullopt},
      {{7}, std::nullopt},
      {{5, 1}, std::nullopt},
      {{6, 37}, 37},
      {{6, 384}, 128},
      {{3, 4, 96}, 32},
      {{4, 9}, 3},
      {{5, 6}, 1},
      {{2, 70001}, std::nullopt},
      {{300, 64}, std::nullopt},
      {{3, 1000}, std::nullopt}};
  for (const auto& [shape, group] : shapes) {
    for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      const Tensor x = (2 * at::randn(shape, at::kDouble)).to(device(), dtype),
                   g = at::randn(shape, at::kDouble).to(device(), dtype);
      const int64_t positions = shape.back() / group.value_or(shape.back());
      for (const int64_t factors : {int64_t{1}, positions}) {
        for (const auto& [symmetric, full_range] :
             {std::pair(false, false), {true, false}, {true, true}}) {
          SCOPED_TRACE(testing::Message()
                       << at::IntArrayRef(shape) << " in groups of " << group.value_or(0) << ", "
                       << c10::toString(dtype) << (symmetric ? ", symmetric" : ""));
          expect_matches({symmetric, full_range, group, factors}, x, g, 4);
        }
      }
    }
  }
  const Tensor x = at::randn({8, 48}, at::kDouble).to(device());
  expect_matches({false, false, 12, 4}, x, at::randn_like(x), 8, at::kDouble);
}

TEST_P(DynamicTest, OneSignAndZeros) {
  Tensor x = at::rand({6, 20}) + 0.5;
  x.select(0, 1).neg_();
  x.select(0, 2).zero_();
  x = x.to(device());
  for (const bool symmetric : {false, true}) {
    expect_matches({symmetric, false, 5, 4}, x, at::randn({6, 20}).to(device()), 8);
  }
}

TEST_P(DynamicTest, Views) {
  const Tensor x = at::randn({4, 6, 10, 8}).to(device()), g = at::randn({4, 6, 10, 8}).to(device());
  const auto check = [&](const Tensor& view, const Tensor& grad) {
    expect_matches({false, false, 4, view.size(-1) / 4}, view, grad, 8);
  };
  check(x.transpose(1, 2), g.transpose(1, 2));  // heads
  check(x.transpose(1, 2), g.transpose(1, 2).contiguous());
  check(x.permute({3, 0, 2, 1}).slice(3, 0, 4), g.permute({3, 0, 2, 1}).slice(3, 0, 4));
  check(x.slice(3, 0, 4), g.slice(3, 0, 4));  // a part of each row
  check(x.slice(0, 0, 4, 2), g.slice(0, 0, 4, 2).clone());
  check(x, g.select(0, 0).expand_as(x));
}

TEST_P(DynamicTest, WithoutElements) {
  for (const std::vector<int64_t>& shape : {std::vector<int64_t>{0}, {3, 0}, {0, 4}}) {
    const Tensor x = at::empty(shape).to(device()).requires_grad_();
    const Tensor gamma = at::ones({1}).to(device()).requires_grad_();
    const Tensor xhat = asymq::fake_quantize_dynamic_symmetric_gamma(x, gamma, std::nullopt, 8);
    EXPECT_EQ(xhat.sizes(), x.sizes());
    const Tensors grads = torch::autograd::grad({xhat.sum()}, {x, gamma});
    EXPECT_EQ(grads[1].item<float>(), 0);
  }
}

TEST_P(DynamicTest, WhatIsNotFiniteStaysInItsGroup) {
  const Tensor clean = at::randn({4, 90}).to(device());
  const Tensor one = at::ones({1}).to(device());
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    for (const int64_t place : {0, 29}) {
      Tensor x = clean.clone();
      x[1][30 + place] = bad;
      const Tensor xhat = asymq::fake_quantize_dynamic_beta_gamma(x, one, one, 30, 8);
      EXPECT_TRUE(xhat[1].slice(0, 30, 60).isnan().all().item<bool>());
      EXPECT_EQ(xhat.isnan().sum().item<int64_t>(), 30);
    }
  }
}

TEST_P(DynamicTest, RepeatableBitForBit) {
  const Tensor x = at::randn({700, 512}).to(device()), g = at::randn({700, 512}).to(device());
  for (const int64_t factors : {1, 4}) {
    const Tensor beta = at::ones({factors}).to(device()).requires_grad_();
    const Tensor gamma = at::full({factors}, 0.75).to(device()).requires_grad_();
    const auto gradients = [&] {
      const Tensor xhat = asymq::fake_quantize_dynamic_beta_gamma(x, beta, gamma, 128, 4);
      return torch::autograd::grad({xhat}, {beta, gamma}, {g});
    };
    const Tensors first = gradients();
    const int threads = at::get_num_threads();
    for (const int count : {1, 2, 3}) {
      at::set_num_threads(count);
      const Tensors again = gradients();
      for (size_t i = 0; i < 2; ++i) EXPECT_TRUE(bit_equal(again[i], first[i])) << count;
    }
    at::set_num_threads(threads);
  }
}

TEST_P(DynamicTest, Errors) {
  const Tensor x = at::ones({2, 6}).to(device()), one = at::ones({1}).to(device());
  const auto expect = [&](const Tensor& x, const Tensor& beta, const Tensor& gamma,
                          std::optional<int64_t> group, int64_t bits,
                          std::vector<std::string> parts) {
    parts.push_back("asymq::fake_quantize_dynamic_beta_gamma");
    expect_error([&] { asymq::fake_quantize_dynamic_beta_gamma(x, beta, gamma, group, bits); },
                 parts);
  };
  expect(x, one, one, 0, 8, {"group", "at least 1", "got 0"});
  expect(x, one, one, 4, 8, {"group", "divide", "6", "got 4"});
  expect(x, one, one, {}, 1, {"bits", "got 1"});
  expect(x.select(0, 0).select(0, 0), one, one, {}, 8, {"x", "dimension", "[]"});
  expect(x, one.expand({2}), one.expand({2}), {}, 8, {"beta", "1 value", "[2]", "[2, 6]"});
  expect(x, one, one.expand({2}), 3, 8, {"gamma", "beta's shape", "[2]"});
  expect(x.to(at::kLong), one, one, {}, 8, {"x", "float32", "Long"});
  expect(x, one.to(at::kHalf), one.to(at::kHalf), {}, 8, {"beta", "float32", "Half"});
  const Tensor leaf = x.clone().requires_grad_();
  const Tensor xhat = asymq::fake_quantize_dynamic_beta_gamma(leaf, one, one, {}, 8);
  const Tensor first =
      torch::autograd::grad({xhat.square().sum()}, {leaf}, {}, true, /*create_graph=*/true)[0];
  expect_error([&] { torch::autograd::grad({first.sum()}, {leaf}); }, {"asymq", "backward"});
}

}  // namespace
}  // namespace asymq_test
