// Codes, their inverse, and the effective scale and offset.
#include "support.h"

namespace asymq_test {
namespace {

class QuantizeTest : public DeviceTest {};
ASYMQ_ON_EVERY_DEVICE(QuantizeTest);

TEST_P(QuantizeTest, RoundTripIsTheFakeQuantizer) {
  for (const std::vector<int64_t>& range :
       {std::vector<int64_t>{1}, {24, 1}, {1, 40}, {24, 5}, {6, 8}}) {
    for (const int64_t bits : {2, 4, 8, 9, 12, 16}) {
      SCOPED_TRACE(bits);
      const Tensor x = (at::randn({24, 40}) * 2).to(device());
      const Op& asymmetric = op_named("scale_offset");
      Tensors parameters = random_parameters(asymmetric, range, bits);
      for (Tensor& p : parameters) p = p.to(device());
      const Tensor scale = parameters[0], offset = parameters[1];

      const Tensor codes = asymq::quantize(x, scale, offset, bits);
      EXPECT_EQ(codes.scalar_type(), bits <= 8 ? at::kByte : at::kInt);
      EXPECT_GE(codes.min().item<int64_t>(), 0);
      EXPECT_LE(codes.max().item<int64_t>(), (int64_t{1} << bits) - 1);
      // Not bit for bit: the fake quantizer keeps the sign of a rounded -0.
      EXPECT_TRUE(at::equal(asymq::dequantize(codes, scale, offset, bits),
                            asymq::fake_quantize_scale_offset(x, scale, offset, bits)));

      const Tensor signed_codes = asymq::quantize(x, scale, std::nullopt, bits);
      EXPECT_EQ(signed_codes.scalar_type(), bits <= 8 ? at::kChar : at::kShort);
      EXPECT_LE(signed_codes.abs().max().item<int64_t>(), (int64_t{1} << (bits - 1)) - 1);
      EXPECT_TRUE(at::equal(asymq::dequantize(signed_codes, scale, std::nullopt, bits),
                            asymq::fake_quantize_symmetric_scale(x, scale, bits)));

      const Tensor full = asymq::quantize(x, scale, std::nullopt, bits, kEps, true);
      EXPECT_EQ(full.scalar_type(), signed_codes.scalar_type());
      EXPECT_GE(full.min().item<int64_t>(), -(int64_t{1} << (bits - 1)));
      EXPECT_TRUE(at::equal(asymq::dequantize(full, scale, std::nullopt, bits, kEps, true),
                            asymq::fake_quantize_symmetric_scale(x, scale, bits, kEps, true)));
    }
  }
}

TEST_P(QuantizeTest, TypesAndSpecialValues) {
  const Tensor scale = at::tensor({0.25f}).to(device()), offset = at::tensor({-3.0f}).to(device());
  const Tensor x = at::tensor({NAN, INFINITY, -INFINITY, -0.0f, 0.3f}).to(device());
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const Tensor codes = asymq::quantize(x.to(dtype), scale, offset, 4).cpu();
    EXPECT_TRUE(at::equal(codes, at::tensor({0, 15, 0, 3, 4}).to(at::kByte)));
    const Tensor signed_codes = asymq::quantize(x.to(dtype), scale, std::nullopt, 4).cpu();
    EXPECT_TRUE(at::equal(signed_codes, at::tensor({0, 7, -7, 0, 1}).to(at::kChar)));
  }
  EXPECT_EQ(
      asymq::dequantize(at::tensor({1}).to(device(), at::kByte), scale, offset, 4).scalar_type(),
      at::kFloat);
  const Tensor codes =
      asymq::quantize(x.to(at::kDouble), scale.to(at::kDouble), offset.to(at::kDouble), 4);
  EXPECT_EQ(
      asymq::dequantize(codes, scale.to(at::kDouble), offset.to(at::kDouble), 4).scalar_type(),
      at::kDouble);
  EXPECT_FALSE(asymq::quantize(x, scale.clone().requires_grad_(), offset, 4).requires_grad());
}

TEST_P(QuantizeTest, ShapesAndStrides) {
  const Tensor scale = at::tensor({0.25f}).to(device());
  for (const Tensor& x :
       {at::empty({0, 3}), at::full({}, 1.0), at::randn({5, 6}).t(), at::randn({8}).slice(0, 1)}) {
    const Tensor moved = x.device() == device() ? x : x.to(device());
    const Tensor codes = asymq::quantize(moved, scale, std::nullopt, 4);
    EXPECT_EQ(codes.sizes(), x.sizes());
    EXPECT_TRUE(at::equal(asymq::dequantize(codes, scale, std::nullopt, 4),
                          asymq::fake_quantize_symmetric_scale(moved.to(at::kFloat), scale, 4)));
  }
}

TEST_P(QuantizeTest, EffectiveScaleAndOffset) {
  const std::vector<int64_t> shape = {7, 1};
  for (const Op& op : ops()) {
    for (const int64_t bits : {3, 8, 16}) {
      SCOPED_TRACE(bits);
      Tensors parameters = random_parameters(op, shape, bits);
      parameters.back()[3] = -1e-3;  // a small, collapsed or reversed range
      Tensors on_device;
      for (const Tensor& p : parameters)
        on_device.push_back(p.to(device()).requires_grad_(op.learnable > 1));
      const auto [scale, offset] = asymq::effective_scale_offset(
          op.parameterization, on_device, bits, op.symmetric, op.sigmoid, kEps, op.full_range);
      EXPECT_FALSE(scale.requires_grad());
      EXPECT_EQ(scale.sizes(), at::IntArrayRef(shape));
      ASSERT_EQ(offset.has_value(), !op.symmetric) << op;
      const Tensor scale_cpu = scale.cpu().flatten(),
                   offset_cpu = offset.value_or(scale).cpu().flatten();
      for (int64_t i = 0; i < 7; ++i) {
        std::vector<double> values;
        for (const Tensor& p : parameters) values.push_back(p[i].item<double>());
        const Grid<float> want = grid<float>(op, values, bits, kEps);
        EXPECT_EQ(scale_cpu[i].item<float>(), want.s) << op;
        if (offset) {
          EXPECT_EQ(offset_cpu[i].item<float>(), want.z) << op;
        }
      }
    }
  }
}

TEST_P(QuantizeTest, ParametersOfARange) {
  const Tensor min = at::tensor({-1.0, -0.3, -5.0}, at::kDouble).reshape({3, 1}).to(device());
  const Tensor max = at::tensor({2.0, 0.0, 0.1}, at::kDouble).reshape({3, 1}).to(device());
  for (const Op& op : ops()) {
    for (const int64_t bits : {2, 8, 16}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kDouble}) {
        SCOPED_TRACE(op.name + ", " + std::to_string(bits) + " bits, " + at::toString(dtype));
        const Tensor low = min.to(dtype).requires_grad_(), high = max.to(dtype).requires_grad_();
        const Tensors learned = asymq::parameters_of_range(op.parameterization, low, high, bits,
                                                           op.symmetric, op.sigmoid, op.full_range);
        ASSERT_EQ(learned.size(), op.learnable);
        for (const Tensor& parameter : learned) {
          EXPECT_EQ(parameter.scalar_type(), dtype);
          EXPECT_EQ(parameter.sizes(), min.sizes());
          EXPECT_EQ(parameter.device(), min.device());
          EXPECT_FALSE(parameter.requires_grad());
          EXPECT_FALSE(parameter.is_alias_of(low) || parameter.is_alias_of(high));
        }
        Tensors all = learned;
        if (op.parameters == 4) all.push_back(low.detach());
        if (op.parameters > op.learnable) all.push_back(high.detach());
        const auto [scale, offset] = asymq::effective_scale_offset(
            op.parameterization, all, bits, op.symmetric, op.sigmoid, kEps, op.full_range);
        const double k = static_cast<double>((int64_t{1} << bits) - 1);
        const double factor = op.sigmoid ? 1 / (1 + std::exp(-4.0)) : 1;
        const Tensor want =
            factor * (op.symmetric ? 2 * max / (k + op.full_range) : (max - min) / k);
        const double unit = dtype == at::kFloat ? 1e-6 : 1e-14;
        const Tensor guarded = want.clamp_min(kEps);
        EXPECT_TRUE(close(scale, guarded, guarded, unit));
        if (offset) {
          EXPECT_TRUE(close(*offset, factor * min / want, (min / want).abs(), unit));
        }
      }
    }
  }
}

}  // namespace
}  // namespace asymq_test
