// What every kernel does first: check its arguments, and describe how x maps to its ranges.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "asymq/detail/layout.h"
#include "asymq/detail/softmax.h"
#include "asymq/fake_quantize.h"
#include "asymq/parameterization.h"

namespace asymq {

using OptionalTensor = std::optional<at::Tensor>;

/// Names of the parameterization at this position of Parameterizations; throws outside it.
const Traits& traits_of(int64_t parameterization);

/// Position of the parameterization that users name by its family; throws where there is none.
int64_t find_parameterization(const char* op, std::string_view family, bool symmetric,
                              bool sigmoid);

/// The range tensors of one call, in the order of the private operators' arguments.
struct RangeTensors {
  const at::Tensor& first;
  const OptionalTensor& second;
  const OptionalTensor& min;
  const OptionalTensor& max;
};

/// The range tensors of one quantizer as a list has them: those that the parameterization has.
struct ListedRanges {
  at::Tensor first;
  OptionalTensor second, min, max;

  /// Throws, naming op and parameter, where the list does not have what the traits say.
  ListedRanges(const char* op, const Traits& traits, at::TensorList list);

  RangeTensors tensors() const { return {first, second, min, max}; }
};

/// Checks one fake-quantize call and returns its kind. Sizes may be symbolic.
QuantizerKind check_fake_quantize(const at::Tensor& x, const RangeTensors& ranges,
                                  int64_t parameterization, int64_t bits, double eps);

/// The same for the ranges alone, as effective_scale_offset has them.
QuantizerKind check_ranges(const RangeTensors& ranges, int64_t parameterization, int64_t bits,
                           double eps);

/// Checks the ends of the ranges that parameters are wanted for.
void check_ends(const char* op, const at::Tensor& min, const at::Tensor& max, int64_t bits);

/// Checks that an upstream gradient fits x.
void check_grad(const at::Tensor& grad, const at::Tensor& x, int64_t parameterization);

/// Checks one call of quantize (x floating) or dequantize (x integer codes).
QuantizerKind check_quantize(const char* op, const at::Tensor& x, const at::Tensor& scale,
                             const OptionalTensor& offset, int64_t bits, double eps);

/// A quantizer with one range, by the private operators' arguments.
struct QuantizerArguments {
  at::TensorList ranges;
  int64_t parameterization, bits;
  double eps;
};

/// What the private operators take for what users give to `op`.
QuantizerArguments by_position(const char* op, const RangeArguments& range);

/// Checked arguments of a quantizer.
struct CheckedQuantizer {
  QuantizerKind kind;
  ListedRanges ranges;
};

/// A checked call with a quantizer before and one after another function.
struct QuantizerPair {
  CheckedQuantizer before, after;
};

/// Checks one call of quantized_softmax. Sizes may be symbolic.
QuantizerPair check_quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask,
                                      const QuantizerArguments& of_scores,
                                      const QuantizerArguments& of_probabilities);

/// Checks one call of quantized_gelu. Sizes may be symbolic.
QuantizerPair check_quantized_gelu(const at::Tensor& x, const QuantizerArguments& of_input,
                                   const QuantizerArguments& of_output);

/// Checks one call of quantized_cross_entropy. Sizes may be symbolic; what the labels say is not
/// looked at.
CheckedQuantizer check_quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                               const QuantizerArguments& quantizer);

/// Tensors for the gradients of a pair's learned parameters, first and second of the one before,
/// then of the one after; undefined where they are not wanted. needs: of the pair's operator.
std::array<at::Tensor, 4> empty_gradients(const QuantizerPair& pair,
                                          const std::array<bool, 5>& needs);

/// Checks that an upstream gradient has the shape, dtype and device of the argument `name`.
void check_grad(const char* op, const char* name, const at::Tensor& grad, const at::Tensor& x);

/// The type that elements of this type compute in.
inline at::ScalarType compute_dtype(at::ScalarType element) {
  return element == at::kDouble ? at::kDouble : at::kFloat;
}

/// A checked mask, laid over the scores and kept alive beside its data pointer.
class MaskTensor {
 public:
  MaskTensor(const OptionalTensor& mask, const at::Tensor& scores, bool causal);

  /// T: the compute type of the scores.
  template <class T>
  detail::AttentionMask<T> view() const {
    detail::AttentionMask<T> result{causal_, nullptr, nullptr, static_cast<T>(hides_), {}};
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
};

/// The dtype of quantize's codes.
at::ScalarType code_dtype(int64_t bits, bool symmetric);

/// Strides of empty_like(x) without allocating it.
std::vector<int64_t> dense_strides(const at::Tensor& x);

/// `grad` in the memory layout of empty_like(x): itself, or a copy.
at::Tensor match_layout(const at::Tensor& grad, const at::Tensor& x);

/// Loops of a checked call over x with ranges of shape `range_sizes`.
detail::Layout make_layout(const at::Tensor& x, at::IntArrayRef range_sizes);

/// The range tensors made contiguous, kept alive beside their data pointers.
class ContiguousRanges {
 public:
  explicit ContiguousRanges(const RangeTensors& ranges);

  template <class P>
  detail::RangePointers<P> pointers() const {
    return {data<P>(first_), data<P>(second_), data<P>(min_), data<P>(max_)};
  }

 private:
  template <class P>
  static const P* data(const at::Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<P>() : nullptr;
  }

  at::Tensor first_, second_, min_, max_;
};

}  // namespace asymq
