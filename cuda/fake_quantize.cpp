#include "ops/fake_quantize.h"

#include "common.h"
#include "kernels/fake_quantize.h"

namespace asymq::cuda {
namespace {

at::Tensor fake_quantize(const at::Tensor& x, const GranularQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize(x, quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const at::Tensor& first = quantizer.ranges.first;
  const detail::Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(quantizer.ranges);
  const Plan plan = plan_for(layout, false, x, {out});
  dispatch_types(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_forward<S, P>(plan, layout, kind, ranges.pointers<P>(), input<S>(x), output<S>(out),
                         c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward(
    const at::Tensor& grad, const at::Tensor& x, const GranularQuantizer& quantizer,
    std::array<bool, 3> needs) {
  const QuantizerKind kind = check_fake_quantize_backward(grad, x, quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor& first = quantizer.ranges.first;
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  at::Tensor first_grad = empty_if(needs[1], first), second_grad = empty_if(needs[2], first);
  const bool needs_sums = (needs[1] || needs[2]) && first.numel() > 0;
  if (!needs_sums && (!needs[0] || x.numel() == 0)) return {dx, first_grad, second_grad};

  const detail::Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(quantizer.ranges);
  const at::Tensor upstream = match_layout(grad, x);
  const Plan plan = plan_for(layout, needs_sums, x, {upstream, dx});
  const int64_t partials = partial_sums(plan).count();
  const at::Tensor workspace =
      workspace_if(needs_sums && partials != 1, 3 * layout.ranges * partials, x);
  dispatch_types(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_backward<S, P>(plan, layout, kind, ranges.pointers<P>(), input<S>(upstream), input<S>(x),
                          output<S>(dx), output<P>(first_grad), output<P>(second_grad),
                          output<double>(workspace), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, first_grad, second_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_fake_quantize", flat<fake_quantize>);
  m.impl("_fake_quantize_backward", flat<fake_quantize_backward>);
}

}  // namespace asymq::cuda
