// How x maps to its ranges and to memory, for kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "asymq/detail/layout.h"
#include "ops/quantizer.h"

namespace asymq {

/// Strides of empty_like(x) without allocating it.
std::vector<int64_t> dense_strides(const at::Tensor& x);

/// A tensor of x's shape in the memory layout of empty_like(x): itself, or a copy.
at::Tensor match_layout(const at::Tensor& tensor, const at::Tensor& x);

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
