#include "ops/quantized_kl_div.h"

#include "common.h"
#include "kernels/quantized_kl_div.h"

namespace asymq::cuda {
namespace {

/// What the kernels read, contiguous; the teacher's rows may be apart.
struct Inputs {
  Inputs(const at::Tensor& logits, const at::Tensor& teacher, const OptionalTensor& labels)
      : logits(logits.contiguous()),
        teacher(teacher.stride(1) == 1 ? teacher : teacher.contiguous()) {
    if (labels.has_value()) this->labels = labels->contiguous();
  }

  /// dlogits is not defined where not wanted.
  template <class S>
  KlDivOperands<S> operands(const at::Tensor& dlogits, double temperature,
                            int64_t ignore_index) const {
    return {logits.size(0),
            static_cast<int>(teacher.size(1)),
            static_cast<int>(logits.size(1)),
            all_aligned({logits, dlogits}),
            ignore_index,
            labels.defined() ? input<int64_t>(labels) : nullptr,
            static_cast<Compute<S>>(temperature),
            input<S>(logits),
            input<S>(teacher),
            teacher.stride(0)};
  }

  at::Tensor logits, teacher, labels;
};

std::tuple<at::Tensor, at::Tensor> quantized_kl_div(
    const at::Tensor& logits, const at::Tensor& teacher_logits, const OptionalTensor& labels,
    const QuantizerArguments& quantizer, double temperature, std::optional<int64_t> classes,
    int64_t ignore_index) {
  const auto checked =
      check_quantized_kl_div(logits, teacher_logits, labels, quantizer, temperature, classes);
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  at::Tensor losses = at::empty({logits.size(0)}, options);
  at::Tensor statistics = at::empty({logits.size(0), 4}, options);
  if (logits.size(0) == 0) return {losses, statistics};
  const Inputs inputs(logits, teacher_logits, labels);
  const DeviceQuantizer of_logits(checked);
  dispatch_types(logits, checked.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_kl_div_forward<S, P>(inputs.operands<S>({}, temperature, ignore_index),
                                of_logits.pointers<P>(), output<Compute<S>>(losses),
                                output<Compute<S>>(statistics), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {losses, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_kl_div_backward(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& teacher_logits,
    const OptionalTensor& labels, const at::Tensor& statistics, const QuantizerArguments& quantizer,
    double temperature, std::optional<int64_t> classes, int64_t ignore_index,
    std::array<bool, 3> needs) {
  const auto checked = check_quantized_kl_div_backward(grad, logits, teacher_logits, labels,
                                                       statistics, quantizer, temperature, classes);
  const c10::cuda::CUDAGuard guard(logits.device());
  const Inputs inputs(logits, teacher_logits, labels);
  const at::Tensor upstream = grad.contiguous();
  at::Tensor dlogits = empty_if(needs[0], logits);
  const DeviceQuantizer of_logits(checked, needs[1], needs[2]);
  const at::Tensor workspace = workspace_if(needs[1] || needs[2], 3 * logits.size(0), logits);
  dispatch_types(logits, checked.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_kl_div_backward<S, P>(
        inputs.operands<S>(dlogits, temperature, ignore_index), of_logits.pointers<P>(),
        input<Compute<S>>(upstream), input<Compute<S>>(statistics), output<S>(dlogits),
        output<double>(workspace), overlaps(), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dlogits, of_logits.first, of_logits.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_kl_div", flat<quantized_kl_div>);
  m.impl("_quantized_kl_div_backward", flat<quantized_kl_div_backward>);
}

}  // namespace asymq::cuda
