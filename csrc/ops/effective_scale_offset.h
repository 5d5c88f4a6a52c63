// The private operator behind effective_scale_offset.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// Scale and offset, the latter without meaning where the parameterization is symmetric.
inline constexpr Op<"asymq::_effective_scale_offset",
                    std::tuple<at::Tensor, at::Tensor>(const GranularQuantizer& quantizer)>
    effective_scale_offset_op;

QuantizerKind check_effective_scale_offset(const GranularQuantizer& quantizer);

}  // namespace asymq
