// Element by element, without gradient: quantize, dequantize, effective scale and offset.
#include "device.cuh"
#include "kernels.h"

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
    const auto effective = effective_scale_offset(kind, ranges.load(place.range));
    codes[place.out] = static_cast<Code>(quantize_element(
        static_cast<T>(widen(x[place.x])), static_cast<T>(effective.scale),
        static_cast<T>(round_half_even(effective.offset)), limits.first, limits.last));
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

template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const float*, uint8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __half*, uint8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __nv_bfloat16*, uint8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const double*, uint8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                              const double*, uint8_t*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                                const uint8_t*, float*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                                const uint8_t*, double*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const float*, int8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __half*, int8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __nv_bfloat16*, int8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const double*, int8_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                              const double*, int8_t*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                                const int8_t*, float*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                                const int8_t*, double*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const float*, int16_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __half*, int16_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __nv_bfloat16*, int16_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const double*, int16_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                              const double*, int16_t*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                                const int16_t*, float*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                                const int16_t*, double*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const float*, int32_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __half*, int32_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const __nv_bfloat16*, int32_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                              const double*, int32_t*, cudaStream_t);
template void launch_quantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                              const double*, int32_t*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<float>&,
                                const int32_t*, float*, cudaStream_t);
template void launch_dequantize(const Layout&, const QuantizerKind&, const RangePointers<double>&,
                                const int32_t*, double*, cudaStream_t);
template void launch_effective_scale_offset(int64_t, const QuantizerKind&,
                                            const RangePointers<float>&, float*, float*,
                                            cudaStream_t);
template void launch_effective_scale_offset(int64_t, const QuantizerKind&,
                                            const RangePointers<double>&, double*, double*,
                                            cudaStream_t);

}  // namespace asymq::cuda
