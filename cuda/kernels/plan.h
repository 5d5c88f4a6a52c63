// Which kernel serves a layout, and how its work is cut. Decided by shape, alignment and the number
// of multiprocessors alone, so that the order of every sum is fixed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "asymq/detail/layout.h"

namespace asymq::cuda {

/// The type that elements of type S compute in.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int kWarp = 32;
constexpr int kRowThreads = 128;   // warp_rows: four warps, each with rows of its own
constexpr int kSpanThreads = 256;  // spans: one block per span of a row
constexpr int kColumnGroups = 8;   // columns: rows that a block reads at a time
constexpr int kColumnThreads = kWarp * kColumnGroups;
constexpr int kGenericThreads = 128;

// Vectors in flight per thread. The backward of spans reads two tensors at 2 each.
constexpr int kUnroll = 4;
constexpr int kSpanUnroll = 2;

// Resident blocks per multiprocessor that registers are allotted for; backward where not said.
constexpr int kRowBlocks = 5;
constexpr int kSpanBlocks = 3;
constexpr int kColumnBlocks = 2;
constexpr int kSoftmaxForwardBlocks = 5;
constexpr int kSoftmaxBlocks = 3;

/// Sums are gathered in float over at most this many vectors per thread before they become double.
constexpr int64_t kVectorsPerSum = 32;

enum class Path {
  kWarpRows,  ///< x is rows of one range each: lanes of a warp share a row
  kSpans,     ///< rows so long that a block, or several, take one
  kColumns,   ///< neighbouring elements belong to neighbouring ranges: a thread owns columns
  kGeneric    ///< anything else, element by element
};

/// x as [outer, channels, inner] with range index = channel. Strides count elements.
struct Shape {
  int64_t outer = 1, channels = 1, inner = 1;
  int64_t x_outer_stride = 0, x_channel_stride = 0;

  ASYMQ_HOST_DEVICE int64_t rows() const { return outer * channels; }
  ASYMQ_HOST_DEVICE int64_t columns() const { return channels * inner; }
  ASYMQ_HOST_DEVICE int64_t channel(int64_t row) const { return outer == 1 ? row : row % channels; }
  ASYMQ_HOST_DEVICE int64_t x_offset(int64_t row) const {
    if (outer == 1) return row * x_channel_stride;
    if (channels == 1) return row * x_outer_stride;
    return row / channels * x_outer_stride + row % channels * x_channel_stride;
  }
};

struct Plan {
  Path path = Path::kGeneric;
  Shape shape;
  bool vectorized = false;  ///< 16-byte accesses, else element by element
  bool overlaps = false;    ///< the device can launch `finish` while the pass before it runs
  int64_t blocks = 0;

  int lanes = kWarp;           ///< warp_rows: lanes that share a row, a power of two
  int64_t rows_per_warp = 1;   ///< warp_rows: at most kWarp
  int64_t pieces = 1;          ///< spans: blocks per row; generic: per range; columns: row chunks
  int64_t rows_per_piece = 1;  ///< columns
  int64_t tiles = 1;           ///< columns: tiles across
};

/// Columns that a thread owns: 16 bytes of them, but no more than its registers hold grids of.
constexpr int column_width(int element_size) { return element_size >= 4 ? 16 / element_size : 4; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// Reads the loops as [outer, channels, inner] with contiguous inner elements, if they are that.
inline bool match_shape(const detail::Layout& layout, Shape& result) {
  Shape shape;
  int i = layout.ndim - 1;
  if (i >= 0 && layout.dims[i].x_stride != 1) return false;
  if (i >= 0 && layout.dims[i].range_stride == 0) shape.inner = layout.dims[i--].size;
  if (i >= 0 && layout.dims[i].range_stride == 1) {
    shape.channels = layout.dims[i].size;
    shape.x_channel_stride = layout.dims[i--].x_stride;
  }
  if (i >= 0 && layout.dims[i].range_stride == 0) {
    shape.outer = layout.dims[i].size;
    shape.x_outer_stride = layout.dims[i--].x_stride;
  }
  if (i >= 0) return false;
  result = shape;
  return true;
}

/// Lanes that share a row: as many as its vectors can busy, or fewer where then all loads come in
/// full groups of kUnroll and there are rows enough for all lanes.
inline int row_lanes(int64_t vectors, bool many_rows) {
  int lanes = 1;
  while (lanes < kWarp && lanes < vectors) lanes *= 2;
  for (int fewer = lanes; many_rows && fewer >= 4; fewer /= 2) {
    if (vectors % (fewer * kUnroll) == 0 && vectors <= fewer * kVectorsPerSum) return fewer;
  }
  return lanes;
}

/// `aligned`: all pointers are multiples of 16 bytes.
/// `sums`: the kernel sums per range, and is better off with few long pieces.
inline Plan make_plan(const detail::Layout& layout, int element_size, bool aligned, bool sums,
                      int multiprocessors) {
  Plan plan;
  if (layout.numel == 0) return plan;
  Shape& shape = plan.shape;
  const int64_t width = 16 / element_size;
  if (!match_shape(layout, shape)) {
    plan.pieces = std::clamp<int64_t>(multiprocessors * 8 / layout.ranges, 1,
                                      ceil_div(layout.numel / layout.ranges, kGenericThreads));
    return plan;
  }
  const bool rows_aligned =
      aligned && shape.x_outer_stride % width == 0 && shape.x_channel_stride % width == 0;
  const bool dense_columns = shape.inner == 1 || shape.x_channel_stride == shape.inner;
  // Short rows of a shared range are better read across than one by one.
  if (dense_columns && shape.columns() > 1 &&
      (shape.inner == 1 || (shape.outer >= 8 && shape.inner < 128))) {
    plan.path = Path::kColumns;
    plan.vectorized = aligned && shape.x_outer_stride % width == 0 && shape.columns() % width == 0;
    const int64_t tile = kWarp * (plan.vectorized ? column_width(element_size) : 1);
    plan.tiles = ceil_div(shape.columns(), tile);
    // Forward, enough rows to be worth their grids; backward, two rounds of resident blocks.
    const int64_t groups = sums ? ceil_div(shape.outer * plan.tiles,
                                           multiprocessors * kColumnBlocks * 2 * kColumnGroups)
                                : 4 * kUnroll;
    plan.rows_per_piece = std::clamp<int64_t>(groups, 1, kVectorsPerSum) * kColumnGroups;
    plan.pieces = ceil_div(shape.outer, plan.rows_per_piece);
    plan.blocks = plan.tiles * plan.pieces;
    return plan;
  }
  const int64_t rows = shape.rows();
  plan.vectorized = rows_aligned && (rows == 1 || shape.inner % width == 0);
  const int64_t vectors = plan.vectorized ? shape.inner / width : shape.inner;
  if (vectors <= kWarp * kVectorsPerSum && rows >= multiprocessors) {
    plan.path = Path::kWarpRows;
    plan.lanes = row_lanes(vectors, rows > multiprocessors * kWarp);
    plan.rows_per_warp = kWarp / plan.lanes;
    // More rows than read at a time, where that is needed to be worth their grids and, backward,
    // their gradients, which the lanes compute side by side.
    while (plan.rows_per_warp < kWarp &&
           plan.rows_per_warp * vectors < kWarp * (sums ? 3 : 2) * kUnroll &&
           rows / plan.rows_per_warp > multiprocessors * kWarp) {
      plan.rows_per_warp *= 2;
    }
    const int64_t warps = ceil_div(rows, plan.rows_per_warp);
    plan.blocks = ceil_div(warps, kRowThreads / kWarp);
    return plan;
  }
  plan.path = Path::kSpans;
  const int64_t windows =
      std::max<int64_t>(ceil_div(vectors, kSpanThreads * (sums ? kSpanUnroll : kUnroll)), 1);
  // Backward, one round of resident blocks, two where each still has plenty to do.
  const int64_t resident = multiprocessors * kSpanBlocks;
  const int64_t wanted = windows * rows > 16 * resident ? 2 * resident : resident;
  plan.pieces =
      sums ? ceil_div(windows, std::min(ceil_div(windows * rows, wanted), windows)) : windows;
  plan.blocks = rows * plan.pieces;
  return plan;
}

constexpr int kSoftmaxThreads = 128;  // four warps, each with rows of its own

/// How a softmax is cut: a warp takes neighbouring rows, one after the other.
struct SoftmaxPlan {
  bool vectorized = false;  ///< 16-byte accesses, else element by element
  bool overlaps = false;    ///< the device can launch `finish` while the pass before it runs
  int64_t rows_per_warp = 1;
  int64_t blocks = 0;
};

/// `sums`: few blocks are better, each of which leaves partial sums.
inline SoftmaxPlan make_softmax_plan(int64_t rows, int64_t keys, int element_size, bool aligned,
                                     bool sums, int multiprocessors) {
  SoftmaxPlan plan;
  plan.vectorized = aligned && keys % (16 / element_size) == 0;
  constexpr int kWarps = kSoftmaxThreads / kWarp;
  if (sums) {
    plan.rows_per_warp = std::clamp<int64_t>(rows / (int64_t{multiprocessors} * kWarps * 16), 1, 8);
  }
  plan.blocks = ceil_div(rows, kWarps * plan.rows_per_warp);
  return plan;
}

constexpr int kDynamicWarps = 8;      // lanes: warps of a block
constexpr int kDynamicThreads = 512;  // block and long: at most, of a block

// Vectors that a thread holds: lanes that share a short group read it in longer runs with fewer.
constexpr int kShortVectors = 2;
constexpr int kLaneVectors = 4;
constexpr int kBlockVectors = 8;
constexpr int64_t kShortGroup = 8;    // vectors of a group that is short
constexpr int64_t kLongVectors = 16;  // long: vectors per thread that are worth a block

enum class DynamicPath {
  kLanes,  ///< lanes of a warp hold a group
  kBlock,  ///< a block holds a group
  kLong    ///< a group is read twice, by one block or, where groups are few, by several
};

/// How groups with ranges of their own are cut, one after another in memory, of which group i has
/// the factors i % factors.
struct DynamicPlan {
  DynamicPath path = DynamicPath::kLong;
  bool vectorized = false;  ///< 16-byte accesses, else element by element
  bool overlaps = false;    ///< the device can launch a kernel while the one before it runs
  int64_t count = 0, size = 0, factors = 1;
  int threads = kDynamicThreads;
  int64_t blocks = 0;

  /// lanes: how many share a group, a power of two. The groups of a warp are neighbours; the warps
  /// of a block are `period` groups apart, a multiple of the factors and of a warp's groups, so
  /// that lanes in the same place have the same factors.
  int lanes = kWarp;
  int64_t period = 1;
  bool is_short = false;  ///< lanes: a thread holds kShortVectors, else kLaneVectors
  int64_t pieces = 1;     ///< long: blocks that share a group

  ASYMQ_HOST_DEVICE int groups_per_warp() const { return kWarp / lanes; }
  ASYMQ_HOST_DEVICE int64_t tiles() const { return period / groups_per_warp(); }

  /// Whether every group has factors of its own and is summed in one place: there are no partial
  /// sums then.
  ASYMQ_HOST_DEVICE bool own_factors() const { return factors == count && pieces == 1; }

  /// Partial sums: entry i belongs to the factors i % factors. There are two doubles in each.
  ASYMQ_HOST_DEVICE int64_t entries() const {
    if (own_factors()) return 0;
    return path == DynamicPath::kLanes && factors > 1 ? blocks * groups_per_warp() : blocks;
  }
  int64_t sums() const { return 2 * entries(); }

  /// Doubles that hold the extrema of pieces.
  int64_t extrema() const { return pieces > 1 ? 2 * count * pieces : 0; }
};

inline DynamicPlan make_dynamic_plan(int64_t count, int64_t size, int64_t factors, int element_size,
                                     bool aligned, int multiprocessors) {
  DynamicPlan plan;
  plan.count = count;
  plan.size = size;
  plan.factors = factors;
  const int64_t width = 16 / element_size;
  plan.vectorized = aligned && size % width == 0;
  const int64_t vectors = plan.vectorized ? size / width : size;
  if (vectors <= kWarp * kLaneVectors) {
    plan.path = DynamicPath::kLanes;
    // Two at least, where there are two vectors: memory is read in sectors of 32 bytes.
    plan.is_short = vectors <= kShortGroup;
    plan.lanes = vectors > 1 ? 2 : 1;
    while (plan.lanes * (plan.is_short ? kShortVectors : kLaneVectors) < vectors) plan.lanes *= 2;
    plan.threads = kWarp * kDynamicWarps;
    const int64_t neighbours = plan.groups_per_warp();
    plan.period = factors == 1 || plan.own_factors() ? neighbours : std::lcm(factors, neighbours);
    plan.blocks = ceil_div(ceil_div(count, plan.period), kDynamicWarps) * plan.tiles();
  } else if (vectors <= kDynamicThreads * kBlockVectors) {
    plan.path = DynamicPath::kBlock;
    plan.threads = static_cast<int>(ceil_div(vectors, kWarp * kBlockVectors)) * kWarp;
    plan.blocks = count;
  } else {
    plan.pieces = std::clamp<int64_t>(ceil_div(2 * multiprocessors, count), 1,
                                      ceil_div(vectors, kDynamicThreads * kLongVectors));
    plan.blocks = count * plan.pieces;
  }
  return plan;
}

/// How rows are cut that a kernel normalizes, or whose own extrema it needs: a team of threads has
/// one row at a time. Vectors are of 16 bytes.
struct RowPlan {
  bool overlaps = false;
  int64_t rows = 0;
  int vectors = 0;   ///< of a row
  int team = kWarp;  ///< threads of a row: lanes of a warp, or a block
  int threads = kRowThreads;
  int64_t blocks = 0;

  ASYMQ_HOST_DEVICE int teams() const { return threads / team; }
  /// Sums of columns: of every warp whose lanes make teams, or of every block.
  ASYMQ_HOST_DEVICE int64_t entries() const {
    return team <= kWarp ? blocks * (threads / kWarp) : blocks;
  }
};

constexpr int kTeamThreads = 512;  // of a row, at most

/// held: vectors that a thread has of a row; rows that need more take several rounds. resident:
/// threads of a multiprocessor that registers are allotted for.
inline RowPlan make_row_plan(int64_t rows, int64_t vectors, int held, int resident,
                             int multiprocessors) {
  RowPlan plan;
  plan.rows = rows;
  plan.vectors = static_cast<int>(vectors);
  const int64_t needed = ceil_div(vectors, held);
  if (needed <= kWarp) {
    plan.team = 1;
    while (plan.team < needed) plan.team *= 2;
  } else {
    const int64_t threads = ceil_div(needed, kWarp) * kWarp;
    plan.threads = plan.team = static_cast<int>(std::min<int64_t>(threads, kTeamThreads));
  }
  const int64_t most = int64_t{multiprocessors} * std::max(1, resident / plan.threads);
  plan.blocks = std::min(ceil_div(rows, int64_t{plan.teams()}), most);
  return plan;
}

/// Where the partial sums of the backward pass lie: sum s of range c, partial (o, i), is at
/// o·outer_stride + c·range_stride + i·inner_stride + s·sum_stride.
struct PartialSums {
  int64_t outer = 1, inner = 1;
  int64_t outer_stride = 0, range_stride = 3, inner_stride = 3, sum_stride = 1;

  ASYMQ_HOST_DEVICE int64_t count() const { return outer * inner; }
};

inline PartialSums partial_sums(const Plan& plan) {
  const Shape& shape = plan.shape;
  const int64_t columns = shape.columns();
  switch (plan.path) {
    case Path::kColumns:
      return {plan.pieces, shape.inner, 3 * columns, shape.inner, 1, columns};
    default:
      return {shape.outer, plan.pieces, 3 * shape.channels * plan.pieces, 3 * plan.pieces, 3, 1};
  }
}

}  // namespace asymq::cuda
