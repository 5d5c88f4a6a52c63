#include "ops/layout.h"

#include <ATen/ATen.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>

namespace asymq {

std::vector<int64_t> dense_strides(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return x.strides().vec();
  return at::infer_dense_strides(x.sizes(), x.strides());
}

at::Tensor match_layout(const at::Tensor& tensor, const at::Tensor& x) {
  const auto strides = dense_strides(x);
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (x.size(axis) != 1 && tensor.stride(axis) != strides[axis]) {
      return at::empty_strided(x.sizes(), strides, tensor.options()).copy_(tensor);
    }
  }
  return tensor;
}

detail::Layout make_layout(const at::Tensor& x, at::IntArrayRef range_sizes) {
  using detail::Dim;
  detail::Layout layout{0, x.numel(), 1, {}};
  for (const int64_t size : range_sizes) layout.ranges *= size;

  const bool per_tensor = layout.ranges == 1;
  const auto out_strides = dense_strides(x);
  Dim dims[detail::kMaxDims];
  int count = 0;
  int64_t range_stride = 1;
  for (int64_t axis = x.dim() - 1; axis >= 0; --axis) {
    const int64_t size = x.size(axis);
    const int64_t blocks = per_tensor ? 1 : range_sizes[axis];
    const int64_t block = blocks == 0 ? 0 : size / blocks;
    if (block != 1) dims[count++] = {block, x.stride(axis), out_strides[axis], 0};
    if (blocks != 1) {
      dims[count++] = {blocks, x.stride(axis) * block, out_strides[axis] * block, range_stride};
    }
    range_stride *= blocks;
  }
  // The output is dense, so its strides alone order the loops; equal ones cannot occur.
  std::sort(dims, dims + count,
            [](const Dim& a, const Dim& b) { return a.out_stride > b.out_stride; });
  for (int i = 0; i < count; ++i) {
    const Dim& inner = dims[i];
    Dim* outer = layout.ndim > 0 ? &layout.dims[layout.ndim - 1] : nullptr;
    if (outer != nullptr && outer->x_stride == inner.x_stride * inner.size &&
        outer->out_stride == inner.out_stride * inner.size &&
        outer->range_stride == inner.range_stride * inner.size) {
      *outer = {outer->size * inner.size, inner.x_stride, inner.out_stride, inner.range_stride};
    } else {
      layout.dims[layout.ndim++] = inner;
    }
  }
  return layout;
}

ContiguousRanges::ContiguousRanges(const RangeTensors& ranges) {
  const auto contiguous = [](const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->defined() ? tensor->contiguous() : at::Tensor();
  };
  first_ = ranges.first.contiguous();
  second_ = contiguous(ranges.second);
  min_ = contiguous(ranges.min);
  max_ = contiguous(ranges.max);
}

}  // namespace asymq
