// CPU kernels: fake-quantize forward and backward, quantize, update_codes_, dequantize, effective
// scale and offset.
//
// The loops over x (detail::Layout) are cut into tasks by shape alone, so that results do not
// depend on the number of threads. A task walks its planes, the two innermost loops, whose rows are
//   runs     contiguous elements of one range,
//   columns  contiguous elements of adjacent ranges, or
//   strided  anything else.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <type_traits>

#include "cpu/blocks.h"
#include "cpu/common.h"
#include "cpu/vector_loops.h"
#include "ops/effective_scale_offset.h"
#include "ops/fake_quantize.h"
#include "ops/layout.h"
#include "ops/quantize.h"

namespace asymq {
namespace {

using detail::Dim;
using detail::Layout;
using detail::RangePointers;

constexpr int64_t kEnoughTasks = 64;  // to keep any number of threads busy

/// Offsets, in elements, of one place of the loops.
struct Position {
  int64_t x = 0, out = 0, range = 0;

  Position advanced(const Dim& dim, int64_t steps) const {
    return {x + steps * dim.x_stride, out + steps * dim.out_stride,
            range + steps * dim.range_stride};
  }
};

/// How the loops are cut: into pieces of the outermost one and, where those are too few, of the
/// second. Pieces of a loop that stays within ranges are slabs, each of which sums for itself.
class Tasks {
 public:
  explicit Tasks(const Layout& layout) : layout_(layout) {
    if (layout.numel == 0) return;
    pieces_[0] = pieces_[1] = 1;
    const int64_t wanted = (layout.numel + kTaskElements - 1) / kTaskElements;
    // The slabs' sums shall be small beside x.
    const int64_t most_slabs =
        std::clamp<int64_t>(layout.numel / (64 * layout.ranges), 1, kEnoughTasks);
    for (int i = 0; i < std::min(layout.ndim, 2); ++i) {
      const Dim& dim = layout.dims[i];
      const int64_t more = i == 0 ? wanted : (std::min(wanted, kEnoughTasks) - 1) / pieces_[0] + 1;
      pieces_[i] = std::min(more, dim.size);
      if (dim.range_stride != 0) continue;
      if (slabs_ > 1) {
        pieces_[i] = 1;
        continue;
      }
      pieces_[i] = slabs_ = std::min(pieces_[i], most_slabs);
      slab_loop_ = i;
    }
  }

  int64_t count() const { return pieces_[0] * pieces_[1]; }
  int64_t slabs() const { return slabs_; }

  /// Calls visit(rows, columns, position, slab) for every plane of one task.
  template <class Visit>
  void for_each_plane(int64_t task, const Visit& visit) const {
    // At least two loops, so that a plane always exists.
    Dim dims[detail::kMaxDims + 2] = {{1, 0, 0, 0}, {1, 0, 0, 0}};
    const int padding = std::max(0, 2 - layout_.ndim);
    const int ndim = padding + layout_.ndim;
    std::copy_n(layout_.dims, layout_.ndim, dims + padding);

    const int64_t piece[2] = {task / pieces_[1], task % pieces_[1]};
    Position start;
    for (int i = 0; i < std::min(layout_.ndim, 2); ++i) {
      Dim& dim = dims[padding + i];
      const int64_t begin = dim.size * piece[i] / pieces_[i];
      start = start.advanced(dim, begin);
      dim.size = dim.size * (piece[i] + 1) / pieces_[i] - begin;
    }
    const int64_t slab = slabs_ == 1 ? 0 : piece[slab_loop_];

    int64_t index[detail::kMaxDims] = {};
    while (true) {
      Position position = start;
      for (int i = 0; i < ndim - 2; ++i) position = position.advanced(dims[i], index[i]);
      visit(dims[ndim - 2], dims[ndim - 1], position, slab);
      int i = ndim - 3;
      while (i >= 0 && ++index[i] == dims[i].size) index[i--] = 0;
      if (i < 0) return;
    }
  }

  /// for_each_plane of all tasks, on all threads.
  template <class Visit>
  void parallel_for_each_plane(const Visit& visit) const {
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) for_each_plane(task, visit);
    });
  }

 private:
  const Layout& layout_;
  int64_t pieces_[2] = {0, 0};
  int64_t slabs_ = 1;
  int slab_loop_ = 0;
};

/// The grids of all ranges.
template <class T>
class GridTable {
 public:
  template <class P>
  GridTable(const QuantizerKind& kind, const RangePointers<P>& ranges, int64_t count)
      : count_(count), values_(new T[3 * count]) {
    at::parallel_for(0, count, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const Grid<T> grid = make_grid<T>(kind, ranges.load(i));
        values_[i] = grid.scale;
        values_[count + i] = grid.lower;
        values_[2 * count + i] = grid.upper;
      }
    });
  }

  cpu::GridColumns<T> from(int64_t range) const {
    return {&values_[range], &values_[count_ + range], &values_[2 * count_ + range]};
  }
  Grid<T> operator[](int64_t range) const { return from(range).first(); }

 private:
  int64_t count_;
  std::unique_ptr<T[]> values_;
};

template <class S>
void forward_plane(const S* x, S* out, const GridTable<Compute<S>>& grids, const Dim& rows,
                   const Dim& columns, const Position& plane) {
  using T = Compute<S>;
  const bool contiguous = columns.x_stride == 1 || columns.size == 1;
  for (int64_t row = 0; row < rows.size; ++row) {
    const Position start = plane.advanced(rows, row);
    if (contiguous && columns.range_stride == 0) {
      const Grid<T> grid = grids[start.range];
      cpu::forward_blocks(
          x + start.x, out + start.out, columns.size,
          [&](const T* from, T* to, int64_t, int64_t n) { cpu::forward_run(from, to, n, grid); });
    } else if (contiguous && columns.range_stride == 1) {
      cpu::forward_blocks(x + start.x, out + start.out, columns.size,
                          [&](const T* from, T* to, int64_t first, int64_t n) {
                            cpu::forward_row(from, to, n, grids.from(start.range + first));
                          });
    } else {
      for (int64_t column = 0; column < columns.size; ++column) {
        const Position at = start.advanced(columns, column);
        out[at.out] =
            static_cast<S>(fake_quantize_element(static_cast<T>(x[at.x]), grids[at.range]));
      }
    }
  }
}

/// Backward of one call: what the planes have in common. dx and sums are null where not wanted.
template <class S>
struct Backward {
  using T = Compute<S>;
  const S* grad;
  const S* x;
  S* dx;
  const GridTable<T>& grids;

  S* dx_at(const Position& position) const { return dx ? dx + position.out : nullptr; }

  void run(const Position& start, int64_t n, Sums<double>* sums) const {
    const Grid<T> grid = grids[start.range];
    cpu::backward_blocks(grad + start.out, x + start.x, dx_at(start), n,
                         [&](const T* g, const T* from, T* to, int64_t, int64_t size) {
                           cpu::backward_run(g, from, to, size, grid, sums);
                         });
  }

  /// Rows of adjacent ranges, at most kTermsPerSum of them, n <= cpu::kBlock columns.
  void columns(const Dim& rows, int64_t row_count, const Position& start, int64_t n,
               Sums<double>* sums) const {
    T inside[cpu::kBlock], below[cpu::kBlock], above[cpu::kBlock];
    cpu::SumColumns<T> partial{nullptr, nullptr, nullptr};
    if (sums != nullptr) {
      partial = {inside, below, above};
      for (T* values : {inside, below, above}) std::fill_n(values, n, T(0));
    }
    for (int64_t row = 0; row < row_count; ++row) {
      const Position at = start.advanced(rows, row);
      cpu::backward_blocks(grad + at.out, x + at.x, dx_at(at), n,
                           [&](const T* g, const T* from, T* to, int64_t, int64_t size) {
                             cpu::backward_row(g, from, to, size, grids.from(at.range), partial);
                           });
    }
    for (int64_t i = 0; sums != nullptr && i < n; ++i) {
      sums[i].inside += inside[i];
      sums[i].below += below[i];
      sums[i].above += above[i];
    }
  }

  void strided(const Dim& columns, const Position& start, Sums<double>* sums) const {
    for (int64_t column = 0; column < columns.size; ++column) {
      const Position at = start.advanced(columns, column);
      const auto term = fake_quantize_element_backward(static_cast<T>(grad[at.out]),
                                                       static_cast<T>(x[at.x]), grids[at.range]);
      if (dx != nullptr) dx[at.out] = static_cast<S>(term.x);
      if (sums != nullptr) {
        Sums<double>& sum = sums[column * columns.range_stride];
        sum.inside += term.x * term.rounding;
        sum.below += term.below;
        sum.above += term.above;
      }
    }
  }

  void plane(const Dim& rows, const Dim& cols, const Position& plane, Sums<double>* sums) const {
    const auto sums_at = [&](const Position& at) { return sums ? sums + at.range : nullptr; };
    const bool contiguous = cols.x_stride == 1 || cols.size == 1;
    if (contiguous && cols.range_stride == 1) {
      const int64_t together = rows.range_stride == 0 ? cpu::kTermsPerSum : 1;
      for (int64_t row = 0; row < rows.size; row += together) {
        for (int64_t column = 0; column < cols.size; column += cpu::kBlock) {
          const Position start = plane.advanced(rows, row).advanced(cols, column);
          columns(rows, std::min(together, rows.size - row), start,
                  std::min(cpu::kBlock, cols.size - column), sums_at(start));
        }
      }
      return;
    }
    for (int64_t row = 0; row < rows.size; ++row) {
      const Position start = plane.advanced(rows, row);
      if (contiguous && cols.range_stride == 0) {
        run(start, cols.size, sums_at(start));
      } else {
        strided(cols, start, sums_at(start));
      }
    }
  }
};

at::Tensor fake_quantize_cpu(const at::Tensor& x, const GranularQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize(x, quantizer);
  const at::Tensor& first = quantizer.ranges.first;
  const Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(quantizer.ranges);
  at::Tensor out = at::empty_like(x);
  dispatch_dtypes(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    const GridTable<Compute<S>> grids(kind, ranges.pointers<P>(), layout.ranges);
    const S* from = x.const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    Tasks(layout).parallel_for_each_plane(
        [&](const Dim& rows, const Dim& columns, const Position& plane, int64_t) {
          forward_plane(from, to, grids, rows, columns, plane);
        });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const GranularQuantizer& quantizer,
    std::array<bool, 3> needs) {
  const QuantizerKind kind = check_fake_quantize_backward(grad, x, quantizer);
  const at::Tensor& first = quantizer.ranges.first;
  const Layout layout = make_layout(x, first.sizes());
  const ContiguousRanges ranges(quantizer.ranges);
  const at::Tensor upstream = match_layout(grad, x);
  const auto like_range = [&](bool needed) {
    return needed ? at::empty(first.sizes(), first.options()) : at::Tensor();
  };
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  at::Tensor first_grad = like_range(needs[1]), second_grad = like_range(needs[2]);
  const bool needs_sums = needs[1] || needs[2];
  if (!needs[0] && !needs_sums) return {dx, first_grad, second_grad};

  dispatch_dtypes(x, first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    const auto pointers = ranges.pointers<P>();
    const GridTable<Compute<S>> grids(kind, pointers, layout.ranges);
    const Backward<S> backward{upstream.const_data_ptr<S>(), x.const_data_ptr<S>(),
                               needs[0] ? dx.mutable_data_ptr<S>() : nullptr, grids};
    const Tasks tasks(layout);
    std::vector<Sums<double>> sums(needs_sums ? tasks.slabs() * layout.ranges : 0);
    tasks.parallel_for_each_plane(
        [&](const Dim& rows, const Dim& columns, const Position& plane, int64_t slab) {
          backward.plane(rows, columns, plane,
                         needs_sums ? sums.data() + slab * layout.ranges : nullptr);
        });
    if (!needs_sums) return;

    P* first_to = needs[1] ? first_grad.mutable_data_ptr<P>() : nullptr;
    P* second_to = needs[2] ? second_grad.mutable_data_ptr<P>() : nullptr;
    at::parallel_for(0, layout.ranges, 2048, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Sums<double> total{};
        for (int64_t slab = 0; slab < tasks.slabs(); ++slab) {
          const Sums<double>& part = sums[slab * layout.ranges + i];
          total.inside += part.inside;
          total.below += part.below;
          total.above += part.above;
        }
        const RangeGradient gradient =
            range_gradient(kind, make_gradient_map<Compute<S>>(kind, pointers.load(i)), total);
        if (first_to) first_to[i] = static_cast<P>(gradient.first);
        if (second_to) second_to[i] = static_cast<P>(gradient.second);
      }
    });
  });
  return {dx, first_grad, second_grad};
}

/// Codes of one call: what the planes have in common. C: the codes' type. kCompare: counts how many
/// of them change, else they have no values yet.
template <bool kCompare, class S, class C>
struct Codes {
  using T = Compute<S>;
  const S* x;
  C* codes;
  const GridTable<T>& grids;
  CodeRange<T> limits;

  bool put(C& code, T value) const {
    const C now = static_cast<C>(value), before = kCompare ? code : now;
    code = now;
    return now != before;
  }

  /// loop(x, out, first, n) finds the codes of contiguous elements, in the compute type.
  template <class Loop>
  int64_t blocks(const Position& start, int64_t n, const Loop& loop) const {
    T found[cpu::kBlock];
    int64_t changed = 0;
    for (int64_t first = 0; first < n; first += cpu::kBlock) {
      const int64_t size = std::min(cpu::kBlock, n - first);
      const S* from = x + start.x + first;
      if constexpr (std::is_same_v<S, T>) {
        loop(from, found, first, size);
      } else {
        cpu::widen(from, found, size);
        loop(found, found, first, size);
      }
      C* to = codes + start.out + first;
      int16_t changed_here = 0;  // of at most kBlock
#pragma omp simd reduction(+ : changed_here)
      for (int64_t i = 0; i < size; ++i) changed_here += put(to[i], found[i]);
      changed += changed_here;
    }
    return changed;
  }

  int64_t plane(const Dim& rows, const Dim& columns, const Position& plane) const {
    const bool contiguous = columns.x_stride == 1 || columns.size == 1;
    const bool runs = contiguous && columns.range_stride == 0;
    // Short runs, one after the other in memory, go through the buffer together.
    const bool dense = runs && rows.x_stride == columns.size;
    const int64_t together = dense ? std::max<int64_t>(cpu::kBlock / columns.size, 1) : 1;
    int64_t changed = 0;
    for (int64_t row = 0; row < rows.size; row += together) {
      const Position start = plane.advanced(rows, row);
      if (runs) {
        const int64_t count = std::min(together, rows.size - row);
        changed +=
            blocks(start, count * columns.size, [&](const T* from, T* to, int64_t, int64_t n) {
              const int64_t size = n / count;
              for (int64_t i = 0; i < count; ++i) {
                const Grid<T> grid = grids[start.range + i * rows.range_stride];
                cpu::codes_run(from + i * size, to + i * size, size, grid, limits);
              }
            });
      } else if (contiguous && columns.range_stride == 1) {
        changed += blocks(start, columns.size, [&](const T* from, T* to, int64_t first, int64_t n) {
          cpu::codes_row(from, to, n, grids.from(start.range + first), limits);
        });
      } else {
        for (int64_t column = 0; column < columns.size; ++column) {
          const Position at = start.advanced(columns, column);
          changed += put(codes[at.out], quantize_element(static_cast<T>(x[at.x]), grids[at.range],
                                                         limits.first, limits.last));
        }
      }
    }
    return changed;
  }
};

template <class Body>
void dispatch_codes(const at::Tensor& codes, const Body& body) {
  AT_DISPATCH_INTEGRAL_TYPES(codes.scalar_type(), "quantize", [&] { body(scalar_t{}); });
}

/// Writes the codes of x, whose memory layout they have. kCompare: returns how many changed.
template <bool kCompare>
int64_t write_codes(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                    const QuantizerKind& kind, const at::Tensor& codes) {
  const Layout layout = make_layout(x, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  std::atomic<int64_t> changed = 0;
  dispatch_dtypes(x, scale, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    const GridTable<Compute<S>> grids(kind, ranges.pointers<P>(), layout.ranges);
    dispatch_codes(codes, [&](auto code) {
      using C = decltype(code);
      const Codes<kCompare, S, C> of_call{x.const_data_ptr<S>(), codes.mutable_data_ptr<C>(), grids,
                                          code_range<Compute<S>>(kind)};
      Tasks(layout).parallel_for_each_plane(
          [&](const Dim& rows, const Dim& columns, const Position& plane, int64_t) {
            changed += of_call.plane(rows, columns, plane);
          });
    });
  });
  return changed;
}

at::Tensor quantize_cpu(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                        int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_quantize(x, scale, offset, bits, eps, full_range);
  at::Tensor codes = at::empty_like(x, x.options().dtype(code_dtype(bits, is_symmetric(kind))));
  write_codes<false>(x, scale, offset, kind, codes);
  return codes;
}

at::Tensor update_codes_cpu(const at::Tensor& codes, const at::Tensor& x, const at::Tensor& scale,
                            const OptionalTensor& offset, int64_t bits, double eps,
                            bool full_range) {
  const QuantizerKind kind = check_update_codes(codes, x, scale, offset, bits, eps, full_range);
  const at::Tensor target = match_layout(codes, x);
  const int64_t changed = write_codes<true>(x, scale, offset, kind, target);
  if (!target.is_same(codes)) codes.copy_(target);
  return at::scalar_tensor(changed, x.options().dtype(at::kLong));
}

at::Tensor dequantize_cpu(const at::Tensor& codes, const at::Tensor& scale,
                          const OptionalTensor& offset, int64_t bits, double eps, bool full_range) {
  const QuantizerKind kind = check_dequantize(codes, scale, offset, bits, eps, full_range);
  const Layout layout = make_layout(codes, scale.sizes());
  const ContiguousRanges ranges({scale, offset, {}, {}});
  at::Tensor out = at::empty_like(codes, codes.options().dtype(scale.scalar_type()));
  AT_DISPATCH_FLOATING_TYPES(scale.scalar_type(), "dequantize", [&] {
    const auto pointers = ranges.pointers<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    dispatch_codes(codes, [&](auto code) {
      const auto* from = codes.const_data_ptr<decltype(code)>();
      Tasks(layout).parallel_for_each_plane(
          [&](const Dim& rows, const Dim& columns, const Position& plane, int64_t) {
            for (int64_t row = 0; row < rows.size; ++row) {
              Position at = plane.advanced(rows, row);
              auto effective = effective_scale_offset(kind, pointers.load(at.range));
              for (int64_t column = 0; column < columns.size; ++column) {
                if (columns.range_stride != 0) {
                  effective = effective_scale_offset(kind, pointers.load(at.range));
                }
                to[at.out] = dequantize_element(static_cast<scalar_t>(from[at.x]), effective.scale,
                                                round_half_even(effective.offset));
                at = at.advanced(columns, 1);
              }
            }
          });
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> effective_scale_offset_cpu(const GranularQuantizer& quantizer) {
  const QuantizerKind kind = check_effective_scale_offset(quantizer);
  const at::Tensor& first = quantizer.ranges.first;
  const ContiguousRanges ranges(quantizer.ranges);
  at::Tensor scale = at::empty(first.sizes(), first.options());
  at::Tensor offset = at::empty(first.sizes(), first.options());
  AT_DISPATCH_FLOATING_TYPES(first.scalar_type(), "effective_scale_offset", [&] {
    const auto pointers = ranges.pointers<scalar_t>();
    scalar_t* scales = scale.mutable_data_ptr<scalar_t>();
    scalar_t* offsets = offset.mutable_data_ptr<scalar_t>();
    for (int64_t i = 0; i < first.numel(); ++i) {
      const auto effective = effective_scale_offset(kind, pointers.load(i));
      scales[i] = effective.scale;
      offsets[i] = effective.offset;
    }
  });
  return {scale, offset};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CPU, m) {
  m.impl("_fake_quantize", flat<fake_quantize_cpu>);
  m.impl("_fake_quantize_backward", flat<fake_quantize_backward_cpu>);
  m.impl("quantize", quantize_cpu);
  m.impl("update_codes_", update_codes_cpu);
  m.impl("dequantize", dequantize_cpu);
  m.impl("_effective_scale_offset", flat<effective_scale_offset_cpu>);
}

}  // namespace asymq
