#include "ops/quantized_softmax.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <limits>

#include "asymq/quantized_softmax.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kSoftmax = "quantized_softmax";

void check_mask(const Where& where, c10::SymIntArrayRef scores, at::Device device,
                const at::Tensor& mask) {
  TORCH_CHECK(mask.scalar_type() == at::kBool || mask.is_floating_point(), where,
              ": mask must be bool (true: seen) or floating (added), got ", mask.scalar_type());
  TORCH_CHECK(mask.device() == device, where, ": mask must be on the scores' device ", device,
              ", got ", mask.device());
  const auto sizes = mask.sym_sizes();
  bool fits = sizes.size() <= 4;
  for (size_t axis = 0; fits && axis < sizes.size(); ++axis) {
    const auto& size = sizes[sizes.size() - 1 - axis];
    fits = size == 1 || size == scores[3 - axis];
  }
  TORCH_CHECK(fits, where, ": mask has shape ", sizes,
              ", which does not broadcast against the scores' shape ", scores);
}

}  // namespace

void check_sight(const char* op, c10::SymIntArrayRef scores, at::Device device,
                 const OptionalTensor& mask, bool causal, std::optional<int64_t> window) {
  const Where where{op};
  TORCH_CHECK(scores[3] <= std::numeric_limits<int>::max(), where,
              ": scores must have less than 2^31 keys, got ", scores[3]);
  if (mask.has_value()) check_mask(where, scores, device, *mask);
  TORCH_CHECK(!window.has_value() || (causal && *window >= 1), where,
              ": window must be at least 1, with causal, got ", *window,
              causal ? "" : " without causal");
}

QuantizerPair check_quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask,
                                      bool causal, std::optional<int64_t> window,
                                      const QuantizerArguments& of_scores,
                                      const QuantizerArguments& of_probabilities) {
  constexpr Where where{kSoftmax};
  TORCH_CHECK(scores.dim() == 4, where,
              ": scores must have 4 dimensions, [batch, heads, queries, keys], got shape ",
              scores.sym_sizes());
  check_elements(where, "scores", scores);
  check_sight(kSoftmax, scores.sym_sizes(), scores.device(), mask, causal, window);
  return check_quantizers(kSoftmax, "scores", scores, "scores' ", of_scores, "probabilities' ",
                          of_probabilities);
}

QuantizerPair check_quantized_softmax_backward(const at::Tensor& grad, const at::Tensor& scores,
                                               const OptionalTensor& mask, bool causal,
                                               std::optional<int64_t> window,
                                               const QuantizerArguments& of_scores,
                                               const QuantizerArguments& of_probabilities) {
  check_grad({kSoftmax}, "scores", grad, scores);
  return check_quantized_softmax(scores, mask, causal, window, of_scores, of_probabilities);
}

double hiding_value(at::ScalarType mask) {
  double value = 0;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, mask, kSoftmax, [&] {
    value = static_cast<double>(static_cast<scalar_t>(-1e4));
  });
  return value;
}

MaskTensor::MaskTensor(const OptionalTensor& mask, at::IntArrayRef sizes, at::ScalarType compute,
                       bool causal, std::optional<int64_t> window)
    : causal_(causal), window_(window.value_or(0)) {
  if (!mask.has_value()) return;
  tensor_ = *mask;
  if (tensor_.scalar_type() != at::kBool) {
    hides_ = hiding_value(tensor_.scalar_type());
    tensor_ = tensor_.to(compute);
  }
  tensor_ = tensor_.expand(sizes);
}

at::Tensor quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask, bool causal,
                             const RangeArguments& scores_range,
                             const RangeArguments& probabilities_range,
                             std::optional<int64_t> window) {
  return std::get<0>(quantized_softmax_op(scores, mask, causal, window,
                                          by_position(kSoftmax, scores_range),
                                          by_position(kSoftmax, probabilities_range)));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_softmax", flat<quantized_softmax>);
}

}  // namespace asymq
