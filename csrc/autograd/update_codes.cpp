// Whoever keeps codes for a backward pass is told when they have become others, as by torch's own
// in-place operations.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(asymq, ADInplaceOrView, m) {
  m.impl("update_codes_", torch::autograd::autogradNotImplementedInplaceOrViewFallback());
}
