// Quantized cross-entropy.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

/// Operands of a quantized cross-entropy and its backward.
template <class S>
struct CrossEntropyOperands {
  int64_t rows;
  int classes, columns;  ///< what is behind the classes of a row counts for nothing
  bool vectorized;       ///< 16-byte accesses: the first rows of all tensors are aligned to them
  int64_t ignore_index;
  const int64_t* labels;  ///< [rows]
  const S* logits;        ///< [rows, columns]

  ASYMQ_HOST_DEVICE bool is_class(int64_t label) const { return label >= 0 && label < classes; }
};

/// losses [rows]. statistics [rows, 2]: of each row the largest quantized logit and the logarithm
/// of the sum of exponentials; 0 where the label is ignored.
template <class S, class P>
void launch_cross_entropy_forward(const CrossEntropyOperands<S>& operands,
                                  const QuantizerPointers<P>& quantizer, Compute<S>* losses,
                                  Compute<S>* statistics, cudaStream_t stream);

/// dlogits is null where not wanted. `workspace` holds 3 · rows doubles; it may be null where no
/// range gradients are wanted. overlaps: see Plan.
template <class S, class P>
void launch_cross_entropy_backward(const CrossEntropyOperands<S>& operands,
                                   const QuantizerPointers<P>& quantizer, const Compute<S>* grad,
                                   const Compute<S>* statistics, S* dlogits, double* workspace,
                                   bool overlaps, cudaStream_t stream);

}  // namespace asymq::cuda
