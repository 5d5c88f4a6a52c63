// The public functions. They serve C++ callers, and the dispatcher as the decomposition of the
// public operators into the private ones.
#include "asymq/fake_quantize.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <string>

#include "asymq/parameterization.h"
#include "ops/arguments.h"
#include "ops/fake_quantize.h"

namespace asymq {
namespace {

using ForwardOp = at::Tensor(const at::Tensor&, const at::Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const OptionalTensor&, int64_t, int64_t,
                             double);
using BackwardOp = std::tuple<at::Tensor, at::Tensor, at::Tensor>(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const OptionalTensor&,
    const OptionalTensor&, const OptionalTensor&, int64_t, int64_t, double, std::array<bool, 3>);

template <class Signature>
c10::TypedOperatorHandle<Signature> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

/// Position of a parameterization in Parameterizations, as the private operators name it.
template <class Parameterization>
constexpr int64_t id() {
  constexpr Traits traits = Parameterization::traits;
  return find_parameterization(traits.family, traits.symmetric, traits.sigmoid);
}

std::vector<at::Tensor> effective_scale_offset_list(std::string_view parameterization,
                                                    at::TensorList parameters, int64_t bits,
                                                    bool symmetric, bool sigmoid, double eps) {
  const auto [scale, offset] =
      effective_scale_offset(parameterization, parameters, bits, symmetric, sigmoid, eps);
  return offset.has_value() ? std::vector<at::Tensor>{scale, *offset}
                            : std::vector<at::Tensor>{scale};
}

/// A new tensor of `like`'s shape and dtype, never an alias of an argument.
at::Tensor new_like(const at::Tensor& like, const at::Tensor& values) {
  return values.to(like.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

at::Tensor new_like(const at::Tensor& like, double value) { return at::full_like(like, value); }

}  // namespace

at::Tensor fake_quantize_op(const at::Tensor& x, const at::Tensor& first,
                            const OptionalTensor& second, const OptionalTensor& min,
                            const OptionalTensor& max, int64_t parameterization, int64_t bits,
                            double eps) {
  static const auto op = find_op<ForwardOp>("asymq::_fake_quantize");
  return op.call(x, first, second, min, max, parameterization, bits, eps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_op(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& first,
    const OptionalTensor& second, const OptionalTensor& min, const OptionalTensor& max,
    int64_t parameterization, int64_t bits, double eps, std::array<bool, 3> needs) {
  static const auto op = find_op<BackwardOp>("asymq::_fake_quantize_backward");
  return op.call(grad, x, first, second, min, max, parameterization, bits, eps, needs);
}

at::Tensor fake_quantize_scale_offset(const at::Tensor& x, const at::Tensor& scale,
                                      const at::Tensor& offset, int64_t bits, double eps) {
  return fake_quantize_op(x, scale, offset, {}, {}, id<ScaleOffsetParameterization>(), bits, eps);
}

at::Tensor fake_quantize_min_max(const at::Tensor& x, const at::Tensor& min, const at::Tensor& max,
                                 int64_t bits, double eps) {
  return fake_quantize_op(x, min, max, {}, {}, id<MinMax>(), bits, eps);
}

at::Tensor fake_quantize_beta_gamma(const at::Tensor& x, const at::Tensor& beta,
                                    const at::Tensor& gamma, const at::Tensor& min,
                                    const at::Tensor& max, int64_t bits, bool sigmoid, double eps) {
  return fake_quantize_op(x, beta, gamma, min, max,
                          sigmoid ? id<BetaGamma<true>>() : id<BetaGamma<false>>(), bits, eps);
}

at::Tensor fake_quantize_kscale_koffset(const at::Tensor& x, const at::Tensor& kscale,
                                        const at::Tensor& koffset, int64_t bits, double eps) {
  return fake_quantize_op(x, kscale, koffset, {}, {}, id<KscaleKoffset>(), bits, eps);
}

at::Tensor fake_quantize_symmetric_scale(const at::Tensor& x, const at::Tensor& scale, int64_t bits,
                                         double eps) {
  return fake_quantize_op(x, scale, {}, {}, {}, id<SymmetricScale>(), bits, eps);
}

at::Tensor fake_quantize_symmetric_max(const at::Tensor& x, const at::Tensor& max, int64_t bits,
                                       double eps) {
  return fake_quantize_op(x, max, {}, {}, {}, id<SymmetricMax>(), bits, eps);
}

at::Tensor fake_quantize_symmetric_gamma(const at::Tensor& x, const at::Tensor& gamma,
                                         const at::Tensor& max, int64_t bits, bool sigmoid,
                                         double eps) {
  return fake_quantize_op(x, gamma, {}, {}, max,
                          sigmoid ? id<SymmetricGamma<true>>() : id<SymmetricGamma<false>>(), bits,
                          eps);
}

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                    int64_t bits, double eps) {
  static const auto op = find_op<decltype(quantize)>("asymq::quantize");
  return op.call(x, scale, offset, bits, eps);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale,
                      const OptionalTensor& offset, int64_t bits, double eps) {
  static const auto op = find_op<decltype(dequantize)>("asymq::dequantize");
  return op.call(codes, scale, offset, bits, eps);
}

std::tuple<at::Tensor, OptionalTensor> effective_scale_offset(std::string_view parameterization,
                                                              at::TensorList parameters,
                                                              int64_t bits, bool symmetric,
                                                              bool sigmoid, double eps) {
  const int64_t id =
      find_parameterization("effective_scale_offset", parameterization, symmetric, sigmoid);
  const ListedRanges ranges("effective_scale_offset", traits_of(id), parameters);

  using Op = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const OptionalTensor&,
                                                const OptionalTensor&, const OptionalTensor&,
                                                int64_t, int64_t, double);
  static const auto op = find_op<Op>("asymq::_effective_scale_offset");
  const auto [scale, offset] =
      op.call(ranges.first, ranges.second, ranges.min, ranges.max, id, bits, eps);
  return {scale, symmetric ? OptionalTensor() : OptionalTensor(offset)};
}

std::vector<at::Tensor> parameters_of_range(std::string_view parameterization,
                                            const at::Tensor& min, const at::Tensor& max,
                                            int64_t bits, bool symmetric, bool sigmoid) {
  constexpr const char* op = "parameters_of_range";
  const int64_t id = find_parameterization(op, parameterization, symmetric, sigmoid);
  check_ends(op, min, max, bits);
  const at::Tensor low = min.detach().to(at::kDouble), high = max.detach().to(at::kDouble);
  std::vector<at::Tensor> result;
  visit_parameterization(id, Parameterizations{}, [&](auto visited) {
    const auto [first, second] = visited.first_values(low, high, grid_steps<double>(bits));
    result.push_back(new_like(max, first));
    if (visited.traits.second[0] != '\0') result.push_back(new_like(max, second));
  });
  return result;
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("fake_quantize_scale_offset", fake_quantize_scale_offset);
  m.impl("fake_quantize_min_max", fake_quantize_min_max);
  m.impl("fake_quantize_beta_gamma", fake_quantize_beta_gamma);
  m.impl("fake_quantize_kscale_koffset", fake_quantize_kscale_koffset);
  m.impl("fake_quantize_symmetric_scale", fake_quantize_symmetric_scale);
  m.impl("fake_quantize_symmetric_max", fake_quantize_symmetric_max);
  m.impl("fake_quantize_symmetric_gamma", fake_quantize_symmetric_gamma);
  m.impl("effective_scale_offset", effective_scale_offset_list);
  m.impl("parameters_of_range", parameters_of_range);
}

}  // namespace asymq
