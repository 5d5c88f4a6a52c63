// The CUDA operators: the one file here that knows torch. Each checks, guards the device,
// allocates, dispatches the dtypes, launches and checks the launch.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include "kernels.h"
#include "ops/arguments.h"

namespace asymq {
namespace {

using detail::Layout;

/// The kernels' name for an element type.
template <class S>
struct DeviceType {
  using type = S;
};
template <>
struct DeviceType<c10::Half> {
  using type = __half;
};
template <>
struct DeviceType<c10::BFloat16> {
  using type = __nv_bfloat16;
};

template <class D>
const D* input(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const D*>(tensor.const_data_ptr()) : nullptr;
}

template <class D>
D* output(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<D*>(tensor.mutable_data_ptr()) : nullptr;
}

/// Calls body(S{}, P{}) for the kernels' types of elements and ranges.
template <class Body>
void dispatch_dtypes(const at::Tensor& x, const at::Tensor& range, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "asymq", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      if (range.scalar_type() == at::kDouble) return body(scalar_t{}, double{});
    }
    body(typename DeviceType<scalar_t>::type{}, float{});
  });
}

template <class Body>
void dispatch_codes(const at::Tensor& codes, const Body& body) {
  switch (codes.scalar_type()) {
    case at::kByte:
      return body(uint8_t{});
    case at::kChar:
      return body(int8_t{});
    case at::kShort:
      return body(int16_t{});
    default:
      return body(int32_t{});
  }
}

bool aligned(const at::Tensor& tensor) {
  return !tensor.defined() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

cuda::Plan plan_for(const Layout& layout, bool sums, const at::Tensor& x,
                    std::initializer_list<at::Tensor> others) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  cuda::Plan plan =
      cuda::make_plan(layout, static_cast<int>(x.element_size()),
                      aligned(x) && std::all_of(others.begin(), others.end(), aligned), sums,
                      device->multiProcessorCount);
  plan.overlaps = device->major >= 9;
  return plan;
}

at::Tensor fake_quantize_cuda(const at::Tensor& x, const at::Tensor& first,
                              const OptionalTensor& second, const OptionalTensor& min,
                              const OptionalTensor& max, int64_t parameterization, int64_t bits,
                              double eps) {
  const RangeTensors tensors{first, second, min, max};
  const QuantizerKind kind = check_fake_quantize(x, tensors, parameterization, bits, eps);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(tensors);
  const cuda::Plan plan = plan_for(layout, false, x, {out});
  dispatch_dtypes(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::launch_forward<S, P>(plan, layout, kind, ranges.pointers<P>(), input<S>(x),
                               output<S>(out), at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& first,
    const OptionalTensor& second, const OptionalTensor& min, const OptionalTensor& max,
    int64_t parameterization, int64_t bits, double eps, std::array<bool, 3> needs) {
  const RangeTensors tensors{first, second, min, max};
  const QuantizerKind kind = check_fake_quantize(x, tensors, parameterization, bits, eps);
  check_grad(grad, x, parameterization);
  const c10::cuda::CUDAGuard guard(x.device());
  const auto like_range = [&](bool needed) {
    return needed ? at::empty(first.sizes(), first.options()) : at::Tensor();
  };
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  at::Tensor first_grad = like_range(needs[1]), second_grad = like_range(needs[2]);
  const bool needs_sums = (needs[1] || needs[2]) && first.numel() > 0;
  if (!needs_sums && (!needs[0] || x.numel() == 0)) return {dx, first_grad, second_grad};

  const Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(tensors);
  const at::Tensor upstream = match_layout(grad, x);
  const cuda::Plan plan = plan_for(layout, needs_sums, x, {upstream, dx});
  const int64_t partials = cuda::partial_sums(plan).count();
  const at::Tensor workspace =
      needs_sums && partials != 1
          ? at::empty({3 * layout.ranges * partials}, x.options().dtype(at::kDouble))
          : at::Tensor();
  dispatch_dtypes(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::launch_backward<S, P>(plan, layout, kind, ranges.pointers<P>(), input<S>(upstream),
                                input<S>(x), output<S>(dx), output<P>(first_grad),
                                output<P>(second_grad), output<double>(workspace),
                                at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, first_grad, second_grad};
}

template <class P>
cuda::QuantizerPointers<P> quantizer_pointers(const QuantizerKind& kind,
                                              const ContiguousRanges& ranges) {
  return {kind, ranges.pointers<P>()};
}

/// `sums`: the call is a backward that wants gradients of ranges.
cuda::SoftmaxPlan softmax_plan_for(const at::Tensor& scores, bool sums,
                                   std::initializer_list<at::Tensor> tensors) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  cuda::SoftmaxPlan plan = cuda::make_softmax_plan(
      scores.size(0) * scores.size(1) * scores.size(2), scores.size(3),
      static_cast<int>(scores.element_size()), std::all_of(tensors.begin(), tensors.end(), aligned),
      sums, device->multiProcessorCount);
  plan.overlaps = device->major >= 9;
  return plan;
}

std::tuple<at::Tensor, at::Tensor> quantized_softmax_cuda(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal, at::TensorList scores_ranges,
    int64_t scores_parameterization, int64_t scores_bits, double scores_eps,
    at::TensorList probabilities_ranges, int64_t probabilities_parameterization,
    int64_t probabilities_bits, double probabilities_eps) {
  const QuantizerPair pair = check_quantized_softmax(
      scores, mask, {scores_ranges, scores_parameterization, scores_bits, scores_eps},
      {probabilities_ranges, probabilities_parameterization, probabilities_bits,
       probabilities_eps});
  const c10::cuda::CUDAGuard guard(scores.device());
  at::Tensor out = at::empty(scores.sizes(), scores.options());
  at::Tensor statistics = at::empty({scores.size(0), scores.size(1), scores.size(2), 2},
                                    scores.options().dtype(compute_dtype(scores.scalar_type())));
  if (statistics.numel() == 0) return {out, statistics};
  const at::Tensor dense = scores.contiguous();
  const MaskTensor mask_tensor(mask, scores, causal);
  const ContiguousRanges of_scores(pair.before.ranges.tensors());
  const ContiguousRanges of_probabilities(pair.after.ranges.tensors());
  const cuda::SoftmaxPlan plan = softmax_plan_for(scores, false, {dense, out});
  dispatch_dtypes(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::launch_softmax_forward<S, P>(
        plan,
        {{scores.size(0), scores.size(1), scores.size(2), scores.size(3)},
         mask_tensor.view<cuda::Compute<S>>(),
         quantizer_pointers<P>(pair.before.kind, of_scores),
         quantizer_pointers<P>(pair.after.kind, of_probabilities),
         input<S>(dense)},
        output<S>(out), output<cuda::Compute<S>>(statistics), at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_cuda(const at::Tensor& grad, const at::Tensor& scores,
                                const at::Tensor& statistics, const OptionalTensor& mask,
                                bool causal, at::TensorList scores_ranges,
                                int64_t scores_parameterization, int64_t scores_bits,
                                double scores_eps, at::TensorList probabilities_ranges,
                                int64_t probabilities_parameterization, int64_t probabilities_bits,
                                double probabilities_eps, std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_softmax(
      scores, mask, {scores_ranges, scores_parameterization, scores_bits, scores_eps},
      {probabilities_ranges, probabilities_parameterization, probabilities_bits,
       probabilities_eps});
  check_grad("quantized_softmax", "scores", grad, scores);
  const c10::cuda::CUDAGuard guard(scores.device());
  at::Tensor dscores = needs[0] ? at::empty(scores.sizes(), scores.options()) : at::Tensor();
  const auto gradients = empty_gradients(pair, needs);
  const at::Tensor dense = scores.contiguous(), upstream = grad.contiguous();
  const MaskTensor mask_tensor(mask, scores, causal);
  const ContiguousRanges of_scores(pair.before.ranges.tensors());
  const ContiguousRanges of_probabilities(pair.after.ranges.tensors());
  const bool sums = std::any_of(needs.begin() + 1, needs.end(), [](bool need) { return need; });
  const cuda::SoftmaxPlan plan =
      softmax_plan_for(scores, sums, {dense, upstream, needs[0] ? dscores : dense});
  const at::Tensor workspace =
      sums ? at::empty({6 * plan.blocks}, scores.options().dtype(at::kDouble)) : at::Tensor();
  dispatch_dtypes(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::SoftmaxOperands<S, P> operands{
        {scores.size(0), scores.size(1), scores.size(2), scores.size(3)},
        mask_tensor.view<cuda::Compute<S>>(),
        quantizer_pointers<P>(pair.before.kind, of_scores),
        quantizer_pointers<P>(pair.after.kind, of_probabilities),
        input<S>(dense)};
    operands.scores_quantizer.first = output<P>(gradients[0]);
    operands.scores_quantizer.second = output<P>(gradients[1]);
    operands.probabilities_quantizer.first = output<P>(gradients[2]);
    operands.probabilities_quantizer.second = output<P>(gradients[3]);
    cuda::launch_softmax_backward<S, P>(
        plan, operands, input<S>(upstream), input<cuda::Compute<S>>(statistics), output<S>(dscores),
        output<double>(workspace), at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dscores, gradients[0], gradients[1], gradients[2], gradients[3]};
}

at::Tensor quantized_gelu_cuda(const at::Tensor& x, at::TensorList input_ranges,
                               int64_t input_parameterization, int64_t input_bits, double input_eps,
                               at::TensorList output_ranges, int64_t output_parameterization,
                               int64_t output_bits, double output_eps) {
  const QuantizerPair pair =
      check_quantized_gelu(x, {input_ranges, input_parameterization, input_bits, input_eps},
                           {output_ranges, output_parameterization, output_bits, output_eps});
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const at::Tensor dense = match_layout(x, x);
  const ContiguousRanges of_input(pair.before.ranges.tensors());
  const ContiguousRanges of_output(pair.after.ranges.tensors());
  const cuda::Plan plan = plan_for(make_layout(dense, {1}), false, dense, {out});
  dispatch_dtypes(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::launch_gelu_forward<S, P>(plan, quantizer_pointers<P>(pair.before.kind, of_input),
                                    quantizer_pointers<P>(pair.after.kind, of_output),
                                    input<S>(dense), output<S>(out),
                                    at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_cuda(
    const at::Tensor& grad, const at::Tensor& x, at::TensorList input_ranges,
    int64_t input_parameterization, int64_t input_bits, double input_eps,
    at::TensorList output_ranges, int64_t output_parameterization, int64_t output_bits,
    double output_eps, std::array<bool, 5> needs) {
  const QuantizerPair pair =
      check_quantized_gelu(x, {input_ranges, input_parameterization, input_bits, input_eps},
                           {output_ranges, output_parameterization, output_bits, output_eps});
  check_grad("quantized_gelu", "x", grad, x);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  const auto gradients = empty_gradients(pair, needs);
  const at::Tensor dense = match_layout(x, x), upstream = match_layout(grad, x);
  const ContiguousRanges of_input(pair.before.ranges.tensors());
  const ContiguousRanges of_output(pair.after.ranges.tensors());
  const bool sums = needs[1] || needs[2] || needs[3] || needs[4];
  const cuda::Plan plan = plan_for(make_layout(dense, {1}), sums, dense, {upstream, dx});
  const at::Tensor workspace =
      sums ? at::empty({6 * plan.blocks}, x.options().dtype(at::kDouble)) : at::Tensor();
  dispatch_dtypes(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    auto before = quantizer_pointers<P>(pair.before.kind, of_input);
    auto after = quantizer_pointers<P>(pair.after.kind, of_output);
    before.first = output<P>(gradients[0]);
    before.second = output<P>(gradients[1]);
    after.first = output<P>(gradients[2]);
    after.second = output<P>(gradients[3]);
    cuda::launch_gelu_backward<S, P>(plan, before, after, input<S>(upstream), input<S>(dense),
                                     output<S>(dx), output<double>(workspace),
                                     at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dx, gradients[0], gradients[1], gradients[2], gradients[3]};
}

/// logits and dlogits, where there is one, are contiguous.
template <class S>
cuda::CrossEntropyOperands<S> cross_entropy_operands(const at::Tensor& logits,
                                                     const at::Tensor& labels,
                                                     const at::Tensor& dlogits,
                                                     int64_t ignore_index) {
  return {logits.size(0), static_cast<int>(logits.size(1)), aligned(logits) && aligned(dlogits),
          ignore_index,   input<int64_t>(labels),           input<S>(logits)};
}

std::tuple<at::Tensor, at::Tensor> quantized_cross_entropy_cuda(
    const at::Tensor& logits, const at::Tensor& labels, at::TensorList ranges,
    int64_t parameterization, int64_t bits, double eps, int64_t ignore_index) {
  const auto quantizer =
      check_quantized_cross_entropy(logits, labels, {ranges, parameterization, bits, eps});
  const c10::cuda::CUDAGuard guard(logits.device());
  const auto options = logits.options().dtype(compute_dtype(logits.scalar_type()));
  at::Tensor losses = at::empty({logits.size(0)}, options);
  at::Tensor statistics = at::empty({logits.size(0), 2}, options);
  if (logits.size(0) == 0) return {losses, statistics};
  const at::Tensor dense = logits.contiguous(), dense_labels = labels.contiguous();
  const ContiguousRanges dense_ranges(quantizer.ranges.tensors());
  dispatch_dtypes(logits, quantizer.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    cuda::launch_cross_entropy_forward<S, P>(
        cross_entropy_operands<S>(dense, dense_labels, {}, ignore_index),
        quantizer_pointers<P>(quantizer.kind, dense_ranges), output<cuda::Compute<S>>(losses),
        output<cuda::Compute<S>>(statistics), at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {losses, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> quantized_cross_entropy_backward_cuda(
    const at::Tensor& grad, const at::Tensor& logits, const at::Tensor& labels,
    const at::Tensor& statistics, at::TensorList ranges, int64_t parameterization, int64_t bits,
    double eps, int64_t ignore_index, std::array<bool, 3> needs) {
  const auto quantizer =
      check_quantized_cross_entropy(logits, labels, {ranges, parameterization, bits, eps});
  check_grad("quantized_cross_entropy", "losses", grad, statistics.select(1, 0));
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor& range_tensor = quantizer.ranges.first;
  const auto like_range = [&](bool needed) {
    return needed ? at::empty(range_tensor.sizes(), range_tensor.options()) : at::Tensor();
  };
  const at::Tensor dense = logits.contiguous(), dense_labels = labels.contiguous();
  const at::Tensor upstream = grad.contiguous();
  at::Tensor dlogits = needs[0] ? at::empty(logits.sizes(), logits.options()) : at::Tensor();
  at::Tensor first = like_range(needs[1]), second = like_range(needs[2]);
  const ContiguousRanges dense_ranges(quantizer.ranges.tensors());
  const at::Tensor workspace =
      needs[1] || needs[2] ? at::empty({3 * logits.size(0)}, logits.options().dtype(at::kDouble))
                           : at::Tensor();
  dispatch_dtypes(logits, range_tensor, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    auto pointers = quantizer_pointers<P>(quantizer.kind, dense_ranges);
    pointers.first = output<P>(first);
    pointers.second = output<P>(second);
    cuda::launch_cross_entropy_backward<S, P>(
        cross_entropy_operands<S>(dense, dense_labels, dlogits, ignore_index), pointers,
        input<cuda::Compute<S>>(upstream), input<cuda::Compute<S>>(statistics), output<S>(dlogits),
        output<double>(workspace), at::cuda::getCurrentDeviceProperties()->major >= 9,
        at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dlogits, first, second};
}

at::Tensor quantize_cuda(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                         int64_t bits, double eps) {
  const QuantizerKind kind = check_quantize("quantize", x, scale, offset, bits, eps);
  const c10::cuda::CUDAGuard guard(x.device());
  at::Tensor codes = at::empty_like(x, x.options().dtype(code_dtype(bits, is_symmetric(kind))));
  if (x.numel() == 0) return codes;
  const Layout layout = make_layout(x, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  dispatch_dtypes(x, scale, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    dispatch_codes(codes, [&](auto code) {
      using Code = decltype(code);
      cuda::launch_quantize<S, P, Code>(layout, kind, ranges.pointers<P>(), input<S>(x),
                                        output<Code>(codes), at::cuda::getCurrentCUDAStream());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return codes;
}

at::Tensor dequantize_cuda(const at::Tensor& codes, const at::Tensor& scale,
                           const OptionalTensor& offset, int64_t bits, double eps) {
  const QuantizerKind kind = check_quantize("dequantize", codes, scale, offset, bits, eps);
  const c10::cuda::CUDAGuard guard(codes.device());
  at::Tensor out = at::empty_like(codes, codes.options().dtype(scale.scalar_type()));
  if (codes.numel() == 0) return out;
  const Layout layout = make_layout(codes, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "dequantize", [&] {
    dispatch_codes(codes, [&](auto code) {
      using Code = decltype(code);
      cuda::launch_dequantize<scalar_t, Code>(layout, kind, ranges.pointers<scalar_t>(),
                                              input<Code>(codes), output<scalar_t>(out),
                                              at::cuda::getCurrentCUDAStream());
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

std::tuple<at::Tensor, at::Tensor> effective_scale_offset_cuda(
    const at::Tensor& first, const OptionalTensor& second, const OptionalTensor& min,
    const OptionalTensor& max, int64_t parameterization, int64_t bits, double eps) {
  const RangeTensors tensors{first, second, min, max};
  const QuantizerKind kind = check_ranges(tensors, parameterization, bits, eps);
  const c10::cuda::CUDAGuard guard(first.device());
  at::Tensor scale = at::empty(first.sizes(), first.options());
  at::Tensor offset = at::empty(first.sizes(), first.options());
  if (first.numel() == 0) return {scale, offset};
  const ContiguousRanges ranges(tensors);
  AT_DISPATCH_FLOATING_TYPES(first.scalar_type(), "effective_scale_offset", [&] {
    cuda::launch_effective_scale_offset<scalar_t>(first.numel(), kind, ranges.pointers<scalar_t>(),
                                                  output<scalar_t>(scale), output<scalar_t>(offset),
                                                  at::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {scale, offset};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_fake_quantize", fake_quantize_cuda);
  m.impl("_fake_quantize_backward", fake_quantize_backward_cuda);
  m.impl("_quantized_softmax", quantized_softmax_cuda);
  m.impl("_quantized_softmax_backward", quantized_softmax_backward_cuda);
  m.impl("_quantized_gelu", quantized_gelu_cuda);
  m.impl("_quantized_gelu_backward", quantized_gelu_backward_cuda);
  m.impl("_quantized_cross_entropy", quantized_cross_entropy_cuda);
  m.impl("_quantized_cross_entropy_backward", quantized_cross_entropy_backward_cuda);
  m.impl("quantize", quantize_cuda);
  m.impl("dequantize", dequantize_cuda);
  m.impl("_effective_scale_offset", effective_scale_offset_cuda);
}

}  // namespace asymq
