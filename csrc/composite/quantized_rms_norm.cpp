// The quantized RMSNorm of single operations: what every device runs that has no kernel of its own
// for it, and what tracing looks at.
#include "ops/quantized_rms_norm.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "composite/quantizer.h"

namespace asymq {
namespace {

/// x / sqrt(mean square + eps), rounded to x's dtype.
at::Tensor normalize(const at::Tensor& x, const at::Tensor& statistics) {
  return (widen(x) * statistics).to(x.scalar_type());
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> quantized_rms_norm_composite(const at::Tensor& x,
                                                                const at::Tensor& weight,
                                                                double eps,
                                                                const QuantizerArguments& output) {
  const auto quantizer = check_quantized_rms_norm(x, weight, output);
  const at::Tensor statistics = (widen(x).square().mean(-1, /*keepdim=*/true) + eps).rsqrt();
  const at::Tensor normalized = quantize(normalize(x, statistics) * weight, quantizer);
  return {normalized.contiguous(), statistics.contiguous()};
}

RmsNormGradients quantized_rms_norm_backward_composite(const at::Tensor& grad, const at::Tensor& x,
                                                       const at::Tensor& weight,
                                                       const at::Tensor& statistics,
                                                       const QuantizerArguments& output,
                                                       std::array<bool, 4> needs) {
  const auto quantizer = check_quantized_rms_norm_backward(grad, x, weight, output);
  const at::Tensor normalized = normalize(x, statistics);
  const auto [dweighted, first, second] =
      quantize_backward(grad, normalized * weight, quantizer, needs[2], needs[3]);
  RmsNormGradients gradients{at::Tensor(), at::Tensor(), first, second};
  auto& [dx, dweight, unused_first, unused_second] = gradients;
  if (needs[0]) {
    const at::Tensor wide = widen(x), dnormalized = widen(dweighted) * widen(weight);
    const at::Tensor along = (dnormalized * wide).mean(-1, /*keepdim=*/true) * statistics.square();
    dx = (statistics * (dnormalized - wide * along)).to(x.scalar_type()).contiguous();
  }
  if (needs[1]) {
    dweight = widen(dweighted) * widen(normalized);
    if (x.dim() > 1) dweight = dweight.flatten(0, -2).sum(0, /*keepdim=*/false, at::kDouble);
    dweight = dweight.to(x.scalar_type());
  }
  return gradients;
}

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_rms_norm", flat<quantized_rms_norm_composite>);
  m.impl("_quantized_rms_norm_backward", flat<quantized_rms_norm_backward_composite>);
}

}  // namespace asymq
