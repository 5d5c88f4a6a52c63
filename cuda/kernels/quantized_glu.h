// The quantized gated linear unit.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/plan.h"
#include "kernels/quantizer.h"

namespace asymq::cuda {

/// The quantizers of the two operands and of the activation, each with one range or none, and that
/// of the product.
template <class P>
struct GluRowQuantizers {
  RowQuantizer<P> gate, activation, up, product;

  /// Whether any but the product's exists.
  __host__ __device__ bool inner() const {
    return gate.ends != Ends::kNone || activation.ends != Ends::kNone || up.ends != Ends::kNone;
  }
};

/// Vectors of a row that a thread has at a time. kInner: there are quantizers before the product.
template <bool kInner>
constexpr int kGluVectors = kInner ? 2 : 4;

inline RowPlan make_glu_plan(int64_t rows, int64_t vectors, bool inner, bool backward,
                             int multiprocessors) {
  const int held = inner ? kGluVectors<true> : kGluVectors<false>;
  return make_row_plan(rows, vectors, held, backward ? 512 : 768, multiprocessors);
}

/// gate, up and out are contiguous and aligned. tanh: the activation is GELU's tanh approximation,
/// else SiLU.
template <class S, class P>
void launch_glu_forward(const RowPlan& plan, const GluRowQuantizers<P>& quantizers, bool tanh,
                        const S* gate, const S* up, S* out, cudaStream_t stream);

/// dgate and dup are null where not wanted. `workspace` holds 12 · plan.blocks doubles where any
/// range learns.
template <class S, class P>
void launch_glu_backward(const RowPlan& plan, const GluRowQuantizers<P>& quantizers, bool tanh,
                         const S* grad, const S* gate, const S* up, S* dgate, S* dup,
                         double* workspace, cudaStream_t stream);

}  // namespace asymq::cuda
