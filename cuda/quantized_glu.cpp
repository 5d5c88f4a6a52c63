#include "ops/quantized_glu.h"

#include "kernels/quantized_glu.h"
#include "rows.h"

namespace asymq::cuda {
namespace {

bool has_kernel(const at::Tensor& gate, const GluQuantizers& quantizers) {
  const bool product_alone = !quantizers.gate && !quantizers.activation && !quantizers.up;
  return product_alone && in_vectors(gate) && is_of_rows(quantizers.product, gate);
}

RowPlan glu_plan_for(const at::Tensor& gate, bool backward) {
  RowPlan plan = make_glu_plan(rows_of(gate), vectors_of_row(gate), backward, multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

bool is_tanh(int64_t activation) {
  return activation == static_cast<int64_t>(GluActivation::kGeluTanh);
}

at::Tensor quantized_glu(const at::Tensor& given_gate, const at::Tensor& given_up,
                         int64_t activation, const GluArguments& of) {
  const auto checked = check_quantized_glu(given_gate, given_up, activation, of);
  const c10::cuda::CUDAGuard guard(given_gate.device());
  if (!has_kernel(given_gate, checked)) {
    return quantized_glu_composite(given_gate, given_up, activation, of);
  }
  const at::Tensor gate = aligned_rows(given_gate), up = aligned_rows(given_up);
  at::Tensor out = at::empty(gate.sizes(), gate.options());
  const DeviceRowQuantizer product(checked.product);
  dispatch_types(gate, product.range_like(gate), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_glu_forward<S, P>(glu_plan_for(gate, false), product.pointers<P>(), is_tanh(activation),
                             input<S>(gate), input<S>(up), output<S>(out),
                             c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

GluGradients quantized_glu_backward(const at::Tensor& grad, const at::Tensor& given_gate,
                                    const at::Tensor& given_up, int64_t activation,
                                    const GluArguments& of, std::array<bool, 10> needs) {
  const auto checked = check_quantized_glu_backward(grad, given_gate, given_up, activation, of);
  const c10::cuda::CUDAGuard guard(given_gate.device());
  if (!has_kernel(given_gate, checked)) {
    return quantized_glu_backward_composite(grad, given_gate, given_up, activation, of, needs);
  }
  const at::Tensor gate = aligned_rows(given_gate), up = aligned_rows(given_up);
  const at::Tensor upstream = aligned_rows(grad);
  at::Tensor dgate = empty_if(needs[0], gate), dup = empty_if(needs[1], up);
  const DeviceRowQuantizer product(checked.product, needs[8], needs[9]);
  const RowPlan plan = glu_plan_for(gate, true);
  const at::Tensor workspace = workspace_if(needs[8] || needs[9], 3 * plan.blocks, gate);
  dispatch_types(gate, product.range_like(gate), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_glu_backward<S, P>(plan, product.pointers<P>(), is_tanh(activation), input<S>(upstream),
                              input<S>(gate), input<S>(up), output<S>(dgate), output<S>(dup),
                              output<double>(workspace), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dgate, dup, {}, {}, {}, {}, {}, {}, product.first, product.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_glu", flat<quantized_glu>);
  m.impl("_quantized_glu_backward", flat<quantized_glu_backward>);
}

}  // namespace asymq::cuda
