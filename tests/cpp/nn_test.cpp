// The modules of asymq/nn.h: what they compute, when they refuse to, and what they keep.
#include <asymq/nn.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <sstream>

#include "support.h"

namespace asymq_test {
namespace {

using asymq::nn::calibrate;
using asymq::nn::PerChannel;
using asymq::nn::PerGroup;
using asymq::nn::PerTensor;
using asymq::nn::PerToken;
using asymq::nn::QuantAct;
using asymq::nn::QuantActOptions;
using asymq::nn::Quantizer;
using asymq::nn::QuantizerImpl;
using asymq::nn::QuantizerOptions;
using asymq::nn::QuantLinear;
using asymq::nn::QuantLinearOptions;
using State = QuantizerImpl::State;

QuantizerOptions options_of(const Op& op) {
  return QuantizerOptions()
      .parameterization(op.parameterization)
      .symmetric(op.symmetric)
      .sigmoid(op.sigmoid)
      .full_range(op.full_range);
}

// Two quantized layers with quantized outputs.
struct NetImpl : torch::nn::Cloneable<NetImpl> {
  NetImpl(const QuantizerOptions& weight, const QuantActOptions& output)
      : weight(weight), output(output) {
    reset();
  }
  void reset() override {
    fc1 = register_module("fc1",
                          QuantLinear(QuantLinearOptions(8, 16).weight(weight).output(output)));
    fc2 = register_module("fc2",
                          QuantLinear(QuantLinearOptions(16, 4).weight(weight).output(output)));
    dropout = register_module("dropout", torch::nn::Dropout());
  }
  Tensor forward(const Tensor& x) { return fc2(dropout(at::relu(fc1(x)))); }

  QuantizerOptions weight;
  QuantActOptions output;
  QuantLinear fc1 = nullptr, fc2 = nullptr;
  torch::nn::Dropout dropout = nullptr;
};
TORCH_MODULE(Net);

class ModuleTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    x = at::randn({32, 8}).to(device());
  }
  Net make_net(const Op& op, int64_t bits = 8) const {
    const QuantizerOptions options = options_of(op).bits(bits);
    Net net(QuantizerOptions(options).granularity(PerChannel()), options);
    net->to(device());
    return net;
  }
  Net calibrated_net(const Op& op = op_named("beta_gamma")) const {
    Net net = make_net(op);
    calibrate(*net, [&] { net->forward(x); });
    return net;
  }
  // A quantizer on this device that has seen `data`.
  Quantizer calibrated(const QuantizerOptions& options, const Tensor& data,
                       bool force_zero = true) const {
    Quantizer quantizer(options);
    quantizer->to(device());
    calibrate(
        *quantizer, [&] { quantizer(data); }, force_zero);
    return quantizer;
  }
  Tensor x;
};
ASYMQ_ON_EVERY_DEVICE(ModuleTest);

Tensor named(const torch::nn::Module& module, const std::string& name) {
  const auto parameters = module.named_parameters();
  const Tensor* parameter = parameters.find(name);
  return parameter != nullptr ? *parameter : module.named_buffers()[name];
}

std::vector<std::string> names(const torch::OrderedDict<std::string, Tensor>& tensors) {
  return tensors.keys();
}

TEST_P(ModuleTest, ComputesTheFunctionOfItsParameterization) {
  for (const Op& op : ops()) {
    SCOPED_TRACE(op.name);
    const Quantizer quantizer = calibrated(options_of(op), x);
    Tensors parameters = quantizer->parameters();
    ASSERT_EQ(parameters.size(), op.learnable);
    if (op.parameters == 4) parameters.push_back(named(*quantizer, "min"));
    if (op.parameters > op.learnable) parameters.push_back(named(*quantizer, "max"));
    const Tensor y = Quantizer(quantizer)(x);
    EXPECT_TRUE(bit_equal(y, op.call(x, parameters, 8, kEps)));
    const double width = (x.max() - x.min()).item<double>();
    EXPECT_LT((y - x).abs().max().item<double>(), op.sigmoid ? width / 20 : width / 100);
    for (size_t i = 0; i < op.learnable; ++i) {
      const std::string name = quantizer->named_parameters().keys()[i];
      EXPECT_TRUE(bit_equal(parameters[i], named(*quantizer, "initial_" + name)));
    }
  }
}

TEST_P(ModuleTest, NamesItsTensorsAsTheFunctions) {
  using Names = std::vector<std::string>;
  const auto check = [](const QuantizerOptions& options, const Names& learned,
                        const Names& buffers) {
    const Quantizer quantizer(options);
    EXPECT_EQ(names(quantizer->named_parameters()), learned);
    EXPECT_EQ(names(quantizer->named_buffers()), buffers);
    for (const auto& tensor : quantizer->parameters()) {
      EXPECT_EQ(tensor.sizes(), at::IntArrayRef({1}));
      EXPECT_EQ(tensor.scalar_type(), at::kFloat);
      EXPECT_TRUE(tensor.isnan().all().item<bool>());
    }
  };
  QuantizerOptions options;
  check(options, {"beta", "gamma"}, {"initial_beta", "initial_gamma", "min", "max"});
  options.fix_min(true);
  check(options, {"gamma"}, {"beta", "initial_gamma", "min", "max"});
  check(options.parameterization("min_max"), {"max"}, {"min", "initial_max"});
  options = QuantizerOptions().parameterization("kscale_koffset");
  check(options, {"kscale", "koffset"}, {"initial_kscale", "initial_koffset"});
  options = QuantizerOptions().parameterization("scale_offset").symmetric(true);
  check(options, {"scale"}, {"initial_scale"});
  check(QuantizerOptions().symmetric(true), {"gamma"}, {"initial_gamma", "max"});
}

TEST_P(ModuleTest, GranularityIsTheShapeOfTheRanges) {
  const Tensor image = at::randn({2, 6, 4, 12}).to(device());
  struct Case {
    QuantizerOptions options;
    std::vector<int64_t> shape;
  };
  const auto sized = [](std::vector<int64_t> sizes) { return QuantizerOptions().sizes(sizes); };
  for (const Case& c :
       {Case{QuantizerOptions(), {1}}, Case{sized({12}).granularity(PerChannel()), {12}},
        Case{sized({6, 1, 1}).granularity(PerChannel()), {6, 1, 1}},
        Case{sized({4, 12}).granularity(PerChannel{-1}), {1, 12}},
        Case{sized({12}).granularity(PerGroup{4}), {3}},
        Case{sized({4, 12}).granularity(PerGroup{6}), {4, 2}},
        Case{sized({4, 12}).granularity(PerGroup{2, 0}), {2, 12}}}) {
    const Quantizer quantizer =
        calibrated(QuantizerOptions(c.options).parameterization("min_max"), image, false);
    const Tensor min = named(*quantizer, "min"), max = named(*quantizer, "max");
    ASSERT_EQ(min.sizes(), at::IntArrayRef(c.shape));
    // Each range ends at elements of its own.
    const Tensor y = Quantizer(quantizer)(image);
    EXPECT_LE((y - image).abs().max().item<double>(), (max - min).max().item<double>() / 255);
    EXPECT_EQ(min.min().item<float>(), image.min().item<float>());
    EXPECT_EQ(max.max().item<float>(), image.max().item<float>());
    if (c.shape == std::vector<int64_t>{4, 2}) {
      const Tensor blocks = image.reshape({12, 4, 2, 6});
      EXPECT_TRUE(bit_equal(min, blocks.amin({0, 3})));
      EXPECT_TRUE(bit_equal(max, blocks.amax({0, 3})));
    }
  }
  Quantizer channels = calibrated(sized({12}).granularity(PerChannel()), image);
  expect_error([&] { channels(at::randn({2, 24}).to(device())); }, {"QuantAct", "[12]", "[2, 24]"});
  expect_error([&] { channels(at::ones({}).to(device())); }, {"QuantAct", "[12]", "[]"});

  QuantLinear groups(QuantLinearOptions(12, 5).weight(QuantizerOptions().granularity(PerGroup{4})));
  EXPECT_EQ(named(*groups->weight_quantizer, "beta").sizes(), at::IntArrayRef({5, 3}));
  const QuantLinear rows(12, 5);
  EXPECT_EQ(named(*rows->weight_quantizer, "gamma").sizes(), at::IntArrayRef({5, 1}));
}

TEST_P(ModuleTest, LayerIsLinearOnItsGrids) {
  for (const Op& op : ops()) {
    SCOPED_TRACE(op.name);
    Net net = calibrated_net(op);
    QuantLinear fc1 = net->fc1;
    const Tensor weight = fc1->weight_quantizer(fc1->weight);
    EXPECT_FALSE(at::equal(weight, fc1->weight));
    const Tensor y = fc1->output_quantizer(at::linear(x, weight, fc1->bias));
    EXPECT_TRUE(bit_equal(fc1(x), y));
  }
}

TEST_P(ModuleTest, GradientsReachWhatLearns) {
  for (const Op& op : ops()) {
    for (const bool frozen : {false, true}) {
      SCOPED_TRACE(op.name + (frozen ? ", weights frozen" : ""));
      Net net = calibrated_net(op);
      if (frozen) asymq::nn::freeze_weights(*net);
      const Tensor input = x.clone().requires_grad_();
      net->forward(input).square().sum().backward();
      for (const auto& item : net->named_parameters()) {
        const bool is_range = item.key().find("quantizer") != std::string::npos;
        EXPECT_EQ(item.value().requires_grad(), is_range || !frozen) << item.key();
        EXPECT_EQ(item.value().grad().defined(), is_range || !frozen) << item.key();
        if (item.value().grad().defined()) {
          EXPECT_TRUE(item.value().grad().isfinite().all().item<bool>()) << item.key();
        }
      }
      EXPECT_GT(input.grad().abs().sum().item<double>(), 0);
      EXPECT_EQ(asymq::nn::range_parameters(*net).size(), 4 * op.learnable);
      EXPECT_EQ(asymq::nn::weight_parameters(*net).size(),
                net->parameters().size() - 4 * op.learnable);
    }
  }
}

TEST_P(ModuleTest, FixedMinimumStays) {
  for (const char* parameterization : {"min_max", "beta_gamma"}) {
    Quantizer quantizer =
        calibrated(QuantizerOptions().parameterization(parameterization).fix_min(true), x.relu());
    ASSERT_EQ(quantizer->parameters().size(), 1u);
    quantizer(x).sum().backward();
    EXPECT_TRUE(quantizer->parameters()[0].grad().defined());
    EXPECT_EQ(named(*quantizer, "min").item<float>(), 0);
    EXPECT_FALSE(named(*quantizer, "min").requires_grad());
  }
}

TEST_P(ModuleTest, UncalibratedIsAnError) {
  Net net = make_net(op_named("min_max"));
  expect_error(
      [&] { net->forward(x); },
      {"QuantLinear(in_features=8, out_features=16, bias=true).weight_quantizer", "calibrate"});
  net->fc1->weight_quantizer->state = State::off;
  expect_error(
      [&] { net->forward(x); },
      {"QuantLinear(in_features=8, out_features=16, bias=true).output_quantizer", "calibrate"});
  QuantAct act(QuantActOptions().name("softmax"));
  act->to(device());
  expect_error([&] { act(x); }, {"softmax", "calibrate"});
}

TEST_P(ModuleTest, States) {
  Net net = calibrated_net();
  net->eval();
  const Tensor quantized = net->forward(x);
  asymq::nn::set_state(*net, State::off);
  const QuantLinear fc1 = net->fc1, fc2 = net->fc2;
  const Tensor plain =
      at::linear(at::relu(at::linear(x, fc1->weight, fc1->bias)), fc2->weight, fc2->bias);
  EXPECT_TRUE(bit_equal(net->forward(x), plain));
  asymq::nn::set_state(*net, State::quantizing);
  EXPECT_TRUE(bit_equal(net->forward(x), quantized));

  QuantAct act(QuantActOptions().parameterization("min_max"));
  act->to(device());
  act->start_observing();
  for (const double scale : {1.0, 3.0, 2.0}) {
    const Tensor part = scale * x;
    EXPECT_TRUE(act(part).is_same(part));
  }
  EXPECT_FALSE(act->calibrated());
  act->finish_observing();
  EXPECT_TRUE(act->calibrated());
  EXPECT_TRUE(act->state == State::quantizing);
  EXPECT_EQ(named(*act, "min").item<float>(), (3 * x).min().item<float>());
  EXPECT_EQ(named(*act, "max").item<float>(), (3 * x).max().item<float>());
}

TEST_P(ModuleTest, CalibratedRanges) {
  const auto ends = [&](QuantizerOptions options, const Tensor& data, bool force_zero = true) {
    const Quantizer q =
        calibrated(options.parameterization("min_max"), data.to(device()), force_zero);
    const float max = named(*q, "max").item<float>();
    return std::pair(options.symmetric() ? -max : named(*q, "min").item<float>(), max);
  };
  using Ends = std::pair<float, float>;
  const Tensor data = at::tensor({0.5f, 2.0f});
  const QuantizerOptions symmetric = QuantizerOptions().symmetric(true);
  EXPECT_EQ(ends({}, data), Ends(0.0f, 2.0f));
  EXPECT_EQ(ends({}, -data), Ends(-2.0f, 0.0f));
  EXPECT_EQ(ends({}, data, false), Ends(0.5f, 2.0f));
  EXPECT_EQ(ends(symmetric, -data), Ends(-2.0f, 2.0f));
  // One value has no width but its distance from 0, and 0 not even that.
  EXPECT_EQ(ends({}, at::tensor({2.0f, 2.0f}), false), Ends(0.0f, 2.0f));
  EXPECT_EQ(ends(symmetric, 0 * data), Ends(-1.0f, 1.0f));
  EXPECT_EQ(ends({}, 0 * data), Ends(-1.0f, 1.0f));
  // Small data are data, until the guard of the scale would hold the range: k·eps.
  EXPECT_EQ(ends(QuantizerOptions().bits(4), at::tensor({1e-6f})), Ends(0.0f, 1e-6f));
  EXPECT_EQ(ends(QuantizerOptions().bits(16), at::tensor({1e-6f})), Ends(0.0f, 65535e-8f));
  EXPECT_EQ(ends(symmetric, at::tensor({1e-7f})), Ends(-127.5e-8f, 127.5e-8f));
  EXPECT_EQ(ends({}, at::cat({at::empty({0}), data})), Ends(0.0f, 2.0f));
}

/// Keeps the warnings that come while it lives.
class Warnings : public c10::WarningHandler {
 public:
  Warnings() : before_(c10::WarningUtils::get_warning_handler()) {
    c10::WarningUtils::set_warning_handler(this);
  }
  ~Warnings() override { c10::WarningUtils::set_warning_handler(before_); }
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }

  std::vector<std::string> texts;

 private:
  c10::WarningHandler* before_;
};

TEST_P(ModuleTest, LayersThatStartAtZeroLearn) {
  Net net = make_net(op_named("min_max"));
  {
    const at::NoGradGuard no_grad;
    net->fc2->weight.zero_();
    net->fc2->bias.zero_();
  }
  Warnings warnings;
  calibrate(*net, [&] { net->forward(x); });
  ASSERT_EQ(warnings.texts.size(), 1u);
  for (const char* part :
       {"calibrate: fc2.weight_quantizer, fc2.output_quantizer saw", "set_range"}) {
    EXPECT_NE(warnings.texts[0].find(part), std::string::npos) << warnings.texts[0];
  }
  EXPECT_EQ(named(*net, "fc2.weight_quantizer.max").max().item<float>(), 0.25f);
  torch::optim::Adam optimizer(net->parameters(), 1e-2);
  const Tensor target = x.narrow(1, 0, 4);
  net->eval();
  double loss = 0, first = 0;
  for (int step = 0; step < 100; ++step) {
    optimizer.zero_grad();
    const Tensor error = (net->forward(x) - target).square().mean();
    error.backward();
    optimizer.step();
    loss = error.item<double>();
    if (step == 0) first = loss;
  }
  EXPECT_LT(loss, first / 4);

  calibrate(*net, [&] { net->forward(x); });
  EXPECT_EQ(warnings.texts.size(), 1u);
}

TEST_P(ModuleTest, WeightsAreQuantizedWhileActivationsAreObserved) {
  Net net = make_net(op_named("min_max"), /*bits=*/2);
  net->train();
  net->fc2->eval();
  calibrate(*net, [&] {
    EXPECT_FALSE(net->is_training());
    net->forward(x);
  });
  EXPECT_TRUE(net->is_training() && net->fc1->is_training() && !net->fc2->is_training());
  QuantLinear fc1 = net->fc1;
  const Tensor y = at::linear(x, fc1->weight_quantizer(fc1->weight), fc1->bias);
  EXPECT_EQ(named(*fc1->output_quantizer, "max").item<float>(), y.max().item<float>());
  const Tensor weight_max = named(*fc1->weight_quantizer, "max");
  EXPECT_TRUE(bit_equal(weight_max, fc1->weight.amax({1}, true).clamp_min(0)));

  // Afresh: a smaller input gives a smaller range.
  calibrate(*net, [&] { net->forward(0.1 * x); });
  EXPECT_LT(named(*fc1->output_quantizer, "max").item<float>(), y.max().item<float>());
}

TEST_P(ModuleTest, FailedCalibrationChangesNothing) {
  Net net = calibrated_net();
  asymq::nn::set_state(*net, State::off);
  const auto values = [&] {
    Tensors all = net->parameters();
    for (const Tensor& buffer : net->buffers()) all.push_back(buffer);
    for (Tensor& tensor : all) tensor = tensor.detach().clone();
    return all;
  };
  {
    const at::NoGradGuard no_grad;
    net->fc1->weight.mul_(2);
  }
  const Tensors before = values();
  const auto check = [&](const std::function<void()>& run, const std::vector<std::string>& parts) {
    expect_error([&] { calibrate(*net, run); }, parts);
    const Tensors after = values();
    for (size_t i = 0; i < before.size(); ++i) EXPECT_TRUE(bit_equal(before[i], after[i]));
    for (const auto& item : asymq::nn::named_quantizers(*net)) {
      EXPECT_TRUE(item.value()->state == State::off) << item.key();
      EXPECT_TRUE(item.value()->calibrated()) << item.key();
    }
    EXPECT_TRUE(net->is_training());
  };
  const auto run = [&](double value) { return [&, value] { net->forward(x + value); }; };
  check(run(NAN), {"fc1.output_quantizer", "calibrat", "NaN"});
  check(run(INFINITY), {"fc1.output_quantizer", "calibrat", "NaN"});
  check([&] { net->fc1(x); }, {"fc2.output_quantizer", "calibrat", "no data"});
  check([&] { net->forward(x.flatten()); }, {});

  Net fresh = make_net(op_named("min_max"));
  expect_error([&] { calibrate(*fresh, [] {}); }, {"fc1.output_quantizer", "calibrat"});
  for (const auto& item : asymq::nn::named_quantizers(*fresh)) {
    EXPECT_FALSE(item.value()->calibrated());
  }
  {
    const at::NoGradGuard no_grad;
    fresh->fc2->weight[1][2].fill_(NAN);
  }
  expect_error([&] { calibrate(*fresh, [&] { fresh->forward(x); }); },
               {"fc2.weight_quantizer", "calibrat", "NaN"});
  torch::nn::Linear plain(2, 2);
  expect_error([&] { calibrate(*plain, [] {}); }, {"calibrate", "no quantizers"});
}

TEST_P(ModuleTest, RangesStayFloat32) {
  for (const at::ScalarType dtype : {at::kHalf, at::kBFloat16, at::kDouble}) {
    SCOPED_TRACE(at::toString(dtype));
    Net net = calibrated_net();
    net->eval();
    net->to(dtype);
    for (const auto& item : asymq::nn::named_quantizers(*net)) {
      for (const Tensor& t : item.value()->parameters()) EXPECT_EQ(t.scalar_type(), at::kFloat);
      for (const Tensor& t : item.value()->buffers()) EXPECT_EQ(t.scalar_type(), at::kFloat);
    }
    const Tensor y = net->forward(x.to(dtype));
    EXPECT_EQ(y.scalar_type(), dtype);
    y.sum().backward();
    EXPECT_EQ(net->fc1->weight.grad().scalar_type(), dtype);
    net->to(at::kCPU, at::kFloat);
    EXPECT_TRUE(named(*net->fc1->output_quantizer, "beta").is_cpu());
    EXPECT_EQ(net->forward(x.cpu()).scalar_type(), at::kFloat);
    calibrate(*net, [&] { net->forward(x.cpu()); });
  }
}

TEST_P(ModuleTest, SaveAndLoad) {
  for (const Op& op : ops()) {
    SCOPED_TRACE(op.name);
    Net net = calibrated_net(op);
    torch::optim::Adam optimizer(asymq::nn::range_parameters(*net), 1e-2);
    net->eval();
    net->forward(x).square().mean().backward();
    optimizer.step();
    std::stringstream file;
    torch::save(net, file);
    at::manual_seed(1);
    Net other = make_net(op);
    other->eval();
    torch::load(other, file);
    EXPECT_TRUE(bit_equal(other->forward(x), net->forward(x)));
    EXPECT_TRUE(
        bit_equal(named(*other, "fc1.output_quantizer.initial_" +
                                    net->fc1->output_quantizer->named_parameters().keys()[0]),
                  named(*net, "fc1.output_quantizer.initial_" +
                                  net->fc1->output_quantizer->named_parameters().keys()[0])));
    other->forward(x).sum().backward();
  }
  Net net = calibrated_net();
  std::stringstream file, uncalibrated;
  torch::save(net, file);
  Net other = make_net(op_named("beta_gamma"), /*bits=*/4);
  expect_error([&] { torch::load(other, file); },
               {"QuantLinear(in_features=8, out_features=16, bias=true).weight_quantizer", "8 bits",
                "4 bits"});
  torch::save(make_net(op_named("beta_gamma")), uncalibrated);
  torch::load(net, uncalibrated);
  expect_error([&] { net->forward(x); }, {"calibrate"});
}

TEST_P(ModuleTest, LoadsFloatWeights) {
  const auto load = [&](auto& from, auto& to) {
    std::stringstream file;
    torch::save(from, file);
    torch::load(to, file);
  };
  torch::nn::Linear linear(8, 4);
  linear->to(device());
  QuantLinear layer(QuantLinearOptions(8, 4).output(QuantActOptions()));
  layer->to(device());
  calibrate(*layer, [&] { layer(x); });
  load(linear, layer);
  EXPECT_TRUE(bit_equal(layer->weight, linear->weight));
  EXPECT_TRUE(bit_equal(layer->bias, linear->bias));
  EXPECT_FALSE(layer->weight_quantizer->calibrated() || layer->output_quantizer->calibrated());
  expect_error([&] { layer(x); }, {"weight_quantizer", "calibrate"});

  // Within a model, and without bias.
  torch::nn::Sequential plain(torch::nn::Linear(8, 6),
                              torch::nn::Linear(torch::nn::LinearOptions(6, 2).bias(false)));
  torch::nn::Sequential quantized(QuantLinear(8, 6),
                                  QuantLinear(QuantLinearOptions(6, 2).bias(false)));
  plain->to(device());
  quantized->to(device());
  load(plain, quantized);
  asymq::nn::set_state(*quantized, State::off);
  EXPECT_TRUE(bit_equal(quantized->forward(x), plain->forward(x)));

  QuantLinear wrong(8, 5);
  EXPECT_ANY_THROW(load(quantized, wrong));
}

TEST_P(ModuleTest, CalibratedStateIsInTheTensors) {
  Net net = calibrated_net(), other = make_net(op_named("beta_gamma"));
  net->eval();
  other->eval();
  const at::NoGradGuard no_grad;
  for (const auto& item : other->named_parameters()) item.value().copy_(named(*net, item.key()));
  for (const auto& item : other->named_buffers()) item.value().copy_(named(*net, item.key()));
  EXPECT_TRUE(bit_equal(other->forward(x), net->forward(x)));
}

TEST_P(ModuleTest, Clone) {
  Net net = calibrated_net(op_named("min_max"));
  net->fc2->output_quantizer->state = State::off;
  net->eval();
  const auto copy = std::dynamic_pointer_cast<NetImpl>(net->clone());
  const Tensor y = net->forward(x);
  EXPECT_TRUE(bit_equal(copy->forward(x), y));
  copy->fc1->output_quantizer->set_range(at::zeros({1}), at::ones({1}));
  EXPECT_FALSE(at::equal(copy->forward(x), y));
  EXPECT_TRUE(bit_equal(net->forward(x), y));
  EXPECT_EQ(named(*copy, "fc1.output_quantizer.max").item<float>(), 1);
}

TEST_P(ModuleTest, FromFloatSharesTheParameters) {
  for (const bool bias : {true, false}) {
    torch::nn::Linear linear(torch::nn::LinearOptions(8, 4).bias(bias));
    linear->to(device());
    linear->weight.requires_grad_(false);
    QuantLinear layer =
        QuantLinear::from_float(linear, QuantizerOptions().bits(8), QuantActOptions().bits(12));
    EXPECT_TRUE(layer->weight.is_same(linear->weight));
    EXPECT_FALSE(layer->weight.requires_grad());
    EXPECT_TRUE(layer->bias.is_same(linear->bias));
    EXPECT_EQ(layer->bias.defined(), bias);
    calibrate(*layer, [&] { layer(x); });
    EXPECT_LT((layer(x) - linear(x)).abs().max().item<double>(), 0.1);
    const auto copy = std::dynamic_pointer_cast<asymq::nn::QuantLinearImpl>(layer->clone());
    EXPECT_TRUE(bit_equal(copy->forward(x), layer(x)));
  }
  QuantLinear plain = QuantLinear::from_float(torch::nn::Linear(8, 4), std::nullopt);
  EXPECT_TRUE(asymq::nn::named_quantizers(*plain).is_empty());
}

TEST_P(ModuleTest, SharedQuantizersCountOnce) {
  QuantAct act(QuantActOptions().bits(8));
  torch::nn::Sequential net(QuantLinear(8, 8), act, torch::nn::ReLU(), act);
  net->to(device());
  EXPECT_EQ(asymq::nn::named_quantizers(*net).keys(),
            (std::vector<std::string>{"0.weight_quantizer", "1"}));
  EXPECT_EQ(asymq::nn::range_parameters(*net).size(), 3u);
  calibrate(*net, [&] { net->forward(x); });
  EXPECT_TRUE(net->forward(x).isfinite().all().item<bool>());
}

TEST_P(ModuleTest, Options) {
  const auto check = [](const QuantizerOptions& options, std::vector<std::string> parts) {
    expect_error([&] { QuantAct act(options); },
                 [&] {
                   auto all = parts;
                   all.push_back("asymq::nn::QuantAct");
                   return all;
                 }());
    parts.push_back(
        "asymq::nn::QuantLinear(in_features=6, out_features=5, bias=true).weight_quantizer");
    expect_error([&] { QuantLinear layer(QuantLinearOptions(6, 5).weight(options)); }, parts);
  };
  const auto of = [](const char* name) { return QuantizerOptions().parameterization(name); };
  check(QuantizerOptions().bits(1), {"bits", "2", "16", "got 1"});
  check(QuantizerOptions().eps(0), {"eps", "positive", "got 0"});
  check(of("alpha"), {"parameterization", "min_max", "alpha"});
  check(of("scale_offset").sigmoid(true), {"sigmoid", "beta_gamma", "got scale_offset"});
  check(of("min_max").link("exp"), {"link exp", "beta_gamma", "got min_max"});
  check(QuantizerOptions().link("tanh"), {"link", "softplus", "got tanh"});
  check(QuantizerOptions().sigmoid(true).link("exp"), {"sigmoid", "link exp"});
  check(QuantizerOptions().gradient_scale(0), {"gradient_scale", "positive", "got 0"});
  check(of("kscale_koffset").symmetric(true), {"symmetric", "min_max", "got kscale_koffset"});
  check(of("scale_offset").fix_min(true), {"fix_min", "min_max", "got scale_offset"});
  check(of("min_max").fix_min(true).symmetric(true), {"fix_min", "got symmetric min_max"});
  check(QuantizerOptions().sizes({6}).granularity(PerGroup{4}), {"group", "4", "6"});
  check(QuantizerOptions().sizes({6}).granularity(PerGroup{0}), {"group", "6", "0"});
  check(QuantizerOptions().granularity(PerChannel{2}), {"axis 2", "sizes"});
  check(QuantizerOptions().full_range(true), {"full_range", "symmetric"});
  const auto per_token = [](const char* name) {
    return QuantActOptions().parameterization(name).granularity(PerToken());
  };
  const auto check_act = [](const QuantActOptions& options, std::vector<std::string> parts) {
    parts.push_back("asymq::nn::QuantAct");
    expect_error([&] { QuantAct act(options); }, parts);
  };
  check_act(per_token("min_max"), {"PerToken", "beta_gamma", "min_max"});
  check_act(per_token("beta_gamma").fix_min(true), {"PerToken", "minimum"});
  check_act(QuantActOptions().sizes({6}).granularity(PerToken{4}), {"group", "6", "4"});
  check_act(QuantActOptions().granularity(PerToken{4}), {"axis", "sizes"});
  expect_error([&] { QuantLinear(QuantLinearOptions(6, 5).weight(per_token("beta_gamma"))); },
               {"asymq::nn::QuantLinear", "PerToken", "weight"});
}

TEST_P(ModuleTest, PerToken) {
  for (const bool symmetric : {false, true}) {
    for (const bool sigmoid : {false, true}) {
      for (const std::optional<int64_t> group : {std::optional<int64_t>(), {4}}) {
        const auto options =
            QuantActOptions().bits(4).symmetric(symmetric).sigmoid(sigmoid).sizes({8}).granularity(
                PerToken{group});
        QuantAct act(options);
        act->to(device());
        EXPECT_TRUE(act->calibrated());
        const Tensors factors = act->parameters();
        ASSERT_EQ(factors.size(), symmetric ? 1u : 2u);
        for (const Tensor& factor : factors) {
          EXPECT_EQ(factor.sizes(), at::IntArrayRef({group ? 2 : 1}));
          EXPECT_TRUE(factor.eq(sigmoid ? 4 : 1).all().item<bool>());
        }
        const Tensor want = symmetric ? asymq::fake_quantize_dynamic_symmetric_gamma(
                                            x, factors[0], group, 4, sigmoid)
                                      : asymq::fake_quantize_dynamic_beta_gamma(
                                            x, factors[0], factors[1], group, 4, sigmoid);
        EXPECT_TRUE(bit_equal(act(x), want));

        // Calibration passes it by, and observing passes everything on.
        const Tensor before = factors[0].detach().clone();
        calibrate(*act, [] {});
        EXPECT_TRUE(bit_equal(factors[0], before));
        EXPECT_EQ(act->state, State::quantizing);
        act->start_observing();
        EXPECT_TRUE(bit_equal(act(x), x));
        EXPECT_TRUE(act->finish_observing());
        expect_error([&] { act->set_range(at::tensor({-1.0f}), at::tensor({1.0f})); },
                     {"asymq::nn::QuantAct", "each token"});

        // It is saved and loaded as others are.
        {
          const at::NoGradGuard no_grad;
          factors[0].fill_(0.5);
        }
        std::stringstream file;
        torch::save(act, file);
        QuantAct again(options);
        torch::load(again, file);
        EXPECT_TRUE(bit_equal(named(*again, symmetric ? "gamma" : "beta"), factors[0]));
        act->clear_range();
        EXPECT_TRUE(bit_equal(factors[0], before));
      }
    }
  }
  torch::nn::Sequential net(
      QuantLinear(QuantLinearOptions(8, 6).output(QuantActOptions().granularity(PerToken{3}))));
  net->to(device());
  calibrate(*net, [] {});
  EXPECT_EQ(asymq::nn::range_parameters(*net).size(), 3u);
  EXPECT_TRUE(net->forward(x).isfinite().all().item<bool>());
}

}  // namespace
}  // namespace asymq_test
