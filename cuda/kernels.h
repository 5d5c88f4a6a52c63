// Launchers of the CUDA kernels: device pointers and a stream, no torch. S is the type of the
// elements (float, double, __half, __nv_bfloat16), P that of the ranges (float, or double where S
// is double).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "asymq/detail/layout.h"
#include "asymq/detail/softmax.h"
#include "plan.h"

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

/// A quantizer with one range, of a kernel that does more than quantize.
template <class P>
struct QuantizerPointers {
  QuantizerKind kind;
  detail::RangePointers<P> ranges;
  P* first = nullptr;  ///< backward: gradients of the learned parameters; null where not wanted
  P* second = nullptr;
};

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

/// Operands of a quantized cross-entropy and its backward.
template <class S>
struct CrossEntropyOperands {
  int64_t rows;
  int classes;
  bool vectorized;  ///< 16-byte accesses: the first rows of all tensors are aligned to them
  int64_t ignore_index;
  const int64_t* labels;  ///< [rows]
  const S* logits;        ///< [rows, classes]

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

template <class S, class P, class Code>
void launch_quantize(const detail::Layout& layout, const QuantizerKind& kind,
                     const detail::RangePointers<P>& ranges, const S* x, Code* codes,
                     cudaStream_t stream);

template <class P, class Code>
void launch_dequantize(const detail::Layout& layout, const QuantizerKind& kind,
                       const detail::RangePointers<P>& ranges, const Code* codes, P* out,
                       cudaStream_t stream);

template <class P>
void launch_effective_scale_offset(int64_t count, const QuantizerKind& kind,
                                   const detail::RangePointers<P>& ranges, P* scale, P* offset,
                                   cudaStream_t stream);

}  // namespace asymq::cuda
