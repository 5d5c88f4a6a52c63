// Element by element, without gradient: quantize, dequantize, effective scale and offset.
#include "kernels/device.cuh"
#include "kernels/quantize.h"

namespace asymq::cuda {
namespace {

using detail::Layout;
using detail::RangePointers;

constexpr int kThreads = 256;

unsigned blocks_for(int64_t count) {
  return static_cast<unsigned>(std::min<int64_t>(ceil_div(count, kThreads), 1 << 20));
}

template <class S, class P, class Code>
__global__ void quantize_kernel(Layout layout, QuantizerKind kind, RangePointers<P> ranges,
                                const S* __restrict__ x, Code* __restrict__ codes) {
  using T = Compute<S>;
  const CodeRange<T> limits = code_range<T>(kind);
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < layout.numel; i += stride) {
    const Place place = place_of(layout, i);
    const auto grid = make_grid<T>(kind, ranges.load(place.range));
    codes[place.out] =
        static_cast<Code>(quantize_element(widen(x[place.x]), grid, limits.first, limits.last));
  }
}

template <class P, class Code>
__global__ void dequantize_kernel(Layout layout, QuantizerKind kind, RangePointers<P> ranges,
                                  const Code* __restrict__ codes, P* __restrict__ out) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < layout.numel; i += stride) {
    const Place place = place_of(layout, i);
    const auto effective = effective_scale_offset(kind, ranges.load(place.range));
    out[place.out] = dequantize_element(static_cast<P>(codes[place.x]), effective.scale,
                                        round_half_even(effective.offset));
  }
}

template <class P>
__global__ void effective_scale_offset_kernel(int64_t count, QuantizerKind kind,
                                              RangePointers<P> ranges, P* __restrict__ scale,
                                              P* __restrict__ offset) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count; i += stride) {
    const auto effective = effective_scale_offset(kind, ranges.load(i));
    scale[i] = effective.scale;
    offset[i] = effective.offset;
  }
}

}  // namespace

template <class S, class P, class Code>
void launch_quantize(const Layout& layout, const QuantizerKind& kind,
                     const RangePointers<P>& ranges, const S* x, Code* codes, cudaStream_t stream) {
  quantize_kernel<<<blocks_for(layout.numel), kThreads, 0, stream>>>(layout, kind, ranges, x,
                                                                     codes);
}

template <class P, class Code>
void launch_dequantize(const Layout& layout, const QuantizerKind& kind,
                       const RangePointers<P>& ranges, const Code* codes, P* out,
                       cudaStream_t stream) {
  dequantize_kernel<<<blocks_for(layout.numel), kThreads, 0, stream>>>(layout, kind, ranges, codes,
                                                                       out);
}

template <class P>
void launch_effective_scale_offset(int64_t count, const QuantizerKind& kind,
                                   const RangePointers<P>& ranges, P* scale, P* offset,
                                   cudaStream_t stream) {
  effective_scale_offset_kernel<<<blocks_for(count), kThreads, 0, stream>>>(count, kind, ranges,
                                                                            scale, offset);
}

#define ASYMQ_INSTANTIATE(Code, S, P)                                                         \
  template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<P>&, \
                                const S*, Code*, cudaStream_t);
#define ASYMQ_INSTANTIATE_CODES(S, P) ASYMQ_FOR_EACH_CODE_TYPE(ASYMQ_INSTANTIATE, S, P)
ASYMQ_FOR_EACH_TYPE(ASYMQ_INSTANTIATE_CODES)
#undef ASYMQ_INSTANTIATE_CODES
#undef ASYMQ_INSTANTIATE

#define ASYMQ_INSTANTIATE(Code, P)                                                              \
  template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<P>&, \
                                  const Code*, P*, cudaStream_t);
#define ASYMQ_INSTANTIATE_CODES(P) ASYMQ_FOR_EACH_CODE_TYPE(ASYMQ_INSTANTIATE, P)
ASYMQ_FOR_EACH_RANGE_TYPE(ASYMQ_INSTANTIATE_CODES)
#undef ASYMQ_INSTANTIATE_CODES
#undef ASYMQ_INSTANTIATE

#define ASYMQ_INSTANTIATE(P)                                                 \
  template void launch_effective_scale_offset(int64_t, const QuantizerKind&, \
                                              const RangePointers<P>&, P*, P*, cudaStream_t);
ASYMQ_FOR_EACH_RANGE_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
