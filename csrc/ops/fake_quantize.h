// The private operators that all fake-quantize functions become.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <tuple>

#include "ops/checks.h"
#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

inline constexpr Op<"asymq::_fake_quantize",
                    at::Tensor(const at::Tensor& x, const GranularQuantizer& quantizer)>
    fake_quantize_op;

/// dL/dx, then the gradients of first and second.
inline constexpr Op<"asymq::_fake_quantize_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& x,
                        const GranularQuantizer& quantizer, std::array<bool, 3> needs)>
    fake_quantize_backward_op;

QuantizerKind check_fake_quantize(const at::Tensor& x, const GranularQuantizer& quantizer);

/// The same, and of the upstream gradient.
QuantizerKind check_fake_quantize_backward(const at::Tensor& grad, const at::Tensor& x,
                                           const GranularQuantizer& quantizer);

}  // namespace asymq
