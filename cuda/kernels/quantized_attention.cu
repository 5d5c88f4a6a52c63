// Attention between quantizers of scores and probabilities, which stay on chip (the tiles are those
// of FlashAttention-2). A block takes 64 queries, or keys, a warp 16 of them, and goes over the
// others tile by tile.
//
// Forward: a probability is quantized after its division by the row's sum, so a first pass over the
// keys finds each row's largest score and sum, a second one the context.
// Backward: dL/dscore = p·(g - dot), where dot = Σ p·g is known after all keys alone. The kernel of
// the queries takes the nearby c = Σ context·dL/dcontext for it (near, as the context is of
// quantized probabilities) and sums what stands by dot - c beside, all linear in it. The kernel of
// the keys then knows dot.
#include "kernels/device.cuh"
#include "kernels/quantized_attention.h"
#include "kernels/quantizer_pair.cuh"
#include "kernels/tensor_cores.cuh"

namespace asymq::cuda {
namespace {

using detail::AttentionMask;
using detail::AttentionShape;

/// A grid whose quotients are products: scores and probabilities here are sums of rounded products,
/// so that no quotient is exact in the first place.
struct ApproximateGrid : Grid<float> {
  float reciprocal;
};

__device__ __forceinline__ float quotient(float x, const ApproximateGrid& grid) {
  return x * grid.reciprocal;
}

__device__ __forceinline__ ApproximateGrid approximate(const Grid<float>& grid) {
  const float reciprocal = 1.0f / grid.scale;
  // An infinite one would make NaN of 0.
  return {grid, reciprocal > 0x1p127f ? 0x1p127f : reciprocal};
}

struct ApproximateGrids {
  ApproximateGrid scores, probabilities;
};

template <class S>
__device__ __forceinline__ ApproximateGrids make_grids(const AttentionOperands<S>& op) {
  const auto grids = make_block_grids<float>(op.scores_quantizer, op.probabilities_quantizer);
  return {approximate(grids.before), approximate(grids.after)};
}

constexpr float kLog2E = 1.44269504f;

/// e^(score - largest). largest2: kLog2E · largest, rounded.
__device__ __forceinline__ float exponential(float score, float largest2) {
  return exp2_approximately(fma(score, kLog2E, -largest2));
}

/// What makes exponentials that were taken with another largest score such of this one.
__device__ __forceinline__ float rescaling(float before, float largest2) {
  return exp2_approximately(kLog2E * before - largest2);
}

/// Of the tokens that a block goes over: as many as keep two pairs of tiles below 72 KiB.
template <class S, int kWidth>
constexpr int kTileTokens = kWidth * sizeof(S) <= 256 ? 64 : 32;
/// In the backward, whose registers are scarcer.
constexpr int kBackwardTokens = 32;

template <class S, int kWidth, int kTokens>
constexpr int kTileElements = kTokens* kSharedStride<S, kWidth>;

/// Starts to bring tokens `first` on to shared memory; zeros where there are none, or no elements.
template <class S, int kWidth, int kTokens>
__device__ __forceinline__ void load_tile(S* to, const S* from, int64_t stride, int first,
                                          int tokens, int width) {
  constexpr int kCount = 16 / sizeof(S);
  constexpr int kChunks = kWidth / kCount;
#pragma unroll
  for (int i = threadIdx.x; i < kTokens * kChunks; i += kAttentionThreads) {
    const int token = i / kChunks, column = i % kChunks * kCount;
    const bool exists = first + token < tokens && column < width;
    copy_async(to + token * kSharedStride<S, kWidth> + column,
               exists ? from + (first + token) * stride + column : from, exists);
  }
}

/// Rounds what this thread has brought, once it is there.
template <class S, int kWidth, int kTokens>
__device__ __forceinline__ void round_tile(S* tile) {
  if constexpr (std::is_same_v<S, float>) {
    constexpr int kChunks = kWidth / 4;
#pragma unroll
    for (int i = threadIdx.x; i < kTokens * kChunks; i += kAttentionThreads) {
      float* at = tile + i / kChunks * kSharedStride<S, kWidth> + i % kChunks * 4;
      auto values = load_vector<4>(at);
      for (float& value : values.values) value = round_to_tensor_core(value);
      store_vector(at, values);
    }
  }
}

/// Two buffers of kElements elements each: a tile of tokens is brought while the one before is in
/// use. Calls load(buffer, i), settle(buffer), use(buffer, i) for i from first to last - 1.
template <class S, int kElements, class Load, class Settle, class Use>
__device__ __forceinline__ void for_each_tile(S* buffers, int first, int last, const Load& load,
                                              const Settle& settle, const Use& use) {
  __syncthreads();  // who uses them still
  if (first < last) load(buffers, first);
  for (int i = first; i < last; ++i) {
    S* buffer = buffers + (i - first) % 2 * kElements;
    wait_for_copies();
    settle(buffer);
    __syncthreads();
    if (i + 1 < last) load(buffers + (i + 1 - first) % 2 * kElements, i + 1);
    use(buffer, i);
  }
}

/// Which of the elements that a thread holds of a product are seen.
struct Sight {
  AttentionShape shape;
  AttentionMask<float> mask;  ///< its pointers at the block's batch and head

  /// Tokens from begin to end - 1.
  struct Span {
    int begin, end;
  };

  __device__ Sight(const AttentionShape& shape, const AttentionMask<float>& mask, int64_t batch,
                   int64_t head)
      : shape(shape), mask(mask) {
    const int64_t offset = batch * mask.strides[0] + head * mask.strides[1];
    if (mask.visible != nullptr) this->mask.visible += offset;
    if (mask.added != nullptr) this->mask.added += offset;
  }

  __device__ int keys() const { return static_cast<int>(shape.keys); }
  __device__ int queries() const { return static_cast<int>(shape.queries); }
  /// Keys that causality leaves to a query.
  __device__ int end(int query) const { return query + keys() - queries() + 1; }
  /// One of all keys and more hides none. 0: there is none.
  __device__ int window() const { return static_cast<int>(min(mask.window, shape.keys)); }

  /// Keys that some of the queries `first` to last see, by causality and window.
  __device__ Span keys_of(int first, int last) const {
    if (!mask.causal) return {0, keys()};
    return {window() > 0 ? max(0, end(first) - window()) : 0, max(0, min(keys(), end(last)))};
  }
  /// Queries that see some of the keys `first` to last.
  __device__ Span queries_of(int first, int last) const {
    if (!mask.causal) return {0, queries()};
    const int offset = keys() - queries();
    return {max(0, first - offset),
            window() > 0 ? max(0, min(queries(), last + window() - offset)) : queries()};
  }

  /// Whether every query `first_query` on sees every key first_key on, of so many.
  __device__ bool all(int first_query, int query_count, int first_key, int key_count) const {
    if (mask.visible != nullptr || mask.added != nullptr) return false;
    if (first_query + query_count > queries() || first_key + key_count > keys()) return false;
    if (!mask.causal) return true;
    return first_key + key_count <= end(first_query) &&
           (window() == 0 || first_key >= end(first_query + query_count - 1) - window());
  }

  __device__ bool operator()(int query, int key) const {
    if (query >= queries() || key >= keys()) return false;
    if (mask.causal && (key >= end(query) || (window() > 0 && key < end(query) - window()))) {
      return false;
    }
    if (mask.visible != nullptr) return mask.visible[place(query, key)];
    return mask.added == nullptr || !(mask.added[place(query, key)] <= mask.hides);
  }

  __device__ int64_t place(int query, int key) const {
    return query * mask.strides[2] + key * mask.strides[3];
  }
};

/// A product of 16 rows and 8 · kTiles columns, queries by keys or keys by queries: where the
/// elements are that this thread holds, and which of them are seen, a bit each.
template <bool kKeysAreRows, int kTiles>
struct Elements {
  int row, column;  ///< of the first
  uint32_t seen;    ///< bit 4·tile + element

  __device__ Elements(const Sight& sight, int first_row, int first_column)
      : row(first_row + threadIdx.x % kWarp / 4), column(first_column + threadIdx.x % 4 * 2) {
    constexpr int kColumns = 8 * kTiles;
    if (kKeysAreRows ? sight.all(first_column, kColumns, first_row, 16)
                     : sight.all(first_row, 16, first_column, kColumns)) {
      seen = ~0u;
      return;
    }
    seen = 0;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (sight(query(i, j), key(i, j))) seen |= 1u << (4 * i + j);
      }
    }
  }

  __device__ int query(int tile, int element) const {
    return kKeysAreRows ? column + 8 * tile + element % 2 : row + element / 2 * 8;
  }
  __device__ int key(int tile, int element) const {
    return kKeysAreRows ? row + element / 2 * 8 : column + 8 * tile + element % 2;
  }
  __device__ bool sees(int tile, int element) const { return seen >> (4 * tile + element) & 1; }

  /// Whether no element of the warp is seen, or all are.
  __device__ bool none() const { return __all_sync(~0u, seen == 0); }
  __device__ bool all() const { return __all_sync(~0u, seen == ~0u); }
};

/// What the softmax takes for a score that is seen.
template <bool kKeysAreRows, int kTiles>
__device__ __forceinline__ float masked_score(const Sight& sight,
                                              const Elements<kKeysAreRows, kTiles>& elements, int i,
                                              int j, float score, const ApproximateGrid& grid) {
  float quantized = fake_quantize_element(score, grid);
  if (sight.mask.added != nullptr && elements.sees(i, j)) {
    quantized += sight.mask.added[sight.place(elements.query(i, j), elements.key(i, j))];
  }
  return quantized;
}

/// The softmax of one row.
struct Row {
  float largest2;  ///< kLog2E times the largest score
  float inverse_sum;

  __device__ float probability(float masked) const {
    return exponential(masked, largest2) * inverse_sum;
  }
};

/// A row that sees no key has probabilities of 0.
__device__ __forceinline__ Row make_row(const float* statistics, int64_t index) {
  const auto both = load_vector<2>(statistics + 2 * index);
  if (both.values[0] == -INFINITY) return {0.0f, 0.0f};
  return {kLog2E * both.values[0], 1.0f / both.values[1]};
}

__device__ __forceinline__ float sum_quad(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

/// Where a block of 64 tokens stands. The blocks with the most to do come first: under causality,
/// the last queries, and the first keys.
struct BlockPlace {
  int64_t batch, head;
  int first;

  __device__ BlockPlace(const AttentionShape& shape, int64_t heads, int64_t tokens,
                        bool last_first) {
    const int64_t all = shape.batch * heads;
    const int64_t tile = blockIdx.x / all;
    batch = blockIdx.x % all / heads;
    head = blockIdx.x % heads;
    first =
        kAttentionRows * static_cast<int>(last_first ? (tokens - 1) / kAttentionRows - tile : tile);
  }
};

extern __shared__ __align__(16) unsigned char shared_memory[];

template <class S, int kColumns>
__device__ __forceinline__ void store_rows(const Heads<S>& to, const BlockPlace& place,
                                           int first_token, int64_t tokens, int width, float factor,
                                           const Accumulator (&tiles)[kColumns]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int token = first_token + lane / 4 + 8 * half;
    if (token >= tokens) continue;
    S* at = to.at(place.batch, place.head) + token * to.token + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      if (8 * i + lane % 4 * 2 >= width) continue;
      store_vector(at + 8 * i, Vector<S, 2>{narrow<S>(factor * tiles[i].values[2 * half]),
                                            narrow<S>(factor * tiles[i].values[2 * half + 1])});
    }
  }
}

template <class S, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward(AttentionOperands<S> op, Heads<S> out, float* __restrict__ statistics) {
  constexpr int kTokens = kTileTokens<S, kWidth>;
  constexpr int kElements = kTileElements<S, kWidth, kTokens>;
  constexpr int kTiles = kTokens / 8;
  const auto grids = make_grids(op);
  const AttentionShape& shape = op.shape;
  const BlockPlace place(shape, shape.heads, shape.queries, /*last_first=*/op.mask.causal);
  const Sight sight(shape, op.mask, place.batch, place.head);
  const int64_t key_head = place.head / (shape.heads / op.key_heads);
  const S* keys = op.key.at(place.batch, key_head);
  const S* values = op.value.at(place.batch, key_head);
  S* queries = reinterpret_cast<S*>(shared_memory);
  S* buffers = queries + kTileElements<S, kWidth, kAttentionRows>;

  load_tile<S, kWidth, kAttentionRows>(queries, op.query.at(place.batch, place.head),
                                       op.query.token, place.first, sight.queries(), op.width);
  wait_for_copies();
  round_tile<S, kWidth, kAttentionRows>(queries);

  const int first_row = place.first + threadIdx.x / kWarp * 16;
  const S* rows = queries + threadIdx.x / kWarp * 16 * kSharedStride<S, kWidth>;
  const auto span = sight.keys_of(place.first, place.first + kAttentionRows - 1);
  const int first = span.begin / kTokens, last = (span.end + kTokens - 1) / kTokens;
  const auto load_keys = [&](S* to, int i) {
    load_tile<S, kWidth, kTokens>(to, keys, op.key.token, i * kTokens, sight.keys(), op.width);
  };
  const auto masked_scores = [&](const Elements<false, kTiles>& elements, const S* tile,
                                 Accumulator(&scores)[kTiles]) {
    multiply_transposed<kWidth>(scores, rows, tile);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[i].values[j];
        score = masked_score(sight, elements, i, j, score * op.scaling, grids.scores);
      }
    }
    if (elements.all()) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (!elements.sees(i, j)) scores[i].values[j] = -INFINITY;
      }
    }
  };

  // Of rows l/4 and l/4 + 8, this thread's own columns until the end.
  float largest[2] = {-INFINITY, -INFINITY}, sums[2] = {};
  const auto round_keys = [](S* tile) { round_tile<S, kWidth, kTokens>(tile); };
  for_each_tile<S, 2 * kElements>(buffers, first, last, load_keys, round_keys, [&](S* tile, int t) {
    const Elements<false, kTiles> elements(sight, first_row, t * kTokens);
    if (elements.none()) return;
    Accumulator scores[kTiles];
    masked_scores(elements, tile, scores);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float found = largest[half];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        found = detail::larger(found, scores[i].values[2 * half]);
        found = detail::larger(found, scores[i].values[2 * half + 1]);
      }
      const float subtracted = found == -INFINITY ? 0.0f : kLog2E * found;
      float sum = sums[half] * rescaling(largest[half], subtracted);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        sum += exponential(scores[i].values[2 * half], subtracted);
        sum += exponential(scores[i].values[2 * half + 1], subtracted);
      }
      largest[half] = found;
      sums[half] = sum;
    }
  });
  Row softmax[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float of_row = detail::larger(largest[half], __shfl_xor_sync(~0u, largest[half], 1));
    of_row = detail::larger(of_row, __shfl_xor_sync(~0u, of_row, 2));
    const float subtracted = of_row == -INFINITY ? 0.0f : kLog2E * of_row;
    const float sum = sum_quad(sums[half] * rescaling(largest[half], subtracted));
    softmax[half] = {subtracted, 1.0f / sum};
    const int query = first_row + threadIdx.x % kWarp / 4 + 8 * half;
    if (threadIdx.x % 4 == 0 && query < sight.queries()) {
      const int64_t row = (place.batch * shape.heads + place.head) * shape.queries + query;
      store_vector(statistics + 2 * row, Vector<float, 2>{of_row, sum});
    }
  }

  Accumulator context[kWidth / 8] = {};
  const auto load_both = [&](S* to, int i) {
    load_keys(to, i);
    load_tile<S, kWidth, kTokens>(to + kElements, values, op.value.token, i * kTokens, sight.keys(),
                                  op.width);
  };
  const auto round_both = [](S* tile) {
    round_tile<S, kWidth, kTokens>(tile);
    round_tile<S, kWidth, kTokens>(tile + kElements);
  };
  for_each_tile<S, 2 * kElements>(buffers, first, last, load_both, round_both, [&](S* tile, int t) {
    const Elements<false, kTiles> elements(sight, first_row, t * kTokens);
    if (elements.none()) return;
    Accumulator scores[kTiles];
    masked_scores(elements, tile, scores);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float probability = softmax[j / 2].probability(scores[i].values[j]);
        const float quantized = fake_quantize_element(probability, grids.probabilities);
        scores[i].values[j] = elements.sees(i, j) ? quantized : 0.0f;
      }
    }
    multiply_across<S>(context, scores, tile + kElements);
  });
  store_rows(out, place, first_row, shape.queries, op.width, 1.0f, context);
}

/// Σ context · dL/dcontext of a row; two neighbouring threads take it, each every other vector.
template <class S>
__device__ __forceinline__ float row_product(const S* a, const S* b, int width) {
  constexpr int kCount = 16 / sizeof(S);
  float sum = 0;
  for (int i = threadIdx.x % 2 * kCount; i < width; i += 2 * kCount) {
    const auto x = load_vector<kCount>(a + i), y = load_vector<kCount>(b + i);
#pragma unroll
    for (int j = 0; j < kCount; ++j) sum = fma(widen(x.values[j]), widen(y.values[j]), sum);
  }
  return sum + __shfl_xor_sync(~0u, sum, 1);
}

template <class S, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_backward_queries(AttentionOperands<S> op, AttentionGradients<S> gradients,
                               RangeGradientsPair<float, float> ranges) {
  constexpr int kTokens = kBackwardTokens;
  constexpr int kElements = kTileElements<S, kWidth, kTokens>;
  constexpr int kTiles = kTokens / 8;
  allow_overlap();
  const auto grids = make_grids(op);
  const AttentionShape& shape = op.shape;
  const BlockPlace place(shape, shape.heads, shape.queries, /*last_first=*/op.mask.causal);
  const Sight sight(shape, op.mask, place.batch, place.head);
  const int64_t key_head = place.head / (shape.heads / op.key_heads);
  const S* keys = op.key.at(place.batch, key_head);
  const S* values = op.value.at(place.batch, key_head);
  const S* grad = gradients.grad.at(place.batch, place.head);
  const S* out = gradients.out.at(place.batch, place.head);
  S* queries = reinterpret_cast<S*>(shared_memory);
  S* upstream = queries + kTileElements<S, kWidth, kAttentionRows>;
  S* buffers = upstream + kTileElements<S, kWidth, kAttentionRows>;

  load_tile<S, kWidth, kAttentionRows>(queries, op.query.at(place.batch, place.head),
                                       op.query.token, place.first, sight.queries(), op.width);
  load_tile<S, kWidth, kAttentionRows>(upstream, grad, gradients.grad.token, place.first,
                                       sight.queries(), op.width);
  wait_for_copies();
  round_tile<S, kWidth, kAttentionRows>(queries);
  round_tile<S, kWidth, kAttentionRows>(upstream);

  __shared__ float nearby[kAttentionRows];
  {
    const int of_block = threadIdx.x / 2;
    const int query = min(place.first + of_block, sight.queries() - 1);
    const float product = row_product(out + query * gradients.out.token,
                                      grad + query * gradients.grad.token, op.width);
    if (threadIdx.x % 2 == 0) nearby[of_block] = product;
  }
  __syncthreads();

  const int first_of_warp = threadIdx.x / kWarp * 16;
  const int first_row = place.first + first_of_warp;
  const int64_t first_index = (place.batch * shape.heads + place.head) * shape.queries;
  const S* query_rows = queries + first_of_warp * kSharedStride<S, kWidth>;
  const S* grad_rows = upstream + first_of_warp * kSharedStride<S, kWidth>;
  Row softmax[2];
  float near[2], difference[2];  // c, and dot - c
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int of_warp = threadIdx.x % kWarp / 4 + 8 * half;
    const int query = min(first_row + of_warp, sight.queries() - 1);
    softmax[half] = make_row(gradients.statistics, first_index + query);
    // Without any key, not even an infinite gradient may show.
    near[half] = softmax[half].inverse_sum == 0 ? 0.0f : nearby[first_of_warp + of_warp];
  }

  // Σ of p·(g - c) and of p, each where the score lets a gradient through.
  Accumulator dquery[kWidth / 8] = {}, by_difference[kWidth / 8] = {};
  SumsPair<double> sums{};
  Sums<float> sums_by_difference[2] = {};
  float dot[2] = {};
  const auto span = sight.keys_of(place.first, place.first + kAttentionRows - 1);
  const int first = span.begin / kTokens, last = (span.end + kTokens - 1) / kTokens;
  const auto load = [&](S* to, int i) {
    load_tile<S, kWidth, kTokens>(to, keys, op.key.token, i * kTokens, sight.keys(), op.width);
    load_tile<S, kWidth, kTokens>(to + kElements, values, op.value.token, i * kTokens, sight.keys(),
                                  op.width);
  };
  const auto settle = [](S* tile) {
    round_tile<S, kWidth, kTokens>(tile);
    round_tile<S, kWidth, kTokens>(tile + kElements);
  };
  for_each_tile<S, 2 * kElements>(buffers, first, last, load, settle, [&](S* tile, int t) {
    const Elements<false, kTiles> elements(sight, first_row, t * kTokens);
    if (elements.none()) return;
    Accumulator scores[kTiles], grads[kTiles];
    multiply_transposed<kWidth>(scores, query_rows, tile);
    multiply_transposed<kWidth>(grads, grad_rows, tile + kElements);
    SumsPair<float> of_tile{};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int half = j / 2;
        const bool hidden = !elements.sees(i, j);
        // A hidden score, which may be NaN, adds to no sum.
        const float score = hidden ? 0.0f : scores[i].values[j] * op.scaling;
        const float masked = masked_score(sight, elements, i, j, score, grids.scores);
        const float probability = hidden ? 0.0f : softmax[half].probability(masked);
        const auto of_probability = fake_quantize_element_backward(
            hidden ? 0.0f : grads[i].values[j], probability, grids.probabilities);
        add(of_tile.after, of_probability);
        dot[half] = fma(of_probability.x, probability, dot[half]);
        const float grad_score =
            detail::softmax_gradient(probability, of_probability.x, near[half]);
        const auto of_score =
            fake_quantize_element_backward(hidden ? 0.0f : grad_score, score, grids.scores);
        add(of_tile.before, of_score);
        const auto by = fake_quantize_element_backward(probability, score, grids.scores);
        add(sums_by_difference[half], by);
        scores[i].values[j] = of_score.x;
        grads[i].values[j] = by.x;
      }
    }
    add(sums.before, of_tile.before);
    add(sums.after, of_tile.after);
    multiply_across<S>(dquery, scores, tile);
    multiply_across<S>(by_difference, grads, tile);
  });

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float of_row = sum_quad(dot[half]);
    difference[half] = of_row - near[half];
    const int query = first_row + threadIdx.x % kWarp / 4 + 8 * half;
    if (threadIdx.x % 4 == 0 && query < sight.queries()) {
      gradients.dots[first_index + query] = of_row;
    }
    const Sums<float>& by = sums_by_difference[half];
    add(sums.before, Sums<float>{-difference[half] * by.inside, -difference[half] * by.below,
                                 -difference[half] * by.above});
  }
  if (gradients.dquery.data != nullptr) {
#pragma unroll
    for (int i = 0; i < kWidth / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        dquery[i].values[j] =
            fma(-difference[j / 2], by_difference[i].values[j], dquery[i].values[j]);
      }
    }
    store_rows(gradients.dquery, place, first_row, shape.queries, op.width, op.scaling, dquery);
  }
  store_block_sums<kAttentionThreads>(ranges, sums);
}

template <class S, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, kWidth <= 64 ? 3 : 2)
    attention_backward_keys(AttentionOperands<S> op, AttentionGradients<S> gradients) {
  constexpr int kTokens = kBackwardTokens;
  constexpr int kElements = kTileElements<S, kWidth, kTokens>;
  constexpr int kTiles = kTokens / 8;
  const auto grids = make_grids(op);
  const AttentionShape& shape = op.shape;
  const BlockPlace place(shape, op.key_heads, shape.keys, /*last_first=*/false);
  const int group = static_cast<int>(shape.heads / op.key_heads);
  S* keys = reinterpret_cast<S*>(shared_memory);
  S* values = keys + kTileElements<S, kWidth, kAttentionRows>;
  S* buffers = values + kTileElements<S, kWidth, kAttentionRows>;

  const int key_count = static_cast<int>(shape.keys);
  load_tile<S, kWidth, kAttentionRows>(keys, op.key.at(place.batch, place.head), op.key.token,
                                       place.first, key_count, op.width);
  load_tile<S, kWidth, kAttentionRows>(values, op.value.at(place.batch, place.head), op.value.token,
                                       place.first, key_count, op.width);
  wait_for_copies();
  round_tile<S, kWidth, kAttentionRows>(keys);
  round_tile<S, kWidth, kAttentionRows>(values);

  /// Of the queries of a buffer.
  struct Rows {
    Row softmax[kTokens];
    float dots[kTokens];
  };
  __shared__ Rows both_rows[2];
  const int first_of_warp = threadIdx.x / kWarp * 16;
  const int first_row = place.first + first_of_warp;
  const S* key_rows = keys + first_of_warp * kSharedStride<S, kWidth>;
  const S* value_rows = values + first_of_warp * kSharedStride<S, kWidth>;

  Accumulator dkey[kWidth / 8] = {}, dvalue[kWidth / 8] = {};
  for (int64_t head = place.head * group; head < (place.head + 1) * group; ++head) {
    const Sight sight(shape, op.mask, place.batch, head);
    const S* queries = op.query.at(place.batch, head);
    const S* grad = gradients.grad.at(place.batch, head);
    const int64_t first_index = (place.batch * shape.heads + head) * shape.queries;
    const auto span = sight.queries_of(place.first, place.first + kAttentionRows - 1);
    const int first = span.begin / kTokens, last = (span.end + kTokens - 1) / kTokens;
    const auto rows_of_buffer = [&](const S* buffer) -> Rows& {
      return both_rows[buffer == buffers ? 0 : 1];
    };
    const auto load = [&](S* to, int i) {
      load_tile<S, kWidth, kTokens>(to, queries, op.query.token, i * kTokens, sight.queries(),
                                    op.width);
      load_tile<S, kWidth, kTokens>(to + kElements, grad, gradients.grad.token, i * kTokens,
                                    sight.queries(), op.width);
      const int query = i * kTokens + threadIdx.x;
      if (threadIdx.x < kTokens && query < sight.queries()) {
        Rows& rows = rows_of_buffer(to);
        rows.softmax[threadIdx.x] = make_row(gradients.statistics, first_index + query);
        rows.dots[threadIdx.x] = gradients.dots[first_index + query];
      }
    };
    const auto settle = [](S* tile) {
      round_tile<S, kWidth, kTokens>(tile);
      round_tile<S, kWidth, kTokens>(tile + kElements);
    };
    for_each_tile<S, 2 * kElements>(buffers, first, last, load, settle, [&](S* tile, int t) {
      const Elements<true, kTiles> elements(sight, first_row, t * kTokens);
      if (elements.none()) return;
      const Rows& rows = rows_of_buffer(tile);
      Accumulator scores[kTiles], grads[kTiles];
      multiply_transposed<kWidth>(scores, key_rows, tile);
      multiply_transposed<kWidth>(grads, value_rows, tile + kElements);
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int of_tile = elements.query(i, j) - t * kTokens;
          const bool hidden = !elements.sees(i, j);
          const float score = hidden ? 0.0f : scores[i].values[j] * op.scaling;
          const float masked = masked_score(sight, elements, i, j, score, grids.scores);
          const float probability = hidden ? 0.0f : rows.softmax[of_tile].probability(masked);
          const float grad_probability =
              fake_quantize_element_backward(hidden ? 0.0f : grads[i].values[j], probability,
                                             grids.probabilities)
                  .x;
          const float grad_score =
              hidden ? 0.0f
                     : detail::softmax_gradient(probability, grad_probability, rows.dots[of_tile]);
          scores[i].values[j] = fake_quantize_element_backward(grad_score, score, grids.scores).x;
          grads[i].values[j] =
              hidden ? 0.0f : fake_quantize_element(probability, grids.probabilities);
        }
      }
      multiply_across<S>(dkey, scores, tile);
      multiply_across<S>(dvalue, grads, tile + kElements);
    });
  }
  if (gradients.dkey.data != nullptr) {
    store_rows(gradients.dkey, place, first_row, shape.keys, op.width, op.scaling, dkey);
  }
  if (gradients.dvalue.data != nullptr) {
    store_rows(gradients.dvalue, place, first_row, shape.keys, op.width, 1.0f, dvalue);
  }
}

/// Bytes of shared memory for tiles of 64 tokens, and two pairs of kTokens.
template <class S, int kWidth, int kTokens>
constexpr int shared_bytes(int tiles) {
  return static_cast<int>(sizeof(S)) *
         (tiles * kTileElements<S, kWidth, kAttentionRows> + 4 * kTileElements<S, kWidth, kTokens>);
}

/// More than 48 KiB are granted on demand.
template <auto* kernel, class... Arguments>
void launch(int64_t blocks, int bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (blocks == 0) return;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<static_cast<unsigned>(blocks), kAttentionThreads, bytes, stream>>>(arguments...);
}

/// Calls launch(width), a compile-time constant, for heads as wide as that or less.
template <class Launch>
void select_width(int width, const Launch& launch) {
  if (width <= 32) return launch(std::integral_constant<int, 32>{});
  if (width <= 64) return launch(std::integral_constant<int, 64>{});
  if (width <= 96) return launch(std::integral_constant<int, 96>{});
  launch(std::integral_constant<int, 128>{});
}

/// Whether this device can run a kernel with so much dynamic shared memory: its code is for tensor
/// cores, and there is so much.
template <auto* kernel>
bool runs(int bytes) {
  static const cudaFuncAttributes attributes = [] {
    cudaFuncAttributes result{};
    if (cudaFuncGetAttributes(&result, kernel) != cudaSuccess) result.ptxVersion = 0;
    return result;
  }();
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return attributes.ptxVersion >= 80 &&
         static_cast<int>(attributes.sharedSizeBytes) + bytes <= most;
}

template <class S, int kWidth>
constexpr int kForwardBytes = shared_bytes<S, kWidth, kTileTokens<S, kWidth>>(1);
template <class S, int kWidth>
constexpr int kBackwardBytes = shared_bytes<S, kWidth, kBackwardTokens>(2);

}  // namespace

template <class S>
bool has_attention_kernel(int64_t width) {
  if (width <= 0 || width > 128 || width * sizeof(S) % 16 != 0) return false;
  bool result = false;
  select_width(static_cast<int>(width), [&](auto most) {
    constexpr int kWidth = decltype(most)::value;
    result = runs<attention_forward<S, kWidth>>(kForwardBytes<S, kWidth>) &&
             runs<attention_backward_queries<S, kWidth>>(kBackwardBytes<S, kWidth>) &&
             runs<attention_backward_keys<S, kWidth>>(kBackwardBytes<S, kWidth>);
  });
  return result;
}

template <class S>
void launch_attention_forward(const AttentionOperands<S>& operands, const Heads<S>& out,
                              float* statistics, cudaStream_t stream) {
  const int64_t blocks = operands.blocks(operands.shape.queries, operands.shape.heads);
  select_width(operands.width, [&](auto width) {
    launch<attention_forward<S, width()>>(blocks, kForwardBytes<S, width()>, stream, operands, out,
                                          statistics);
  });
}

template <class S>
void launch_attention_backward(const AttentionOperands<S>& operands,
                               const AttentionGradients<S>& gradients, bool overlaps,
                               cudaStream_t stream) {
  const int64_t blocks = operands.blocks(operands.shape.queries, operands.shape.heads);
  const auto ranges = make_range_gradients<float>(
      operands.scores_quantizer, operands.probabilities_quantizer, gradients.workspace, blocks);
  select_width(operands.width, [&](auto width) {
    constexpr int kBytes = kBackwardBytes<S, width()>;
    launch<attention_backward_queries<S, width()>>(blocks, kBytes, stream, operands, gradients,
                                                   ranges);
    launch_finish(ranges, overlaps, stream);
    if (gradients.dkey.data == nullptr && gradients.dvalue.data == nullptr) return;
    launch<attention_backward_keys<S, width()>>(
        operands.blocks(operands.shape.keys, operands.key_heads), kBytes, stream, operands,
        gradients);
  });
}

#define ASYMQ_INSTANTIATE(S)                                                                   \
  template bool has_attention_kernel<S>(int64_t);                                              \
  template void launch_attention_forward(const AttentionOperands<S>&, const Heads<S>&, float*, \
                                         cudaStream_t);                                        \
  template void launch_attention_backward(const AttentionOperands<S>&,                         \
                                          const AttentionGradients<S>&, bool, cudaStream_t);
ASYMQ_FOR_EACH_TENSOR_CORE_TYPE(ASYMQ_INSTANTIATE)
#undef ASYMQ_INSTANTIATE

}  // namespace asymq::cuda
