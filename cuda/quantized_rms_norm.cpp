#include "ops/quantized_rms_norm.h"

#include "kernels/quantized_rms_norm.h"
#include "rows.h"

namespace asymq::cuda {
namespace {

bool has_kernel(const at::Tensor& x, const at::Tensor& weight,
                const std::optional<CheckedQuantizer>& output) {
  return aligned(weight) && in_vectors(x) && vectors_of_row(x) <= kMostRmsNormVectors &&
         is_of_rows(output, x);
}

RowPlan rms_norm_plan_for(const at::Tensor& x, bool backward) {
  RowPlan plan = make_rms_norm_plan(rows_of(x), vectors_of_row(x), backward, multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

std::tuple<at::Tensor, at::Tensor> quantized_rms_norm(const at::Tensor& given, const at::Tensor& w,
                                                      double eps,
                                                      const QuantizerArguments& output_quantizer) {
  const auto checked = check_quantized_rms_norm(given, w, output_quantizer);
  const c10::cuda::CUDAGuard guard(given.device());
  const at::Tensor x = aligned_rows(given), weight = w.contiguous();
  if (!has_kernel(x, weight, checked)) {
    return quantized_rms_norm_composite(x, weight, eps, output_quantizer);
  }
  at::Tensor out = at::empty(x.sizes(), x.options());
  auto sizes = x.sizes().vec();
  sizes.back() = 1;
  at::Tensor statistics = at::empty(sizes, x.options().dtype(compute_dtype(x.scalar_type())));
  const DeviceRowQuantizer quantizer(checked);
  dispatch_types(x, quantizer.range_like(x), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_rms_norm_forward<S, P>(
        rms_norm_plan_for(x, false), quantizer.pointers<P>(), input<S>(x), input<S>(weight), eps,
        output<S>(out), output<Compute<S>>(statistics), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, statistics};
}

RmsNormGradients quantized_rms_norm_backward(const at::Tensor& grad, const at::Tensor& given,
                                             const at::Tensor& w, const at::Tensor& statistics,
                                             const QuantizerArguments& output_quantizer,
                                             std::array<bool, 4> needs) {
  const auto checked = check_quantized_rms_norm_backward(grad, given, w, output_quantizer);
  const c10::cuda::CUDAGuard guard(given.device());
  const at::Tensor x = aligned_rows(given), upstream = aligned_rows(grad), weight = w.contiguous();
  if (!has_kernel(x, weight, checked)) {
    return quantized_rms_norm_backward_composite(upstream, x, weight, statistics, output_quantizer,
                                                 needs);
  }
  at::Tensor dx = empty_if(needs[0], x), dweight = empty_if(needs[1], weight);
  const DeviceRowQuantizer quantizer(checked, needs[2], needs[3]);
  const RowPlan plan = rms_norm_plan_for(x, true);
  const at::Tensor workspace = workspace_if(needs[2] || needs[3], 3 * plan.blocks, x);
  const at::Tensor weight_sums =
      needs[1] ? at::empty({plan.entries(), weight.size(0)}, statistics.options()) : at::Tensor();
  dispatch_types(x, quantizer.range_like(x), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    using T = Compute<S>;
    launch_rms_norm_backward<S, P>(plan, quantizer.pointers<P>(), input<S>(upstream), input<S>(x),
                                   input<S>(weight), input<T>(statistics), output<S>(dx),
                                   output<S>(dweight), output<double>(workspace),
                                   output<T>(weight_sums), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, dweight, quantizer.first, quantizer.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_rms_norm", flat<quantized_rms_norm>);
  m.impl("_quantized_rms_norm_backward", flat<quantized_rms_norm_backward>);
}

}  // namespace asymq::cuda
