// The gated linear unit of decoders' MLPs between learnable quantizers.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// product(activation(act(gate(g))) · up(u)): a gated linear unit (Shazeer 2020) whose operands,
/// activation and product are quantized, each on its range or, without one, not at all.
///
/// g, u [..., D]: float32, float64, bfloat16 or float16, of one shape and dtype, any strides.
/// activation: "silu", or "gelu_tanh" for GELU's tanh approximation. The arithmetic is in float32
/// (float64 for float64 tensors), every step rounded to the tensors' dtype as single operations
/// round it. The result is contiguous. On CUDA one kernel each way, where D is a multiple of 16
/// bytes, the product's range is none, one, or that of the whole token, and there are no others.
///
/// The backward saves g and u alone. Gradients are those of the composition, for both and the
/// ranges' learned parameters.
at::Tensor quantized_glu(const at::Tensor& gate, const at::Tensor& up,
                         const std::optional<RangeArguments>& product_range,
                         std::string_view activation = "silu",
                         const std::optional<RangeArguments>& gate_range = std::nullopt,
                         const std::optional<RangeArguments>& activation_range = std::nullopt,
                         const std::optional<RangeArguments>& up_range = std::nullopt);

}  // namespace asymq

#pragma GCC visibility pop
