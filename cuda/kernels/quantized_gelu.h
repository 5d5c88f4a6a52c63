// Quantized GELU.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

/// x and out are dense, in one order of memory, and `plan` is that of one range over all of them:
/// spans of a row.
template <class S, class P>
void launch_gelu_forward(const Plan& plan, const QuantizerPointers<P>& input,
                         const QuantizerPointers<P>& output, const S* x, S* out,
                         cudaStream_t stream);

/// dx is null where not wanted. `workspace` holds 6 · plan.blocks doubles; it may be null where no
/// range gradients are wanted.
template <class S, class P>
void launch_gelu_backward(const Plan& plan, const QuantizerPointers<P>& input,
                          const QuantizerPointers<P>& output, const S* grad, const S* x, S* dx,
                          double* workspace, cudaStream_t stream);

}  // namespace asymq::cuda
