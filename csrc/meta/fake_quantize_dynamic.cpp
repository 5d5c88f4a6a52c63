// Shapes, dtypes and strides of the results of a live range's kernels, for tracing.
#include "ops/fake_quantize_dynamic.h"

#include <ATen/ATen.h>
#include <torch/library.h>

namespace asymq {
namespace {

at::Tensor fake_quantize_dynamic_meta(const at::Tensor& x, const LiveQuantizer& quantizer) {
  check_fake_quantize_dynamic(x, quantizer);
  return at::empty_like(x);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_dynamic_backward_meta(
    const at::Tensor& grad, const at::Tensor& x, const LiveQuantizer& quantizer,
    std::array<bool, 3> needs) {
  check_fake_quantize_dynamic_backward(grad, x, quantizer);
  const at::Tensor& first = quantizer.first;
  const auto like_factors = [&](bool needed) {
    return needed ? at::empty_symint(first.sym_sizes(), first.options()) : at::Tensor();
  };
  return {needs[0] ? at::empty_like(x) : at::Tensor(), like_factors(needs[1]),
          like_factors(needs[2])};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Meta, m) {
  m.impl("_fake_quantize_dynamic", flat<fake_quantize_dynamic_meta>);
  m.impl("_fake_quantize_dynamic_backward", flat<fake_quantize_dynamic_backward_meta>);
}

}  // namespace asymq
