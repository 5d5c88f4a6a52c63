// The quantized gated linear unit.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

constexpr int kGluVectors = 4;  // of a thread at a time

inline RowPlan make_glu_plan(int64_t rows, int64_t vectors, bool backward, int multiprocessors) {
  return make_row_plan(rows, vectors, kGluVectors, backward ? 512 : 768, multiprocessors);
}

/// gate, up and out are contiguous and aligned. tanh: the activation is GELU's tanh approximation,
/// else SiLU.
template <class S, class P>
void launch_glu_forward(const RowPlan& plan, const RowQuantizer<P>& product, bool tanh,
                        const S* gate, const S* up, S* out, cudaStream_t stream);

/// dgate and dup are null where not wanted. `workspace` holds 3 · plan.blocks doubles where the
/// range learns.
template <class S, class P>
void launch_glu_backward(const RowPlan& plan, const RowQuantizer<P>& product, bool tanh,
                         const S* grad, const S* gate, const S* up, S* dgate, S* dup,
                         double* workspace, cudaStream_t stream);

}  // namespace asymq::cuda
