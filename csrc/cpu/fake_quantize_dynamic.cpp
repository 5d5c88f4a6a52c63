// CPU kernels of live ranges: each group's extrema, grid and elements in turn, while it is in the
// cache.
//
// Groups make a matrix of one column per factor. Tasks are rectangles of it, cut by shape alone;
// those of other rows, the slabs, sum the factors' gradients for themselves, so that results do not
// depend on the number of threads.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "asymq/live_range.h"
#include "cpu/blocks.h"
#include "cpu/common.h"
#include "cpu/vector_loops.h"
#include "ops/fake_quantize_dynamic.h"

namespace asymq {
namespace {

class Tasks {
 public:
  explicit Tasks(const LiveGroups& groups)
      : columns_(groups.factors()), rows_(groups.count() / columns_) {
    const int64_t elements = groups.count() * groups.size();
    const int64_t wanted = (elements + kTaskElements - 1) / kTaskElements;
    // The slabs' sums shall be small beside x.
    const int64_t most_slabs = std::max<int64_t>(elements / (64 * columns_), 1);
    slabs_ = std::min({wanted, most_slabs, rows_});
    pieces_ = std::min((wanted - 1) / slabs_ + 1, columns_);
  }

  int64_t slabs() const { return slabs_; }
  int64_t columns() const { return columns_; }

  /// Calls visit(group, column, slab) for every group, in the order of memory within a task.
  template <class Visit>
  void parallel_for_each_group(const Visit& visit) const {
    at::parallel_for(0, slabs_ * pieces_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t slab = task / pieces_, piece = task % pieces_;
        const int64_t last_row = rows_ * (slab + 1) / slabs_;
        const int64_t last_column = columns_ * (piece + 1) / pieces_;
        for (int64_t row = rows_ * slab / slabs_; row < last_row; ++row) {
          for (int64_t column = columns_ * piece / pieces_; column < last_column; ++column) {
            visit(row * columns_ + column, column, slab);
          }
        }
      }
    });
  }

 private:
  int64_t columns_, rows_, slabs_, pieces_;
};

/// The factors as they are applied.
template <class P>
std::vector<Factors<P>> applied_factors(const QuantizerKind& kind, const LiveGroups& groups) {
  const P* first = groups.first().const_data_ptr<P>();
  const P* second = groups.second().defined() ? groups.second().const_data_ptr<P>() : first;
  std::vector<Factors<P>> factors(groups.factors());
  at::parallel_for(0, groups.factors(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) factors[i] = apply_factors(kind, first[i], second[i]);
  });
  return factors;
}

at::Tensor fake_quantize_dynamic_cpu(const at::Tensor& x, const LiveQuantizer& quantizer) {
  const QuantizerKind kind = check_fake_quantize_dynamic(x, quantizer);
  if (x.numel() == 0) return at::empty_like(x);
  const LiveGroups groups(x, quantizer);
  at::Tensor out = at::empty_like(groups.x());
  dispatch_dtypes(x, groups.first(), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    using T = Compute<S>;
    const auto factors = applied_factors<P>(kind, groups);
    const S* from = groups.x().const_data_ptr<S>();
    S* to = out.mutable_data_ptr<S>();
    const int64_t n = groups.size();
    Tasks(groups).parallel_for_each_group([&](int64_t group, int64_t column, int64_t) {
      const S* elements = from + group * n;
      const Extrema<P> ends = live_ends<P>(kind, quantizer.token, cpu::extrema_run(elements, n));
      const Grid<T> grid = make_grid<T>(kind, live_scale_offset(kind, factors[column], ends));
      cpu::forward_blocks(elements, to + group * n, n,
                          [&](const T* block, T* result, int64_t, int64_t size) {
                            cpu::forward_run(block, result, size, grid);
                          });
    });
  });
  return groups.restore(out);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> fake_quantize_dynamic_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const LiveQuantizer& quantizer,
    std::array<bool, 3> needs) {
  const QuantizerKind kind = check_fake_quantize_dynamic_backward(grad, x, quantizer);
  const at::Tensor& first = quantizer.first;
  const auto like_factors = [&](bool needed) {
    return needed ? at::zeros(first.sizes(), first.options()) : at::Tensor();
  };
  at::Tensor first_grad = like_factors(needs[1]), second_grad = like_factors(needs[2]);
  const bool needs_sums = needs[1] || needs[2];
  if (!needs[0] && !needs_sums) return {at::Tensor(), first_grad, second_grad};
  if (x.numel() == 0) return {needs[0] ? at::empty_like(x) : at::Tensor(), first_grad, second_grad};

  const LiveGroups groups(x, quantizer);
  const at::Tensor upstream = groups.match(grad);
  at::Tensor dx = needs[0] ? at::empty_like(groups.x()) : at::Tensor();
  dispatch_dtypes(x, groups.first(), [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    using T = Compute<S>;
    const auto factors = applied_factors<P>(kind, groups);
    const S* grads = upstream.const_data_ptr<S>();
    const S* from = groups.x().const_data_ptr<S>();
    S* to = needs[0] ? dx.mutable_data_ptr<S>() : nullptr;
    const int64_t n = groups.size();
    const Tasks tasks(groups);
    std::vector<RangeGradient> slabs(needs_sums ? tasks.slabs() * tasks.columns() : 0);
    tasks.parallel_for_each_group([&](int64_t group, int64_t column, int64_t slab) {
      const S* elements = from + group * n;
      const Extrema<P> ends = live_ends<P>(kind, quantizer.token, cpu::extrema_run(elements, n));
      const ScaleOffset<P> effective = live_scale_offset(kind, factors[column], ends);
      const Grid<T> grid = make_grid<T>(kind, effective);
      Sums<double> sums{};
      cpu::backward_blocks(grads + group * n, elements, to ? to + group * n : nullptr, n,
                           [&](const T* g, const T* block, T* result, int64_t, int64_t size) {
                             cpu::backward_run(g, block, result, size, grid,
                                               needs_sums ? &sums : nullptr);
                           });
      if (!needs_sums) return;
      const RangeGradient gradient =
          live_gradient(kind, {static_cast<double>(ends.min), static_cast<double>(ends.max)},
                        make_grid_point<T>(kind, effective), sums);
      RangeGradient& sum = slabs[slab * tasks.columns() + column];
      sum.first += gradient.first;
      sum.second += gradient.second;
    });
    if (!needs_sums) return;

    const auto finish = [&](at::Tensor& result, const at::Tensor& learned,
                            double RangeGradient::*which) {
      if (!result.defined()) return;
      const P* value = learned.const_data_ptr<P>();
      P* gradient = result.mutable_data_ptr<P>();
      at::parallel_for(0, tasks.columns(), 2048, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          double total = 0;
          for (int64_t slab = 0; slab < tasks.slabs(); ++slab) {
            total += slabs[slab * tasks.columns() + i].*which;
          }
          gradient[i] =
              static_cast<P>(learned_gradient(kind, static_cast<double>(value[i]), total));
        }
      });
    };
    finish(first_grad, groups.first(), &RangeGradient::first);
    finish(second_grad, groups.second(), &RangeGradient::second);
  });
  return {needs[0] ? groups.restore(dx) : dx, first_grad, second_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CPU, m) {
  m.impl("_fake_quantize_dynamic", flat<fake_quantize_dynamic_cpu>);
  m.impl("_fake_quantize_dynamic_backward", flat<fake_quantize_dynamic_backward_cpu>);
}

}  // namespace asymq
