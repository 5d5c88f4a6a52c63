// Element by element, without gradient: quantize, dequantize, effective scale and offset.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/layout.h"

namespace asymq::cuda {

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
