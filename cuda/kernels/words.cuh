// Vectors of elements as kernels hold them, and their extrema.
#pragma once

#include <cstring>

#include "asymq/live_range.h"
#include "kernels/device.cuh"

namespace asymq::cuda {

/// What one access moves. 16-bit elements of a vector stay in pairs until they are used: apart,
/// each would take a register.
template <class S, bool kVectorized>
constexpr bool kPaired = kVectorized && sizeof(S) == 2;
template <class S, bool kVectorized>
using Word = std::conditional_t<kPaired<S, kVectorized>, uint32_t, S>;
template <class S, bool kVectorized>
using Words = Vector<Word<S, kVectorized>, kVectorized ? 16 / sizeof(Word<S, kVectorized>) : 1>;

template <class S>
using Pair = std::conditional_t<std::is_same_v<S, __half>, __half2, __nv_bfloat162>;

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class S>
__device__ __forceinline__ float2 widen_pair(uint32_t pair) {
  if constexpr (std::is_same_v<S, __half>) {
    return __half22float2(bits_as<__half2>(pair));
  } else {
    return {bits_as<float>(pair << 16), bits_as<float>(pair & 0xffff0000u)};
  }
}

template <class S>
__device__ __forceinline__ uint32_t narrow_pair(float2 values) {
  if constexpr (std::is_same_v<S, __half>) {
    return bits_as<uint32_t>(__float22half2_rn(values));
  } else {
    return bits_as<uint32_t>(__float22bfloat162_rn(values));
  }
}

// Smaller and larger of two; NaN if one is.
__device__ __forceinline__ float smaller(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b < a || b != b ? b : a;
#endif
}
__device__ __forceinline__ float larger(float a, float b) {
#if __CUDA_ARCH__ >= 800
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return b > a || b != b ? b : a;
#endif
}
__device__ __forceinline__ double smaller(double a, double b) { return b < a || b != b ? b : a; }
__device__ __forceinline__ double larger(double a, double b) { return b > a || b != b ? b : a; }

template <class T>
__device__ __forceinline__ void include(Extrema<T>& extrema, const Extrema<T>& others) {
  extrema.min = smaller(extrema.min, others.min);
  extrema.max = larger(extrema.max, others.max);
}

template <class T>
__device__ __forceinline__ Extrema<T> no_extrema() {
  return {static_cast<T>(INFINITY), static_cast<T>(-INFINITY)};
}

/// Extrema as vectors have them: of 16-bit elements, of each half of a pair.
template <class S, bool kVectorized>
class Search {
 public:
  __device__ __forceinline__ void include_vector(const Words<S, kVectorized>& vector) {
#pragma unroll
    for (const auto word : vector.values) {
      if constexpr (kPaired<S, kVectorized>) {
        min_ = __hmin2_nan(min_, bits_as<Pair<S>>(word));
        max_ = __hmax2_nan(max_, bits_as<Pair<S>>(word));
      } else {
        include(found_, {widen(word), widen(word)});
      }
    }
  }

  __device__ __forceinline__ Extrema<Compute<S>> result() const {
    if constexpr (kPaired<S, kVectorized>) {
      const float2 min = widen_pair<S>(bits_as<uint32_t>(min_));
      const float2 max = widen_pair<S>(bits_as<uint32_t>(max_));
      return {smaller(min.x, min.y), larger(max.x, max.y)};
    } else {
      return found_;
    }
  }

 private:
  struct None {};
  using Half = std::conditional_t<kPaired<S, kVectorized>, Pair<S>, None>;
  Extrema<Compute<S>> found_ = no_extrema<Compute<S>>();
  Half min_ = both<Half>(INFINITY), max_ = both<Half>(-INFINITY);

  template <class H>
  static __device__ __forceinline__ H both(float value) {
    if constexpr (std::is_same_v<H, None>) {
      return {};
    } else {
      return bits_as<H>(narrow_pair<S>({value, value}));
    }
  }
};

template <class T>
__device__ __forceinline__ Extrema<T> over_lanes(Extrema<T> extrema, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) {
    include(extrema,
            {__shfl_xor_sync(~0u, extrema.min, step), __shfl_xor_sync(~0u, extrema.max, step)});
  }
  return extrema;
}

template <class S, bool kVectorized>
__device__ __forceinline__ Words<S, kVectorized> load_words(const S* from) {
  return *reinterpret_cast<const Words<S, kVectorized>*>(from);
}

template <class S, bool kVectorized>
__device__ __forceinline__ void store_words(S* to, const Words<S, kVectorized>& words) {
  *reinterpret_cast<Words<S, kVectorized>*>(to) = words;
}

}  // namespace asymq::cuda
