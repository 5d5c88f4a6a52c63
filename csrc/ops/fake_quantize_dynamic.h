// The private operators behind the fake-quantize functions of a live range: of a token, whose
// factors all tokens share, and of a weight's rows or groups.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "ops/checks.h"
#include "ops/flat.h"
#include "ops/quantizer.h"

namespace asymq {

/// A quantizer whose ends come from the groups of x (asymq/live_range.h).
/// first, second: the learned factors, second where the parameterization has one; of one shape,
///     with 1 value, one for every group of a row, or, of a weight, one for every group.
/// group: how many elements of the last axis make a group; none: all of them.
/// kind: of a BetaGamma or SymmetricGamma.
/// token: whether the range is that of a token, or of a weight.
struct LiveQuantizer {
  const at::Tensor& first;
  const OptionalTensor& second;
  std::optional<int64_t> group;
  KindArguments kind;
  bool token;
};

template <>
struct Flat<const LiveQuantizer&> {
  using Types = std::tuple<const at::Tensor&, const OptionalTensor&, std::optional<int64_t>,
                           int64_t, int64_t, double, int64_t, double, bool>;
  static Types write(const LiveQuantizer& q) {
    const auto& [parameterization, bits, eps, link, gradient_scale] = q.kind;
    return {q.first, q.second, q.group, parameterization, bits, eps, link, gradient_scale, q.token};
  }
  static LiveQuantizer read(const at::Tensor& first, const OptionalTensor& second,
                            std::optional<int64_t> group, int64_t parameterization, int64_t bits,
                            double eps, int64_t link, double gradient_scale, bool token) {
    return {first, second, group, {parameterization, bits, eps, link, gradient_scale}, token};
  }
};

inline std::string live_quantizer_schema() {
  return "Tensor first, Tensor? second, int? group, " + kind_schema() + ", bool token";
}

inline constexpr Op<"asymq::_fake_quantize_dynamic",
                    at::Tensor(const at::Tensor& x, const LiveQuantizer& quantizer)>
    fake_quantize_dynamic_op;

/// dL/dx, then the gradients of first and second.
inline constexpr Op<"asymq::_fake_quantize_dynamic_backward",
                    std::tuple<at::Tensor, at::Tensor, at::Tensor>(
                        const at::Tensor& grad, const at::Tensor& x, const LiveQuantizer& quantizer,
                        std::array<bool, 3> needs)>
    fake_quantize_dynamic_backward_op;

/// Returns the kind of a token's or a weight's quantizer.
QuantizerKind check_fake_quantize_dynamic(const at::Tensor& x, const LiveQuantizer& quantizer);

/// The same, of the quantizer that errors call `at`.
QuantizerKind check_live(const Where& at, const at::Tensor& x, const LiveQuantizer& quantizer);

/// The same, and of the upstream gradient.
QuantizerKind check_fake_quantize_dynamic_backward(const at::Tensor& grad, const at::Tensor& x,
                                                   const LiveQuantizer& quantizer);

/// The groups of a checked call, one after another in memory.
class LiveGroups {
 public:
  LiveGroups(const at::Tensor& x, const LiveQuantizer& quantizer);

  /// x itself where it is dense and its last axis innermost, whatever the order of the others (a
  /// view of heads, say), else contiguous: then one copy. Its elements in the order of memory are
  /// `count` groups of `size`, and group i has the factor i % factors.
  const at::Tensor& x() const { return x_; }
  int64_t size() const { return size_; }
  int64_t count() const { return count_; }
  int64_t factors() const { return factors_; }

  /// The factors, contiguous. second: undefined where there is none.
  const at::Tensor& first() const { return first_; }
  const at::Tensor& second() const { return second_; }

  /// A gradient of x's shape in the memory layout of x().
  at::Tensor match(const at::Tensor& grad) const;

  /// A result in the memory layout of x() in that of empty_like of the x that came.
  at::Tensor restore(at::Tensor result) const;

 private:
  at::Tensor given_, x_, first_, second_;
  int64_t size_, count_, factors_;
};

}  // namespace asymq
