// Quantized Kullback-Leibler divergence.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

/// Operands of a quantized Kullback-Leibler divergence and its backward.
template <class S>
struct KlDivOperands {
  int64_t rows;
  int classes, columns;  ///< what is behind the classes of a row counts for nothing
  bool vectorized;       ///< 16-byte accesses: the first rows of all tensors are aligned to them
  int64_t ignore_index;
  const int64_t* labels;  ///< [rows]; null: every row counts
  Compute<S> temperature;
  const S* logits;   ///< [rows, columns]
  const S* teacher;  ///< [rows, classes], `teacher_stride` apart
  int64_t teacher_stride;

  ASYMQ_HOST_DEVICE bool ignores(int64_t row) const {
    return labels != nullptr && labels[row] == ignore_index;
  }
};

/// losses [rows]. statistics [rows, 4]: of each row the largest quantized logit and the logarithm
/// of the sum of exponentials, divided by the temperature before, and the teacher's; 0 where the
/// label is ignored.
template <class S, class P>
void launch_kl_div_forward(const KlDivOperands<S>& operands, const QuantizerPointers<P>& quantizer,
                           Compute<S>* losses, Compute<S>* statistics, cudaStream_t stream);

/// dlogits is null where not wanted. `workspace` holds 3 · rows doubles; it may be null where no
/// range gradients are wanted. overlaps: see Plan.
template <class S, class P>
void launch_kl_div_backward(const KlDivOperands<S>& operands, const QuantizerPointers<P>& quantizer,
                            const Compute<S>* grad, const Compute<S>* statistics, S* dlogits,
                            double* workspace, bool overlaps, cudaStream_t stream);

}  // namespace asymq::cuda
