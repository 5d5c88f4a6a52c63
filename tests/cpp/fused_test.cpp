// The quantized GELU, losses, RMSNorm and gated unit against the composition of our own functions,
// and their arguments.
#include "support.h"

namespace asymq_test {
namespace {

using asymq::RangeArguments;

class FusedTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    x = (2 * at::randn({6, 41})).to(device()).requires_grad_();
    min = end(-2.5f);
    max = end(2.2f);
    beta = end(1.0f);
    gamma = end(0.75f);
    low = end(-0.2f).detach();
    high = end(2.0f).detach();
  }
  Tensor end(float value) const { return at::full({1}, value).to(device()).requires_grad_(); }

  Tensor fused_gelu() const {
    return asymq::quantized_gelu(x, {"min_max", {min, max}, 8},
                                 {"beta_gamma", {beta, gamma, low, high}, 8});
  }

  /// Of both for the same random upstream gradient, to `terms` times the error of its sum.
  static void expect_same_gradients(const Tensor& got, const Tensor& want, const Tensors& leaves,
                                    double terms = 1) {
    const Tensor grad = at::randn_like(got);
    const Tensors grads = torch::autograd::grad({got}, leaves, {grad});
    const Tensors expected = torch::autograd::grad({want}, leaves, {grad});
    for (size_t i = 0; i < grads.size(); ++i) {
      EXPECT_TRUE(close(grads[i], expected[i], terms * grad.abs().sum(), 1e-6)) << i;
    }
  }

  Tensor x, min, max, beta, gamma, low, high;
};
ASYMQ_ON_EVERY_DEVICE(FusedTest);

TEST_P(FusedTest, GeluEqualsTheComposition) {
  const Tensor raw = at::gelu(asymq::fake_quantize_min_max(x, min, max, 8), "tanh");
  const Tensor want = asymq::fake_quantize_beta_gamma(raw, beta, gamma, low, high, 8);
  const Tensor got = fused_gelu();
  // One step of the grid where a quotient lies on a tie.
  EXPECT_LE((got - want).abs().max().item<float>(), 2.0f / 255);
  EXPECT_LE(at::count_nonzero(got - want).item<int64_t>(), 1);
  expect_same_gradients(got, want, {x, min, max, beta, gamma});
}

TEST_P(FusedTest, CrossEntropyEqualsTheComposition) {
  const Tensor labels = at::randint(41, {6}).to(at::kLong).to(device());
  labels[2] = -100;
  const Tensor want = at::cross_entropy_loss(asymq::fake_quantize_min_max(x, min, max, 8), labels,
                                             {}, at::Reduction::None);
  const Tensor got = asymq::quantized_cross_entropy(x, labels, {"min_max", {min, max}, 8});
  EXPECT_TRUE(close(got, want, want.abs().max()));
  EXPECT_EQ(got[2].item<float>(), 0);
  expect_same_gradients(got, want, {x, min, max});
  const Tensor wider = at::constant_pad_nd(x, {0, 7}, 9);
  EXPECT_TRUE(close(
      asymq::quantized_cross_entropy(wider, labels, {"min_max", {min, max}, 8}, -100, x.size(1)),
      want, want.abs().max()));
}

TEST_P(FusedTest, RmsNormEqualsTheComposition) {
  const Tensor values = at::randn({6, 64}).to(device()).requires_grad_();
  const Tensor weight = (1 + at::randn({64}) / 4).to(device()).requires_grad_();
  const Tensor normalized = values * at::rsqrt(values.square().mean(-1, true) + 1e-5);
  const Tensor raw = weight * normalized;
  const Tensor want = asymq::fake_quantize_dynamic_beta_gamma(raw, beta, gamma, {}, 8);
  const Tensors factors{beta, gamma};
  RangeArguments token{"beta_gamma", factors, 8};
  token.token = true;
  const Tensor got = asymq::quantized_rms_norm(values, weight, token, 1e-5);
  EXPECT_LE((got - want).abs().max().item<float>(), raw.abs().max().item<float>() / 100);
  EXPECT_LE(at::count_nonzero((got - want).abs() > 1e-5).item<int64_t>(), 1);
  expect_same_gradients(got, want, {values, weight, beta, gamma}, 4);
  const Tensor plain = asymq::quantized_rms_norm(values, weight, {}, 1e-5);
  EXPECT_TRUE(close(plain, raw, raw.abs().max(), 1e-6));
}

TEST_P(FusedTest, GluEqualsTheComposition) {
  const Tensor up = at::randn({6, 41}).to(device()).requires_grad_();
  const Tensor gated = at::silu(asymq::fake_quantize_min_max(x, min, max, 8));
  const Tensor product = gated * up;
  const Tensor want = asymq::fake_quantize_beta_gamma(product, beta, gamma, low, high, 8);
  const Tensors ends{min, max}, factors{beta, gamma, low, high};
  const Tensor got = asymq::quantized_glu(x, up, RangeArguments{"beta_gamma", factors, 8}, "silu",
                                          RangeArguments{"min_max", ends, 8});
  EXPECT_LE((got - want).abs().max().item<float>(), 2.0f / 255);
  EXPECT_LE(at::count_nonzero((got - want).abs() > 1e-5).item<int64_t>(), 1);
  expect_same_gradients(got, want, {x, up, min, max, beta, gamma}, 4);
}

TEST_P(FusedTest, KlDivEqualsTheComposition) {
  const Tensor teacher = at::randn({6, 41}).to(device());
  const Tensor labels = at::zeros({6}, at::kLong).to(device());
  labels[2] = -100;
  const double temperature = 2;
  const Tensor quantized = asymq::fake_quantize_min_max(x, min, max, 8);
  const Tensor want = at::kl_div((quantized / temperature).log_softmax(1),
                                 (teacher / temperature).log_softmax(1), at::Reduction::None, true)
                          .sum(1)
                          .mul(temperature * temperature)
                          .masked_fill(labels.eq(-100), 0);
  const Tensor got =
      asymq::quantized_kl_div(x, teacher, {"min_max", {min, max}, 8}, labels, temperature);
  EXPECT_TRUE(close(got, want, want.abs().max()));
  expect_same_gradients(got, want, {x, min, max});
}

TEST_P(FusedTest, Errors) {
  const Tensors ends{min, max}, wide{min.expand({2}), max.expand({2})}, few{min};
  const Tensors constants{beta, gamma, low, high.clone().requires_grad_()};
  const RangeArguments range{"min_max", ends, 8};
  const auto gelu = [&](const Tensor& of, const RangeArguments& a, const RangeArguments& b,
                        std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_gelu");
    expect_error([&] { asymq::quantized_gelu(of, a, b); }, parts);
  };
  gelu(x.to(at::kLong), range, range, {"x", "float32", "Long"});
  gelu(x, {"min_max", wide, 8}, range, {"input's", "min", "one element", "[2]"});
  gelu(x, range, {"min_max", few, 8}, {"min_max", "max", "1"});
  gelu(x, range, {"min_max", ends, 17}, {"output's", "bits", "17"});
  gelu(x, range, {"beta_gamma", constants, 8}, {"beta_gamma", "max", "grad"});

  const Tensor weight = at::ones({41}).to(device());
  const auto norm = [&](const Tensor& of, const Tensor& weight, const RangeArguments& output,
                        std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_rms_norm");
    expect_error([&] { asymq::quantized_rms_norm(of, weight, output); }, parts);
  };
  const Tensors factors{beta, gamma};
  RangeArguments groups{"beta_gamma", factors, 8};
  groups.token = true;
  groups.group = 5;
  norm(x, weight.slice(0, 1), range, {"weight", "[41]", "[40]"});
  norm(x, weight.to(at::kDouble), range, {"weight", "Float", "Double"});
  norm(x, weight, groups, {"output's", "group", "41", "5"});
  gelu(x, range, groups, {"output's", "one range"});
  const auto glu = [&](const Tensor& up, const char* activation,
                       const std::optional<RangeArguments>& product,
                       std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_glu");
    expect_error([&] { asymq::quantized_glu(x, up, product, activation); }, parts);
  };
  glu(x[0], "silu", range, {"up", "[6, 41]", "[41]"});
  glu(x, "relu", range, {"activation", "relu"});
  glu(x, "silu", RangeArguments{"beta_gamma", constants, 8}, {"beta_gamma", "max", "grad"});

  const Tensor labels = at::zeros({6}, at::kLong).to(device());
  const auto loss = [&](const Tensor& logits, const Tensor& labels, const RangeArguments& range,
                        std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_cross_entropy");
    expect_error([&] { asymq::quantized_cross_entropy(logits, labels, range); }, parts);
  };
  loss(x[0], labels, range, {"logits", "2 dimensions", "[41]"});
  loss(x, labels.to(at::kInt), range, {"labels", "int64", "Int"});
  loss(x, labels.slice(0, 1), range, {"labels", "[6]", "[5]"});
  loss(x, labels, {"range", ends, 8}, {"parameterization", "range"});
  loss(x, labels, {"beta_gamma", constants, 8}, {"beta_gamma", "max", "grad"});
  const auto divergence = [&](const Tensor& teacher, double temperature,
                              std::vector<std::string> parts) {
    parts.push_back("asymq::quantized_kl_div");
    expect_error([&] { asymq::quantized_kl_div(x, teacher, range, labels, temperature); }, parts);
  };
  divergence(x, 1, {"teacher_logits", "grad"});
  divergence(x.detach().slice(0, 1), 1, {"teacher_logits", "[6, 41]", "[5, 41]"});
  divergence(x.detach(), 0, {"temperature", "positive", "0"});
  if (device().is_cpu()) {
    loss(x, labels + 41, range, {"labels", "0 to 40", "41"});
  } else {
    loss(x, labels.cpu(), range, {"labels", "cuda", "cpu"});
    const Tensors elsewhere{min.cpu(), max.cpu()};
    gelu(x, range, {"min_max", elsewhere, 8}, {"min", "cuda", "cpu"});
  }
}

}  // namespace
}  // namespace asymq_test
