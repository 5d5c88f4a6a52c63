// Quantize, update_codes_, dequantize, effective scale and offset.
#include "ops/quantize.h"

#include "common.h"
#include "kernels/quantize.h"
#include "kernels/update_codes.h"
#include "ops/effective_scale_offset.h"

namespace asymq::cuda {
namespace {

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                    int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_quantize(x, scale, offset, bits, eps, full_range);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor codes = at::empty_like(x, x.options().dtype(code_dtype(bits, is_symmetric(kind))));
  if (x.numel() == 0) return codes;
  const detail::Layout layout = make_layout(x, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  dispatch_types(x, scale, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    dispatch_code_types(codes, [&](auto code) {
      using Code = decltype(code);
      launch_quantize<S, P, Code>(layout, kind, ranges.pointers<P>(), input<S>(x),
                                  output<Code>(codes), c10::cuda::getCurrentCUDAStream());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return codes;
}

at::Tensor update_codes_(const at::Tensor& codes, const at::Tensor& x, const at::Tensor& scale,
                         const OptionalTensor& offset, int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_update_codes(codes, x, scale, offset, bits, eps, full_range);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto count = x.options().dtype(at::kLong);
  if (x.numel() == 0) return at::zeros({}, count);
  const at::Tensor changed = at::empty({}, count);
  const at::Tensor target = match_layout(codes, x);
  const detail::Layout layout = make_layout(x, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  const Plan plan = plan_for(layout, false, x, {target});
  dispatch_types(x, scale, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    dispatch_code_types(target, [&](auto code) {
      using Code = std::make_unsigned_t<decltype(code)>;
      launch_update_codes<S, P, Code>(plan, layout, kind, ranges.pointers<P>(), input<S>(x),
                                      output<Code>(target), output<int64_t>(changed),
                                      c10::cuda::getCurrentCUDAStream());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  if (!target.is_same(codes)) codes.copy_(target);
  return changed;
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale,
                      const OptionalTensor& offset, int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_dequantize(codes, scale, offset, bits, eps, full_range);
  const c10::cuda::CUDAGuard guard(codes.device());
  at::Tensor out = at::empty_like(codes, codes.options().dtype(scale.scalar_type()));
  if (codes.numel() == 0) return out;
  const detail::Layout layout = make_layout(codes, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  dispatch_range_types(scale, [&](auto range) {
    using P = decltype(range);
    dispatch_code_types(codes, [&](auto code) {
      using Code = decltype(code);
      launch_dequantize<P, Code>(layout, kind, ranges.pointers<P>(), input<Code>(codes),
                                 output<P>(out), c10::cuda::getCurrentCUDAStream());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor> effective_scale_offset(const GranularQuantizer& quantizer) {
  const QuantizerKind kind = check_effective_scale_offset(quantizer);
  const at::Tensor& first = quantizer.ranges.first;
  const c10::cuda::CUDAGuard guard(first.device());
  at::Tensor scale = at::empty(first.sizes(), first.options());
  at::Tensor offset = at::empty(first.sizes(), first.options());
  if (first.numel() == 0) return {scale, offset};
  const ContiguousRanges ranges(quantizer.ranges);
  dispatch_range_types(first, [&](auto range) {
    using P = decltype(range);
    launch_effective_scale_offset<P>(first.numel(), kind, ranges.pointers<P>(), output<P>(scale),
                                     output<P>(offset), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {scale, offset};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("quantize", quantize);
  m.impl("update_codes_", update_codes_);
  m.impl("dequantize", dequantize);
  m.impl("_effective_scale_offset", flat<effective_scale_offset>);
}

}  // namespace asymq::cuda
