// Quantized attention against the quantized softmax between two products, and its arguments.
#include "support.h"

namespace asymq_test {
namespace {

class AttentionTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    query = heads(4, 6);
    key = heads(2, 9);
    value = heads(2, 9);
    for (const float end : {-1.5f, 2.0f, 0.0f, 0.6f}) {
      ends.push_back(at::full({1}, end).to(device()).requires_grad_());
    }
  }
  Tensor heads(int64_t count, int64_t tokens) const {
    return at::randn({2, count, tokens, 16}).to(device()).requires_grad_();
  }
  asymq::RangeArguments scores() const { return {"min_max", at::TensorList(ends).slice(0, 2), 8}; }
  asymq::RangeArguments probabilities() const {
    return {"min_max", at::TensorList(ends).slice(2, 2), 8};
  }
  Tensors leaves() const {
    Tensors all{query, key, value};
    all.insert(all.end(), ends.begin(), ends.end());
    return all;
  }

  Tensor query, key, value;
  Tensors ends;
};
ASYMQ_ON_EVERY_DEVICE(AttentionTest);

TEST_P(AttentionTest, EqualsTheComposition) {
  // Every key head serves two heads.
  const Tensor keys = key.repeat_interleave(2, 1), values = value.repeat_interleave(2, 1);
  for (const auto window : {std::optional<int64_t>(), std::optional<int64_t>(4)}) {
    const Tensor got = asymq::quantized_attention(query, key, value, std::nullopt, true, 0.5,
                                                  scores(), probabilities(), window);
    const Tensor want =
        asymq::quantized_softmax((0.5 * query).matmul(keys.transpose(-1, -2)), std::nullopt, true,
                                 scores(), probabilities(), window)
            .matmul(values);
    // A code that rounding moves is a step of the grid.
    EXPECT_LE((got - want).norm().item<float>(), 1e-2 * want.norm().item<float>());
    const Tensor grad = at::randn_like(want);
    const Tensors grads = torch::autograd::grad({got}, leaves(), {grad});
    const Tensors expected = torch::autograd::grad({want}, leaves(), {grad});
    for (size_t i = 0; i < grads.size(); ++i) {
      const Tensor off = (grads[i] - expected[i]).norm();
      EXPECT_LE(off.item<float>(), 1e-2 * (expected[i].norm() + grad.norm()).item<float>()) << i;
    }
  }
}

TEST_P(AttentionTest, NamesWhatDoesNotFit) {
  expect_error(
      [&] {
        asymq::quantized_attention(query, key, query, std::nullopt, true, 0.5, scores(),
                                   probabilities());
      },
      {"asymq::quantized_attention", "value must have the key's batch, heads and tokens"});
}

}  // namespace
}  // namespace asymq_test
