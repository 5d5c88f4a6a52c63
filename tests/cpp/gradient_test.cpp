// Autograd's contract and the quality of the sums.
#include <ATen/Parallel.h>

#include "support.h"

namespace asymq_test {
namespace {

class GradientTest : public DeviceTest {
 protected:
  Tensor sample(at::IntArrayRef shape) const { return at::randn(shape).to(device()); }
};
ASYMQ_ON_EVERY_DEVICE(GradientTest);

TEST_P(GradientTest, OnlyWhatIsNeeded) {
  const Tensor x = sample({12, 65}), g = sample({12, 65});
  for (const Op& op : ops()) {
    Tensors parameters = random_parameters(op, {12, 1}, 4);
    for (Tensor& p : parameters) p = p.to(device());
    const Result full = evaluate(op, x, parameters, g, 4);
    const size_t leaves = 1 + op.learnable;
    for (size_t mask = 0; mask < (size_t{1} << leaves); ++mask) {
      SCOPED_TRACE(mask);
      Tensors arguments = {x.detach()}, needed, expected;
      for (const Tensor& p : parameters) arguments.push_back(p.detach());
      for (size_t i = 0; i < leaves; ++i) {
        if ((mask >> i & 1) == 0) continue;
        needed.push_back(arguments[i].requires_grad_());
        expected.push_back(i == 0 ? full.dx : full.grads[i - 1]);
      }
      const Tensor xhat =
          op.call(arguments[0], Tensors(arguments.begin() + 1, arguments.end()), 4, kEps);
      EXPECT_EQ(xhat.requires_grad(), mask != 0);
      EXPECT_TRUE(bit_equal(xhat, full.xhat)) << op;
      if (mask == 0) continue;
      const Tensors grads = torch::autograd::grad({xhat}, needed, {g});
      for (size_t i = 0; i < grads.size(); ++i)
        EXPECT_TRUE(bit_equal(grads[i], expected[i])) << op << " " << i;
    }
  }
}

TEST_P(GradientTest, SumDeliversAnExpandedUpstream) {
  const Tensor x = sample({40, 30}).requires_grad_();
  const Tensor min = at::tensor({-1.0f}).to(device()).requires_grad_();
  const Tensor max = at::tensor({1.5f}).to(device()).requires_grad_();
  asymq::fake_quantize_min_max(x, min, max, 4).sum().backward();
  const Result explicit_ones = evaluate(op_named("min_max"), x, {min, max}, at::ones_like(x), 4);
  EXPECT_TRUE(bit_equal(x.grad(), explicit_ones.dx));
  EXPECT_TRUE(bit_equal(min.grad(), explicit_ones.grads[0]));
  EXPECT_TRUE(bit_equal(max.grad(), explicit_ones.grads[1]));
}

TEST_P(GradientTest, Invariants) {
  // One range per element makes the gradients the partial derivatives.
  const Tensor x = (sample({500}) * 3).to(at::kDouble), ones = at::ones_like(x);
  const Op& op = op_named("min_max");
  Tensors parameters = random_parameters(op, {500}, 4, at::kDouble);
  for (Tensor& p : parameters) p = p.to(device());
  const Result result = evaluate(op, x, parameters, ones, 4);
  const Tensor outside = 1 - result.dx;
  EXPECT_TRUE(at::allclose(result.grads[0] + result.grads[1], outside, 0, 1e-12));
  EXPECT_TRUE(at::allclose(
      parameters[0] * result.grads[0] + parameters[1] * result.grads[1] + x * result.dx,
      result.xhat, 0, 1e-11));
}

TEST_P(GradientTest, LongSumsOfConstantTerms) {
  // Float32 running sums of 1/3 are off by far more than 1e-6 after a few hundred terms.
  struct Shape {
    std::vector<int64_t> x, range;
  };
  for (const Shape& shape :
       {Shape{{(1 << 21) + 5}, {1}}, Shape{{2, 300001}, {2, 1}}, Shape{{40000, 24}, {1, 24}},
        Shape{{3, 4, 50000}, {1, 4, 1}}, Shape{{2, 65536}, {2, 4}}}) {
    SCOPED_TRACE(shape.x);
    for (const double value : {10.0, -10.0, 0.21}) {
      const Tensor x = at::full(shape.x, value, at::kFloat).to(device());
      const Tensor g = at::full(shape.x, 1.0 / 3, at::kFloat).to(device());
      const Op& op = op_named("scale_offset");
      const Tensors parameters = {at::full(shape.range, 0.1, at::kFloat),
                                  at::full(shape.range, -6.3, at::kFloat)};
      expect_matches_oracle(op, x, parameters, g, 4);
    }
  }
}

TEST_P(GradientTest, RepeatableBitForBit) {
  for (const std::vector<int64_t>& range :
       {std::vector<int64_t>{1, 1}, {512, 1}, {1, 1111}, {512, 11}}) {
    const Op& op = op_named("min_max");
    const Tensor x = sample({512, 1111}), g = sample({512, 1111});
    const Tensors parameters = random_parameters(op, range, 8);
    const Result first = evaluate(op, x, parameters, g, 8);
    const int threads = at::get_num_threads();
    for (const int count : {1, 2, 3}) {
      at::set_num_threads(count);
      const Result again = evaluate(op, x, parameters, g, 8);
      EXPECT_TRUE(bit_equal(again.xhat, first.xhat));
      EXPECT_TRUE(bit_equal(again.dx, first.dx));
      for (size_t i = 0; i < 2; ++i)
        EXPECT_TRUE(bit_equal(again.grads[i], first.grads[i])) << count << " threads";
    }
    at::set_num_threads(threads);
  }
}

TEST_P(GradientTest, SecondDerivativeRaises) {
  for (const Op& op : ops()) {
    const Tensor x = sample({30}).requires_grad_();
    Tensors parameters = random_parameters(op, {1}, 4);
    Tensors inputs = {x};
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters[i] = parameters[i].to(device());
      if (i < op.learnable) inputs.push_back(parameters[i].requires_grad_());
    }
    const Tensor xhat = op.call(x, parameters, 4, kEps);
    const Tensors grads =
        torch::autograd::grad({xhat.square().sum()}, inputs, {}, true, /*create_graph=*/true);
    expect_error([&] { torch::autograd::grad({grads[1].sum()}, {inputs[1]}); },
                 {"asymq", "backward"});
  }
}

}  // namespace
}  // namespace asymq_test
