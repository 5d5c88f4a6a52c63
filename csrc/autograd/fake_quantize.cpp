// Differentiation of the private fake-quantize operator.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/arguments.h"
#include "ops/fake_quantize.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

OptionalTensor present(const at::Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

class FakeQuantize : public torch::autograd::Function<FakeQuantize> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& first,
                            const OptionalTensor& second, const OptionalTensor& min,
                            const OptionalTensor& max, int64_t parameterization, int64_t bits,
                            double eps) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, first, second.value_or(at::Tensor()), min.value_or(at::Tensor()),
                            max.value_or(at::Tensor())});
    ctx->saved_data["parameterization"] = parameterization;
    ctx->saved_data["bits"] = bits;
    ctx->saved_data["eps"] = eps;
    return fake_quantize_op(x, first, second, min, max, parameterization, bits, eps);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(8);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto second = present(saved[2]);
    const std::array<bool, 3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    second.has_value() && ctx->needs_input_grad(2)};
    std::tie(result[0], result[1], result[2]) = fake_quantize_backward_op(
        grads[0], saved[0], saved[1], second, present(saved[3]), present(saved[4]),
        ctx->saved_data["parameterization"].toInt(), ctx->saved_data["bits"].toInt(),
        ctx->saved_data["eps"].toDouble(), needs);
    return result;
  }
};

at::Tensor fake_quantize_autograd(const at::Tensor& x, const at::Tensor& first,
                                  const OptionalTensor& second, const OptionalTensor& min,
                                  const OptionalTensor& max, int64_t parameterization, int64_t bits,
                                  double eps) {
  const Traits& traits = traits_of(parameterization);
  const auto check_constant = [&](const char* name, const OptionalTensor& tensor) {
    TORCH_CHECK(!tensor.has_value() || !tensor->requires_grad(), "asymq::fake_quantize_",
                traits.name, ": ", name,
                " must not require grad: it is a constant of this parameterization");
  };
  check_constant("min", min);
  check_constant("max", max);
  return FakeQuantize::apply(x, first, second, min, max, parameterization, bits, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_fake_quantize", fake_quantize_autograd);
  // Without this a second derivative would silently be 0.
  m.impl("_fake_quantize_backward", torch::autograd::autogradNotImplementedFallback());
  for (const char* op : {"quantize", "dequantize", "_effective_scale_offset"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace asymq
