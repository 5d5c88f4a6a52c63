// From torch to the launchers of kernels that take rows: the last axis of contiguous tensors.
#pragma once

#include <limits>
#include <optional>

#include "common.h"

namespace asymq::cuda {

/// x contiguous, where 16-byte accesses may start.
inline at::Tensor aligned_rows(const at::Tensor& x) {
  const at::Tensor dense = x.contiguous();
  return aligned(dense) ? dense : dense.clone();
}

/// Whether rows are whole vectors of 16 bytes.
inline bool in_vectors(const at::Tensor& x) {
  return x.dim() > 0 && x.size(-1) > 0 && x.size(-1) * x.element_size() % 16 == 0 &&
         x.size(-1) <= std::numeric_limits<int>::max();
}

inline int64_t vectors_of_row(const at::Tensor& x) { return x.size(-1) * x.element_size() / 16; }
inline int64_t rows_of(const at::Tensor& x) { return x.numel() / x.size(-1); }

/// Whether it is a quantizer at the end of rows: none, one with one range, or one whose range is
/// that of the whole row.
inline bool is_of_rows(const std::optional<CheckedQuantizer>& quantizer, const at::Tensor& x) {
  return !quantizer.has_value() || !quantizer->token ||
         quantizer->group.value_or(x.size(-1)) == x.size(-1);
}

/// A quantizer, or none, as such kernels take it, and the gradients of its learned parameters.
class DeviceRowQuantizer {
 public:
  explicit DeviceRowQuantizer(const std::optional<CheckedQuantizer>& quantizer,
                              bool needs_first = false, bool needs_second = false) {
    if (!quantizer.has_value()) return;
    device_.emplace(*quantizer, needs_first, needs_second);
    ends_ = quantizer->token ? Ends::kToken : Ends::kStored;
    range_ = quantizer->ranges.first;
    first = device_->first;
    second = device_->second;
  }

  template <class P>
  RowQuantizer<P> pointers() const {
    if (!device_.has_value()) return {};
    return {device_->pointers<P>(), ends_};
  }

  /// A tensor of the ranges' type; without any, of the type of ranges that goes with any x.
  at::Tensor range_like(const at::Tensor& x) const {
    return range_.defined() ? range_ : at::empty({0}, x.options().dtype(at::kFloat));
  }

  at::Tensor first, second;

 private:
  std::optional<DeviceQuantizer> device_;
  Ends ends_ = Ends::kNone;
  at::Tensor range_;
};

}  // namespace asymq::cuda
