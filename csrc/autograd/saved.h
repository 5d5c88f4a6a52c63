// What the differentiation of the operators shares: what a forward keeps of its quantizers, and
// where the gradients go that a backward returns of an operator that does more than quantize.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autograd/differentiable.h"
#include "ops/quantizer.h"

namespace asymq {

/// Keeps a quantizer's kind for the backward under this name. As one entry: entries of each number
/// take longer to write and to find than a small tensor to quantize.
inline void save_kind(torch::autograd::AutogradContext* ctx, const KindArguments& kind,
                      const std::string& name = "kind") {
  ctx->saved_data[name] = std::vector<double>{static_cast<double>(kind.parameterization),
                                              static_cast<double>(kind.bits), kind.eps,
                                              static_cast<double>(kind.link), kind.gradient_scale};
}

inline KindArguments saved_kind(torch::autograd::AutogradContext* ctx,
                                const std::string& name = "kind") {
  const std::vector<double> numbers = ctx->saved_data.at(name).toDoubleVector();
  return {static_cast<int64_t>(numbers[0]), static_cast<int64_t>(numbers[1]), numbers[2],
          static_cast<int64_t>(numbers[3]), numbers[4]};
}

/// Keeps tensors and quantizers for the backward.
inline void save(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list tensors,
                 std::initializer_list<QuantizerArguments> quantizers) {
  ctx->saved_data["tensors"] = static_cast<int64_t>(tensors.size());
  ctx->saved_data["quantizers"] = static_cast<int64_t>(quantizers.size());
  int number = 0;
  for (const QuantizerArguments& quantizer : quantizers) {
    const std::string key = std::to_string(number++) + "_";
    save_kind(ctx, quantizer.kind, key + "kind");
    ctx->saved_data[key + "ranges"] = static_cast<int64_t>(quantizer.ranges.size());
    ctx->saved_data[key + "token"] = quantizer.token;
    ctx->saved_data[key + "group"] = quantizer.group;
    tensors.insert(tensors.end(), quantizer.ranges.begin(), quantizer.ranges.end());
  }
  ctx->save_for_backward(std::move(tensors));
}

/// What `save` kept of a function whose arguments are `inputs` tensors, the ranges of every
/// quantizer, and others that get no gradient.
class Saved {
 public:
  explicit Saved(torch::autograd::AutogradContext* ctx, size_t inputs = 1)
      : ctx_(ctx), inputs_(inputs), tensors_(ctx->get_saved_variables()) {
    size_t first = static_cast<size_t>(integer("tensors"));
    for (int64_t i = 0; i < integer("quantizers"); ++i) {
      const std::string key = std::to_string(i) + "_";
      const auto count = static_cast<size_t>(integer(key + "ranges"));
      quantizers_.push_back({at::TensorList(tensors_).slice(first, count),
                             saved_kind(ctx_, key + "kind"),
                             ctx_->saved_data.at(key + "token").toBool(),
                             ctx_->saved_data.at(key + "group").toOptional<int64_t>()});
      first += count;
    }
  }
  Saved(const Saved&) = delete;
  Saved& operator=(const Saved&) = delete;

  const at::Tensor& tensor(size_t i) const { return tensors_[i]; }
  const QuantizerArguments& quantizer(size_t i) const { return quantizers_[i]; }

  /// Which gradients are wanted: of the inputs, then of first and second of every quantizer.
  template <size_t kCount>
  std::array<bool, kCount> needs() const {
    std::array<bool, kCount> needs{};
    for (size_t i = 0; i < inputs_; ++i) needs[i] = ctx_->needs_input_grad(i);
    for_each_learned([&](size_t gradient, size_t argument) {
      needs[gradient] = ctx_->needs_input_grad(argument);
    });
    return needs;
  }

  /// The gradients that the backward operator returned, in the order of `needs`, in the order of
  /// the function's arguments. Those that get none may be left out of it or be undefined.
  template <class... Tensors>
  torch::autograd::variable_list in_order(const std::tuple<Tensors...>& gradients) const {
    const std::array<at::Tensor, sizeof...(Tensors)> given = std::apply(
        [](const auto&... tensors) {
          return std::array<at::Tensor, sizeof...(Tensors)>{tensors...};
        },
        gradients);
    auto result = none();
    std::copy_n(given.begin(), inputs_, result.begin());
    for_each_learned([&](size_t gradient, size_t argument) { result[argument] = given[gradient]; });
    return result;
  }

  /// No gradient at all.
  torch::autograd::variable_list none() const {
    // Undefined gradients past the last argument do no harm.
    constexpr size_t kMostArguments = 32;
    return torch::autograd::variable_list(kMostArguments);
  }

 private:
  int64_t integer(const std::string& key) const { return ctx_->saved_data.at(key).toInt(); }

  /// Calls visit(place among the gradients, place among the arguments) for what learns.
  template <class Visit>
  void for_each_learned(const Visit& visit) const {
    size_t gradient = inputs_, argument = inputs_;
    for (const QuantizerArguments& quantizer : quantizers_) {
      if (quantizer.exists()) {
        visit(gradient, argument);
        const bool two = traits_of(quantizer.kind.parameterization).second[0] != '\0';
        if (two) visit(gradient + 1, argument + 1);
      }
      gradient += 2;
      argument += quantizer.ranges.size();
    }
  }

  torch::autograd::AutogradContext* ctx_;
  size_t inputs_;
  torch::autograd::variable_list tensors_;
  std::vector<QuantizerArguments> quantizers_;
};

/// Throws where the operator cannot be differentiated as it is called.
inline void check_differentiable(
    const char* op, std::initializer_list<std::optional<CheckedQuantizer>> quantizers) {
  check_transforms({op});
  for (const auto& quantizer : quantizers) {
    if (!quantizer.has_value()) continue;
    const char* name = traits_of(quantizer->kind.parameterization).name;
    check_constants({op, ": ", name}, quantizer->ranges.tensors());
  }
}

}  // namespace asymq
