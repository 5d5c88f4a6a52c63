// Whoever keeps codes for a backward pass is told when they have become others, as by torch's own
// in-place operations.
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include "asymq/fake_quantize.h"

namespace asymq {
namespace {

at::Tensor update_codes_and_version(const at::Tensor& codes, const at::Tensor& x,
                                    const at::Tensor& scale,
                                    const std::optional<at::Tensor>& offset, int64_t bits,
                                    double eps, bool full_range) {
  const at::AutoDispatchBelowADInplaceOrView below;
  at::Tensor changed = update_codes_(codes, x, scale, offset, bits, eps, full_range);
  codes.unsafeGetTensorImpl()->bump_version();
  return changed;
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, ADInplaceOrView, m) { m.impl("update_codes_", update_codes_and_version); }

}  // namespace asymq
