// What the CPU kernels share: the types they compute in, and the size of their tasks.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include <type_traits>

namespace asymq {

template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

/// Elements that are worth a task of their own.
constexpr int64_t kTaskElements = 32768;

/// Calls body(S{}, P{}) for the dtypes of elements and ranges.
template <class Body>
void dispatch_dtypes(const at::Tensor& x, const at::Tensor& range, const Body& body) {
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "asymq", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      if (range.scalar_type() == at::kDouble) return body(scalar_t{}, double{});
    }
    body(scalar_t{}, float{});
  });
}

}  // namespace asymq
