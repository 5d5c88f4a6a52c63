// Differentiation of the private fake-quantize operator.
#include "ops/fake_quantize.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "autograd/saved.h"

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

  /// The tensors are those of the quantizer's ranges, for autograd to see.
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const at::Tensor& first,
                            const OptionalTensor& second, const OptionalTensor& min,
                            const OptionalTensor& max, const GranularQuantizer& quantizer) {
    // The call below shall reach a kernel, not this function again.
    const at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({x, first, second.value_or(at::Tensor()), min.value_or(at::Tensor()),
                            max.value_or(at::Tensor())});
    save_kind(ctx, quantizer.kind);
    return fake_quantize_op(x, quantizer);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    variable_list result(6);
    if (!grads[0].defined()) return result;
    const auto saved = ctx->get_saved_variables();
    const auto second = present(saved[2]), min = present(saved[3]), max = present(saved[4]);
    const std::array<bool, 3> needs{ctx->needs_input_grad(0), ctx->needs_input_grad(1),
                                    second.has_value() && ctx->needs_input_grad(2)};
    std::tie(result[0], result[1], result[2]) = fake_quantize_backward_op(
        grads[0], saved[0], {{saved[1], second, min, max}, saved_kind(ctx)}, needs);
    return result;
  }
};

at::Tensor fake_quantize_autograd(const at::Tensor& x, const GranularQuantizer& quantizer) {
  const Where where{"fake_quantize_", traits_of(quantizer.kind.parameterization).name};
  check_transforms(where);
  check_constants(where, quantizer.ranges);
  const auto& [first, second, min, max] = quantizer.ranges;
  return FakeQuantize::apply(x, first, second, min, max, quantizer);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_fake_quantize", flat<fake_quantize_autograd>);
  // Without this a second derivative would silently be 0.
  m.impl("_fake_quantize_backward", torch::autograd::autogradNotImplementedFallback());
  for (const char* op : {"quantize", "dequantize", "_effective_scale_offset"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace asymq
