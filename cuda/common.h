// From torch to the launchers: what the operators share. Each checks, guards the device, allocates,
// dispatches the types, launches and checks the launch.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "kernels/plan.h"
#include "kernels/quantizer.h"
#include "kernels/types.h"
#include "ops/layout.h"
#include "ops/quantizer.h"

namespace asymq::cuda {

/// torch's name of a kernel's type.
template <class T>
inline constexpr at::ScalarType kDtype = c10::CppTypeToScalarType<T>::value;
template <>
inline constexpr at::ScalarType kDtype<__half> = at::kHalf;
template <>
inline constexpr at::ScalarType kDtype<__nv_bfloat16> = at::kBFloat16;

/// Calls body(S{}, P{}) for the types of elements and ranges.
template <class Body>
void dispatch_types(const at::Tensor& x, const at::Tensor& range, const Body& body) {
#define ASYMQ_CASE(S, P)                                                  \
  if (x.scalar_type() == kDtype<S> && range.scalar_type() == kDtype<P>) { \
    return body(S{}, P{});                                                \
  }
  ASYMQ_FOR_EACH_TYPE(ASYMQ_CASE)
#undef ASYMQ_CASE
  TORCH_INTERNAL_ASSERT(false, "no kernel for ", x.scalar_type(), " and ", range.scalar_type());
}

/// Calls body(P{}).
template <class Body>
void dispatch_range_types(const at::Tensor& range, const Body& body) {
#define ASYMQ_CASE(P) \
  if (range.scalar_type() == kDtype<P>) return body(P{});
  ASYMQ_FOR_EACH_RANGE_TYPE(ASYMQ_CASE)
#undef ASYMQ_CASE
  TORCH_INTERNAL_ASSERT(false, "no kernel for ", range.scalar_type());
}

/// Calls body(Code{}).
template <class Body>
void dispatch_code_types(const at::Tensor& codes, const Body& body) {
#define ASYMQ_CASE(Code, ...) \
  if (codes.scalar_type() == kDtype<Code>) return body(Code{});
  ASYMQ_FOR_EACH_CODE_TYPE(ASYMQ_CASE, )
#undef ASYMQ_CASE
  TORCH_INTERNAL_ASSERT(false, "no kernel for ", codes.scalar_type());
}

/// D: the kernel's type. Null where the tensor is undefined.
template <class D>
const D* input(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<const D*>(tensor.const_data_ptr()) : nullptr;
}

template <class D>
D* output(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<D*>(tensor.mutable_data_ptr()) : nullptr;
}

/// A tensor of this one's shape and options where it is wanted, or undefined.
inline at::Tensor empty_if(bool wanted, const at::Tensor& like) {
  return wanted ? at::empty(like.sizes(), like.options()) : at::Tensor();
}

/// A quantizer with one range as kernels take it, and the gradients of its learned parameters.
class DeviceQuantizer {
 public:
  explicit DeviceQuantizer(const CheckedQuantizer& quantizer, bool needs_first = false,
                           bool needs_second = false)
      : first(empty_if(needs_first, quantizer.ranges.first)),
        second(empty_if(needs_second, quantizer.ranges.first)),
        kind_(quantizer.kind),
        ranges_(quantizer.ranges.tensors()) {}

  template <class P>
  QuantizerPointers<P> pointers() const {
    return {kind_, ranges_.pointers<P>(), output<P>(first), output<P>(second)};
  }

  const at::Tensor first, second;

 private:
  QuantizerKind kind_;
  ContiguousRanges ranges_;
};

/// Whether 16-byte accesses may start where the tensor does.
inline bool aligned(const at::Tensor& tensor) {
  return !tensor.defined() || reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

inline bool all_aligned(std::initializer_list<at::Tensor> tensors) {
  return std::all_of(tensors.begin(), tensors.end(), aligned);
}

struct DeviceProperties {
  int multiprocessors = 0, major = 0;
};

/// Of the current device, asked for once. (at::cuda has them too, but its headers need those of
/// cuBLAS, cuSPARSE and cuSOLVER.)
inline const DeviceProperties& device_properties() {
  static const std::vector<DeviceProperties> all = [] {
    std::vector<DeviceProperties> devices(c10::cuda::device_count());
    for (int i = 0; auto& device : devices) {
      C10_CUDA_CHECK(
          cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, i));
      C10_CUDA_CHECK(cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, i));
      ++i;
    }
    return devices;
  }();
  return all.at(c10::cuda::current_device());
}

inline int multiprocessors() { return device_properties().multiprocessors; }

/// Whether a kernel may start while the one before it runs.
inline bool overlaps() { return device_properties().major >= 9; }

/// others: what else the kernel reads or writes. sums: it is a backward that sums.
inline Plan plan_for(const detail::Layout& layout, bool sums, const at::Tensor& x,
                     std::initializer_list<at::Tensor> others) {
  Plan plan = make_plan(layout, static_cast<int>(x.element_size()),
                        aligned(x) && all_aligned(others), sums, multiprocessors());
  plan.overlaps = overlaps();
  return plan;
}

/// Space for partial sums, or undefined where there are none.
inline at::Tensor workspace_if(bool wanted, int64_t doubles, const at::Tensor& x) {
  return wanted ? at::empty({doubles}, x.options().dtype(at::kDouble)) : at::Tensor();
}

}  // namespace asymq::cuda
