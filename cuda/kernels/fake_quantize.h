// Fake-quantize. Launchers take device pointers and a stream; S and P are the types of types.h.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/layout.h"
#include "kernels/plan.h"

namespace asymq::cuda {

template <class S, class P>
void launch_forward(const Plan& plan, const detail::Layout& layout, const QuantizerKind& kind,
                    const detail::RangePointers<P>& ranges, const S* x, S* out,
                    cudaStream_t stream);

/// dx is null where not wanted. `first` and `second` receive the gradients of the learned
/// parameters; both are null where no sums are wanted, one where that parameter's is not.
/// `workspace` holds 3 · layout.ranges · partial_sums(plan).count() doubles; it is not used, and
/// may be null, where that count is 1 or no sums are wanted.
template <class S, class P>
void launch_backward(const Plan& plan, const detail::Layout& layout, const QuantizerKind& kind,
                     const detail::RangePointers<P>& ranges, const S* grad, const S* x, S* dx,
                     P* first, P* second, double* workspace, cudaStream_t stream);

}  // namespace asymq::cuda
