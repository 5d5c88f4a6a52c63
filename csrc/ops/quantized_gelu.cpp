#include "ops/quantized_gelu.h"

#include <torch/library.h>

#include "asymq/quantized_gelu.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kOp = "quantized_gelu";

}  // namespace

QuantizerPair check_quantized_gelu(const at::Tensor& x, const QuantizerArguments& input,
                                   const QuantizerArguments& output) {
  check_elements({kOp}, "x", x);
  return check_quantizers(kOp, "x", x, "input's ", input, "output's ", output);
}

QuantizerPair check_quantized_gelu_backward(const at::Tensor& grad, const at::Tensor& x,
                                            const QuantizerArguments& input,
                                            const QuantizerArguments& output) {
  check_grad({kOp}, "x", grad, x);
  return check_quantized_gelu(x, input, output);
}

at::Tensor quantized_gelu(const at::Tensor& x, const RangeArguments& input_range,
                          const RangeArguments& output_range) {
  return quantized_gelu_op(x, by_position(kOp, input_range), by_position(kOp, output_range));
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("quantized_gelu", flat<quantized_gelu>);
}

}  // namespace asymq
