// Fake-quantize on live ranges (asymq/live_range.h). Launchers take device pointers and a stream; S
// and P are the types of types.h. Tensors of elements are groups, one after another.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/live_range.h"
#include "kernels/plan.h"

namespace asymq::cuda {

/// Group i has the factors first[i % plan.factors] and second[i % plan.factors]; second is null
/// where the parameterization has none.
template <class P>
struct LiveFactors {
  QuantizerKind kind;
  bool token;
  const P* first;
  const P* second;
};

/// `workspace` holds plan.extrema() doubles.
template <class S, class P>
void launch_dynamic_forward(const DynamicPlan& plan, const LiveFactors<P>& factors, const S* x,
                            S* out, double* workspace, cudaStream_t stream);

/// dx is null where not wanted. `first` and `second` receive the gradients of the factors; both are
/// null where no sums are wanted, one where that factor's is not. `workspace` holds plan.extrema()
/// doubles and, with sums, plan.sums() more.
template <class S, class P>
void launch_dynamic_backward(const DynamicPlan& plan, const LiveFactors<P>& factors, const S* grad,
                             const S* x, S* dx, P* first, P* second, double* workspace,
                             cudaStream_t stream);

}  // namespace asymq::cuda
