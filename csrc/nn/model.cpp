// What is done with all quantizers of a model at once.
#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "asymq/nn.h"

namespace asymq::nn {
namespace {

using State = QuantizerImpl::State;
using Quantizers = torch::OrderedDict<std::string, Quantizer>;

std::vector<at::Tensor> tensors(const QuantizerImpl& quantizer) {
  auto all = quantizer.parameters();
  for (const auto& buffer : quantizer.buffers()) all.push_back(buffer);
  return all;
}

/// What a calibration changes of a quantizer.
struct Saved {
  std::shared_ptr<QuantizerImpl> quantizer;
  State state;
  bool calibrated;
  std::vector<at::Tensor> values;
};

std::vector<Saved> save(const Quantizers& quantizers) {
  std::vector<Saved> all;
  for (const auto& item : quantizers) {
    const auto& quantizer = item.value().ptr();
    all.push_back({quantizer, quantizer->state, quantizer->calibrated(), {}});
    for (const auto& tensor : tensors(*quantizer)) all.back().values.push_back(tensor.clone());
  }
  return all;
}

void restore(const std::vector<Saved>& all) {
  for (const Saved& saved : all) {
    saved.quantizer->state = saved.state;
    if (!saved.calibrated) saved.quantizer->clear_range();
    const auto now = tensors(*saved.quantizer);
    for (size_t i = 0; i < now.size(); ++i) now[i].copy_(saved.values[i]);
  }
}

/// Eval mode while it lives.
class Evaluation {
 public:
  explicit Evaluation(torch::nn::Module& model) : model_(model) {
    model_.apply([&](torch::nn::Module& module) { training_.push_back(module.is_training()); });
    model_.eval();
  }
  Evaluation(const Evaluation&) = delete;
  Evaluation& operator=(const Evaluation&) = delete;

  ~Evaluation() {
    // train() reaches all below; they come after their parents, so the last word is their own.
    size_t i = 0;
    model_.apply([&](torch::nn::Module& module) { module.train(training_[i++]); });
  }

 private:
  torch::nn::Module& model_;
  std::vector<bool> training_;
};

bool of_norm(const QuantizerImpl& quantizer) { return quantizer.options.kind() == "norm_weight"; }

/// A calibration of a model's quantizers.
class Calibration {
 public:
  explicit Calibration(bool force_zero) : force_zero_(force_zero) {}

  /// path: the quantizer's place in the model.
  void finish(QuantizerImpl& quantizer, const std::string& path, double fallback) {
    try {
      // The weights of a trained norm lie around 1: zero would cost them most of their range.
      if (quantizer.finish_observing(force_zero_ && !of_norm(quantizer), fallback)) return;
      without_width_.push_back(path.empty() ? quantizer.options.name() : path);
    } catch (c10::Error& error) {
      error.add_context("calibrating " + path);
      throw;
    }
  }

  void warn() const {
    if (without_width_.empty()) return;
    TORCH_WARN("asymq::nn::calibrate: ", c10::Join(", ", without_width_),
               " saw nothing that gives a range a width (all 0, or within k*eps), so the range is "
               "a guess: calibrate again when the values vary, or call set_range");
  }

 private:
  bool force_zero_;
  std::vector<std::string> without_width_;
};

/// Layers by the quantizers of their weights.
using Layers = std::unordered_map<const QuantizerImpl*, const QuantLayer*>;

Layers layers_of_weights(torch::nn::Module& model) {
  Layers found;
  model.apply([&](torch::nn::Module& module) {
    const auto* layer = dynamic_cast<const QuantLayer*>(&module);
    if (layer != nullptr && layer->weight_quantizer) {
      found.emplace(layer->weight_quantizer.get(), layer);
    }
  });
  return found;
}

void calibrate_weights(const Quantizers& quantizers, const Layers& layers,
                       Calibration& calibration) {
  for (const auto& item : quantizers) {
    auto& quantizer = *item.value().ptr();
    const auto found = layers.find(&quantizer);
    if (found == layers.end()) continue;
    quantizer.start_observing();
    quantizer.forward(found->second->weight);
    calibration.finish(quantizer, item.key(), found->second->typical_end());
  }
}

void calibrate_activations(torch::nn::Module& model, const Quantizers& quantizers,
                           const Layers& layers, const std::function<void()>& run,
                           Calibration& calibration) {
  std::vector<std::pair<std::string, QuantizerImpl*>> observers;
  for (const auto& item : quantizers) {
    auto* quantizer = item.value().ptr().get();
    if (!layers.contains(quantizer)) observers.emplace_back(item.key(), quantizer);
    if (of_norm(*quantizer)) quantizer->state = State::off;
  }
  for (const auto& [path, quantizer] : observers) quantizer->start_observing();
  {
    const Evaluation evaluation(model);
    run();
  }
  for (const auto& [path, quantizer] : observers) calibration.finish(*quantizer, path, 1.0);
  for (const auto& [quantizer, layer] : layers)
    layer->weight_quantizer.ptr()->state = State::quantizing;
}

/// Those that there are.
std::vector<at::Tensor> ranges_of(const torch::nn::Module& model) {
  std::vector<at::Tensor> ranges;
  for (const auto& item : named_quantizers(model)) {
    for (const auto& parameter : item.value()->parameters()) ranges.push_back(parameter);
  }
  return ranges;
}

}  // namespace

Quantizers named_quantizers(const torch::nn::Module& model) {
  Quantizers quantizers;
  std::unordered_set<const torch::nn::Module*> seen;
  model.apply([&](const std::string& name, const torch::nn::Module& module) {
    if (module.as<Quantizer>() == nullptr || !seen.insert(&module).second) return;
    const auto shared = std::const_pointer_cast<torch::nn::Module>(module.shared_from_this());
    quantizers.insert(name, Quantizer(std::dynamic_pointer_cast<QuantizerImpl>(shared)));
  });
  return quantizers;
}

void calibrate(torch::nn::Module& model, const std::function<void()>& run, bool force_zero) {
  const auto quantizers = named_quantizers(model);
  TORCH_CHECK(!quantizers.is_empty(), "asymq::nn::calibrate: the model has no quantizers");
  const at::NoGradGuard no_grad;
  const auto before = save(quantizers);
  Calibration calibration(force_zero);
  try {
    const auto layers = layers_of_weights(model);
    calibrate_weights(quantizers, layers, calibration);
    calibrate_activations(model, quantizers, layers, run, calibration);
  } catch (...) {
    restore(before);
    throw;
  }
  calibration.warn();
}

void set_state(torch::nn::Module& model, State state) {
  for (const auto& item : named_quantizers(model)) item.value().ptr()->state = state;
}

std::vector<at::Tensor> range_parameters(const torch::nn::Module& model) {
  auto ranges = ranges_of(model);
  TORCH_CHECK(!ranges.empty(),
              "asymq::nn::range_parameters: the model has no quantizers with learned ranges");
  return ranges;
}

std::vector<at::Tensor> weight_parameters(const torch::nn::Module& model) {
  std::unordered_set<const c10::TensorImpl*> seen;
  for (const auto& range : ranges_of(model)) seen.insert(range.unsafeGetTensorImpl());
  std::vector<at::Tensor> weights;
  for (const auto& parameter : model.parameters()) {
    if (seen.insert(parameter.unsafeGetTensorImpl()).second) weights.push_back(parameter);
  }
  return weights;
}

void freeze_weights(torch::nn::Module& model) {
  for (const auto& weight : weight_parameters(model)) weight.requires_grad_(false);
}

}  // namespace asymq::nn
