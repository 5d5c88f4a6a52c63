#include "ops/quantized_glu.h"

#include "kernels/quantized_glu.h"
#include "rows.h"

namespace asymq::cuda {
namespace {

bool has_kernel(const at::Tensor& gate, const GluQuantizers& quantizers) {
  const auto live = [](const auto& quantizer) { return quantizer.has_value() && quantizer->token; };
  return in_vectors(gate) && is_of_rows(quantizers.product, gate) && !live(quantizers.gate) &&
         !live(quantizers.activation) && !live(quantizers.up);
}

RowPlan plan_for(const at::Tensor& gate, const GluQuantizers& quantizers, bool backward) {
  const bool inner = quantizers.gate || quantizers.activation || quantizers.up;
  RowPlan plan =
      make_glu_plan(rows_of(gate), vectors_of_row(gate), inner, backward, multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

/// The four quantizers of a call.
struct DeviceQuantizers {
  DeviceRowQuantizer gate, activation, up, product;

  /// needs: of the operator.
  explicit DeviceQuantizers(const GluQuantizers& checked, const std::array<bool, 10>& needs = {})
      : gate(checked.gate, needs[2], needs[3]),
        activation(checked.activation, needs[4], needs[5]),
        up(checked.up, needs[6], needs[7]),
        product(checked.product, needs[8], needs[9]) {}

  template <class P>
  GluRowQuantizers<P> pointers() const {
    return {gate.pointers<P>(), activation.pointers<P>(), up.pointers<P>(), product.pointers<P>()};
  }

  at::Tensor range_like(const at::Tensor& x) const {
    for (const DeviceRowQuantizer* one : {&gate, &activation, &up}) {
      if (one->exists()) return one->range_like(x);
    }
    return product.range_like(x);
  }
};

bool is_tanh(int64_t activation) {
  return activation == static_cast<int64_t>(GluActivation::kGeluTanh);
}

at::Tensor quantized_glu(const at::Tensor& given_gate, const at::Tensor& given_up,
                         int64_t activation, const QuantizerArguments& of_gate,
                         const QuantizerArguments& of_activation, const QuantizerArguments& of_up,
                         const QuantizerArguments& of_product) {
  const auto checked = check_quantized_glu(given_gate, given_up, activation, of_gate, of_activation,
                                           of_up, of_product);
  const c10::cuda::CUDAGuard guard(given_gate.device());
  if (!has_kernel(given_gate, checked)) {
    return quantized_glu_composite(given_gate, given_up, activation, of_gate, of_activation, of_up,
                                   of_product);
  }
  const at::Tensor gate = aligned_rows(given_gate), up = aligned_rows(given_up);
  at::Tensor out = at::empty(gate.sizes(), gate.options());
  const DeviceQuantizers quantizers(checked);
  dispatch_types(gate, quantizers.range_like(gate), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_glu_forward<S, P>(plan_for(gate, checked, false), quantizers.pointers<P>(),
                             is_tanh(activation), input<S>(gate), input<S>(up), output<S>(out),
                             at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

GluGradients quantized_glu_backward(const at::Tensor& grad, const at::Tensor& given_gate,
                                    const at::Tensor& given_up, int64_t activation,
                                    const QuantizerArguments& of_gate,
                                    const QuantizerArguments& of_activation,
                                    const QuantizerArguments& of_up,
                                    const QuantizerArguments& of_product,
                                    std::array<bool, 10> needs) {
  const auto checked = check_quantized_glu_backward(grad, given_gate, given_up, activation, of_gate,
                                                    of_activation, of_up, of_product);
  const c10::cuda::CUDAGuard guard(given_gate.device());
  if (!has_kernel(given_gate, checked)) {
    return quantized_glu_backward_composite(grad, given_gate, given_up, activation, of_gate,
                                            of_activation, of_up, of_product, needs);
  }
  const at::Tensor gate = aligned_rows(given_gate), up = aligned_rows(given_up);
  const at::Tensor upstream = aligned_rows(grad);
  at::Tensor dgate = empty_if(needs[0], gate), dup = empty_if(needs[1], up);
  const DeviceQuantizers quantizers(checked, needs);
  const bool sums = std::any_of(needs.begin() + 2, needs.end(), [](bool needed) { return needed; });
  const RowPlan plan = plan_for(gate, checked, true);
  const at::Tensor workspace = workspace_if(sums, 12 * plan.blocks, gate);
  dispatch_types(gate, quantizers.range_like(gate), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    launch_glu_backward<S, P>(plan, quantizers.pointers<P>(), is_tanh(activation),
                              input<S>(upstream), input<S>(gate), input<S>(up), output<S>(dgate),
                              output<S>(dup), output<double>(workspace),
                              at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto& [g, a, u, p] = quantizers;
  return {dgate, dup, g.first, g.second, a.first, a.second, u.first, u.second, p.first, p.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_glu", flat<quantized_glu>);
  m.impl("_quantized_glu_backward", flat<quantized_glu_backward>);
}

}  // namespace asymq::cuda
