// Layers with a weight: one way to quantize them all, and what each is.
#include <ATen/ATen.h>
#include <torch/serialize/input-archive.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string_view>

#include "asymq/nn.h"

namespace asymq::nn {
namespace {

using Sizes = std::optional<std::vector<int64_t>>;

/// What the quantizers of a layer need to know of it.
struct Facts {
  const char* kind = "weight";
  /// The axis of its weight that it sums over.
  int64_t reduction_axis = -1;
  /// The last axis of its output and input; none where the channels are elsewhere.
  Sizes output = std::nullopt, input = std::nullopt;
  /// Whether the output is anything but the weight's own values.
  bool has_output = true;
};

Facts facts_of(const torch::nn::LinearImpl& layer, const std::string&) {
  return {.output = {{layer.weight.size(0)}}, .input = {{layer.weight.size(1)}}};
}

Facts facts_of(const torch::nn::EmbeddingImpl& layer, const std::string& label) {
  TORCH_CHECK(!layer.options.max_norm() && !layer.options.sparse(), label,
              ": max_norm and sparse gradients change the weight or its gradient row by row; the "
              "ranges cannot follow");
  return {.has_output = false};
}

Facts facts_of(const torch::nn::LayerNormImpl& layer, const std::string&) {
  const Sizes channels{{layer.options.normalized_shape().back()}};
  return {.kind = "norm_weight", .output = channels, .input = channels};
}

template <size_t dims, typename Conv>
Facts facts_of(const torch::nn::ConvNdImpl<dims, Conv>&, const std::string&) {
  return {.reduction_axis = 1};
}

/// As the float layer prints itself.
std::string label_of(const torch::nn::Module& layer) {
  constexpr std::string_view prefix = "torch::nn::";
  std::ostringstream text;
  layer.pretty_print(text);
  return "asymq::nn::Quant" + text.str().substr(prefix.size());
}

std::optional<QuantizerOptions> options_of(const Quantizer& quantizer) {
  return quantizer ? std::optional(quantizer->options) : std::nullopt;
}

QuantizerOptions for_weight(QuantizerOptions options, const Facts& facts,
                            const at::Tensor& weight) {
  if (auto* group = std::get_if<PerGroup>(&options.granularity());
      group != nullptr && group->axis == PerGroup::kReduction) {
    group->axis = facts.reduction_axis;
  }
  return options.kind(facts.kind).sizes(weight.sizes().vec());
}

QuantActOptions for_activation(QuantActOptions options, const char* kind, const Sizes& sizes) {
  if (sizes) options.sizes(*sizes);
  return options.kind(kind);
}

}  // namespace

template <typename Derived, typename Float>
QuantLayerImpl<Derived, Float>::QuantLayerImpl(const std::shared_ptr<Float>& layer,
                                               const std::optional<QuantizerOptions>& weight,
                                               const std::optional<QuantActOptions>& output,
                                               const std::optional<QuantActOptions>& input) {
  register_all(layer, weight, output, input);
}

template <typename Derived, typename Float>
void QuantLayerImpl<Derived, Float>::reset() {
  register_all(std::dynamic_pointer_cast<Float>(layer_->clone()), options_of(weight_quantizer),
               options_of(output_quantizer), options_of(input_quantizer));
}

template <typename Derived, typename Float>
void QuantLayerImpl<Derived, Float>::register_all(
    std::shared_ptr<Float> layer, const std::optional<QuantizerOptions>& weight_options,
    const std::optional<QuantActOptions>& output, const std::optional<QuantActOptions>& input) {
  layer_ = std::move(layer);
  const std::string label = label_of(*layer_);
  const Facts facts = facts_of(*layer_, label);
  TORCH_CHECK(layer_->weight.defined() || !weight_options, label,
              ": the layer has no weight to quantize: weight must be std::nullopt");
  TORCH_CHECK(
      !weight_options || !std::holds_alternative<PerToken>(weight_options->granularity()), label,
      ": a weight has no tokens: PerToken is a granularity of activations, got it for the weight");
  TORCH_CHECK(facts.has_output || (!output && !input), label,
              ": takes indices and returns values of its weight's grid; output and input must be "
              "std::nullopt");

  for (const auto& item : layer_->named_parameters(/*recurse=*/false)) {
    // A weight is tied by the member, which the layer computes with; its own is still registered.
    const at::Tensor& value = item.key() == "weight" ? layer_->weight : item.value();
    this->register_parameter(item.key(), value, value.requires_grad());
  }
  weight = layer_->weight;
  if constexpr (requires { layer_->bias; }) bias = layer_->bias;

  const auto quantizer = [&](const char* name, QuantizerOptions options) {
    const auto made = this->register_module(name, Quantizer(options.name(label + "." + name)));
    if (weight.defined()) made->to(weight.device());
    return made;
  };
  if (weight_options) {
    weight_quantizer = quantizer("weight_quantizer", for_weight(*weight_options, facts, weight));
    const int64_t summed = std::max<int64_t>(weight.size(facts.reduction_axis), 1);
    if (weight_quantizer->options.kind() == "weight") {
      typical_end_ = 1 / std::sqrt(static_cast<double>(summed));
    }
  }
  if (input) {
    input_quantizer = quantizer("input_quantizer", for_activation(*input, "input", facts.input));
  }
  if (output) {
    output_quantizer =
        quantizer("output_quantizer", for_activation(*output, "activation", facts.output));
  }
}

template <typename Derived, typename Float>
at::Tensor QuantLayerImpl<Derived, Float>::forward(const at::Tensor& x) {
  // One that reads the quantized weight, of this call's own: another thread may be in here, too.
  Float layer(*layer_);
  layer.weight = weight_quantizer ? weight_quantizer(weight) : weight;
  if constexpr (requires { layer.bias; }) layer.bias = bias;
  const at::Tensor y = layer.forward(input_quantizer ? input_quantizer(x) : x);
  return output_quantizer ? output_quantizer(y) : y;
}

template <typename Derived, typename Float>
void QuantLayerImpl<Derived, Float>::share_weight_quantizer(const QuantLayer& other) {
  TORCH_CHECK(weight.is_same(other.weight), label_of(*layer_),
              ": the other layer's weight is another tensor, with ranges of its own: only tied "
              "layers share a weight quantizer");
  if (weight_quantizer) this->unregister_module("weight_quantizer");
  weight_quantizer = other.weight_quantizer;
  if (weight_quantizer) this->register_module("weight_quantizer", weight_quantizer);
}

template <typename Derived, typename Float>
void QuantLayerImpl<Derived, Float>::load(torch::serialize::InputArchive& archive) {
  torch::serialize::InputArchive of_quantizer;
  const auto has = [&](const auto& child) { return archive.try_read(child.key(), of_quantizer); };
  const auto quantizers = this->named_children();
  if (std::any_of(quantizers.begin(), quantizers.end(), has)) {
    return torch::nn::Module::load(archive);
  }
  for (auto& parameter : this->named_parameters(/*recurse=*/false)) {
    archive.read(parameter.key(), parameter.value());
  }
  for (const Quantizer& quantizer : {weight_quantizer, output_quantizer, input_quantizer}) {
    if (quantizer) quantizer.ptr()->clear_range();
  }
}

template <typename Derived, typename Float>
void QuantLayerImpl<Derived, Float>::pretty_print(std::ostream& stream) const {
  stream << label_of(*layer_);
}

template class QuantLayerImpl<QuantLinearImpl, torch::nn::LinearImpl>;
template class QuantLayerImpl<QuantEmbeddingImpl, torch::nn::EmbeddingImpl>;
template class QuantLayerImpl<QuantLayerNormImpl, torch::nn::LayerNormImpl>;
template class QuantLayerImpl<QuantConv1dImpl, torch::nn::Conv1dImpl>;
template class QuantLayerImpl<QuantConv2dImpl, torch::nn::Conv2dImpl>;

QuantLinearOptions::QuantLinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

QuantLinearImpl::QuantLinearImpl(int64_t in_features, int64_t out_features)
    : QuantLinearImpl(QuantLinearOptions(in_features, out_features)) {}

QuantLinearImpl::QuantLinearImpl(const QuantLinearOptions& options)
    : QuantLinearImpl(options, torch::nn::Linear(torch::nn::LinearOptions(options.in_features(),
                                                                          options.out_features())
                                                     .bias(options.bias()))) {}

QuantLinearImpl::QuantLinearImpl(const QuantLinearOptions& options, const torch::nn::Linear& linear)
    : QuantLinearImpl(linear.ptr(), options.weight(), options.output(), options.input()) {}

QuantLinearImpl::QuantLinearImpl(const std::shared_ptr<torch::nn::LinearImpl>& linear,
                                 const std::optional<QuantizerOptions>& weight,
                                 const std::optional<QuantActOptions>& output,
                                 const std::optional<QuantActOptions>& input)
    : QuantLayerImpl(linear, weight, output, input),
      options(linear->weight.size(1), linear->weight.size(0)) {
  options.bias(linear->bias.defined()).weight(weight).output(output).input(input);
}

}  // namespace asymq::nn
