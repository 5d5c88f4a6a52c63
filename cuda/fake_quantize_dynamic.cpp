#include "ops/fake_quantize_dynamic.h"

#include "common.h"
#include "kernels/fake_quantize_dynamic.h"

namespace asymq::cuda {
namespace {

DynamicPlan dynamic_plan_for(const LiveGroups& groups, std::initializer_list<at::Tensor> tensors) {
  DynamicPlan plan = make_dynamic_plan(groups.count(), groups.size(), groups.factors(),
                                       static_cast<int>(groups.x().element_size()),
                                       all_aligned(tensors), multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

template <class P>
LiveFactors<P> live_factors(const QuantizerKind& kind, bool token, const LiveGroups& groups) {
  return {kind, token, input<P>(groups.first()), input<P>(groups.second())};
}

at::Tensor fake_quantize_dynamic(const at::Tensor& x, const LiveQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize_dynamic(x, quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  if (x.numel() == 0) return at::empty_like(x);
  const LiveGroups groups(x, quantizer);
  at::Tensor out = at::empty_like(groups.x());
  const DynamicPlan plan = dynamic_plan_for(groups, {groups.x(), out});
  const at::Tensor workspace = workspace_if(plan.extrema() > 0, plan.extrema(), x);
  dispatch_types(x, groups.first(), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_dynamic_forward<S, P>(plan, live_factors<P>(kind, quantizer.token, groups),
                                 input<S>(groups.x()), output<S>(out), output<double>(workspace),
                                 c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return groups.restore(out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_dynamic_backward(
    const at::Tensor& grad, const at::Tensor& x, const LiveQuantizer& quantizer,
    std::array<bool, 3> needs) {
  const QuantizerKind kind = check_fake_quantize_dynamic_backward(grad, x, quantizer);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor& first = quantizer.first;
  at::Tensor first_grad = empty_if(needs[1], first), second_grad = empty_if(needs[2], first);
  const bool needs_sums = needs[1] || needs[2];
  if (x.numel() == 0) {
    for (const at::Tensor& gradient : {first_grad, second_grad}) {
      if (gradient.defined()) gradient.zero_();
    }
    return {needs[0] ? at::empty_like(x) : at::Tensor(), first_grad, second_grad};
  }
  if (!needs[0] && !needs_sums) return {at::Tensor(), first_grad, second_grad};

  const LiveGroups groups(x, quantizer);
  const at::Tensor upstream = groups.match(grad);
  at::Tensor dx = needs[0] ? at::empty_like(groups.x()) : at::Tensor();
  const DynamicPlan plan = dynamic_plan_for(groups, {groups.x(), upstream, dx});
  const int64_t doubles = plan.extrema() + (needs_sums ? plan.sums() : 0);
  const at::Tensor workspace = workspace_if(doubles > 0, doubles, x);
  dispatch_types(x, groups.first(), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_dynamic_backward<S, P>(plan, live_factors<P>(kind, quantizer.token, groups),
                                  input<S>(upstream), input<S>(groups.x()), output<S>(dx),
                                  output<P>(first_grad), output<P>(second_grad),
                                  output<double>(workspace), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {needs[0] ? groups.restore(dx) : dx, first_grad, second_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_fake_quantize_dynamic", flat<fake_quantize_dynamic>);
  m.impl("_fake_quantize_dynamic_backward", flat<fake_quantize_dynamic_backward>);
}

}  // namespace asymq::cuda
