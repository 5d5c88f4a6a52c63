// The private operators behind quantized_softmax.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>

#include "asymq/detail/softmax.h"
#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// Probabilities, and of each row the largest masked score and the sum of exponentials.
inline constexpr Op<"asymq::_quantized_softmax",
                    std::tuple<at::Tensor, at::Tensor>(
                        const at::Tensor& scores, const OptionalTensor& mask, bool causal,
                        std::optional<int64_t> window, const QuantizerArguments& of_scores,
                        const QuantizerArguments& of_probabilities)>
    quantized_softmax_op;

/// dL/dscores, then the gradients of first and second of the scores' and the probabilities' range.
inline constexpr Op<"asymq::_quantized_softmax_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& scores,
                        const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
                        std::optional<int64_t> window, const QuantizerArguments& of_scores,
                        const QuantizerArguments& of_probabilities, std::array<bool, 5> needs)>
    quantized_softmax_backward_op;

/// Sizes may be symbolic.
QuantizerPair check_quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask,
                                      bool causal, std::optional<int64_t> window,
                                      const QuantizerArguments& of_scores,
                                      const QuantizerArguments& of_probabilities);

/// The same, and of the upstream gradient.
QuantizerPair check_quantized_softmax_backward(const at::Tensor& grad, const at::Tensor& scores,
                                               const OptionalTensor& mask, bool causal,
                                               std::optional<int64_t> window,
                                               const QuantizerArguments& of_scores,
                                               const QuantizerArguments& of_probabilities);

/// Throws where mask and window do not fit scores of these sizes, [batch, heads, queries, keys], on
/// this device.
void check_sight(const char* op, c10::SymIntArrayRef scores, at::Device device,
                 const OptionalTensor& mask, bool causal, std::optional<int64_t> window);

/// What a floating mask of this dtype hides keys with, at this value and below: -1e4, as the dtype
/// has it.
double hiding_value(at::ScalarType mask);

/// A checked mask, laid over scores of these sizes and compute type and kept alive beside its data
/// pointer.
class MaskTensor {
 public:
  MaskTensor(const OptionalTensor& mask, at::IntArrayRef sizes, at::ScalarType compute, bool causal,
             std::optional<int64_t> window);

  /// T: the compute type of the scores.
  template <class T>
  detail::AttentionMask<T> view() const {
    detail::AttentionMask<T> result{causal_, window_, nullptr, nullptr, static_cast<T>(hides_), {}};
    if (!tensor_.defined()) return result;
    std::copy_n(tensor_.strides().begin(), 4, result.strides);
    if (tensor_.scalar_type() == at::kBool) {
      result.visible = tensor_.const_data_ptr<bool>();
    } else {
      result.added = tensor_.const_data_ptr<T>();
    }
    return result;
  }

 private:
  at::Tensor tensor_;
  double hides_ = 0;
  bool causal_;
  int64_t window_;
};

}  // namespace asymq
