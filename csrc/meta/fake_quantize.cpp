// Shapes, dtypes and strides of every kernel's results, for tracing.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "ops/arguments.h"

namespace asymq {
namespace {

at::Tensor like_range(const at::Tensor& range) {
  return at::empty_symint(range.sym_sizes(), range.options());
}

at::Tensor fake_quantize_meta(const at::Tensor& x, const at::Tensor& first,
                              const OptionalTensor& second, const OptionalTensor& min,
                              const OptionalTensor& max, int64_t parameterization, int64_t bits,
                              double eps) {
  check_fake_quantize(x, {first, second, min, max}, parameterization, bits, eps);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& first,
    const OptionalTensor& second, const OptionalTensor& min, const OptionalTensor& max,
    int64_t parameterization, int64_t bits, double eps, std::array<bool, 3> needs) {
  check_fake_quantize(x, {first, second, min, max}, parameterization, bits, eps);
  check_grad(grad, x, parameterization);
  return {needs[0] ? at::empty_like(x) : at::Tensor(), needs[1] ? like_range(first) : at::Tensor(),
          needs[2] ? like_range(first) : at::Tensor()};
}

at::Tensor quantize_meta(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                         int64_t bits, double eps) {
  const QuantizerKind kind = check_quantize("quantize", x, scale, offset, bits, eps);
  return at::empty_like(x, x.options().dtype(code_dtype(bits, is_symmetric(kind))));
}

at::Tensor dequantize_meta(const at::Tensor& codes, const at::Tensor& scale,
                           const OptionalTensor& offset, int64_t bits, double eps) {
  check_quantize("dequantize", codes, scale, offset, bits, eps);
  return at::empty_like(codes, codes.options().dtype(scale.scalar_type()));
}

std::tuple<at::Tensor, at::Tensor> effective_scale_offset_meta(
    const at::Tensor& first, const OptionalTensor& second, const OptionalTensor& min,
    const OptionalTensor& max, int64_t parameterization, int64_t bits, double eps) {
  check_ranges({first, second, min, max}, parameterization, bits, eps);
  return {like_range(first), like_range(first)};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_fake_quantize", fake_quantize_meta);
  m.impl("_fake_quantize_backward", fake_quantize_backward_meta);
  m.impl("quantize", quantize_meta);
  m.impl("dequantize", dequantize_meta);
  m.impl("_effective_scale_offset", effective_scale_offset_meta);
}

}  // namespace asymq
