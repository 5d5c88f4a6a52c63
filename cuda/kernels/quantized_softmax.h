// Quantized softmax.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/softmax.h"
#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

/// Operands of a quantized softmax and its backward.
template <class S, class P>
struct SoftmaxOperands {
  detail::AttentionShape shape;
  detail::AttentionMask<Compute<S>> mask;
  QuantizerPointers<P> scores_quantizer, probabilities_quantizer;
  const S* scores;
};

/// statistics [rows, 2]: of each row the largest masked score and the sum of exponentials.
template <class S, class P>
void launch_softmax_forward(const SoftmaxPlan& plan, const SoftmaxOperands<S, P>& operands, S* out,
                            Compute<S>* statistics, cudaStream_t stream);

/// dscores is null where not wanted. `workspace` holds 6 · plan.blocks doubles; it may be null
/// where no range gradients are wanted.
template <class S, class P>
void launch_softmax_backward(const SoftmaxPlan& plan, const SoftmaxOperands<S, P>& operands,
                             const S* grad, const Compute<S>* statistics, S* dscores,
                             double* workspace, cudaStream_t stream);

}  // namespace asymq::cuda
