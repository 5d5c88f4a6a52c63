#include "ops/quantizer.h"

#include <c10/util/Exception.h>

#include <iterator>

#include "ops/checks.h"

namespace asymq {

const Traits& traits_of(int64_t parameterization) {
  const int64_t count = std::size(Parameterizations::traits);
  TORCH_CHECK(parameterization >= 0 && parameterization < count,
              "asymq: parameterization must be between 0 and ", count - 1, ", got ",
              parameterization);
  return Parameterizations::traits[parameterization];
}

int64_t find_parameterization(const char* op, std::string_view family, bool symmetric,
                              bool full_range) {
  const int id = asymq::find_parameterization(family, symmetric, full_range);
  TORCH_CHECK(
      id >= 0, "asymq::", op,
      ": parameterization must be scale_offset, min_max, beta_gamma or kscale_koffset, "
      "full_range belongs to symmetric, and kscale_koffset has no symmetric counterpart; got ",
      family, symmetric ? ", symmetric" : "", full_range ? ", full_range" : "");
  return id;
}

QuantizerArguments by_position(const char* op, const RangeArguments& range) {
  return {range.parameters,
          {find_parameterization(op, range.parameterization, range.symmetric, range.full_range),
           range.bits, range.eps, link_number(Where{op}, range.sigmoid, range.link),
           range.gradient_scale},
          range.token,
          range.group};
}

QuantizerArguments by_position(const char* op, const std::optional<RangeArguments>& range) {
  if (!range.has_value()) return {{}, {kNoQuantizer, 8, 1}};
  return by_position(op, *range);
}

ListedRanges::ListedRanges(const char* op, const Traits& traits, at::TensorList list, bool token) {
  size_t used = 0;
  const auto take = [&](const char* name) -> OptionalTensor {
    if (name[0] == '\0') return std::nullopt;
    TORCH_CHECK(used < list.size(), "asymq::", op, ": ", traits.name, " needs the parameter ", name,
                ", got ", list.size(), " parameters");
    return list[used++];
  };
  first = *take(traits.first);
  second = take(traits.second);
  if (!token) {
    min = take(traits.min);
    max = take(traits.max);
  }
  TORCH_CHECK(used == list.size(), "asymq::", op, ": ", traits.name, " needs ", used,
              " parameters, got ", list.size());
}

}  // namespace asymq
