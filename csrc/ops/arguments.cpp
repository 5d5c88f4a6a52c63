#include "ops/arguments.h"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/ExpandUtils.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace asymq {
namespace {

struct Argument {
  const char* name;
  const at::Tensor* tensor;
};

/// The range tensors that are there, with the names users know them by.
class ArgumentList {
 public:
  void add(const char* name, const at::Tensor& tensor) { arguments_[size_++] = {name, &tensor}; }
  const Argument* begin() const { return arguments_; }
  const Argument* end() const { return arguments_ + size_; }

 private:
  Argument arguments_[4];
  int size_ = 0;
};

bool is_compute_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 ||
         dtype == at::kHalf;
}

void check_bits(const char* prefix, const char* op, int64_t bits) {
  TORCH_CHECK(bits >= 2 && bits <= 16, prefix, op, ": bits must be between 2 and 16, got ", bits);
}

void check_scalars(const char* prefix, const char* op, int64_t bits, double eps) {
  check_bits(prefix, op, bits);
  TORCH_CHECK(eps > 0 && std::isfinite(eps), prefix, op, ": eps must be positive and finite, got ",
              eps);
}

/// All range tensors alike, and of a dtype that goes with `wide` (float64) elements or not.
void check_alike(const char* prefix, const char* op, const ArgumentList& ranges, bool wide) {
  const auto& [first_name, first] = *ranges.begin();
  for (const auto& [name, range] : ranges) {
    TORCH_CHECK(range->scalar_type() == at::kFloat || (wide && range->scalar_type() == at::kDouble),
                prefix, op, ": ", name, " must be ", wide ? "float32 or float64" : "float32",
                ", got ", range->scalar_type());
    TORCH_CHECK(range->scalar_type() == first->scalar_type(), prefix, op, ": ", name, " must have ",
                first_name, "'s dtype ", first->scalar_type(), ", got ", range->scalar_type());
    TORCH_CHECK(range->device() == first->device(), prefix, op, ": ", name, " must be on ",
                first_name, "'s device ", first->device(), ", got ", range->device());
    TORCH_CHECK(range->sym_sizes() == first->sym_sizes(), prefix, op, ": ", name, " must have ",
                first_name, "'s shape ", first->sym_sizes(), ", got ", range->sym_sizes());
  }
}

void check_granularity(const char* prefix, const char* op, const at::Tensor& x,
                       const ArgumentList& ranges) {
  const auto& [name, range] = *ranges.begin();
  TORCH_CHECK(range->device() == x.device(), prefix, op, ": ", name, " must be on x's device ",
              x.device(), ", got ", range->device());
  TORCH_CHECK(x.dim() <= detail::kMaxAxes, prefix, op, ": x must have at most ", detail::kMaxAxes,
              " dimensions, got ", x.dim());
  const auto sizes = x.sym_sizes();
  const auto range_sizes = range->sym_sizes();
  if (range_sizes.size() != sizes.size()) {
    TORCH_CHECK(range->sym_numel() == 1, prefix, op, ": ", name, " has shape ", range_sizes,
                ": it must have one element or as many dimensions as x, whose shape is ", sizes);
    return;
  }
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    const auto& size = sizes[axis];
    const auto& count = range_sizes[axis];
    TORCH_CHECK(count == 1 || count == size || (count != 0 && size % count == 0), prefix, op, ": ",
                name, " has shape ", range_sizes, ", which does not divide x's shape ", sizes,
                " at axis ", axis);
  }
}

ArgumentList name_ranges(const Traits& traits, const char* prefix, const RangeTensors& ranges) {
  ArgumentList list;
  list.add(traits.first, ranges.first);
  const auto add = [&](const char* name, const OptionalTensor& tensor) {
    const bool present = tensor.has_value() && tensor->defined();
    TORCH_CHECK(present == (name[0] != '\0'), prefix, traits.name, ": takes ",
                present ? "fewer" : "more", " range tensors than it got");
    if (present) list.add(name, *tensor);
  };
  add(traits.second, ranges.second);
  add(traits.min, ranges.min);
  add(traits.max, ranges.max);
  return list;
}

}  // namespace

ListedRanges::ListedRanges(const char* op, const Traits& traits, at::TensorList list) {
  size_t used = 0;
  const auto take = [&](const char* name) -> OptionalTensor {
    if (name[0] == '\0') return std::nullopt;
    TORCH_CHECK(used < list.size(), "asymq::", op, ": ", traits.name, " needs the parameter ", name,
                ", got ", list.size(), " parameters");
    return list[used++];
  };
  first = *take(traits.first);
  second = take(traits.second);
  min = take(traits.min);
  max = take(traits.max);
  TORCH_CHECK(used == list.size(), "asymq::", op, ": ", traits.name, " needs ", used,
              " parameters, got ", list.size());
}

const Traits& traits_of(int64_t parameterization) {
  const int64_t count = std::size(Parameterizations::traits);
  TORCH_CHECK(parameterization >= 0 && parameterization < count,
              "asymq: parameterization must be between 0 and ", count - 1, ", got ",
              parameterization);
  return Parameterizations::traits[parameterization];
}

int64_t find_parameterization(const char* op, std::string_view family, bool symmetric,
                              bool sigmoid) {
  const int id = find_parameterization(family, symmetric, sigmoid);
  TORCH_CHECK(
      id >= 0, "asymq::", op,
      ": parameterization must be scale_offset, min_max, beta_gamma or kscale_koffset, "
      "sigmoid belongs to beta_gamma, and kscale_koffset has no symmetric counterpart; got ",
      family, symmetric ? ", symmetric" : "", sigmoid ? ", sigmoid" : "");
  return id;
}

QuantizerKind check_fake_quantize(const at::Tensor& x, const RangeTensors& ranges,
                                  int64_t parameterization, int64_t bits, double eps) {
  constexpr const char* prefix = "asymq::fake_quantize_";
  const Traits& traits = traits_of(parameterization);
  check_scalars(prefix, traits.name, bits, eps);
  TORCH_CHECK(is_compute_dtype(x.scalar_type()), prefix, traits.name,
              ": x must be float32, float64, bfloat16 or float16, got ", x.scalar_type());
  const ArgumentList list = name_ranges(traits, prefix, ranges);
  check_alike(prefix, traits.name, list, x.scalar_type() == at::kDouble);
  check_granularity(prefix, traits.name, x, list);
  return make_kind(parameterization, bits, eps);
}

QuantizerKind check_ranges(const RangeTensors& ranges, int64_t parameterization, int64_t bits,
                           double eps) {
  constexpr const char* prefix = "asymq::effective_scale_offset: ";
  const Traits& traits = traits_of(parameterization);
  check_scalars(prefix, traits.name, bits, eps);
  check_alike(prefix, traits.name, name_ranges(traits, prefix, ranges), true);
  return make_kind(parameterization, bits, eps);
}

void check_ends(const char* op, const at::Tensor& min, const at::Tensor& max, int64_t bits) {
  check_bits("asymq::", op, bits);
  TORCH_CHECK(min.is_floating_point(), "asymq::", op, ": min must be floating, got ",
              min.scalar_type());
  TORCH_CHECK(max.scalar_type() == min.scalar_type(), "asymq::", op, ": max must have min's dtype ",
              min.scalar_type(), ", got ", max.scalar_type());
  TORCH_CHECK(max.device() == min.device(), "asymq::", op, ": max must be on min's device ",
              min.device(), ", got ", max.device());
  TORCH_CHECK(max.sym_sizes() == min.sym_sizes(), "asymq::", op, ": max must have min's shape ",
              min.sym_sizes(), ", got ", max.sym_sizes());
}

namespace {

void check_grad(const char* prefix, const char* op, const char* name, const at::Tensor& grad,
                const at::Tensor& x) {
  TORCH_CHECK(grad.sym_sizes() == x.sym_sizes(), prefix, op, ": the upstream gradient must have ",
              name, "'s shape ", x.sym_sizes(), ", got ", grad.sym_sizes());
  TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(), prefix, op,
              ": the upstream gradient must be ", x.scalar_type(), " on ", x.device(), " like ",
              name, ", got ", grad.scalar_type(), " on ", grad.device());
}

}  // namespace

void check_grad(const at::Tensor& grad, const at::Tensor& x, int64_t parameterization) {
  check_grad("asymq::fake_quantize_", traits_of(parameterization).name, "x", grad, x);
}

void check_grad(const char* op, const char* name, const at::Tensor& grad, const at::Tensor& x) {
  check_grad("asymq::", op, name, grad, x);
}

QuantizerKind check_quantize(const char* op, const at::Tensor& x, const at::Tensor& scale,
                             const OptionalTensor& offset, int64_t bits, double eps) {
  constexpr const char* prefix = "asymq::";
  const bool symmetric = !offset.has_value() || !offset->defined();
  const bool from_codes = std::string_view(op) == "dequantize";
  check_scalars(prefix, op, bits, eps);
  if (from_codes) {
    const auto expected = code_dtype(bits, symmetric);
    TORCH_CHECK(x.scalar_type() == expected, prefix, op, ": codes must be ", expected, " for ",
                bits, " bits ", symmetric ? "without" : "with", " offset, got ", x.scalar_type());
  } else {
    TORCH_CHECK(is_compute_dtype(x.scalar_type()), prefix, op,
                ": x must be float32, float64, bfloat16 or float16, got ", x.scalar_type());
  }
  ArgumentList list;
  list.add("scale", scale);
  if (!symmetric) list.add("offset", *offset);
  check_alike(prefix, op, list, from_codes || x.scalar_type() == at::kDouble);
  check_granularity(prefix, op, x, list);
  return make_kind(find_parameterization("scale_offset", symmetric, false), bits, eps);
}

QuantizerArguments by_position(const char* op, const RangeArguments& range) {
  return {range.parameters,
          find_parameterization(op, range.parameterization, range.symmetric, range.sigmoid),
          range.bits, range.eps};
}

namespace {

/// prefix: the operator, and whose quantizer it is. x: the argument `name` that it belongs to.
CheckedQuantizer check_quantizer(const char* op, const char* prefix, const char* name,
                                 const at::Tensor& x, const QuantizerArguments& quantizer) {
  const Traits& traits = traits_of(quantizer.parameterization);
  ListedRanges ranges(op, traits, quantizer.ranges);
  check_scalars(prefix, traits.name, quantizer.bits, quantizer.eps);
  const ArgumentList list = name_ranges(traits, prefix, ranges.tensors());
  check_alike(prefix, traits.name, list, x.scalar_type() == at::kDouble);
  TORCH_CHECK(ranges.first.sym_numel() == 1, prefix, traits.name, ": ", traits.first,
              " must have one element, got shape ", ranges.first.sym_sizes());
  TORCH_CHECK(ranges.first.device() == x.device(), prefix, traits.name, ": ", traits.first,
              " must be on the device of ", name, ", ", x.device(), ", got ",
              ranges.first.device());
  return {make_kind(quantizer.parameterization, quantizer.bits, quantizer.eps), ranges};
}

void check_same_dtype(const char* op, const char* before, const char* after,
                      const QuantizerPair& pair) {
  const auto wanted = pair.before.ranges.first.scalar_type();
  const auto got = pair.after.ranges.first.scalar_type();
  TORCH_CHECK(got == wanted, "asymq::", op, ": the ", after, " range must have the dtype of the ",
              before, " ", wanted, ", got ", got);
}

}  // namespace

QuantizerPair check_quantized_softmax(const at::Tensor& scores, const OptionalTensor& mask,
                                      const QuantizerArguments& of_scores,
                                      const QuantizerArguments& of_probabilities) {
  constexpr const char* op = "quantized_softmax";
  constexpr const char* prefix = "asymq::quantized_softmax: ";
  TORCH_CHECK(scores.dim() == 4, prefix,
              "scores must have 4 dimensions, [batch, heads, queries, keys], got shape ",
              scores.sym_sizes());
  TORCH_CHECK(is_compute_dtype(scores.scalar_type()), prefix,
              "scores must be float32, float64, bfloat16 or float16, got ", scores.scalar_type());
  TORCH_CHECK(scores.sym_size(3) <= std::numeric_limits<int>::max(), prefix,
              "scores must have less than 2^31 keys, got ", scores.sym_size(3));
  if (mask.has_value()) {
    TORCH_CHECK(mask->scalar_type() == at::kBool || mask->is_floating_point(), prefix,
                "mask must be bool (true: seen) or floating (added), got ", mask->scalar_type());
    TORCH_CHECK(mask->device() == scores.device(), prefix, "mask must be on the scores' device ",
                scores.device(), ", got ", mask->device());
    const auto sizes = mask->sym_sizes();
    const auto wanted = scores.sym_sizes();
    bool fits = sizes.size() <= 4;
    for (size_t axis = 0; fits && axis < sizes.size(); ++axis) {
      const auto& size = sizes[sizes.size() - 1 - axis];
      fits = size == 1 || size == wanted[3 - axis];
    }
    TORCH_CHECK(fits, prefix, "mask has shape ", sizes,
                ", which does not broadcast against the scores' shape ", wanted);
  }
  QuantizerPair pair{
      check_quantizer(op, "asymq::quantized_softmax: scores' ", "scores", scores, of_scores),
      check_quantizer(op, "asymq::quantized_softmax: probabilities' ", "scores", scores,
                      of_probabilities)};
  check_same_dtype(op, "scores'", "probabilities'", pair);
  return pair;
}

QuantizerPair check_quantized_gelu(const at::Tensor& x, const QuantizerArguments& of_input,
                                   const QuantizerArguments& of_output) {
  constexpr const char* op = "quantized_gelu";
  TORCH_CHECK(is_compute_dtype(x.scalar_type()),
              "asymq::quantized_gelu: x must be float32, float64, bfloat16 or float16, got ",
              x.scalar_type());
  QuantizerPair pair{check_quantizer(op, "asymq::quantized_gelu: input's ", "x", x, of_input),
                     check_quantizer(op, "asymq::quantized_gelu: output's ", "x", x, of_output)};
  check_same_dtype(op, "input's", "output's", pair);
  return pair;
}

std::array<at::Tensor, 4> empty_gradients(const QuantizerPair& pair,
                                          const std::array<bool, 5>& needs) {
  std::array<at::Tensor, 4> gradients;
  for (size_t i = 0; i < gradients.size(); ++i) {
    const at::Tensor& range = (i < 2 ? pair.before : pair.after).ranges.first;
    if (needs[1 + i]) gradients[i] = at::empty_symint(range.sym_sizes(), range.options());
  }
  return gradients;
}

CheckedQuantizer check_quantized_cross_entropy(const at::Tensor& logits, const at::Tensor& labels,
                                               const QuantizerArguments& quantizer) {
  constexpr const char* op = "quantized_cross_entropy";
  constexpr const char* prefix = "asymq::quantized_cross_entropy: ";
  TORCH_CHECK(logits.dim() == 2, prefix,
              "logits must have 2 dimensions, [tokens, classes], got shape ", logits.sym_sizes());
  TORCH_CHECK(is_compute_dtype(logits.scalar_type()), prefix,
              "logits must be float32, float64, bfloat16 or float16, got ", logits.scalar_type());
  TORCH_CHECK(logits.sym_size(1) >= 1, prefix, "logits must have at least one class, got shape ",
              logits.sym_sizes());
  TORCH_CHECK(logits.sym_size(1) <= std::numeric_limits<int>::max(), prefix,
              "logits must have less than 2^31 classes, got ", logits.sym_size(1));
  TORCH_CHECK(labels.scalar_type() == at::kLong, prefix, "labels must be int64, got ",
              labels.scalar_type());
  TORCH_CHECK(labels.dim() == 1 && labels.sym_size(0) == logits.sym_size(0), prefix,
              "labels must have one element per row of the logits, shape [", logits.sym_size(0),
              "], got ", labels.sym_sizes());
  TORCH_CHECK(labels.device() == logits.device(), prefix, "labels must be on the logits' device ",
              logits.device(), ", got ", labels.device());
  return check_quantizer(op, prefix, "logits", logits, quantizer);
}

MaskTensor::MaskTensor(const OptionalTensor& mask, const at::Tensor& scores, bool causal)
    : causal_(causal) {
  if (!mask.has_value()) return;
  tensor_ = *mask;
  if (tensor_.scalar_type() != at::kBool) {
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, tensor_.scalar_type(), "quantized_softmax",
        [&] { hides_ = static_cast<double>(std::numeric_limits<scalar_t>::lowest()) / 2; });
    tensor_ = tensor_.to(compute_dtype(scores.scalar_type()));
  }
  tensor_ = tensor_.expand(scores.sizes());
}

at::ScalarType code_dtype(int64_t bits, bool symmetric) {
  if (symmetric) return bits <= 8 ? at::kChar : at::kShort;
  return bits <= 8 ? at::kByte : at::kInt;
}

std::vector<int64_t> dense_strides(const at::Tensor& x) {
  if (x.is_non_overlapping_and_dense()) return x.strides().vec();
  return at::infer_dense_strides(x.sizes(), x.strides());
}

at::Tensor match_layout(const at::Tensor& grad, const at::Tensor& x) {
  const auto strides = dense_strides(x);
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    if (x.size(axis) != 1 && grad.stride(axis) != strides[axis]) {
      return at::empty_strided(x.sizes(), strides, grad.options()).copy_(grad);
    }
  }
  return grad;
}

detail::Layout make_layout(const at::Tensor& x, at::IntArrayRef range_sizes) {
  using detail::Dim;
  detail::Layout layout{0, x.numel(), 1, {}};
  for (const int64_t size : range_sizes) layout.ranges *= size;

  const bool per_tensor = layout.ranges == 1;
  const auto out_strides = dense_strides(x);
  Dim dims[detail::kMaxDims];
  int count = 0;
  int64_t range_stride = 1;
  for (int64_t axis = x.dim() - 1; axis >= 0; --axis) {
    const int64_t size = x.size(axis);
    const int64_t blocks = per_tensor ? 1 : range_sizes[axis];
    const int64_t block = blocks == 0 ? 0 : size / blocks;
    if (block != 1) dims[count++] = {block, x.stride(axis), out_strides[axis], 0};
    if (blocks != 1) {
      dims[count++] = {blocks, x.stride(axis) * block, out_strides[axis] * block, range_stride};
    }
    range_stride *= blocks;
  }
  // The output is dense, so its strides alone order the loops; equal ones cannot occur.
  std::sort(dims, dims + count,
            [](const Dim& a, const Dim& b) { return a.out_stride > b.out_stride; });
  for (int i = 0; i < count; ++i) {
    const Dim& inner = dims[i];
    Dim* outer = layout.ndim > 0 ? &layout.dims[layout.ndim - 1] : nullptr;
    if (outer != nullptr && outer->x_stride == inner.x_stride * inner.size &&
        outer->out_stride == inner.out_stride * inner.size &&
        outer->range_stride == inner.range_stride * inner.size) {
      *outer = {outer->size * inner.size, inner.x_stride, inner.out_stride, inner.range_stride};
    } else {
      layout.dims[layout.ndim++] = inner;
    }
  }
  return layout;
}

ContiguousRanges::ContiguousRanges(const RangeTensors& ranges) {
  const auto contiguous = [](const OptionalTensor& tensor) {
    return tensor.has_value() && tensor->defined() ? tensor->contiguous() : at::Tensor();
  };
  first_ = ranges.first.contiguous();
  second_ = contiguous(ranges.second);
  min_ = contiguous(ranges.min);
  max_ = contiguous(ranges.max);
}

}  // namespace asymq
