// Quantized layers of asymq/nn.h: what each computes, learns, keeps and refuses.
#include <asymq/nn.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/serialize.h>

#include <sstream>

#include "support.h"

namespace asymq_test {
namespace {

using namespace asymq::nn;
using State = QuantizerImpl::State;

class LayersTest : public DeviceTest {
 protected:
  Tensor random(at::IntArrayRef sizes) const { return at::randn(sizes).to(device()); }

  // The layer on this device, calibrated with x.
  template <typename Layer>
  Layer calibrated(Layer layer, const Tensor& x) const {
    layer->to(device());
    calibrate(*layer, [&] { layer->forward(x); });
    return layer;
  }

  // What the layer gives and all its gradients are those of `function`, which gets the quantized
  // input and weight and the bias.
  template <typename Layer>
  void expect_composition(
      Layer layer, const Tensor& x,
      const std::function<Tensor(const Tensor&, const Tensor&, const Tensor&)>& function) const {
    SCOPED_TRACE(torch::str(*layer));
    const auto apply = [](Quantizer& quantizer, const Tensor& value) {
      return quantizer ? quantizer(value) : value;
    };
    const auto gradients = [&](const Tensor& y) {
      y.square().sum().backward();
      Tensors all;
      for (const auto& item : layer->named_parameters()) {
        EXPECT_TRUE(item.value().grad().defined()) << item.key();
        EXPECT_GT(item.value().grad().abs().sum().template item<double>(), 0) << item.key();
        all.push_back(item.value().grad().clone());
        item.value().mutable_grad() = Tensor();
      }
      return all;
    };
    const Tensor got = layer(x);
    const Tensor want = apply(layer->output_quantizer,
                              function(apply(layer->input_quantizer, x),
                                       apply(layer->weight_quantizer, layer->weight), layer->bias));
    EXPECT_TRUE(bit_equal(got, want));
    const Tensors got_gradients = gradients(got), want_gradients = gradients(want);
    for (size_t i = 0; i < got_gradients.size(); ++i) {
      EXPECT_TRUE(bit_equal(got_gradients[i], want_gradients[i]));
    }
    set_state(*layer, State::off);
    EXPECT_TRUE(bit_equal(layer(x), function(x, layer->weight, layer->bias)));
    EXPECT_FALSE(at::equal(layer(x), got));
    set_state(*layer, State::quantizing);
  }
};
ASYMQ_ON_EVERY_DEVICE(LayersTest);

// Quantizers narrow enough that every range has elements beyond its ends.
QuantActOptions act() { return QuantActOptions().bits(3).symmetric(true); }

TEST_P(LayersTest, Linear) {
  const Tensor x = random({16, 8});
  expect_composition(
      calibrated(QuantLinear(QuantLinearOptions(8, 6).output(act()).input(act())), x), x,
      [](const Tensor& x, const Tensor& w, const Tensor& b) { return at::linear(x, w, b); });
}

TEST_P(LayersTest, Embedding) {
  const Tensor ids = at::randint(1, 7, {5, 4}).to(device());
  ids[0][0] = 2;
  const auto options = QuantEmbeddingOptions(torch::nn::EmbeddingOptions(7, 12).padding_idx(2))
                           .weight(default_weight().bits(3));
  QuantEmbedding layer = calibrated(QuantEmbedding(options), ids);
  expect_composition(layer, ids, [](const Tensor& ids, const Tensor& w, const Tensor&) {
    return at::embedding(w, ids, /*padding_idx=*/2);
  });
  layer(ids).sum().backward();
  EXPECT_EQ(layer->weight.grad()[2].abs().sum().item<double>(), 0);
  // The row of zeros is as wide as the widest.
  const Tensor low = std::get<0>(layer->weight_quantizer->bounds());
  EXPECT_EQ(low.sizes(), at::IntArrayRef({7, 1}));
  EXPECT_EQ(low[2].item<double>(), low.min().item<double>());
}

TEST_P(LayersTest, LayerNorm) {
  const Tensor x = random({4, 5, 8});
  const auto options = QuantLayerNormOptions(torch::nn::LayerNormOptions({8}).eps(1e-3))
                           .weight(default_norm_weight().bits(4))
                           .output(act().granularity(PerChannel()))
                           .input(act().granularity(PerToken{4}));
  QuantLayerNorm layer(options);
  {
    const at::NoGradGuard no_grad;
    layer->weight.add_(0.1 * at::randn({8}));
    layer->bias.add_(0.1 * at::randn({8}));
  }
  layer = calibrated(layer, x);
  expect_composition(layer, x, [](const Tensor& x, const Tensor& w, const Tensor& b) {
    return at::layer_norm(x, {8}, w, b, 1e-3);
  });
  EXPECT_EQ(layer->output_quantizer->parameters()[0].sizes(), at::IntArrayRef({8}));
  EXPECT_EQ(layer->input_quantizer->parameters()[0].sizes(), at::IntArrayRef({2}));

  // Its weight is calibrated as an activation: without zero, and in float meanwhile.
  EXPECT_GT(std::get<0>(layer->weight_quantizer->bounds()).item<double>(), 0.4);
  QuantLayerNorm coarse(QuantLayerNormOptions(options)
                            .weight(default_norm_weight().bits(2))
                            .output(QuantActOptions().parameterization("min_max"))
                            .input(std::nullopt));
  coarse->to(device());
  {
    const at::NoGradGuard no_grad;
    coarse->weight.copy_(layer->weight);
  }
  calibrate(*coarse, [&] { coarse(x); });
  const Tensor y = at::layer_norm(x, {8}, coarse->weight, coarse->bias, 1e-3);
  EXPECT_EQ(coarse->output_quantizer->named_parameters()["max"].item<float>(),
            y.max().item<float>());
  EXPECT_TRUE(coarse->weight_quantizer->state == State::quantizing);
}

TEST_P(LayersTest, Convolutions) {
  const Tensor image = random({2, 4, 6, 5}), sound = random({2, 4, 9});
  const auto conv = torch::nn::Conv2dOptions(4, 6, {3, 2}).stride(2).padding(1).groups(2);
  for (const bool bias : {true, false}) {
    const auto options = torch::nn::Conv2dOptions(conv).bias(bias);
    expect_composition(
        calibrated(QuantConv2d(QuantConv2dOptions(options).output(act()).input(act())), image),
        image, [](const Tensor& x, const Tensor& w, const Tensor& b) {
          return at::conv2d(x, w, b, {2, 2}, {1, 1}, {1, 1}, 2);
        });
  }
  expect_composition(
      calibrated(QuantConv2d(QuantConv2dOptions(
                     torch::nn::Conv2dOptions(4, 6, 3).padding(1).padding_mode(torch::kReflect))),
                 image),
      image, [](const Tensor& x, const Tensor& w, const Tensor& b) {
        return at::conv2d(at::reflection_pad2d(x, {1, 1, 1, 1}), w, b);
      });
  expect_composition(
      calibrated(QuantConv1d(QuantConv1dOptions(4, 6, 3).output(act())), sound), sound,
      [](const Tensor& x, const Tensor& w, const Tensor& b) { return at::conv1d(x, w, b); });

  // Channels of activations, where their place is said.
  QuantConv2d channels = calibrated(QuantConv2d(QuantConv2dOptions(4, 6, 3).output(
                                        act().granularity(PerChannel()).sizes({6, 1, 1}))),
                                    image);
  EXPECT_EQ(channels->output_quantizer->parameters()[0].sizes(), at::IntArrayRef({6, 1, 1}));
}

TEST_P(LayersTest, RangesOfWeights) {
  const auto shape = [](const auto& layer) {
    return layer->weight_quantizer->named_parameters()["gamma"].sizes().vec();
  };
  using Shape = std::vector<int64_t>;
  const auto per = [](Granularity granularity) {
    return default_weight().granularity(granularity);
  };
  EXPECT_EQ(shape(QuantLinear(8, 6)), (Shape{6, 1}));
  EXPECT_EQ(shape(QuantEmbedding(7, 12)), (Shape{7, 1}));
  EXPECT_EQ(shape(QuantEmbedding(QuantEmbeddingOptions(7, 12).weight(per(PerGroup{4})))),
            (Shape{7, 3}));
  EXPECT_EQ(shape(QuantLayerNorm(std::vector<int64_t>{8})), (Shape{1}));
  EXPECT_EQ(shape(QuantLayerNorm(
                QuantLayerNormOptions(std::vector<int64_t>{8}).weight(per(PerGroup{2})))),
            (Shape{4}));
  EXPECT_EQ(shape(QuantConv1d(4, 6, 3)), (Shape{6, 1, 1}));
  EXPECT_EQ(shape(QuantConv2d(4, 6, 3)), (Shape{6, 1, 1, 1}));
  // Groups lie along the input channels, whose size is that of a group of the convolution.
  const auto grouped = QuantConv2dOptions(torch::nn::Conv2dOptions(8, 6, 3).groups(2));
  EXPECT_EQ(shape(QuantConv2d(QuantConv2dOptions(grouped).weight(per(PerGroup{2})))),
            (Shape{6, 2, 3, 3}));
  EXPECT_EQ(shape(QuantConv2d(QuantConv2dOptions(grouped).weight(per(PerGroup{3, -1})))),
            (Shape{6, 4, 3, 1}));
  // Of zeros: the bound of torch's initial weights.
  EXPECT_EQ(QuantConv2d(4, 6, 3)->typical_end(), 0.5);
  EXPECT_EQ(QuantEmbedding(7, 16)->typical_end(), 0.25);
  EXPECT_EQ(QuantLayerNorm(std::vector<int64_t>{8})->typical_end(), 1);
}

TEST_P(LayersTest, Refusals) {
  const auto embedding = [](torch::nn::EmbeddingOptions options) {
    return [=] { QuantEmbedding layer{QuantEmbeddingOptions(options)}; };
  };
  expect_error(embedding(torch::nn::EmbeddingOptions(7, 12).max_norm(1)),
               {"asymq::nn::QuantEmbedding(num_embeddings=7", "max_norm"});
  expect_error(embedding(torch::nn::EmbeddingOptions(7, 12).sparse(true)), {"sparse"});
  expect_error([] { QuantEmbedding layer(QuantEmbeddingOptions(7, 12).output(act())); },
               {"QuantEmbedding", "grid", "output and input must be"});
  expect_error([] { QuantEmbedding layer(QuantEmbeddingOptions(7, 12).input(act())); },
               {"QuantEmbedding", "grid", "output and input must be"});
  const auto plain = torch::nn::LayerNormOptions({8}).elementwise_affine(false);
  expect_error([&] { QuantLayerNorm layer{QuantLayerNormOptions(plain)}; },
               {"asymq::nn::QuantLayerNorm([8]", "no weight to quantize", "std::nullopt"});
  QuantLayerNorm norm =
      calibrated(QuantLayerNorm(QuantLayerNormOptions(plain).weight(std::nullopt).output(act())),
                 random({4, 8}));
  EXPECT_EQ(named_quantizers(*norm).keys(), std::vector<std::string>{"output_quantizer"});
  expect_error(
      [] {
        QuantConv2d layer(QuantConv2dOptions(4, 6, 3).output(act().granularity(PerChannel())));
      },
      {"asymq::nn::QuantConv2d(4, 6", "output_quantizer", "sizes"});
  expect_error(
      [] {
        QuantConv2d layer(
            QuantConv2dOptions(3, 6, 3).weight(default_weight().granularity(PerGroup{2})));
      },
      {"QuantConv2d(3, 6", "weight_quantizer", "group", "2", "3"});
  expect_error(
      [] {
        QuantConv1d layer(
            QuantConv1dOptions(4, 6, 3).weight(QuantizerOptions().granularity(PerToken())));
      },
      {"QuantConv1d(4, 6", "PerToken", "weight"});
  QuantEmbedding fresh(7, 12);
  expect_error(
      [&] { fresh(at::zeros({1}, at::kLong)); },
      {"QuantEmbedding(num_embeddings=7, embedding_dim=12).weight_quantizer", "calibrate"});
}

TEST_P(LayersTest, TiedWeightsHaveOneQuantizer) {
  torch::nn::Embedding embedding(7, 8);
  torch::nn::Linear head(torch::nn::LinearOptions(8, 7).bias(false));
  head->weight = embedding->weight;
  const auto groups = default_weight().bits(3).granularity(PerGroup{4});
  const auto first = QuantEmbedding::from_float(embedding, groups);
  const auto last = QuantLinear::from_float(head, *first, act());
  EXPECT_TRUE(last->weight_quantizer.ptr() == first->weight_quantizer.ptr());
  torch::nn::Sequential net(first, last);
  net->to(device());
  EXPECT_EQ(named_quantizers(*net).keys(),
            (std::vector<std::string>{"0.weight_quantizer", "1.output_quantizer"}));
  ASSERT_EQ(weight_parameters(*net).size(), 1u);
  EXPECT_TRUE(weight_parameters(*net)[0].is_same(embedding->weight));

  const Tensor tokens = at::arange(7).to(device());
  calibrate(*net, [&] { net->forward(tokens); });
  net->forward(tokens).square().sum().backward();
  EXPECT_EQ(range_parameters(*net).size(), 2u);
  for (const Tensor& range : range_parameters(*net)) EXPECT_TRUE(range.grad().defined());
  const auto copy = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(net->clone());
  EXPECT_TRUE(bit_equal(copy->forward(tokens), net->forward(tokens)));

  const torch::nn::Linear other(8, 7);
  expect_error([&] { QuantLinear::from_float(other, *first); },
               {"asymq::nn::QuantLinear(in_features=8", "another tensor", "tied"});
  const auto plain = QuantEmbedding::from_float(embedding, std::nullopt);
  EXPECT_TRUE(named_quantizers(*QuantLinear::from_float(head, *plain)).is_empty());
}

// What holds of every layer: `float_layer` with its quantized counterpart, and an input.
template <typename Layer, typename Float>
void expect_kept(const Float& float_layer, const Tensor& x) {
  SCOPED_TRACE(torch::str(*float_layer));
  const auto on_x = [&](auto layer) {
    layer->to(x.device());
    return layer;
  };
  on_x(float_layer);
  const auto from_float = [&](const Float& layer) {
    return Layer::from_float(layer, default_weight().bits(5));
  };
  Layer layer = from_float(float_layer);
  EXPECT_TRUE(layer->weight.is_same(float_layer->weight));
  calibrate(*layer, [&] { layer(x); });
  const Tensor y = layer(x);

  // The names of a state are those of Python.
  std::vector<std::string> names;
  for (const std::string& name : float_layer->named_parameters().keys()) names.push_back(name);
  names.push_back("weight_quantizer.gamma");
  EXPECT_EQ(layer->named_parameters().keys(), names);
  EXPECT_EQ(layer->named_buffers().keys(),
            (std::vector<std::string>{"weight_quantizer.initial_gamma", "weight_quantizer.max"}));

  const auto load = [](auto& from, auto& to) {
    std::stringstream file;
    torch::save(from, file);
    torch::load(to, file);
  };
  const auto other_float = [&] {
    return on_x(
        Float(std::dynamic_pointer_cast<typename Float::ContainedType>(float_layer->clone())));
  };
  Layer again = from_float(other_float());
  {
    const at::NoGradGuard no_grad;
    again->weight.zero_();
  }
  load(layer, again);
  EXPECT_TRUE(bit_equal(again(x), y));

  const auto copy = std::dynamic_pointer_cast<typename Layer::Impl>(layer->clone());
  EXPECT_TRUE(bit_equal(copy->forward(x), y));
  {
    const at::NoGradGuard no_grad;
    copy->weight.mul_(0.5);
  }
  EXPECT_FALSE(at::equal(copy->forward(x), y));
  EXPECT_TRUE(bit_equal(layer(x), y));

  load(float_layer, again);
  EXPECT_FALSE(again->weight_quantizer->calibrated());
  set_state(*again, State::off);
  Float plain = float_layer;
  EXPECT_TRUE(bit_equal(again(x), plain(x)));

  layer->to(at::kDouble);
  EXPECT_EQ(layer(x.is_floating_point() ? x.to(at::kDouble) : x).scalar_type(), at::kDouble);
  EXPECT_EQ(layer->weight_quantizer->parameters()[0].scalar_type(), at::kFloat);
}

TEST_P(LayersTest, WhatIsKept) {
  expect_kept<QuantLinear>(torch::nn::Linear(8, 6), random({4, 8}));
  expect_kept<QuantEmbedding>(torch::nn::Embedding(7, 12), at::arange(7).to(device()));
  expect_kept<QuantLayerNorm>(torch::nn::LayerNorm(std::vector<int64_t>{8}), random({4, 8}));
  expect_kept<QuantConv1d>(torch::nn::Conv1d(4, 6, 3), random({2, 4, 9}));
  expect_kept<QuantConv2d>(torch::nn::Conv2d(4, 6, 3), random({2, 4, 9, 9}));
}

}  // namespace
}  // namespace asymq_test
