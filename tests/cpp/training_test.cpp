// A learned range from C++: torch::optim::Adam on the quantization error.
#include <torch/optim/adam.h>

#include "support.h"

namespace asymq_test {
namespace {

class TrainingTest : public DeviceTest {};
ASYMQ_ON_EVERY_DEVICE(TrainingTest);

double mse_after(const Op& op, const Tensor& x, Tensors parameters, int steps) {
  Tensors learned(parameters.begin(), parameters.begin() + op.learnable);
  for (Tensor& p : learned) p.requires_grad_();
  torch::optim::Adam optimizer(learned, torch::optim::AdamOptions(2e-2));
  const auto loss = [&] { return (op.call(x, parameters, 4, kEps) - x).square().mean(); };
  for (int step = 0; step < steps; ++step) {
    optimizer.zero_grad();
    loss().backward();
    optimizer.step();
  }
  return loss().item<double>();
}

TEST_P(TrainingTest, AdamShrinksAWideRange) {
  const Tensor x = at::randn({2000}).to(device());
  for (const Op& op : ops()) {
    Tensors parameters = parameters_of_range(op, -6, 9, 4);
    for (Tensor& p : parameters) p = p.to(device());
    const double before = mse_after(op, x, parameters, 0);
    const double after = mse_after(op, x, parameters, 400);
    EXPECT_LT(after, 0.5 * before) << op;
  }
}

TEST_P(TrainingTest, AdamRecoversAReversedRange) {
  const Tensor x = at::randn({2000}).to(device());
  const Tensor min = at::full({1}, 0.5f).to(device()), max = at::full({1}, -0.5f).to(device());
  const double after = mse_after(op_named("min_max"), x, {min, max}, 300);
  EXPECT_LT(after, 0.05);
  EXPECT_LT(min.item<float>(), max.item<float>());
}

}  // namespace
}  // namespace asymq_test
