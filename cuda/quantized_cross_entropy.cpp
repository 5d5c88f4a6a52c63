#include "ops/quantized_cross_entropy.h"

#include "common.h"
#include "kernels/quantized_cross_entropy.h"

namespace asymq::cuda {
namespace {

/// logits and dlogits, where there is one, are contiguous.
template <class S>
CrossEntropyOperands<S> operands(const at::Tensor& logits, const at::Tensor& labels,
                                 const at::Tensor& dlogits, std::optional<int64_t> classes,
                                 int64_t ignore_index) {
  const auto columns = static_cast<int>(logits.size(1));
  return {logits.size(0),  static_cast<int>(classes.value_or(columns)),
          columns,         all_aligned({logits, dlogits}),
          ignore_index,    input<int64_t>(labels),
          input<S>(logits)};
}

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy(const at::Tensor& logits,
                                                           const at::Tensor& labels,
                                                           const QuantizerArguments& quantizer,
                                                           std::optional<int64_t> classes,
                                                           int64_t ignore_index) {
  const auto checked = check_quantized_cross_entropy(logits, labels, quantizer, classes);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  at::Tensor losses = at::empty({logits.size(0)}, options);
  at::Tensor statistics = at::empty({logits.size(0), 2}, options);
  if (logits.size(0) == 0) return {losses, statistics};
  const at::Tensor dense = logits.contiguous(), dense_labels = labels.contiguous();
  const DeviceQuantizer of_logits(checked);
  dispatch_types(logits, checked.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_cross_entropy_forward<S, P>(operands<S>(dense, dense_labels, {}, classes, ignore_index),
                                       of_logits.pointers<P>(), output<Compute<S>>(losses),
                                       output<Compute<S>>(statistics),
                                       c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {losses, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_cross_entropy_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels,
    const at::Tensor& statistics, const QuantizerArguments& quantizer,
    std::optional<int64_t> classes, int64_t ignore_index, std::array<bool, 3> needs) {
  const auto checked =
      check_quantized_cross_entropy_backward(grad, logits, labels, statistics, quantizer, classes);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor dense = logits.contiguous(), dense_labels = labels.contiguous();
  const at::Tensor upstream = grad.contiguous();
  at::Tensor dlogits = empty_if(needs[0], logits);
  const DeviceQuantizer of_logits(checked, needs[1], needs[2]);
  const at::Tensor workspace = workspace_if(needs[1] || needs[2], 3 * logits.size(0), logits);
  dispatch_types(logits, checked.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_cross_entropy_backward<S, P>(
        operands<S>(dense, dense_labels, dlogits, classes, ignore_index), of_logits.pointers<P>(),
        input<Compute<S>>(upstream), input<Compute<S>>(statistics), output<S>(dlogits),
        output<double>(workspace), overlaps(), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dlogits, of_logits.first, of_logits.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_cross_entropy", flat<quantized_cross_entropy>);
  m.impl("_quantized_cross_entropy_backward", flat<quantized_cross_entropy_backward>);
}

}  // namespace asymq::cuda
