// The quantized gated linear unit of single operations: what every device runs that has no kernel
// of its own for it, and what tracing looks at.
#include "ops/quantized_glu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "composite/quantizer.h"

namespace asymq {
namespace {

bool is_silu(int64_t activation) {
  return activation == static_cast<int64_t>(GluActivation::kSilu);
}

/// Calls body(piece...) of tensors that are contiguous and alike. On the CPU pieces are cut by size
/// alone: the elements that a thread has left over of a whole tensor are not computed as the others
/// are, and the bits would depend on the number of threads.
template <class Body, class... Tensors>
void for_each_piece(const Body& body, const at::Tensor& first, const Tensors&... others) {
  if (!first.device().is_cpu()) return body(first, others...);
  constexpr int64_t kPiece = 1 << 15;
  const int64_t numel = first.numel();
  at::parallel_for(0, (numel + kPiece - 1) / kPiece, 1, [&](int64_t begin, int64_t end) {
    for (int64_t start = begin * kPiece; start < std::min(end * kPiece, numel); start += kPiece) {
      const auto piece = [&](const at::Tensor& tensor) {
        return tensor.view(-1).narrow(0, start, std::min(kPiece, numel - start));
      };
      body(piece(first), piece(others)...);
    }
  });
}

/// The activation of a gate.
at::Tensor activate(const at::Tensor& gate, int64_t activation) {
  // Other threads than this one would record what happens to a tensor that requires grad.
  const at::Tensor dense = gate.detach().contiguous();
  at::Tensor result = at::empty_like(dense);
  for_each_piece(
      [&](at::Tensor to, const at::Tensor& from) {
        if (is_silu(activation)) {
          at::silu_out(to, from);
        } else {
          at::gelu_out(to, from, "tanh");
        }
      },
      result, dense);
  return result;
}

/// dL/dgate from that of its activation.
at::Tensor activate_backward(const at::Tensor& grad, const at::Tensor& gate, int64_t activation) {
  const at::Tensor dense = gate.detach().contiguous(), upstream = grad.detach().contiguous();
  at::Tensor result = at::empty_like(dense);
  for_each_piece(
      [&](at::Tensor to, const at::Tensor& of, const at::Tensor& from) {
        if (is_silu(activation)) {
          at::silu_backward_out(to, of, from);
        } else {
          at::gelu_backward_out(to, of, from, "tanh");
        }
      },
      result, upstream, dense);
  return result;
}

/// Every tensor of the forward.
struct Steps {
  at::Tensor gate, activated, activation, up, product;

  Steps(const at::Tensor& given_gate, const at::Tensor& given_up, int64_t function,
        const GluQuantizers& quantizers)
      : gate(quantize(given_gate, quantizers.gate)),
        activated(activate(gate, function)),
        activation(quantize(activated, quantizers.activation)),
        up(quantize(given_up, quantizers.up)),
        product((activation * up).contiguous()) {}
};

}  // namespace

at::Tensor quantized_glu_composite(const at::Tensor& gate, const at::Tensor& up, int64_t activation,
                                   const GluArguments& of) {
  const auto quantizers = check_quantized_glu(gate, up, activation, of);
  return quantize(Steps(gate, up, activation, quantizers).product, quantizers.product);
}

GluGradients quantized_glu_backward_composite(const at::Tensor& grad, const at::Tensor& gate,
                                              const at::Tensor& up, int64_t activation,
                                              const GluArguments& of, std::array<bool, 10> needs) {
  const auto quantizers = check_quantized_glu_backward(grad, gate, up, activation, of);
  const Steps steps(gate, up, activation, quantizers);
  const auto [dproduct, product_first, product_second] =
      quantize_backward(grad, steps.product, quantizers.product, needs[8], needs[9]);
  const auto [dup, up_first, up_second] =
      quantize_backward(dproduct * steps.activation, up, quantizers.up, needs[6], needs[7]);
  const auto [dactivated, activation_first, activation_second] = quantize_backward(
      dproduct * steps.up, steps.activated, quantizers.activation, needs[4], needs[5]);
  const auto [dgate, gate_first, gate_second] =
      quantize_backward(activate_backward(dactivated, steps.gate, activation), gate,
                        quantizers.gate, needs[2], needs[3]);
  return {needs[0] ? dgate.contiguous() : at::Tensor(),
          needs[1] ? dup.contiguous() : at::Tensor(),
          gate_first,
          gate_second,
          activation_first,
          activation_second,
          up_first,
          up_second,
          product_first,
          product_second};
}

TORCH_LIBRARY_IMPL(asymq, CompositeExplicitAutograd, m) {
  m.impl("_quantized_glu", flat<quantized_glu_composite>);
  m.impl("_quantized_glu_backward", flat<quantized_glu_backward_composite>);
}

}  // namespace asymq
