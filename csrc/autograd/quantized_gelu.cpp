// Differentiation of the private quantized-GELU operator.
#include "ops/quantized_gelu.h"

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "autograd/kept_quantizer.h"

namespace asymq {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class QuantizedGelu : public torch::autograd::Function<QuantizedGelu> {
 public:
  static constexpr bool is_traceable = true;

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, at::TensorList input_ranges,
                            at::TensorList output_ranges, const QuantizerArguments& of_input,
                            const QuantizerArguments& of_output) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{x};
    saved.insert(saved.end(), input_ranges.begin(), input_ranges.end());
    saved.insert(saved.end(), output_ranges.begin(), output_ranges.end());
    ctx->save_for_backward(saved);
    keep(ctx, "input", of_input);
    keep(ctx, "output", of_output);
    return quantized_gelu_op(x, of_input, of_output);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const QuantizerArguments of_input = kept(ctx, "input", saved, 1);
    const size_t count = of_input.ranges.size();
    const QuantizerArguments of_output = kept(ctx, "output", saved, 1 + count);
    variable_list result(1 + count + of_output.ranges.size() + 2);
    if (!grads[0].defined()) return result;
    const auto i = needed(ctx, of_input, 1), o = needed(ctx, of_output, 1 + count);
    const auto [dx, i_first, i_second, o_first, o_second] =
        quantized_gelu_backward_op(grads[0], saved[0], of_input, of_output,
                                   {ctx->needs_input_grad(0), i[0], i[1], o[0], o[1]});
    result[0] = dx;
    result[1] = i_first;
    if (i[1]) result[2] = i_second;
    result[1 + count] = o_first;
    if (o[1]) result[2 + count] = o_second;
    return result;
  }
};

at::Tensor quantized_gelu_autograd(const at::Tensor& x, at::TensorList input_ranges,
                                   int64_t input_parameterization, int64_t input_bits,
                                   double input_eps, at::TensorList output_ranges,
                                   int64_t output_parameterization, int64_t output_bits,
                                   double output_eps) {
  const QuantizerArguments of_input{input_ranges, input_parameterization, input_bits, input_eps};
  const QuantizerArguments of_output{output_ranges, output_parameterization, output_bits,
                                     output_eps};
  // Before anything is recorded for the backward.
  const auto pair = check_quantized_gelu(x, of_input, of_output);
  check_constants("quantized_gelu", input_parameterization, pair.before.ranges);
  check_constants("quantized_gelu", output_parameterization, pair.after.ranges);
  return QuantizedGelu::apply(x, input_ranges, output_ranges, of_input, of_output);
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, Autograd, m) {
  m.impl("_quantized_gelu", quantized_gelu_autograd);
  // Without this a second derivative would silently be 0.
  m.impl("_quantized_gelu_backward", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace asymq
