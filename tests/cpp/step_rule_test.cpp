// StepRule and the groups of an optimizer that hold ranges.
#include <asymq/nn.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include "support.h"

namespace asymq_test {
namespace {

using namespace asymq::nn;

class StepRuleTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    x = at::randn({32, 8}).to(device());
  }
  // The same at every call.
  QuantLinear layer(const char* parameterization) const {
    at::manual_seed(1);
    const auto options = QuantizerOptions().bits(4).parameterization(parameterization);
    QuantLinear layer(QuantLinearOptions(8, 6)
                          .weight(QuantizerOptions(options).granularity(PerChannel()))
                          .output(options));
    layer->to(device());
    calibrate(*layer, [&] { layer(x); });
    // Narrower than the data, so that every parameter has a gradient.
    for (const auto& item : named_quantizers(*layer)) {
      const auto [low, high] = item.value()->bounds();
      item.value().ptr()->set_range(0.5 * low, 0.5 * high);
    }
    return layer;
  }
  template <typename Optimizer>
  Tensors steps(Optimizer& optimizer, QuantLinear& layer, const std::function<void()>& step,
                int count) const {
    for (int i = 0; i < count; ++i) {
      optimizer.zero_grad();
      layer(x).square().mean().backward();
      step();
    }
    Tensors values;
    for (const Tensor& range : range_parameters(*layer)) values.push_back(range.detach().clone());
    return values;
  }
  Tensor x;
};
ASYMQ_ON_EVERY_DEVICE(StepRuleTest);

Tensor learned(const QuantizerImpl& quantizer, const char* name) {
  return quantizer.named_parameters()[name].detach().clone();
}

TEST_P(StepRuleTest, ScalesStepsPerElement) {
  struct Case {
    const char* rule;
    const char* parameterization;
    std::function<Tensor(const QuantizerImpl&, const char*)> factor;
  };
  const auto absolute = [](const QuantizerImpl& quantizer, const char* name) {
    return learned(quantizer, name).abs();
  };
  const auto of_min_max = [](const QuantizerImpl& quantizer, const char* name) {
    const Tensor scale = learned(quantizer, "scale");
    return std::string(name) == "scale" ? at::full_like(scale, 2.0 / 15) : 1 / scale;
  };
  for (const Case& c :
       {Case{"min_max_plus", "min_max", absolute}, Case{"naive", "scale_offset", absolute},
        Case{"naive_current", "scale_offset", absolute},
        Case{"sophisticated", "scale_offset", of_min_max}}) {
    SCOPED_TRACE(c.rule);
    QuantLinear plain = layer(c.parameterization), ruled = layer(c.parameterization);
    Tensors before, factors;
    for (const auto& item : named_quantizers(*plain)) {
      for (const auto& parameter : item.value()->named_parameters()) {
        before.push_back(parameter.value().detach().clone());
        factors.push_back(c.factor(*item.value(), parameter.key().c_str()));
      }
    }
    torch::optim::Adam adam(plain->parameters(), 1e-2), other(ruled->parameters(), 1e-2);
    StepRule rule(other, *ruled, c.rule);
    const Tensors unscaled = steps(
        adam, plain, [&] { adam.step(); }, 1);
    const Tensors scaled = steps(
        other, ruled, [&] { rule.step(); }, 1);
    ASSERT_EQ(scaled.size(), 4u);
    for (size_t i = 0; i < scaled.size(); ++i) {
      const Tensor want = before[i] + factors[i] * (unscaled[i] - before[i]);
      EXPECT_FALSE(at::equal(scaled[i], before[i]));
      EXPECT_TRUE(at::allclose(scaled[i], want, 1e-6, 1e-9)) << scaled[i] << want;
    }
    // What is no range steps as ever.
    EXPECT_TRUE(bit_equal(ruled->weight, plain->weight));
    EXPECT_TRUE(bit_equal(ruled->bias, plain->bias));
  }
}

TEST_P(StepRuleTest, FirstValuesStayAndPresentOnesMove) {
  const auto train = [&](const char* name) {
    QuantLinear one = layer("scale_offset");
    torch::optim::SGD optimizer(range_parameters(*one), 0.1);
    StepRule rule(optimizer, *one, name);
    return steps(
        optimizer, one, [&] { rule.step(); }, 3);
  };
  const Tensors first = train("naive"), present = train("naive_current");
  EXPECT_FALSE(at::equal(first[0], present[0]));

  // By hand, with the factors of SGD's first step ever after.
  QuantLinear one = layer("scale_offset");
  for (int i = 0; i < 3; ++i) {
    one->zero_grad();
    one(x).square().mean().backward();
    const at::NoGradGuard no_grad;
    for (const auto& item : named_quantizers(*one)) {
      for (auto& parameter : item.value()->named_parameters()) {
        const Tensor initial = item.value()->named_buffers()["initial_" + parameter.key()];
        parameter.value().sub_(0.1 * initial.abs() * parameter.value().grad());
      }
    }
  }
  const Tensors by_hand = range_parameters(*one);
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_TRUE(at::allclose(first[i], by_hand[i], 1e-5, 1e-7));
  }
}

TEST_P(StepRuleTest, GivesTheLossOfAClosure) {
  QuantLinear one = layer("min_max");
  torch::optim::SGD optimizer(range_parameters(*one), 0.1);
  StepRule rule(optimizer, *one, "min_max_plus");
  const Tensor loss = rule.step([&] {
    optimizer.zero_grad();
    const Tensor loss = one(x).square().mean();
    loss.backward();
    return loss;
  });
  EXPECT_GT(loss.item<double>(), 0);
}

TEST_P(StepRuleTest, Refusals) {
  QuantLinear one = layer("min_max"), fresh(8, 6);
  torch::optim::SGD optimizer(range_parameters(*one), 0.1), weights(weight_parameters(*one), 0.1);
  expect_error([&] { StepRule(optimizer, *one, "fast"); },
               {"StepRule: unknown rule fast", "min_max_plus, naive, naive_current, soph"});
  expect_error([&] { StepRule(optimizer, *one, "naive"); },
               {"naive belongs to scale_offset", "weight_quantizer learns min_max"});
  expect_error([&] { StepRule(weights, *one, "min_max_plus"); },
               {"the optimizer has none of the model's range parameters"});
  one->output_quantizer->clear_range();
  expect_error([&] { StepRule(optimizer, *one, "min_max_plus"); },
               {"output_quantizer has no first values", "calibrate"});
  torch::nn::Linear plain(8, 6);
  expect_error([&] { range_parameters(*plain); }, {"range_parameters", "no quantizers"});
  EXPECT_EQ(weight_parameters(*plain).size(), 2u);
}

TEST_P(StepRuleTest, AGroupOfRangesHasItsOwnOptionsAndNoDecay) {
  QuantLinear one = layer("min_max");
  // Values that equal their class's defaults, and differ from the optimizer's.
  torch::optim::Adam optimizer(weight_parameters(*one),
                               torch::optim::AdamOptions(1e-2).weight_decay(0.1));
  add_range_parameters(optimizer, *one, torch::optim::AdamOptions(1e-3).weight_decay(0.3));
  ASSERT_EQ(optimizer.param_groups().size(), 2u);
  auto& group = optimizer.param_groups()[1];
  EXPECT_EQ(group.params().size(), 4u);
  const auto& options = static_cast<const torch::optim::AdamOptions&>(group.options());
  EXPECT_EQ(options.lr(), 1e-3);
  EXPECT_EQ(options.weight_decay(), 0);
  expect_error([&] { add_range_parameters(optimizer, *one, torch::optim::AdamWOptions(1e-3)); },
               {"add_range_parameters", "own type"});
  EXPECT_EQ(optimizer.param_groups().size(), 2u);
  torch::optim::LBFGS one_group(weight_parameters(*one), torch::optim::LBFGSOptions(1));
  expect_error([&] { add_range_parameters(one_group, *one, torch::optim::LBFGSOptions(1)); },
               {"add_range_parameters", "LBFGS steps its first group alone", "as one group"});
  EXPECT_EQ(one_group.param_groups().size(), 1u);
}

}  // namespace
}  // namespace asymq_test
