// Every golden vector, in float32 and float64, on every device.
#include <fstream>
#include <map>

#include "support.h"

namespace asymq_test {
namespace {

using nlohmann::json;

// File name -> operator, and the vectors' names of its parameters in the operator's order.
struct GoldenFile {
  std::string file, op;
  std::vector<std::string> parameters;

  friend std::ostream& operator<<(std::ostream& out, const GoldenFile& file) {
    return out << file.file;
  }
};

const std::vector<GoldenFile>& golden_files() {
  static const std::vector<GoldenFile> files = {
      {"scale_offset", "scale_offset", {"s", "z"}},
      {"min_max", "min_max", {"theta_min", "theta_max"}},
      {"beta_gamma", "beta_gamma", {"beta", "gamma", "theta_min", "theta_max"}},
      {"beta_gamma_sigmoid", "beta_gamma_sigmoid", {"beta", "gamma", "theta_min", "theta_max"}},
      {"kscale_koffset", "kscale_koffset", {"s_prime", "z_prime"}},
      {"sym_scale", "symmetric_scale", {"s"}},
      {"sym_max", "symmetric_max", {"theta_max"}},
      {"sym_gamma", "symmetric_gamma", {"gamma", "theta_max"}},
      {"sym_gamma_sigmoid", "symmetric_gamma_sigmoid", {"gamma", "theta_max"}},
  };
  return files;
}

class GoldenTest
    : public testing::TestWithParam<std::tuple<GoldenFile, at::DeviceType, at::ScalarType>> {};

TEST_P(GoldenTest, EveryCase) {
  const GoldenFile& file = std::get<0>(GetParam());
  const at::DeviceType device = std::get<1>(GetParam());
  const at::ScalarType dtype = std::get<2>(GetParam());
  const Op& op = op_named(file.op);
  std::ifstream stream(std::string(ASYMQ_GOLDEN_DIR) + "/" + file.file + ".json");
  ASSERT_TRUE(stream) << file.file;
  const json cases = json::parse(stream)["cases"];
  ASSERT_FALSE(cases.empty());
  for (const json& vector : cases) {
    SCOPED_TRACE(vector["case"].get<std::string>());
    const int64_t bits = vector["bits"];
    const double k = vector["k"];
    const auto on_device = [&](const Tensor& t) { return t.to(device, dtype); };
    const Tensor x = on_device(tensor_of(vector["x"])),
                 upstream = on_device(tensor_of(vector["upstream"]));
    const Tensor region = tensor_of(vector["region"]);
    Tensors parameters;
    for (const std::string& name : file.parameters) {
      const json& group =
          vector["learnable"].contains(name) ? vector["learnable"] : vector["const"];
      parameters.push_back(on_device(tensor_of(group.at(name))));
    }

    // Scale and offset of this type, and codes.
    const auto [scale, offset] = asymq::effective_scale_offset(op.parameterization, parameters,
                                                               bits, op.symmetric, op.sigmoid);
    EXPECT_EQ(offset.has_value(), !op.symmetric);
    const Tensor codes = asymq::quantize(x, scale, offset, bits);
    EXPECT_TRUE(at::equal(codes.cpu().to(at::kDouble), tensor_of(vector["xbar"]))) << "codes";

    const Result shared = evaluate(op, x, parameters, upstream, bits);
    const Tensor xhat = tensor_of(vector["xhat"]);
    EXPECT_TRUE(close(shared.xhat, xhat, xhat.abs())) << "xhat";
    EXPECT_TRUE(bit_equal(shared.dx, tensor_of(vector["grad_x"]).to(dtype))) << "dx";

    // A range for every element turns the parameters' gradients into upstream times the partials.
    Tensors spread;
    for (const Tensor& p : parameters) spread.push_back(p.expand_as(x).contiguous());
    const Result single = evaluate(op, x, spread, upstream, bits);
    EXPECT_TRUE(bit_equal(single.xhat, shared.xhat)) << "xhat with a range per element";
    const Tensor inside = single.dx.cpu().to(at::kDouble).eq(upstream.cpu().to(at::kDouble));
    EXPECT_TRUE(at::equal(inside, region.eq(0))) << "region";
    for (size_t i = 0; i < op.learnable; ++i) {
      const std::string& name = file.parameters[i];
      const Tensor partial = tensor_of(vector["partial"][name]);
      const Tensor allowed =
          name == "s" ? at::full_like(partial, 2.5e-7 * k) : 3e-6 * partial.abs().clamp_min(1);
      EXPECT_TRUE(close(single.grads[i].cpu().to(at::kDouble) / upstream.cpu().to(at::kDouble),
                        partial, allowed, 1))
          << "partial of " << name;
      const Tensor weighted = allowed * upstream.cpu().abs();
      const Tensor sum_allowed =
          weighted.dim() == 2 ? weighted.sum(-1, /*keepdim=*/true) : weighted.sum();
      EXPECT_TRUE(close(shared.grads[i], tensor_of(vector["grad"][name]), sum_allowed, 1))
          << "gradient of " << name;
    }
  }
}

class LiveGoldenTest : public testing::TestWithParam<std::tuple<at::DeviceType, at::ScalarType>> {};

TEST_P(LiveGoldenTest, EveryCase) {
  const auto [device, dtype] = GetParam();
  std::ifstream stream(std::string(ASYMQ_GOLDEN_DIR) + "/dynamic_per_token.json");
  ASSERT_TRUE(stream);
  const json cases = json::parse(stream)["cases"];
  ASSERT_EQ(cases.size(), 12u);
  const double unit = dtype == at::kFloat ? 3e-6 : 1e-12;
  for (const json& vector : cases) {
    SCOPED_TRACE(vector["case"].get<std::string>());
    const std::string kind = vector["kind"];
    const int64_t bits = vector["bits"];
    const double eps = vector["eps"];
    const bool sigmoid = vector["sigmoid"], full_range = kind.ends_with("full_range");
    const auto group =
        vector["group"].is_null() ? std::nullopt : std::optional<int64_t>(vector["group"]);
    const auto leaf = [&](const Tensor& t) { return t.to(device, dtype).requires_grad_(); };
    const Tensor x = leaf(tensor_of(vector["x"])), upstream = tensor_of(vector["upstream"]);
    std::vector<std::string> names = {"gamma"};
    if (kind == "asymmetric") names.insert(names.begin(), "beta");
    Tensors inputs = {x};
    for (const auto& name : names) inputs.push_back(leaf(tensor_of(vector["learnable"][name])));

    Tensor xhat;
    if (kind == "static_full_range") {
      const Tensor max = tensor_of(vector["theta_max"]).flatten()[0].reshape(1).to(device, dtype);
      xhat = asymq::fake_quantize_symmetric_gamma(x, inputs[1], max, bits, sigmoid, eps, true);
    } else if (kind == "asymmetric") {
      xhat = asymq::fake_quantize_dynamic_beta_gamma(x, inputs[1], inputs[2], group, bits, sigmoid,
                                                     eps);
    } else {
      xhat = asymq::fake_quantize_dynamic_symmetric_gamma(x, inputs[1], group, bits, sigmoid,
                                                          full_range, eps);
    }
    const Tensor want = tensor_of(vector["xhat"]);
    EXPECT_TRUE(close(xhat, want, want.abs(), unit)) << "xhat";
    const auto of_elements = [&](const char* name) {
      const Tensor values = tensor_of(vector[name]);
      return values.repeat_interleave(x.size(-1) / values.size(-1), -1);
    };
    Tensor codes = (xhat.detach().cpu().to(at::kDouble) / of_elements("s")).round();
    if (kind == "asymmetric") codes = codes - of_elements("n");
    EXPECT_TRUE(at::equal(codes, tensor_of(vector["xbar"]))) << "codes";

    const auto gradients = [&](const Tensor& grad) {
      return torch::autograd::grad({xhat}, inputs, {grad.to(device, dtype)}, true);
    };
    const Tensors grads = gradients(upstream);
    EXPECT_TRUE(bit_equal(grads[0], tensor_of(vector["grad_x"]).to(dtype))) << "dx";
    for (size_t i = 0; i < names.size(); ++i) {
      const Tensor partial = tensor_of(vector["partial"][names[i]]);
      const Tensor allowed = (upstream.abs() * partial.abs().clamp_min(1)).sum();
      EXPECT_TRUE(close(grads[1 + i], tensor_of(vector["grad"][names[i]]), allowed, unit))
          << "gradient of " << names[i];
    }
    for (int64_t place = 0; place < x.numel(); ++place) {
      Tensor one = at::zeros_like(upstream);
      one.view(-1)[place] = 1;
      const Tensors of_one = gradients(one);
      for (size_t i = 0; i < names.size(); ++i) {
        const Tensor partial = tensor_of(vector["partial"][names[i]]).flatten()[place];
        EXPECT_TRUE(close(of_one[1 + i].sum(), partial, partial.abs().clamp_min(1), unit))
            << "partial of " << names[i] << " at " << place;
      }
    }
  }
}

class LinkGoldenTest : public testing::TestWithParam<std::tuple<at::DeviceType, at::ScalarType>> {};

TEST_P(LinkGoldenTest, EveryCase) {
  const auto [device, dtype] = GetParam();
  std::ifstream stream(std::string(ASYMQ_GOLDEN_DIR) + "/train.json");
  ASSERT_TRUE(stream);
  const double unit = dtype == at::kFloat ? 1e-5 : 1e-12;
  int count = 0;
  const json cases = json::parse(stream)["cases"];
  for (const json& vector : cases) {
    if (vector["kind"] != "link") continue;
    ++count;
    const std::string link = vector["link"];
    SCOPED_TRACE(link);
    const auto on_device = [&](const char* name) {
      return tensor_of(vector[name]).to(device, dtype);
    };
    const Tensor upstream = on_device("upstream"), min = on_device("min"), max = on_device("max");
    const Tensors inputs = {on_device("x").requires_grad_(), on_device("beta").requires_grad_(),
                            on_device("gamma").requires_grad_()};
    const auto call = [&](double gradient_scale) {
      const Tensor xhat =
          asymq::fake_quantize_beta_gamma(inputs[0], inputs[1], inputs[2], min, max, vector["bits"],
                                          /*sigmoid=*/false, kEps, link, gradient_scale);
      Tensors result = torch::autograd::grad({xhat}, inputs, {upstream});
      result.push_back(xhat);
      return result;
    };
    const Tensors got = call(1), half = call(0.5);
    const Tensor xhat = tensor_of(vector["xhat"]);
    EXPECT_TRUE(close(got[3], xhat, xhat.abs(), unit)) << "xhat";
    EXPECT_TRUE(bit_equal(got[0], tensor_of(vector["grad_x"]).to(dtype))) << "dx";
    // Their terms cancel, and are at most as large as the ends and the upstream gradients.
    const Tensor size = 4.7 * tensor_of(vector["upstream"]).abs().sum();
    EXPECT_TRUE(close(got[1], tensor_of(vector["grad_beta"]), size, unit)) << "gradient of beta";
    EXPECT_TRUE(close(got[2], tensor_of(vector["grad_gamma"]), size, unit)) << "gradient of gamma";
    for (const size_t i : {0, 3}) EXPECT_TRUE(bit_equal(half[i], got[i].cpu()));
    for (const size_t i : {1, 2}) EXPECT_TRUE(bit_equal(half[i], (0.5 * got[i]).cpu()));
  }
  EXPECT_EQ(count, 4);
}

std::string device_and_type(const testing::TestParamInfo<LiveGoldenTest::ParamType>& info) {
  return c10::DeviceTypeName(std::get<0>(info.param), /*lower_case=*/true) + std::string("_") +
         c10::toString(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(, LiveGoldenTest,
                         testing::Combine(testing::ValuesIn(devices()),
                                          testing::Values(at::kFloat, at::kDouble)),
                         device_and_type);

INSTANTIATE_TEST_SUITE_P(, LinkGoldenTest,
                         testing::Combine(testing::ValuesIn(devices()),
                                          testing::Values(at::kFloat, at::kDouble)),
                         device_and_type);

std::string case_name(const testing::TestParamInfo<GoldenTest::ParamType>& info) {
  return std::get<0>(info.param).file + "_" +
         c10::DeviceTypeName(std::get<1>(info.param), /*lower_case=*/true) + "_" +
         c10::toString(std::get<2>(info.param));
}

INSTANTIATE_TEST_SUITE_P(, GoldenTest,
                         testing::Combine(testing::ValuesIn(golden_files()),
                                          testing::ValuesIn(devices()),
                                          testing::Values(at::kFloat, at::kDouble)),
                         case_name);

}  // namespace
}  // namespace asymq_test
