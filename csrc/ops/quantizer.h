// A quantizer on its way down from the public functions to the kernels: one argument.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>

#include "asymq/fake_quantize.h"
#include "asymq/parameterization.h"

namespace asymq {

using OptionalTensor = std::optional<at::Tensor>;

/// Names of the parameterization at this position of Parameterizations; throws outside it.
const Traits& traits_of(int64_t parameterization);

/// Position of the parameterization that users name by its family; throws where there is none.
int64_t find_parameterization(const char* op, std::string_view family, bool symmetric,
                              bool full_range);

/// What a quantizer is beside its tensors, as the private operators have it, not checked yet.
/// parameterization: its position in Parameterizations. link: its number.
struct KindArguments {
  int64_t parameterization, bits;
  double eps;
  int64_t link = 0;
  double gradient_scale = 1;
};

inline KindArguments arguments_of(const QuantizerKind& kind) {
  return {kind.parameterization, kind.bits, kind.eps, static_cast<int64_t>(kind.link),
          kind.gradient_scale};
}

/// The range tensors of a quantizer, in the order of Traits.
struct RangeTensors {
  const at::Tensor& first;
  const OptionalTensor& second;
  const OptionalTensor& min;
  const OptionalTensor& max;
};

/// A quantizer with ranges of any granularity, as the operators have it that only quantize.
struct GranularQuantizer {
  RangeTensors ranges;
  KindArguments kind;
};

/// The parameterization of no quantizer at all, for operators that can do without one.
inline constexpr int64_t kNoQuantizer = -1;

/// A quantizer as the operators have it that do more than quantize. ranges: the tensors that the
/// parameterization has, in the order of Traits; of a token's range the factors alone. token,
/// group: as in RangeArguments.
struct QuantizerArguments {
  at::TensorList ranges;
  KindArguments kind;
  bool token = false;
  std::optional<int64_t> group = std::nullopt;

  bool exists() const { return kind.parameterization != kNoQuantizer; }
};

/// What the private operators take for what users give to `op`.
QuantizerArguments by_position(const char* op, const RangeArguments& range);
QuantizerArguments by_position(const char* op, const std::optional<RangeArguments>& range);

/// The tensors of a list, each in its place.
struct ListedRanges {
  at::Tensor first;
  OptionalTensor second, min, max;

  /// Throws, naming op and parameter, where the list does not have what the traits say. token: it
  /// has no constants.
  ListedRanges(const char* op, const Traits& traits, at::TensorList list, bool token = false);

  /// References to these; of a temporary, they would dangle.
  RangeTensors tensors() const& { return {first, second, min, max}; }
  RangeTensors tensors() const&& = delete;
};

/// A quantizer with one range, or with one of each token, checked.
struct CheckedQuantizer {
  QuantizerKind kind;
  ListedRanges ranges;
  bool token = false;
  std::optional<int64_t> group = std::nullopt;

  /// For the operators that only quantize. Of a stored range. References to these, as above.
  GranularQuantizer granular() const& { return {ranges.tensors(), arguments_of(kind)}; }
  GranularQuantizer granular() const&& = delete;
};

/// A quantizer before and one after another function.
struct QuantizerPair {
  CheckedQuantizer before, after;
};

/// The type that elements of this type compute in.
inline at::ScalarType compute_dtype(at::ScalarType element) {
  return element == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace asymq
