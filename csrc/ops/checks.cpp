#include "ops/checks.h"

#include <cmath>
#include <iterator>
#include <limits>
#include <string_view>
#include <utility>

#include "asymq/detail/layout.h"
#include "ops/fake_quantize_dynamic.h"

namespace asymq {

NamedTensors name_ranges(const Where& where, const Traits& traits, const RangeTensors& ranges) {
  NamedTensors named;
  named.add(traits.first, ranges.first);
  const auto add = [&](const char* name, const OptionalTensor& tensor) {
    const bool present = tensor.has_value() && tensor->defined();
    TORCH_CHECK(present == (name[0] != '\0'), where, ": takes ", present ? "fewer" : "more",
                " range tensors than it got");
    if (present) named.add(name, *tensor);
  };
  add(traits.second, ranges.second);
  add(traits.min, ranges.min);
  add(traits.max, ranges.max);
  return named;
}

void check_bits(const Where& where, int64_t bits) {
  TORCH_CHECK(bits >= 2 && bits <= 16, where, ": bits must be between 2 and 16, got ", bits);
}

void check_positive(const Where& where, const char* name, double value) {
  TORCH_CHECK(value > 0 && std::isfinite(value), where, ": ", name,
              " must be positive and finite, got ", value);
}

QuantizerKind checked_kind(const Where& where, const KindArguments& kind, bool token) {
  const Traits& traits = traits_of(kind.parameterization);
  check_bits(where, kind.bits);
  check_positive(where, "eps", kind.eps);
  check_positive(where, "gradient_scale", kind.gradient_scale);
  const int64_t links = std::size(kLinks);
  TORCH_CHECK(kind.link >= 0 && kind.link < links, where, ": link must be between 0 and ",
              links - 1, ", got ", kind.link);
  const Link link{static_cast<int>(kind.link)};
  TORCH_CHECK(link == Link::identity || std::string_view(traits.family) == "beta_gamma", where,
              ": link belongs to the factors of beta_gamma, got the link ", kLinks[kind.link].name,
              " with ", traits.name);
  return make_kind(kind.parameterization, kind.bits, kind.eps, token, link, kind.gradient_scale);
}

void check_elements(const Where& where, const char* name, const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  TORCH_CHECK(
      dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf,
      where, ": ", name, " must be float32, float64, bfloat16 or float16, got ", dtype);
}

void check_alike(const Where& where, const NamedTensors& ranges, bool wide) {
  const auto& [first_name, first] = *ranges.begin();
  for (const auto& [name, range] : ranges) {
    TORCH_CHECK(range->scalar_type() == at::kFloat || (wide && range->scalar_type() == at::kDouble),
                where, ": ", name, " must be ", wide ? "float32 or float64" : "float32", ", got ",
                range->scalar_type());
    TORCH_CHECK(range->scalar_type() == first->scalar_type(), where, ": ", name, " must have ",
                first_name, "'s dtype ", first->scalar_type(), ", got ", range->scalar_type());
    TORCH_CHECK(range->device() == first->device(), where, ": ", name, " must be on ", first_name,
                "'s device ", first->device(), ", got ", range->device());
    TORCH_CHECK(range->sym_sizes() == first->sym_sizes(), where, ": ", name, " must have ",
                first_name, "'s shape ", first->sym_sizes(), ", got ", range->sym_sizes());
  }
}

void check_granularity(const Where& where, const at::Tensor& x, const NamedTensors& ranges) {
  const auto& [name, range] = *ranges.begin();
  TORCH_CHECK(range->device() == x.device(), where, ": ", name, " must be on x's device ",
              x.device(), ", got ", range->device());
  TORCH_CHECK(x.dim() <= detail::kMaxAxes, where, ": x must have at most ", detail::kMaxAxes,
              " dimensions, got ", x.dim());
  const auto sizes = x.sym_sizes();
  const auto range_sizes = range->sym_sizes();
  if (range_sizes.size() != sizes.size()) {
    TORCH_CHECK(range->sym_numel() == 1, where, ": ", name, " has shape ", range_sizes,
                ": it must have one element or as many dimensions as x, whose shape is ", sizes);
    return;
  }
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    const auto& size = sizes[axis];
    const auto& count = range_sizes[axis];
    TORCH_CHECK(count == 1 || count == size || (count != 0 && size % count == 0), where, ": ", name,
                " has shape ", range_sizes, ", which does not divide x's shape ", sizes,
                " at axis ", axis);
  }
}

void check_ends(const Where& where, const at::Tensor& min, const at::Tensor& max) {
  TORCH_CHECK(min.is_floating_point(), where, ": min must be floating, got ", min.scalar_type());
  TORCH_CHECK(max.scalar_type() == min.scalar_type(), where, ": max must have min's dtype ",
              min.scalar_type(), ", got ", max.scalar_type());
  TORCH_CHECK(max.device() == min.device(), where, ": max must be on min's device ", min.device(),
              ", got ", max.device());
  TORCH_CHECK(max.sym_sizes() == min.sym_sizes(), where, ": max must have min's shape ",
              min.sym_sizes(), ", got ", max.sym_sizes());
}

void check_logits(const Where& where, const at::Tensor& logits, std::optional<int64_t> classes) {
  TORCH_CHECK(logits.dim() == 2, where,
              ": logits must have 2 dimensions, [tokens, classes], got shape ", logits.sym_sizes());
  check_elements(where, "logits", logits);
  TORCH_CHECK(logits.sym_size(1) >= 1, where, ": logits must have at least one class, got shape ",
              logits.sym_sizes());
  TORCH_CHECK(logits.sym_size(1) <= std::numeric_limits<int>::max(), where,
              ": logits must have less than 2^31 classes, got ", logits.sym_size(1));
  TORCH_CHECK(!classes.has_value() || (*classes >= 1 && logits.sym_size(1) >= *classes), where,
              ": classes must be between 1 and the number of the logits' columns ",
              logits.sym_size(1), ", got ", classes.value_or(0));
}

void check_labels(const Where& where, const at::Tensor& labels, const at::Tensor& logits) {
  TORCH_CHECK(labels.scalar_type() == at::kLong, where, ": labels must be int64, got ",
              labels.scalar_type());
  TORCH_CHECK(labels.dim() == 1 && labels.sym_size(0) == logits.sym_size(0), where,
              ": labels must have one element per row of the logits, shape [", logits.sym_size(0),
              "], got ", labels.sym_sizes());
  TORCH_CHECK(labels.device() == logits.device(), where, ": labels must be on the logits' device ",
              logits.device(), ", got ", labels.device());
}

void check_grad(const Where& where, const char* name, const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(grad.sym_sizes() == x.sym_sizes(), where, ": the upstream gradient must have ", name,
              "'s shape ", x.sym_sizes(), ", got ", grad.sym_sizes());
  TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.device() == x.device(), where,
              ": the upstream gradient must be ", x.scalar_type(), " on ", x.device(), " like ",
              name, ", got ", grad.scalar_type(), " on ", grad.device());
}

CheckedQuantizer check_quantizer(const char* op, const char* whose, const char* name,
                                 const at::Tensor& x, const QuantizerArguments& quantizer) {
  const Traits& traits = traits_of(quantizer.kind.parameterization);
  const Where where{op, ": ", whose, traits.name};
  TORCH_CHECK(!quantizer.token, where,
              ": takes one range, not one of each token, which fake_quantize_dynamic_* have");
  ListedRanges ranges(op, traits, quantizer.ranges);
  const QuantizerKind kind = checked_kind(where, quantizer.kind);
  check_alike(where, name_ranges(where, traits, ranges.tensors()), x.scalar_type() == at::kDouble);
  TORCH_CHECK(ranges.first.sym_numel() == 1, where, ": ", traits.first,
              " must have one element, got shape ", ranges.first.sym_sizes());
  TORCH_CHECK(ranges.first.device() == x.device(), where, ": ", traits.first,
              " must be on the device of ", name, ", ", x.device(), ", got ",
              ranges.first.device());
  return {kind, std::move(ranges)};
}

std::optional<CheckedQuantizer> check_any_quantizer(const char* op, const char* whose,
                                                    const char* name, const at::Tensor& x,
                                                    const QuantizerArguments& quantizer) {
  if (!quantizer.exists()) return std::nullopt;
  if (!quantizer.token) return check_quantizer(op, whose, name, x, quantizer);
  const Traits& traits = traits_of(quantizer.kind.parameterization);
  ListedRanges ranges(op, traits, quantizer.ranges, /*token=*/true);
  const QuantizerKind kind =
      check_live({op, ": ", whose, traits.name}, x,
                 {ranges.first, ranges.second, quantizer.group, quantizer.kind, /*token=*/true});
  return CheckedQuantizer{kind, ranges, true, quantizer.group};
}

QuantizerPair check_quantizers(const char* op, const char* name, const at::Tensor& x,
                               const char* whose_before, const QuantizerArguments& before,
                               const char* whose_after, const QuantizerArguments& after) {
  QuantizerPair pair{check_quantizer(op, whose_before, name, x, before),
                     check_quantizer(op, whose_after, name, x, after)};
  const auto wanted = pair.before.ranges.first.scalar_type();
  const auto got = pair.after.ranges.first.scalar_type();
  TORCH_CHECK(got == wanted, "asymq::", op, ": the ", whose_after,
              "range must have the dtype of the ", whose_before, wanted, ", got ", got);
  return pair;
}

}  // namespace asymq
