// The quantized softmax against the composition of our own functions, and its arguments.
#include <limits>

#include "support.h"

namespace asymq_test {
namespace {

using asymq::RangeArguments;

class SoftmaxTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    scores = (3 * at::randn({2, 3, 6, 40})).to(device()).requires_grad_();
    min = end(-6.0f);
    max = end(5.0f);
    beta = end(1.0f);
    gamma = end(0.75f);
    zero = end(0.0f).detach();
    one = end(1.0f).detach();
  }
  Tensor end(float value) const { return at::full({1}, value).to(device()).requires_grad_(); }

  Tensor fused(const Tensor& scores, const std::optional<Tensor>& mask, bool causal) const {
    return asymq::quantized_softmax(scores, mask, causal, {"min_max", {min, max}, 8},
                                    {"beta_gamma", {beta, gamma, zero, one}, 8});
  }
  Tensor composed(const Tensor& scores, const Tensor& seen) const {
    const Tensor hidden = seen.logical_not();
    const Tensor quantized = asymq::fake_quantize_min_max(scores, min, max, 8)
                                 .masked_fill(hidden, -std::numeric_limits<double>::infinity());
    return asymq::fake_quantize_beta_gamma(quantized.softmax(-1), beta, gamma, zero, one, 8)
        .masked_fill(hidden, 0);
  }
  Tensors leaves() const { return {scores, min, max, beta, gamma}; }

  Tensor scores, min, max, beta, gamma, zero, one;
};
ASYMQ_ON_EVERY_DEVICE(SoftmaxTest);

TEST_P(SoftmaxTest, EqualsTheComposition) {
  const Tensor all = at::ones({6, 40}, at::TensorOptions(device()).dtype(at::kBool));
  const Tensor some = at::rand({2, 1, 6, 40}).to(device()) < 0.7;
  const Tensor grad = at::randn({2, 3, 6, 40}).to(device());
  for (const bool causal : {false, true}) {
    for (const bool masked : {false, true}) {
      SCOPED_TRACE(testing::Message() << "causal " << causal << " masked " << masked);
      const std::optional<Tensor> mask = masked ? std::optional<Tensor>(some) : std::nullopt;
      Tensor seen = masked ? some : all;
      if (causal) seen = seen.logical_and(all.tril(40 - 6));
      const Tensor got = fused(scores, mask, causal), want = composed(scores, seen);
      // One step of the grid where a quotient lies on a tie.
      EXPECT_LE((got - want).abs().max().item<float>(), 0.76f / 255);
      EXPECT_LE(at::count_nonzero(got - want).item<int64_t>(), 1);
      const Tensors grads = torch::autograd::grad({got}, leaves(), {grad});
      const Tensors expected = torch::autograd::grad({want}, leaves(), {grad});
      for (size_t i = 0; i < grads.size(); ++i) {
        EXPECT_TRUE(close(grads[i], expected[i], grad.abs().sum(), 1e-6)) << i;
      }
    }
  }
}

TEST_P(SoftmaxTest, WindowHidesWhatAMaskWould) {
  const Tensor seen =
      at::ones({6, 40}, at::TensorOptions(device()).dtype(at::kBool)).tril(34).triu(31);
  const Tensors ends{min, max}, unit{zero, one};
  const RangeArguments before{"min_max", ends, 8}, after{"min_max", unit, 8};
  const Tensor got = asymq::quantized_softmax(scores, std::nullopt, true, before, after, 4);
  EXPECT_TRUE(got.equal(asymq::quantized_softmax(scores, seen, false, before, after)));
}

TEST_P(SoftmaxTest, Errors) {
  const auto expect = [&](const Tensor& scores, const std::optional<Tensor>& mask,
                          const RangeArguments& range, std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_softmax");
    const Tensors ends{min, max};
    expect_error(
        [&] {
          asymq::quantized_softmax(scores, mask, true, range, {"min_max", ends, 8});
        },
        parts);
  };
  const Tensors ends{min, max};
  const RangeArguments range{"min_max", ends, 8};
  expect(scores[0], std::nullopt, range, {"scores", "4 dimensions", "[3, 6, 40]"});
  expect(scores.to(at::kLong), std::nullopt, range, {"scores", "float32", "Long"});
  expect(scores, at::ones({6, 40}, at::kLong).to(device()), range, {"mask", "bool", "Long"});
  expect(scores, at::ones({4, 40}).to(device()), range, {"mask", "[4, 40]", "[2, 3, 6, 40]"});
  expect(scores, at::ones({6, 40}).to(device()).requires_grad_(), range, {"mask", "grad"});
  const Tensors few{min}, many{min, max, max}, wide{min.expand({2}), max.expand({2})};
  expect(scores, std::nullopt, {"min_max", few, 8}, {"min_max", "max", "1"});
  expect(scores, std::nullopt, {"min_max", many, 8}, {"min_max", "2", "3"});
  expect(scores, std::nullopt, {"min_max", {}, 8}, {"min_max", "min", "0"});
  expect(scores, std::nullopt, {"min_max", wide, 8}, {"scores", "min", "one element", "[2]"});
  expect(scores, std::nullopt, {"min_max", ends, 17}, {"bits", "17"});
  expect(scores, std::nullopt, {"range", ends, 8}, {"parameterization", "range"});
  const Tensors doubles{min.to(at::kDouble), max.to(at::kDouble)};
  expect(scores.to(at::kDouble), std::nullopt, {"min_max", doubles, 8},
         {"dtype", "Double", "Float"});
  const Tensors constants{beta, gamma, zero, one.clone().requires_grad_()};
  expect(scores, std::nullopt, {"beta_gamma", constants, 8}, {"beta_gamma", "max", "grad"});
  if (device().is_cpu()) return;
  expect(scores, at::ones({6, 40}), range, {"mask", "cuda", "cpu"});
  const Tensors elsewhere{min.cpu(), max.cpu()};
  expect(scores, std::nullopt, {"min_max", elsewhere, 8}, {"min", "cuda", "cpu"});
}

}  // namespace
}  // namespace asymq_test
