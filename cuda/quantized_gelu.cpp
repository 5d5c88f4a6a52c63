#include "ops/quantized_gelu.h"

#include "common.h"
#include "kernels/quantized_gelu.h"

namespace asymq::cuda {
namespace {

at::Tensor quantized_gelu(const at::Tensor& x, const QuantizerArguments& input_quantizer,
                          const QuantizerArguments& output_quantizer) {
  const QuantizerPair pair = check_quantized_gelu(x, input_quantizer, output_quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const at::Tensor dense = match_layout(x, x);
  const DeviceQuantizer before(pair.before), after(pair.after);
  const Plan plan = plan_for(make_layout(dense, {1}), false, dense, {out});
  dispatch_types(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_gelu_forward<S, P>(plan, before.pointers<P>(), after.pointers<P>(), input<S>(dense),
                              output<S>(out), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& input_quantizer,
    const QuantizerArguments& output_quantizer, std::array<bool, 5> needs) {
  const QuantizerPair pair =
      check_quantized_gelu_backward(grad, x, input_quantizer, output_quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  const DeviceQuantizer before(pair.before, needs[1], needs[2]);
  const DeviceQuantizer after(pair.after, needs[3], needs[4]);
  const at::Tensor dense = match_layout(x, x), upstream = match_layout(grad, x);
  const bool sums = needs[1] || needs[2] || needs[3] || needs[4];
  const Plan plan = plan_for(make_layout(dense, {1}), sums, dense, {upstream, dx});
  const at::Tensor workspace = workspace_if(sums, 6 * plan.blocks, x);
  dispatch_types(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_gelu_backward<S, P>(plan, before.pointers<P>(), after.pointers<P>(), input<S>(upstream),
                               input<S>(dense), output<S>(dx), output<double>(workspace),
                               c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, before.first, before.second, after.first, after.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_gelu", flat<quantized_gelu>);
  m.impl("_quantized_gelu_backward", flat<quantized_gelu_backward>);
}

}  // namespace asymq::cuda
