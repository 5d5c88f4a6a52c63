#include "ops/quantized_attention.h"

#include <limits>

#include "common.h"
#include "kernels/quantized_attention.h"
#include "ops/quantized_softmax.h"

namespace asymq::cuda {
namespace {

/// Calls body(S{}) for the elements that tensor cores take.
template <class Body>
void dispatch_tensor_core_types(const at::Tensor& x, const Body& body) {
#define ASYMQ_CASE(S) \
  if (x.scalar_type() == kDtype<S>) return body(S{});
  ASYMQ_FOR_EACH_TENSOR_CORE_TYPE(ASYMQ_CASE)
#undef ASYMQ_CASE
  TORCH_INTERNAL_ASSERT(false, "no kernel for ", x.scalar_type());
}

/// Whether products of float32 may be rounded as tensor cores do.
bool allows_tf32() {
  return at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::MATMUL) ==
         at::Float32Precision::TF32;
}

bool has_kernel(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value) {
  const auto dtype = query.scalar_type();
  if (dtype == at::kDouble || (dtype == at::kFloat && !allows_tf32())) return false;
  if (query.size(3) != value.size(3) || query.numel() == 0 || key.size(2) == 0) return false;
  // Tokens are counted, and blocks launched, in int.
  constexpr int64_t kMost = std::numeric_limits<int>::max() - 2 * kAttentionRows;
  const int64_t tokens = query.size(2) + key.size(2);
  const int64_t heads = query.size(0) * query.size(1);
  if (tokens > kMost || ceil_div(tokens, kAttentionRows) * heads > kMost) return false;
  bool result = false;
  dispatch_tensor_core_types(query, [&](auto element) {
    result = has_attention_kernel<decltype(element)>(query.size(3));
  });
  return result;
}

/// The tensor itself where kernels can read its rows, or a dense copy.
at::Tensor readable(const at::Tensor& heads) {
  bool fits = heads.stride(3) == 1 && aligned(heads);
  for (int axis = 0; axis < 3; ++axis) {
    fits = fits && (heads.size(axis) == 1 || heads.stride(axis) * heads.element_size() % 16 == 0);
  }
  return fits ? heads : heads.clone(at::MemoryFormat::Contiguous);
}

/// [batch, heads, tokens, width] with the memory of [batch, tokens, heads, width].
at::Tensor empty_heads(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options())
      .transpose(1, 2);
}

at::Tensor empty_heads_if(bool wanted, const at::Tensor& like) {
  return wanted ? empty_heads(like) : at::Tensor();
}

template <class S>
Heads<const S> input_heads(const at::Tensor& heads) {
  return {input<S>(heads), heads.stride(0), heads.stride(1), heads.stride(2)};
}

template <class S>
Heads<S> output_heads(const at::Tensor& heads) {
  if (!heads.defined()) return {};
  return {output<S>(heads), heads.stride(0), heads.stride(1), heads.stride(2)};
}

/// What both directions read; keeps it alive.
struct Operands {
  at::Tensor query, key, value;
  double scaling;
  MaskTensor mask;

  Operands(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
           const OptionalTensor& mask, bool causal, std::optional<int64_t> window, double scaling)
      : query(readable(query)),
        key(readable(key)),
        value(readable(value)),
        scaling(scaling),
        mask(mask, {query.size(0), query.size(1), query.size(2), key.size(2)}, at::kFloat, causal,
             window) {}

  template <class S>
  AttentionOperands<S> pointers(const DeviceQuantizer& of_scores,
                                const DeviceQuantizer& of_probabilities) const {
    return {{query.size(0), query.size(1), query.size(2), key.size(2)},
            static_cast<int>(key.size(1)),
            static_cast<int>(query.size(3)),
            static_cast<float>(scaling),
            mask.view<float>(),
            of_scores.pointers<float>(),
            of_probabilities.pointers<float>(),
            input_heads<S>(query),
            input_heads<S>(key),
            input_heads<S>(value)};
  }
};

std::tuple<at::Tensor, at::Tensor> quantized_attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const OptionalTensor& mask, bool causal, std::optional<int64_t> window, double scaling,
    const QuantizerArguments& of_scores, const QuantizerArguments& of_probabilities) {
  const QuantizerPair pair = check_quantized_attention(query, key, value, mask, causal, window,
                                                       of_scores, of_probabilities);
  const c10::cuda::CUDAGuard guard(query.device());
  if (!has_kernel(query, key, value)) {
    return quantized_attention_composite(query, key, value, mask, causal, window, scaling,
                                         of_scores, of_probabilities);
  }
  const Operands operands(query, key, value, mask, causal, window, scaling);
  const DeviceQuantizer before(pair.before), after(pair.after);
  at::Tensor out = empty_heads(query);
  at::Tensor statistics = at::empty({query.size(0), query.size(1), query.size(2), 2},
                                    query.options().dtype(at::kFloat));
  dispatch_tensor_core_types(query, [&](auto element) {
    using S = decltype(element);
    launch_attention_forward<S>(operands.pointers<S>(before, after), output_heads<S>(out),
                                output<float>(statistics), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {out, statistics};
}

AttentionGradientTensors quantized_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& statistics, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, double scaling, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities, std::array<bool, 7> needs) {
  const QuantizerPair pair = check_quantized_attention_backward(
      grad, query, key, value, out, mask, causal, window, of_scores, of_probabilities);
  const c10::cuda::CUDAGuard guard(query.device());
  if (!has_kernel(query, key, value)) {
    return quantized_attention_backward_composite(grad, query, key, value, out, statistics, mask,
                                                  causal, window, scaling, of_scores,
                                                  of_probabilities, needs);
  }
  const Operands operands(query, key, value, mask, causal, window, scaling);
  const DeviceQuantizer before(pair.before, needs[3], needs[4]);
  const DeviceQuantizer after(pair.after, needs[5], needs[6]);
  const at::Tensor upstream = readable(grad), context = readable(out);
  const at::Tensor of_rows = statistics.contiguous();
  const at::Tensor dquery = empty_heads_if(needs[0], query);
  const at::Tensor dkey = empty_heads_if(needs[1], key), dvalue = empty_heads_if(needs[2], value);
  const at::Tensor dots = at::empty({query.numel() / query.size(3)}, statistics.options());
  dispatch_tensor_core_types(query, [&](auto element) {
    using S = decltype(element);
    const auto pointers = operands.pointers<S>(before, after);
    const bool sums = needs[3] || needs[4] || needs[5] || needs[6];
    const at::Tensor workspace =
        workspace_if(sums, 6 * pointers.blocks(query.size(2), query.size(1)), query);
    launch_attention_backward<S>(
        pointers,
        {input_heads<S>(upstream), input_heads<S>(context), input<float>(of_rows),
         output<float>(dots), output<double>(workspace), output_heads<S>(dquery),
         output_heads<S>(dkey), output_heads<S>(dvalue)},
        overlaps(), c10::cuda::getCurrentCUDAStream());
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return {dquery, dkey, dvalue, before.first, before.second, after.first, after.second};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CUDA, m) {
  m.impl("_quantized_attention", flat<quantized_attention>);
  m.impl("_quantized_attention_backward", flat<quantized_attention_backward>);
}

}  // namespace asymq::cuda
