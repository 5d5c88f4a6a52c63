// update_codes_: overwrites codes and counts those that change.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/layout.h"
#include "kernels/plan.h"

namespace asymq::cuda {

/// Code: a type of ASYMQ_FOR_EACH_CODE_SIZE. `changed` receives the count.
template <class S, class P, class Code>
void launch_update_codes(const Plan& plan, const detail::Layout& layout, const QuantizerKind& kind,
                         const detail::RangePointers<P>& ranges, const S* x, Code* codes,
                         int64_t* changed, cudaStream_t stream);

}  // namespace asymq::cuda
