// Attention whose scores and probabilities are quantized and never in memory.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/softmax.h"
#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionRows = 64;  // of a block: 16 a warp

/// [batch, heads, tokens, width] with elements of a token side by side, at addresses and strides
/// of 16 bytes.
template <class S>
struct Heads {
  S* data;
  int64_t batch, head, token;  ///< strides

  ASYMQ_HOST_DEVICE S* at(int64_t of_batch, int64_t of_head) const {
    return data + of_batch * batch + of_head * head;
  }
};

template <class S>
struct AttentionOperands {
  detail::AttentionShape shape;
  int key_heads, width;
  float scaling;
  detail::AttentionMask<float> mask;
  QuantizerPointers<Compute<S>> scores_quantizer, probabilities_quantizer;
  Heads<const S> query, key, value;

  /// Blocks that share out so many tokens of so many heads.
  int64_t blocks(int64_t tokens, int64_t heads) const {
    return ceil_div(tokens, kAttentionRows) * shape.batch * heads;
  }
};

/// Whether the current device has kernels for heads of this width, both ways.
template <class S>
bool has_attention_kernel(int64_t width);

/// statistics [rows, 2]: of each row the largest masked score and the sum of exponentials.
template <class S>
void launch_attention_forward(const AttentionOperands<S>& operands, const Heads<S>& out,
                              float* statistics, cudaStream_t stream);

/// What the backward reads of the forward, what comes to it, and what it leaves; dquery and the
/// two of the keys are null where not wanted.
template <class S>
struct AttentionGradients {
  Heads<const S> grad, out;
  const float* statistics;
  float* dots;        ///< [rows]: of each row Σ p · dL/dp
  double* workspace;  ///< 6 a block of the queries
  Heads<S> dquery, dkey, dvalue;
};

template <class S>
void launch_attention_backward(const AttentionOperands<S>& operands,
                               const AttentionGradients<S>& gradients, bool overlaps,
                               cudaStream_t stream);

}  // namespace asymq::cuda
