// The types that kernels come in, listed once. Every launcher is instantiated by these lists, and
// the way from torch's dtypes to a launcher (common.h) goes through them.
//
//   S  elements     P  ranges     Code  codes of quantize
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

/// apply(S, P): ranges are float, or double where elements are.
#define ASYMQ_FOR_EACH_TYPE(apply)                                                          \
  apply(float, float) apply(__half, float) apply(__nv_bfloat16, float) apply(double, float) \
      apply(double, double)

/// apply(S): what tensor cores multiply, with sums in float.
#define ASYMQ_FOR_EACH_TENSOR_CORE_TYPE(apply) apply(float) apply(__half) apply(__nv_bfloat16)

/// apply(P)
#define ASYMQ_FOR_EACH_RANGE_TYPE(apply) apply(float) apply(double)

/// apply(Code, ...)
#define ASYMQ_FOR_EACH_CODE_TYPE(apply, ...)                                         \
  apply(uint8_t, __VA_ARGS__) apply(int8_t, __VA_ARGS__) apply(int16_t, __VA_ARGS__) \
      apply(int32_t, __VA_ARGS__)

/// apply(Code, ...): the bits of a code of each size, signed or not.
#define ASYMQ_FOR_EACH_CODE_SIZE(apply, ...) \
  apply(uint8_t, __VA_ARGS__) apply(uint16_t, __VA_ARGS__) apply(uint32_t, __VA_ARGS__)
