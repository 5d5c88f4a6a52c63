#include "ops/effective_scale_offset.h"

#include <torch/library.h>

#include "asymq/fake_quantize.h"
#include "ops/checks.h"

namespace asymq {
namespace {

constexpr const char* kScaleOffset = "effective_scale_offset";

std::vector<at::Tensor> as_list(std::string_view parameterization, at::TensorList parameters,
                                int64_t bits, bool symmetric, bool sigmoid, double eps,
                                bool full_range, std::string_view link) {
  const auto [scale, offset] = effective_scale_offset(parameterization, parameters, bits, symmetric,
                                                      sigmoid, eps, full_range, link);
  return offset.has_value() ? std::vector<at::Tensor>{scale, *offset}
                            : std::vector<at::Tensor>{scale};
}

}  // namespace

QuantizerKind check_effective_scale_offset(const GranularQuantizer& quantizer) {
  const Traits& traits = traits_of(quantizer.kind.parameterization);
  const Where where{kScaleOffset, ": ", traits.name};
  const QuantizerKind kind = checked_kind(where, quantizer.kind);
  check_alike(where, name_ranges(where, traits, quantizer.ranges), /*wide=*/true);
  return kind;
}

std::tuple<at::Tensor, OptionalTensor> effective_scale_offset(
    std::string_view parameterization, at::TensorList parameters, int64_t bits, bool symmetric,
    bool sigmoid, double eps, bool full_range, std::string_view link) {
  const int64_t id = find_parameterization(kScaleOffset, parameterization, symmetric, full_range);
  const ListedRanges ranges(kScaleOffset, traits_of(id), parameters);
  const auto [scale, offset] = effective_scale_offset_op(
      {ranges.tensors(), {id, bits, eps, link_number(Where{kScaleOffset}, sigmoid, link)}});
  return {scale, symmetric ? OptionalTensor() : OptionalTensor(offset)};
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("effective_scale_offset", as_list);
}

}  // namespace asymq
