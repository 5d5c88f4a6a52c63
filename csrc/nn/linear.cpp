#include <ATen/ATen.h>
#include <torch/serialize/input-archive.h>

#include <algorithm>
#include <utility>

#include "asymq/nn.h"

namespace asymq::nn {

QuantLinearOptions::QuantLinearOptions(int64_t in_features, int64_t out_features)
    : in_features_(in_features), out_features_(out_features) {}

QuantLinearImpl::QuantLinearImpl(int64_t in_features, int64_t out_features)
    : QuantLinearImpl(QuantLinearOptions(in_features, out_features)) {}

QuantLinearImpl::QuantLinearImpl(QuantLinearOptions options) : options(std::move(options)) {
  reset();
}

QuantLinearImpl::QuantLinearImpl(QuantLinearOptions options, const torch::nn::Linear& linear)
    : options(std::move(options)) {
  register_all(linear);
}

void QuantLinearImpl::reset() {
  register_all(
      torch::nn::Linear(torch::nn::LinearOptions(options.in_features(), options.out_features())
                            .bias(options.bias())));
}

void QuantLinearImpl::register_all(const torch::nn::Linear& linear) {
  const int64_t in = options.in_features(), out = options.out_features();
  const auto share = [&](const char* name, const at::Tensor& parameter) {
    return register_parameter(name, parameter, parameter.requires_grad());
  };
  weight = share("weight", linear->weight);
  bias = linear->bias.defined() ? share("bias", linear->bias) : at::Tensor();

  const auto quantizer = [&](const std::string& name, std::optional<QuantizerOptions> own,
                             std::vector<int64_t> sizes) -> Quantizer {
    if (!own) return nullptr;
    own->sizes(std::move(sizes))
        .name(c10::str("asymq::nn::QuantLinear(", in, ", ", out, ").", name));
    const auto registered = register_module(name, Quantizer(*own));
    registered->to(weight.device());
    return registered;
  };
  TORCH_CHECK(
      !options.weight() || !std::holds_alternative<PerToken>(options.weight()->granularity()),
      "asymq::nn::QuantLinear: a weight has no tokens: PerToken is a granularity of "
      "activations, got it for the weight of QuantLinear(",
      in, ", ", out, ")");
  weight_quantizer = quantizer("weight_quantizer", options.weight(), {out, in});
  output_quantizer = quantizer("output_quantizer", options.output(), {out});
}

at::Tensor QuantLinearImpl::forward(const at::Tensor& x) {
  const at::Tensor y = at::linear(x, weight_quantizer ? weight_quantizer(weight) : weight, bias);
  return output_quantizer ? output_quantizer(y) : y;
}

void QuantLinearImpl::load(torch::serialize::InputArchive& archive) {
  torch::serialize::InputArchive of_quantizer;
  const auto has = [&](const auto& child) { return archive.try_read(child.key(), of_quantizer); };
  const auto quantizers = named_children();
  if (std::any_of(quantizers.begin(), quantizers.end(), has)) return Module::load(archive);
  for (auto& parameter : named_parameters(/*recurse=*/false)) {
    archive.read(parameter.key(), parameter.value());
  }
  if (weight_quantizer) weight_quantizer->clear_range();
  if (output_quantizer) output_quantizer->clear_range();
}

void QuantLinearImpl::pretty_print(std::ostream& stream) const {
  stream << std::boolalpha << "asymq::nn::QuantLinear(in_features=" << options.in_features()
         << ", out_features=" << options.out_features() << ", bias=" << options.bias() << ")";
}

QuantLinear QuantLinear::from_float(const torch::nn::Linear& linear,
                                    std::optional<QuantizerOptions> weight,
                                    std::optional<QuantActOptions> output) {
  QuantLinearOptions options(linear->weight.size(1), linear->weight.size(0));
  options.bias(linear->bias.defined()).weight(std::move(weight)).output(std::move(output));
  return QuantLinear(std::move(options), linear);
}

}  // namespace asymq::nn
