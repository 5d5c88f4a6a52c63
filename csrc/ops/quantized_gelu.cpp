#include "ops/quantized_gelu.h"

#include <torch/library.h>

#include "asymq/quantized_gelu.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kGelu = "quantized_gelu";

}  // namespace

QuantizerPair check_quantized_gelu(const at::Tensor& x, const QuantizerArguments& input,
                                   const QuantizerArguments& output) {
  check_elements({kGelu}, "x", x);
  return check_quantizers(kGelu, "x", x, "input's ", input, "output's ", output);
}

QuantizerPair check_quantized_gelu_backward(const at::Tensor& grad, const at::Tensor& x,
                                            const QuantizerArguments& input,
                                            const QuantizerArguments& output) {
  check_grad({kGelu}, "x", grad, x);
  return check_quantized_gelu(x, input, output);
}

at::Tensor quantized_gelu(const at::Tensor& x, const RangeArguments& input_range,
                          const RangeArguments& output_range) {
  return quantized_gelu_op(x, by_position(kGelu, input_range), by_position(kGelu, output_range));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_gelu", flat<quantized_gelu>);
}

}  // namespace asymq
