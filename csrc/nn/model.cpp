// What is done with all quantizers of a model at once.
#include <ATen/ATen.h>

#include <unordered_set>
#include <utility>

#include "asymq/nn.h"

namespace asymq::nn {
namespace {

using State = QuantizerImpl::State;
using Quantizers = torch::OrderedDict<std::string, Quantizer>;

/// Gives quantizers their present ranges and states back on its end, unless told to keep the new.
class Undo {
 public:
  explicit Undo(const Quantizers& quantizers) {
    for (const auto& item : quantizers) {
      const auto& quantizer = item.value().ptr();
      entries_.push_back({quantizer, quantizer->state, quantizer->calibrated(), {}});
      for (const auto& tensor : tensors(*quantizer)) {
        entries_.back().values.push_back(tensor.clone());
      }
    }
  }
  Undo(const Undo&) = delete;
  Undo& operator=(const Undo&) = delete;

  ~Undo() {
    for (const Entry& entry : entries_) {
      const at::NoGradGuard no_grad;
      entry.quantizer->state = entry.state;
      const auto now = tensors(*entry.quantizer);
      for (size_t i = 0; i < now.size(); ++i) now[i].copy_(entry.values[i]);
      if (!entry.calibrated) entry.quantizer->clear_range();
    }
  }

  void keep() { entries_.clear(); }

 private:
  struct Entry {
    std::shared_ptr<QuantizerImpl> quantizer;
    State state;
    bool calibrated;
    std::vector<at::Tensor> values;
  };

  static std::vector<at::Tensor> tensors(const QuantizerImpl& quantizer) {
    auto all = quantizer.parameters();
    for (const auto& buffer : quantizer.buffers()) all.push_back(buffer);
    return all;
  }

  std::vector<Entry> entries_;
};

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

/// finish_observing, whose errors then tell the quantizer's place in the model.
void finish_observing(QuantizerImpl& quantizer, const std::string& path, bool force_zero) {
  try {
    quantizer.finish_observing(force_zero);
  } catch (c10::Error& error) {
    error.add_context("calibrating " + path);
    throw;
  }
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
  Undo undo(quantizers);

  std::unordered_set<const QuantizerImpl*> of_weights;
  model.apply([&](const std::string& path, torch::nn::Module& module) {
    auto* layer = module.as<QuantLinear>();
    if (layer == nullptr || !layer->weight_quantizer) return;
    auto& quantizer = *layer->weight_quantizer;
    of_weights.insert(&quantizer);
    quantizer.start_observing();
    quantizer.forward(layer->weight);
    finish_observing(quantizer, path + ".weight_quantizer", force_zero);
  });
  std::vector<std::pair<std::string, QuantizerImpl*>> others;
  for (const auto& item : quantizers) {
    auto* quantizer = item.value().ptr().get();
    if (!of_weights.contains(quantizer)) others.emplace_back(item.key(), quantizer);
  }

  for (const auto& [path, quantizer] : others) quantizer->start_observing();
  {
    const Evaluation evaluation(model);
    run();
  }
  for (const auto& [path, quantizer] : others) finish_observing(*quantizer, path, force_zero);
  undo.keep();
}

void set_state(torch::nn::Module& model, State state) {
  for (const auto& item : named_quantizers(model)) item.value().ptr()->state = state;
}

std::vector<at::Tensor> range_parameters(const torch::nn::Module& model) {
  std::vector<at::Tensor> ranges;
  for (const auto& item : named_quantizers(model)) {
    for (const auto& parameter : item.value()->parameters()) ranges.push_back(parameter);
  }
  return ranges;
}

void freeze_weights(torch::nn::Module& model) {
  std::unordered_set<const c10::TensorImpl*> ranges;
  for (const auto& range : range_parameters(model)) ranges.insert(range.unsafeGetTensorImpl());
  for (const auto& parameter : model.parameters()) {
    if (!ranges.contains(parameter.unsafeGetTensorImpl())) parameter.requires_grad_(false);
  }
}

}  // namespace asymq::nn
