#include "ops/quantized_softmax.h"

#include "common.h"
#include "kernels/quantized_softmax.h"

namespace asymq::cuda {
namespace {

/// `sums`: the call is a backward that wants gradients of ranges.
SoftmaxPlan softmax_plan_for(const at::Tensor& scores, bool sums,
                             std::initializer_list<at::Tensor> tensors) {
  SoftmaxPlan plan = make_softmax_plan(scores.size(0) * scores.size(1) * scores.size(2),
                                       scores.size(3), static_cast<int>(scores.element_size()),
                                       all_aligned(tensors), sums, multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

/// dense: contiguous scores.
template <class S, class P>
SoftmaxOperands<S, P> operands(const at::Tensor& dense, const MaskTensor& mask,
                               const DeviceQuantizer& of_scores,
                               const DeviceQuantizer& of_probabilities) {
  return {{dense.size(0), dense.size(1), dense.size(2), dense.size(3)},
          mask.view<Compute<S>>(),
          of_scores.pointers<P>(),
          of_probabilities.pointers<P>(),
          input<S>(dense)};
}

std::tuple<at::Tensor, at::Tensor> quantized_softmax(const at::Tensor& scores,
                                                     const OptionalTensor& mask, bool causal,
                                                     std::optional<int64_t> window,
                                                     const QuantizerArguments& scores_quantizer,
                                                     const QuantizerArguments& quantizer) {
  const QuantizerPair pair =
      check_quantized_softmax(scores, mask, causal, window, scores_quantizer, quantizer);
  const c10::cuda::CUDAGuard guard(scores.device());
  at::Tensor out = at::empty(scores.sizes(), scores.options());
  at::Tensor statistics = at::empty({scores.size(0), scores.size(1), scores.size(2), 2},
                                    scores.options().dtype(compute_dtype(scores.scalar_type())));
  if (statistics.numel() == 0) return {out, statistics};
  const at::Tensor dense = scores.contiguous();
  const MaskTensor mask_tensor(mask, scores.sizes(), compute_dtype(scores.scalar_type()), causal,
                               window);
  const DeviceQuantizer before(pair.before), after(pair.after);
  const SoftmaxPlan plan = softmax_plan_for(scores, false, {dense, out});
  dispatch_types(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_softmax_forward<S, P>(plan, operands<S, P>(dense, mask_tensor, before, after),
                                 output<S>(out), output<Compute<S>>(statistics),
                                 c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_softmax_backward(
    const at::Tensor& grad, const at::Tensor& scores, const at::Tensor& statistics,
    const OptionalTensor& mask, bool causal, std::optional<int64_t> window,
    const QuantizerArguments& scores_quantizer, const QuantizerArguments& quantizer,
    std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_softmax_backward(grad, scores, mask, causal, window,
                                                              scores_quantizer, quantizer);
  const c10::cuda::CUDAGuard guard(scores.device());
  at::Tensor dscores = empty_if(needs[0], scores);
  const DeviceQuantizer before(pair.before, needs[1], needs[2]);
  const DeviceQuantizer after(pair.after, needs[3], needs[4]);
  const at::Tensor dense = scores.contiguous(), upstream = grad.contiguous();
  const MaskTensor mask_tensor(mask, scores.sizes(), compute_dtype(scores.scalar_type()), causal,
                               window);
  const bool sums = needs[1] || needs[2] || needs[3] || needs[4];
  const SoftmaxPlan plan = softmax_plan_for(scores, sums, {dense, upstream, dscores});
  const at::Tensor workspace = workspace_if(sums, 6 * plan.blocks, scores);
  dispatch_types(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_softmax_backward<S, P>(plan, operands<S, P>(dense, mask_tensor, before, after),
                                  input<S>(upstream), input<Compute<S>>(statistics),
                                  output<S>(dscores), output<double>(workspace),
                                  c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dscores, before.first, before.second, after.first, after.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_softmax", flat<quantized_softmax>);
  m.impl("_quantized_softmax_backward", flat<quantized_softmax_backward>);
}

}  // namespace asymq::cuda
