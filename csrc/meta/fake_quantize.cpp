// Shapes, dtypes and strides of the results of kernels that quantize and no more, for tracing.
#include "ops/fake_quantize.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/effective_scale_offset.h"
#include "ops/quantize.h"

namespace asymq {
namespace {

at::Tensor like_range(const at::Tensor& range) {
  return at::empty_symint(range.sym_sizes(), range.options());
}

at::Tensor fake_quantize_meta(const at::Tensor& x, const GranularQuantizer& quantizer) {
  check_fake_quantize(x, quantizer);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const GranularQuantizer& quantizer,
    std::array<bool, 3> needs) {
  check_fake_quantize_backward(grad, x, quantizer);
  const at::Tensor& range = quantizer.ranges.first;
  return {needs[0] ? at::empty_like(x) : at::Tensor(), needs[1] ? like_range(range) : at::Tensor(),
          needs[2] ? like_range(range) : at::Tensor()};
}

at::Tensor quantize_meta(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                         int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_quantize(x, scale, offset, bits, eps, full_range);
  return at::empty_like(x, x.options().dtype(code_dtype(bits, is_symmetric(kind))));
}

at::Tensor update_codes_meta(const at::Tensor& codes, const at::Tensor& x, const at::Tensor& scale,
                             const OptionalTensor& offset, int64_t bits, double eps,
                             bool full_range) {
  check_update_codes(codes, x, scale, offset, bits, eps, full_range);
  return at::empty({}, x.options().dtype(at::kLong));
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor& scale,
                           const OptionalTensor& offset, int64_t bits, double eps,
                           bool full_range) {
  check_dequantize(codes, scale, offset, bits, eps, full_range);
  return at::empty_like(codes, codes.options().dtype(scale.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> effective_scale_offset_meta(const GranularQuantizer& quantizer) {
  check_effective_scale_offset(quantizer);
  const at::Tensor& range = quantizer.ranges.first;
  return {like_range(range), like_range(range)};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_fake_quantize", flat<fake_quantize_meta>);
  m.impl("_fake_quantize_backward", flat<fake_quantize_backward_meta>);
  m.impl("quantize", quantize_meta);
  m.impl("update_codes_", update_codes_meta);
  m.impl("dequantize", dequantize_meta);
  m.impl("_effective_scale_offset", flat<effective_scale_offset_meta>);
}

}  // namespace asymq
