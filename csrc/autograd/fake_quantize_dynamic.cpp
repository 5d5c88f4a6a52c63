// Differentiation of the private operator of live ranges.
#include "ops/fake_quantize_dynamic.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/saved.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class FakeQuantizeDynamic : public torch::autograd::Function<FakeQuantizeDynamic> {
 public:
  static constexpr bool is_traceable = true;

  /// The tensors are those of the quantizer, for autograd to see.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& first,
                            const OptionalTensor& second, const LiveQuantizer& quantizer) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, first, second.value_or(at::Tensor())});
    ctx->saved_data["group"] = quantizer.group;
    save_kind(ctx, quantizer.kind);
    ctx->saved_data["token"] = quantizer.token;
    return fake_quantize_dynamic_op(x, quantizer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(4);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const OptionalTensor second = saved[2].defined() ? OptionalTensor(saved[2]) : std::nullopt;
    const std::array<bool, 3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    second.has_value() && ctx->needs_input_grad(2)};
    std::tie(result[0], result[1], result[2]) = fake_quantize_dynamic_backward_op(
        grads[0], saved[0],
        {saved[1], second, ctx->saved_data["group"].toOptional<int64_t>(), saved_kind(ctx),
         ctx->saved_data["token"].toBool()},
        needs);
    return result;
  }
};

at::Tensor fake_quantize_dynamic_autograd(const at::Tensor& x, const LiveQuantizer& quantizer) {
  check_transforms({"fake_quantize_dynamic_", traits_of(quantizer.kind.parameterization).name});
  return FakeQuantizeDynamic::apply(x, quantizer.first, quantizer.second, quantizer);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_fake_quantize_dynamic", flat<fake_quantize_dynamic_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_fake_quantize_dynamic_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
