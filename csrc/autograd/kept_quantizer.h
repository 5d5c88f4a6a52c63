// What the differentiation of operators with lists of ranges shares.
#pragma once

#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <string>

#include "ops/arguments.h"

namespace asymq {

/// Throws where a constant of the parameterization asks for a gradient.
inline void check_constants(const char* op, int64_t parameterization, const ListedRanges& ranges) {
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    TORCH_CHECK(!tensor.has_value() || !tensor->requires_grad(), "asymq::", op, ": ",
                traits_of(parameterization).name, ": ", name,
                " must not require grad: it is a constant of this parameterization");
  };
  check("min", ranges.min);
  check("max", ranges.max);
}

/// Keeps a quantizer for the backward under a name; its tensors are kept by save_for_backward.
inline void keep(torch::autograd::AutogradContext* ctx, const std::string& name,
                 const QuantizerArguments& quantizer) {
  ctx->saved_data[name + "_ranges"] = static_cast<int64_t>(quantizer.ranges.size());
  ctx->saved_data[name + "_parameterization"] = quantizer.parameterization;
  ctx->saved_data[name + "_bits"] = quantizer.bits;
  ctx->saved_data[name + "_eps"] = quantizer.eps;
}

/// The quantizer that was kept, whose tensors start at `first` of the saved ones.
inline QuantizerArguments kept(torch::autograd::AutogradContext* ctx, const std::string& name,
                               at::TensorList saved, size_t first) {
  const auto data = [&](const char* what) { return ctx->saved_data[name + what]; };
  return {saved.slice(first, static_cast<size_t>(data("_ranges").toInt())),
          data("_parameterization").toInt(), data("_bits").toInt(), data("_eps").toDouble()};
}

/// Which of its learned parameters, first and second, need a gradient. `edge`: the place of the
/// first among the arguments that are tensors.
inline std::array<bool, 2> needed(const torch::autograd::AutogradContext* ctx,
                                  const QuantizerArguments& quantizer, size_t edge) {
  const bool second = traits_of(quantizer.parameterization).second[0] != '\0';
  return {ctx->needs_input_grad(edge), second && ctx->needs_input_grad(edge + 1)};
}

}  // namespace asymq
