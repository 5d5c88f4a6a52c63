// Quantized RMSNorm.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"
#include "kernels/types.h"

namespace asymq::cuda {

constexpr int kRmsNormVectors = 4;  // of a thread

/// The largest number of vectors of a row.
constexpr int64_t kMostRmsNormVectors = kRmsNormVectors * kTeamThreads;

/// Rows of `vectors` vectors; only rows that a team holds at once.
inline RowPlan make_rms_norm_plan(int64_t rows, int64_t vectors, bool backward,
                                  int multiprocessors) {
  return make_row_plan(rows, vectors, kRmsNormVectors, backward ? 512 : 1024, multiprocessors);
}

/// x, weight and out are contiguous and aligned. statistics receives 1 / sqrt(mean square + eps) of
/// each row.
template <class S, class P>
void launch_rms_norm_forward(const RowPlan& plan, const RowQuantizer<P>& output, const S* x,
                             const S* weight, double eps, S* out, Compute<S>* statistics,
                             cudaStream_t stream);

/// dx and dweight are null where not wanted. `workspace` holds 3 · plan.blocks doubles where the
/// range learns, weight_sums plan.entries() rows where dweight is wanted.
template <class S, class P>
void launch_rms_norm_backward(const RowPlan& plan, const RowQuantizer<P>& output, const S* grad,
                              const S* x, const S* weight, const Compute<S>* statistics, S* dx,
                              S* dweight, double* workspace, Compute<S>* weight_sums,
                              cudaStream_t stream);

}  // namespace asymq::cuda
