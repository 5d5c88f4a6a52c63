// What every kernel does first: check its arguments, and describe how x maps to its ranges.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "asymq/detail/layout.h"
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
