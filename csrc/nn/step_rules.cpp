// The paper's step rules: factors of the steps of range tensors (its section 3).
#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <array>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "asymq/nn.h"

namespace asymq::nn {
namespace {

using at::Tensor;

Tensor first_value(const QuantizerImpl& quantizer, const std::string& name) {
  return quantizer.named_buffers()["initial_" + name].abs();
}

Tensor current_value(const QuantizerImpl& quantizer, const std::string& name) {
  return quantizer.named_parameters()[name].abs();
}

/// What moves the range as a step of min and max would: 2/k for the scale, 1/s for the offset
/// (equations 5 to 8).
Tensor of_min_max(const QuantizerImpl& quantizer, const std::string& name) {
  const Tensor scale = std::get<0>(quantizer.scale_offset());
  const double steps = static_cast<double>((int64_t{1} << quantizer.options.bits()) - 1);
  return name == "scale" ? at::full_like(scale, 2 / steps) : scale.reciprocal();
}

struct Rule {
  std::string_view name, parameterization;
  Tensor (*factor)(const QuantizerImpl& quantizer, const std::string& name);
};

constexpr std::array<Rule, 4> kRules{{{"min_max_plus", "min_max", first_value},
                                      {"naive", "scale_offset", first_value},
                                      {"naive_current", "scale_offset", current_value},
                                      {"sophisticated", "scale_offset", of_min_max}}};

const Rule& find_rule(const std::string& name) {
  std::vector<std::string_view> names;
  for (const Rule& rule : kRules) {
    if (rule.name == name) return rule;
    names.push_back(rule.name);
  }
  TORCH_CHECK(false, "asymq::nn::StepRule: unknown rule ", name, "; there are ",
              c10::Join(", ", names));
}

}  // namespace

StepRule::StepRule(torch::optim::Optimizer& optimizer, const torch::nn::Module& model,
                   const std::string& name)
    : optimizer_(optimizer) {
  const Rule& rule = find_rule(name);
  factor_ = rule.factor;
  std::unordered_set<const c10::TensorImpl*> optimized;
  for (const auto& group : optimizer.param_groups()) {
    for (const Tensor& parameter : group.params()) {
      optimized.insert(parameter.unsafeGetTensorImpl());
    }
  }
  for (const auto& item : named_quantizers(model)) {
    const Quantizer& quantizer = item.value();
    for (const auto& learned : quantizer->named_parameters()) {
      if (!optimized.contains(learned.value().unsafeGetTensorImpl())) continue;
      const std::string& parameterization = quantizer->options.parameterization();
      TORCH_CHECK(parameterization == rule.parameterization, "asymq::nn::StepRule: ", name,
                  " belongs to ", rule.parameterization, ", but ", item.key(), " learns ",
                  parameterization);
      TORCH_CHECK(quantizer->calibrated(), "asymq::nn::StepRule: ", item.key(),
                  " has no first values yet; calibrate the model first");
      sites_.push_back({quantizer, learned.key(), learned.value()});
    }
  }
  TORCH_CHECK(!sites_.empty(),
              "asymq::nn::StepRule: the optimizer has none of the model's range parameters");
}

Tensor StepRule::step(torch::optim::Optimizer::LossClosure closure) {
  std::vector<Tensor> parameters, values, factors;
  {
    const at::NoGradGuard no_grad;
    for (const Site& site : sites_) {
      parameters.push_back(site.parameter);
      values.push_back(site.parameter.clone());
      factors.push_back(factor_(*site.quantizer, site.name));
    }
  }
  const Tensor loss = optimizer_.step(std::move(closure));
  const at::NoGradGuard no_grad;
  // value + factor·(stepped - value), in a few launches for all of them.
  at::_foreach_sub_(parameters, values);
  at::_foreach_mul_(parameters, factors);
  at::_foreach_add_(parameters, values);
  return loss;
}

}  // namespace asymq::nn
