// The public fake-quantize functions: they serve C++ callers, and the dispatcher as what the public
// operators decompose into.
#include "ops/fake_quantize.h"

#include <torch/library.h>

#include "asymq/fake_quantize.h"

namespace asymq {
namespace {

Where where(const Traits& traits) { return {"fake_quantize_", traits.name}; }

/// Position of a parameterization in Parameterizations, as the private operators name it.
template <class Parameterization>
constexpr int64_t id() {
  constexpr Traits traits = Parameterization::traits;
  return find_parameterization(traits.family, traits.symmetric, traits.full_range);
}

constexpr int64_t kIdentity = static_cast<int64_t>(Link::identity);

}  // namespace

QuantizerKind check_fake_quantize(const at::Tensor& x, const GranularQuantizer& quantizer) {
  const Traits& traits = traits_of(quantizer.kind.parameterization);
  const QuantizerKind kind = checked_kind(where(traits), quantizer.kind);
  check_elements(where(traits), "x", x);
  const NamedTensors named = name_ranges(where(traits), traits, quantizer.ranges);
  check_alike(where(traits), named, x.scalar_type() == at::kDouble);
  check_granularity(where(traits), x, named);
  return kind;
}

QuantizerKind check_fake_quantize_backward(const at::Tensor& grad, const at::Tensor& x,
                                           const GranularQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize(x, quantizer);
  check_grad(where(traits_of(quantizer.kind.parameterization)), "x", grad, x);
  return kind;
}

at::Tensor fake_quantize_scale_offset(const at::Tensor& x, const at::Tensor& scale,
                                      const at::Tensor& offset, int64_t bits, double eps,
                                      double gradient_scale) {
  return fake_quantize_op(
      x, {{scale, offset, {}, {}},
          {id<ScaleOffsetParameterization>(), bits, eps, kIdentity, gradient_scale}});
}

at::Tensor fake_quantize_min_max(const at::Tensor& x, const at::Tensor& min, const at::Tensor& max,
                                 int64_t bits, double eps, double gradient_scale) {
  return fake_quantize_op(
      x, {{min, max, {}, {}}, {id<MinMax>(), bits, eps, kIdentity, gradient_scale}});
}

at::Tensor fake_quantize_beta_gamma(const at::Tensor& x, const at::Tensor& beta,
                                    const at::Tensor& gamma, const at::Tensor& min,
                                    const at::Tensor& max, int64_t bits, bool sigmoid, double eps,
                                    std::string_view link, double gradient_scale) {
  return fake_quantize_op(
      x, {{beta, gamma, min, max},
          {id<BetaGamma>(), bits, eps,
           link_number(Where{"fake_quantize_beta_gamma"}, sigmoid, link), gradient_scale}});
}

at::Tensor fake_quantize_kscale_koffset(const at::Tensor& x, const at::Tensor& kscale,
                                        const at::Tensor& koffset, int64_t bits, double eps,
                                        double gradient_scale) {
  return fake_quantize_op(
      x, {{kscale, koffset, {}, {}}, {id<KscaleKoffset>(), bits, eps, kIdentity, gradient_scale}});
}

at::Tensor fake_quantize_symmetric_scale(const at::Tensor& x, const at::Tensor& scale, int64_t bits,
                                         double eps, bool full_range, double gradient_scale) {
  return fake_quantize_op(x, {{scale, {}, {}, {}},
                              {find_parameterization("scale_offset", true, full_range), bits, eps,
                               kIdentity, gradient_scale}});
}

at::Tensor fake_quantize_symmetric_max(const at::Tensor& x, const at::Tensor& max, int64_t bits,
                                       double eps, bool full_range, double gradient_scale) {
  return fake_quantize_op(x, {{max, {}, {}, {}},
                              {find_parameterization("min_max", true, full_range), bits, eps,
                               kIdentity, gradient_scale}});
}

at::Tensor fake_quantize_symmetric_gamma(const at::Tensor& x, const at::Tensor& gamma,
                                         const at::Tensor& max, int64_t bits, bool sigmoid,
                                         double eps, bool full_range, std::string_view link,
                                         double gradient_scale) {
  return fake_quantize_op(
      x, {{gamma, {}, {}, max},
          {find_parameterization("beta_gamma", true, full_range), bits, eps,
           link_number(Where{"fake_quantize_symmetric_gamma"}, sigmoid, link), gradient_scale}});
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("fake_quantize_scale_offset", fake_quantize_scale_offset);
  m.impl("fake_quantize_min_max", fake_quantize_min_max);
  m.impl("fake_quantize_beta_gamma", fake_quantize_beta_gamma);
  m.impl("fake_quantize_kscale_koffset", fake_quantize_kscale_koffset);
  m.impl("fake_quantize_symmetric_scale", fake_quantize_symmetric_scale);
  m.impl("fake_quantize_symmetric_max", fake_quantize_symmetric_max);
  m.impl("fake_quantize_symmetric_gamma", fake_quantize_symmetric_gamma);
}

}  // namespace asymq
