#include "ops/fake_quantize_dynamic.h"

#include <ATen/ATen.h>
#include <torch/library.h>

#include "asymq/fake_quantize.h"
#include "ops/layout.h"

namespace asymq {
namespace {

Where where_dynamic(const Traits& traits) { return {"fake_quantize_dynamic_", traits.name}; }

bool has_second(const LiveQuantizer& quantizer) {
  return quantizer.second.has_value() && quantizer.second->defined();
}

/// Groups of a row. A row without elements is one group.
c10::SymInt groups_of_row(const at::Tensor& x, const LiveQuantizer& quantizer) {
  if (!quantizer.group.has_value()) return 1;
  return x.sym_size(-1) / *quantizer.group;
}

void check_group(const Where& where, const at::Tensor& x, std::optional<int64_t> group) {
  TORCH_CHECK(x.dim() > 0, where,
              ": x must have at least one dimension, the last of which makes the groups, got shape "
              "[]");
  if (!group.has_value()) return;
  TORCH_CHECK(*group >= 1, where, ": group must be at least 1, or None for all of x's last axis, ",
              "got ", *group);
  TORCH_CHECK(x.sym_size(-1) % *group == 0, where, ": group must divide x's last axis of ",
              x.sym_size(-1), " elements, got ", *group);
}

void check_factors(const Where& where, const char* name, const at::Tensor& x,
                   const LiveQuantizer& quantizer) {
  const c10::SymInt factors = quantizer.first.sym_numel();
  if (factors == 1) return;
  const c10::SymInt in_row = groups_of_row(x, quantizer);
  if (factors == in_row) return;
  c10::SymInt groups = in_row;
  for (const auto& size : x.sym_sizes().slice(0, x.dim() - 1)) groups = groups * size;
  if (!quantizer.token && factors == groups) return;
  if (quantizer.token) {
    TORCH_CHECK(false, where, ": ", name, " must have 1 value or one for each of the ", in_row,
                " groups of a row, which all rows share, got shape ", quantizer.first.sym_sizes(),
                " for x's shape ", x.sym_sizes());
  }
  TORCH_CHECK(false, where, ": ", name, " must have 1 value, one for each of the ", in_row,
              " groups of a row or one for each of all ", groups, ", got shape ",
              quantizer.first.sym_sizes(), " for x's shape ", x.sym_sizes());
}

/// A weight's rows or groups on their live ranges; symmetric without `second`.
at::Tensor fake_quantize_live(const at::Tensor& x, const at::Tensor& first,
                              const OptionalTensor& second, std::optional<int64_t> group,
                              int64_t bits, bool sigmoid, bool full_range, double eps,
                              std::string_view link, double gradient_scale) {
  constexpr const char* op = "_fake_quantize_live";
  const bool symmetric = !second.has_value() || !second->defined();
  return fake_quantize_dynamic_op(
      x, {first,
          second,
          group,
          {find_parameterization(op, "beta_gamma", symmetric, full_range), bits, eps,
           link_number(Where{op}, sigmoid, link), gradient_scale},
          /*token=*/false});
}

}  // namespace

QuantizerKind check_fake_quantize_dynamic(const at::Tensor& x, const LiveQuantizer& quantizer) {
  return check_live(where_dynamic(traits_of(quantizer.kind.parameterization)), x, quantizer);
}

QuantizerKind check_live(const Where& at, const at::Tensor& x, const LiveQuantizer& quantizer) {
  const Traits& traits = traits_of(quantizer.kind.parameterization);
  TORCH_CHECK(std::string_view(traits.family) == "beta_gamma", at,
              ": a live range needs factors, those of beta_gamma or symmetric_gamma");
  const QuantizerKind kind = checked_kind(at, quantizer.kind, quantizer.token);
  check_elements(at, "x", x);
  check_group(at, x, quantizer.group);
  const bool two = traits.second[0] != '\0';
  TORCH_CHECK(has_second(quantizer) == two, at, ": takes ", two ? "two factors" : "one factor",
              ", got ", two ? "one" : "two");
  NamedTensors factors;
  factors.add(traits.first, quantizer.first);
  if (two) factors.add(traits.second, *quantizer.second);
  check_alike(at, factors, x.scalar_type() == at::kDouble);
  TORCH_CHECK(quantizer.first.device() == x.device(), at, ": ", traits.first,
              " must be on x's device ", x.device(), ", got ", quantizer.first.device());
  check_factors(at, traits.first, x, quantizer);
  return kind;
}

QuantizerKind check_fake_quantize_dynamic_backward(const at::Tensor& grad, const at::Tensor& x,
                                                   const LiveQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize_dynamic(x, quantizer);
  check_grad(where_dynamic(traits_of(quantizer.kind.parameterization)), "x", grad, x);
  return kind;
}

LiveGroups::LiveGroups(const at::Tensor& x, const LiveQuantizer& quantizer)
    : given_(x),
      x_(x),
      first_(quantizer.first.contiguous()),
      second_(has_second(quantizer) ? quantizer.second->contiguous() : at::Tensor()),
      size_(quantizer.group.value_or(x.size(-1))),
      count_(size_ == 0 ? 0 : x.numel() / size_),
      factors_(first_.numel()) {
  // Where every row has the same factors, the order of rows does not matter.
  const bool rows_are_alike = factors_ == 1 || factors_ == groups_of_row(x, quantizer);
  const bool innermost = x.is_non_overlapping_and_dense() && (x.stride(-1) == 1 || x.size(-1) == 1);
  if (!rows_are_alike || !innermost) x_ = x.contiguous();
}

at::Tensor LiveGroups::match(const at::Tensor& grad) const { return match_layout(grad, x_); }

at::Tensor LiveGroups::restore(at::Tensor result) const {
  if (x_.is_same(given_)) return result;
  at::Tensor restored = at::empty_like(given_);
  return restored.strides() == result.strides() ? result : restored.copy_(result);
}

at::Tensor fake_quantize_dynamic_beta_gamma(const at::Tensor& x, const at::Tensor& beta,
                                            const at::Tensor& gamma, std::optional<int64_t> group,
                                            int64_t bits, bool sigmoid, double eps,
                                            std::string_view link, double gradient_scale) {
  return fake_quantize_dynamic_op(
      x, {beta,
          gamma,
          group,
          {find_parameterization("beta_gamma", false), bits, eps,
           link_number(Where{"fake_quantize_dynamic_beta_gamma"}, sigmoid, link), gradient_scale},
          /*token=*/true});
}

at::Tensor fake_quantize_dynamic_symmetric_gamma(const at::Tensor& x, const at::Tensor& gamma,
                                                 std::optional<int64_t> group, int64_t bits,
                                                 bool sigmoid, bool full_range, double eps,
                                                 std::string_view link, double gradient_scale) {
  return fake_quantize_dynamic_op(
      x,
      {gamma,
       {},
       group,
       {find_parameterization("beta_gamma", true, full_range), bits, eps,
        link_number(Where{"fake_quantize_dynamic_symmetric_gamma"}, sigmoid, link), gradient_scale},
       /*token=*/true});
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("fake_quantize_dynamic_beta_gamma", fake_quantize_dynamic_beta_gamma);
  m.impl("fake_quantize_dynamic_symmetric_gamma", fake_quantize_dynamic_symmetric_gamma);
  m.impl("_fake_quantize_live", fake_quantize_live);
}

}  // namespace asymq
