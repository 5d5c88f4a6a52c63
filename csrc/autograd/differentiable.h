// What can be differentiated at all.
#pragma once

#include <ATen/FuncTorchTLS.h>

#include "ops/checks.h"

namespace asymq {

/// Throws where a constant of the parameterization asks for a gradient.
inline void check_constants(const Where& where, const RangeTensors& ranges) {
  const auto check = [&](const char* name, const OptionalTensor& tensor) {
    TORCH_CHECK(!tensor.has_value() || !tensor->requires_grad(), where, ": ", name,
                " must not require grad: it is a constant of this parameterization");
  };
  check("min", ranges.min);
  check("max", ranges.max);
}

/// Throws within torch.func's transforms, which do not see what a C++ autograd function does.
inline void check_transforms(const Where& where) {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (transforms == nullptr) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK(false, where,
                ": torch.func cannot differentiate this operator: give a model plain PyTorch by "
                "asymq.use_functions(\"reference\"), call asymq.reference.fake_quantize_*, or take "
                "torch.autograd.grad");
  }
}

}  // namespace asymq
