// Products of tiles on tensor cores, from shared memory: what a warp holds of them, and the
// instructions behind. For compute capability 8.0 and later.
//
// A tile of S lies in shared memory in rows of `stride` elements, 16 bytes longer than the tile is
// wide: eight rows of 16 bytes then come from all banks. float takes the tensor cores' TF32, to
// which its elements have been rounded before (`round_to_tensor_core`).
//
// Of a product of 16 x 8, lane l holds the elements (l/4, 2(l%4)), (l/4, 2(l%4) + 1) and the two
// eight rows below: `Accumulator`. kDepth<S> elements, 32 bytes, of rows and columns go into one
// instruction.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/device.cuh"
#include "kernels/words.cuh"

namespace asymq::cuda {

template <class S>
inline constexpr int kDepth = 32 / sizeof(S);

/// Elements from row to row of a tile of `width` columns in shared memory.
template <class S, int kWidth>
constexpr int kSharedStride = kWidth + 16 / sizeof(S);

struct Accumulator {
  float values[4];
};

/// Operands of one instruction: 16 rows, and 8 columns, of kDepth elements.
struct RowsFragment {
  uint32_t words[4];
};
struct ColumnsFragment {
  uint32_t words[2];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800

/// Four matrices of 8 rows of 16 bytes; lane l gives the address of row l%8 of matrix l/8, and gets
/// of each matrix the four bytes at 4(l%4) of row l/4.
__device__ __forceinline__ void load_matrices(const void* row, uint32_t (&words)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

/// Matrices of 8 x 8 16-bit elements, transposed: of each, rows 2(l%4) and 2(l%4) + 1 of column
/// l/4.
__device__ __forceinline__ void load_matrices_transposed(const void* row, uint32_t (&words)[4]) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

#define ASYMQ_MMA(instruction)                                                          \
  asm("mma.sync.aligned." instruction                                                   \
      " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "                                 \
      "{%0, %1, %2, %3};"                                                               \
      : "+f"(to.values[0]), "+f"(to.values[1]), "+f"(to.values[2]), "+f"(to.values[3])  \
      : "r"(rows.words[0]), "r"(rows.words[1]), "r"(rows.words[2]), "r"(rows.words[3]), \
        "r"(columns.words[0]), "r"(columns.words[1]))

template <class S>
__device__ __forceinline__ void multiply_add(Accumulator& to, const RowsFragment& rows,
                                             const ColumnsFragment& columns) {
  if constexpr (std::is_same_v<S, float>) {
    ASYMQ_MMA("m16n8k8.row.col.f32.tf32.tf32.f32");
  } else if constexpr (std::is_same_v<S, __half>) {
    ASYMQ_MMA("m16n8k16.row.col.f32.f16.f16.f32");
  } else {
    ASYMQ_MMA("m16n8k16.row.col.f32.bf16.bf16.f32");
  }
}
#undef ASYMQ_MMA

/// 16 bytes on their way to shared memory; zeros where not `exists`.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool exists) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(exists ? 16 : 0)
               : "memory");
}

/// Until this thread's copies have arrived.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

/// Rounded to the 10 bits of TF32's fraction.
__device__ __forceinline__ float round_to_tensor_core(float value) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(value));
  return bits_as<float>(word);
}

/// 2^value.
__device__ __forceinline__ float exp2_approximately(float value) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
}

#else  // Hosts launch no kernel that would need these.

__device__ inline void load_matrices(const void*, uint32_t (&)[4]) { __trap(); }
__device__ inline void load_matrices_transposed(const void*, uint32_t (&)[4]) { __trap(); }
template <class S>
__device__ inline void multiply_add(Accumulator&, const RowsFragment&, const ColumnsFragment&) {
  __trap();
}
__device__ inline void copy_async(void*, const void*, bool) { __trap(); }
__device__ inline void wait_for_copies() { __trap(); }
__device__ inline float round_to_tensor_core(float value) { return value; }
__device__ inline float exp2_approximately(float value) { return value; }

#endif

/// 16 rows of kDepth elements, from `tile` on.
template <class S>
__device__ __forceinline__ RowsFragment load_rows(const S* tile, int stride) {
  const int lane = threadIdx.x % kWarp;
  RowsFragment rows;
  load_matrices(tile + lane % 16 * stride + lane / 16 * (kDepth<S> / 2), rows.words);
  return rows;
}

struct ColumnsPair {
  ColumnsFragment first, second;
};

/// 16 columns of kDepth elements, which are rows of the tile: the product is with its transpose.
template <class S>
__device__ __forceinline__ ColumnsPair load_columns(const S* tile, int stride) {
  const int lane = threadIdx.x % kWarp;
  uint32_t words[4];
  load_matrices(tile + (lane % 8 + lane / 16 * 8) * stride + lane / 8 % 2 * (kDepth<S> / 2), words);
  return {{words[0], words[1]}, {words[2], words[3]}};
}

/// kDepth rows of the tile, 16 columns wide: the product is with the tile itself. Of floats, the
/// rows are in the order in which `rows_of` takes them.
template <class S>
__device__ __forceinline__ ColumnsPair load_columns_across(const S* tile, int stride) {
  const int lane = threadIdx.x % kWarp;
  if constexpr (std::is_same_v<S, float>) {
    const float* from = tile + lane % 4 * 2 * stride + lane / 4;
    return {{bits_as<uint32_t>(from[0]), bits_as<uint32_t>(from[stride])},
            {bits_as<uint32_t>(from[8]), bits_as<uint32_t>(from[stride + 8])}};
  } else {
    uint32_t words[4];
    load_matrices_transposed(tile + lane % 16 * stride + lane / 16 * 8, words);
    return {{words[0], words[1]}, {words[2], words[3]}};
  }
}

/// What one product left, as the rows of the next: columns kDepth · step on.
template <class S, int kTiles>
__device__ __forceinline__ RowsFragment rows_of(const Accumulator (&tiles)[kTiles], int step) {
  if constexpr (std::is_same_v<S, float>) {
    // Elements 2i and 2i + 1 stand where the instruction has i and i + 4.
    const auto& v = tiles[step].values;
    return {{bits_as<uint32_t>(round_to_tensor_core(v[0])),
             bits_as<uint32_t>(round_to_tensor_core(v[2])),
             bits_as<uint32_t>(round_to_tensor_core(v[1])),
             bits_as<uint32_t>(round_to_tensor_core(v[3]))}};
  } else {
    const auto &left = tiles[2 * step].values, &right = tiles[2 * step + 1].values;
    return {{narrow_pair<S>({left[0], left[1]}), narrow_pair<S>({left[2], left[3]}),
             narrow_pair<S>({right[0], right[1]}), narrow_pair<S>({right[2], right[3]})}};
  }
}

/// to = 16 rows of one tile times (8 · kTiles rows of another) transposed, both `kWidth` wide.
template <int kWidth, class S, int kTiles>
__device__ __forceinline__ void multiply_transposed(Accumulator (&to)[kTiles], const S* rows,
                                                    const S* columns) {
  constexpr int kStride = kSharedStride<S, kWidth>;
#pragma unroll
  for (Accumulator& tile : to) tile = {};
#pragma unroll
  for (int depth = 0; depth < kWidth; depth += kDepth<S>) {
    const RowsFragment fragment = load_rows(rows + depth, kStride);
#pragma unroll
    for (int i = 0; i < kTiles; i += 2) {
      const ColumnsPair pair = load_columns(columns + 8 * i * kStride + depth, kStride);
      multiply_add<S>(to[i], fragment, pair.first);
      multiply_add<S>(to[i + 1], fragment, pair.second);
    }
  }
}

/// to += a product's 16 rows times (8 · kTiles rows of a tile), 8 · kColumns wide.
template <class S, int kColumns, int kTiles>
__device__ __forceinline__ void multiply_across(Accumulator (&to)[kColumns],
                                                const Accumulator (&rows)[kTiles], const S* tile) {
  constexpr int kStride = kSharedStride<S, 8 * kColumns>;
#pragma unroll
  for (int step = 0; step < 8 * kTiles / kDepth<S>; ++step) {
    const RowsFragment fragment = rows_of<S>(rows, step);
#pragma unroll
    for (int i = 0; i < kColumns; i += 2) {
      const ColumnsPair pair =
          load_columns_across(tile + step * kDepth<S> * kStride + 8 * i, kStride);
      multiply_add<S>(to[i], fragment, pair.first);
      multiply_add<S>(to[i + 1], fragment, pair.second);
    }
  }
}

}  // namespace asymq::cuda
