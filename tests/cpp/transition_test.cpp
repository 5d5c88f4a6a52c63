// update_codes_, and learning rates that follow its counts: the golden trajectories under
// LibTorch's optimizers.
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <cmath>
#include <fstream>
#include <memory>
#include <numbers>

#include "support.h"

namespace asymq_test {
namespace {

using nlohmann::json;

class TransitionTest : public DeviceTest {};
ASYMQ_ON_EVERY_DEVICE(TransitionTest);

TEST_P(TransitionTest, CodesBecomeThoseOfQuantize) {
  for (const std::vector<int64_t>& range :
       {std::vector<int64_t>{1}, {24, 1}, {1, 40}, {24, 5}, {6, 8}}) {
    for (const int64_t bits : {2, 8, 9, 16}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
        SCOPED_TRACE(bits);
        const Tensor x = at::randn({24, 40}).to(device(), dtype);
        Tensors parameters = random_parameters(op_named("scale_offset"), range, bits);
        for (Tensor& p : parameters) p = p.to(device());
        for (const bool symmetric : {false, true}) {
          const auto offset = symmetric ? std::nullopt : std::optional(parameters[1]);
          const auto quantize = [&](const Tensor& of) {
            return asymq::quantize(of, parameters[0], offset, bits, kEps, symmetric);
          };
          const Tensor codes = quantize(x), moved = quantize(-x);
          const int64_t expected = codes.ne(moved).sum().item<int64_t>();
          for (const int64_t count : {expected, int64_t{0}}) {
            const Tensor changed =
                asymq::update_codes_(codes, -x, parameters[0], offset, bits, kEps, symmetric);
            EXPECT_EQ(changed.scalar_type(), at::kLong);
            EXPECT_EQ(changed.dim(), 0);
            EXPECT_EQ(changed.item<int64_t>(), count);
            EXPECT_TRUE(at::equal(codes, moved));
          }
        }
      }
    }
  }
}

TEST_P(TransitionTest, CodesOfAnotherKindAreRefused) {
  const Tensor x = at::randn({2, 3}).to(device()), scale = at::ones({1}).to(device());
  const Tensor codes = asymq::quantize(x, scale, std::nullopt, 4);
  expect_error([&] { asymq::update_codes_(codes, x, scale, scale, 4); },
               {"update_codes_", "codes must be Byte", "got Char"});
  expect_error([&] { asymq::update_codes_(codes, x, scale, std::nullopt, 9); },
               {"update_codes_", "codes must be Short", "got Char"});
  expect_error([&] { asymq::update_codes_(codes, x.t(), scale, std::nullopt, 4); },
               {"update_codes_", "[3, 2]", "[2, 3]"});
  expect_error(
      [&] {
        asymq::update_codes_(codes[0].expand({2, 3}), x, scale, std::nullopt, 4);
      },
      {"single memory location"});
}

// An optimizer of one group for every weight, and the rates of its groups.
std::unique_ptr<torch::optim::Optimizer> make_optimizer(const json& golden,
                                                        const Tensors& weights) {
  std::vector<torch::optim::OptimizerParamGroup> groups;
  for (const Tensor& weight : weights) groups.emplace_back(Tensors{weight});
  const std::string name = golden["optimizer"];
  const double lr = golden["lr"];
  if (name == "SGD") {
    return std::make_unique<torch::optim::SGD>(
        groups, torch::optim::SGDOptions(lr).momentum(0.9).weight_decay(1e-2));
  }
  if (name == "AdamW") {
    return std::make_unique<torch::optim::AdamW>(groups,
                                                 torch::optim::AdamWOptions(lr).weight_decay(0.1));
  }
  return std::make_unique<torch::optim::Adam>(groups, torch::optim::AdamOptions(lr));
}

TEST_P(TransitionTest, GoldenTrajectories) {
  std::ifstream stream(std::string(ASYMQ_GOLDEN_DIR) + "/transition_rate.json");
  const json cases = json::parse(stream);
  ASSERT_FALSE(cases.empty());
  for (const json& golden : cases) {
    SCOPED_TRACE(golden["optimizer"].get<std::string>() + " " + golden["rule"].get<std::string>());
    const Tensor x = tensor_of(golden["X"]).to(device()), t = tensor_of(golden["T"]).to(device());
    const std::vector<int64_t> bits = golden["bits"];
    Tensors weights, scales, offsets, codes;
    std::vector<double> targets, sizes;
    for (size_t i = 0; i < bits.size(); ++i) {
      weights.push_back(tensor_of(golden["weights"][i]).to(device()).requires_grad_());
      scales.push_back(at::full({1}, golden["scales"][i].get<double>(), weights[i].options()));
      offsets.push_back(at::full({1}, -std::exp2(bits[i] - 1), weights[i].options()));
      codes.push_back(asymq::quantize(weights[i], scales[i], offsets[i], bits[i]));
      sizes.push_back(static_cast<double>(weights[i].numel()));
      targets.push_back(golden["factor"].get<double>() * std::sqrt(bits[i]));
    }
    const bool shared = golden["shared"];
    if (shared) {
      const double all = sizes[0] + sizes[1];
      targets = {(targets[0] * sizes[0] + targets[1] * sizes[1]) / all};
      sizes = {all};
    }
    const auto optimizer = make_optimizer(golden, weights);
    const double first = golden["lr"], m = golden["momentum"], gain = golden["gain"];
    const double total = golden["total_steps"];
    std::vector<double> running = targets, rates(targets.size(), first);

    for (size_t step = 0; step < golden["trace"].size(); ++step) {
      SCOPED_TRACE(step);
      const json& expected = golden["trace"][step];
      const auto quantized = [&](size_t i) {
        return asymq::fake_quantize_scale_offset(weights[i], scales[i], offsets[i], bits[i]);
      };
      optimizer->zero_grad();
      const Tensor y = x.matmul(quantized(0).t()).matmul(quantized(1).t());
      const Tensor loss = 0.5 * (y - t).square().sum() / x.size(0);
      loss.backward();
      for (size_t i = 0; i < weights.size(); ++i) {
        optimizer->param_groups()[i].options().set_lr(rates[shared ? 0 : i]);
      }
      optimizer->step();
      EXPECT_NEAR(loss.item<double>(), expected["loss"].get<double>(), 1e-9);

      std::vector<double> changed;
      for (size_t i = 0; i < weights.size(); ++i) {
        const Tensor count =
            asymq::update_codes_(codes[i], weights[i], scales[i], offsets[i], bits[i]);
        EXPECT_EQ(count.item<int64_t>(), expected["counts"][i].get<int64_t>());
        EXPECT_TRUE(at::equal(codes[i].cpu().to(at::kDouble), tensor_of(expected["codes"][i])));
        changed.push_back(count.item<double>());
      }
      if (shared) changed = {changed[0] + changed[1]};
      for (size_t i = 0; i < rates.size(); ++i) {
        running[i] = m * running[i] + (1 - m) * changed[i] / sizes[i];
        const double part = std::min((static_cast<double>(step) + 1) / total, 1.0);
        const double target = targets[i] * (1 + std::cos(std::numbers::pi * part)) / 2;
        rates[i] = golden["rule"] == "additive"
                       ? std::max(0.0, rates[i] + gain * first * (target - running[i]))
                       : m * rates[i] + (1 - m) * rates[i] * target / (running[i] + 1e-8);
        EXPECT_NEAR(running[i], expected["K"][i].get<double>(), 1e-9);
        EXPECT_NEAR(rates[i], expected["U"][i].get<double>(), 1e-9);
      }
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor want = tensor_of(golden["final"][i]);
      EXPECT_TRUE(close(weights[i], want, at::ones_like(want), 1e-9));
    }
  }
}

}  // namespace
}  // namespace asymq_test
