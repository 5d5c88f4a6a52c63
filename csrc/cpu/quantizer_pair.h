// What the CPU kernels share that have a quantizer before and one after another function, each with
// one range.
#pragma once

#include <algorithm>
#include <array>
#include <type_traits>
#include <vector>

#include "cpu/common.h"
#include "cpu/vector_loops.h"
#include "ops/gradients.h"
#include "ops/layout.h"
#include "ops/quantizer.h"

namespace asymq::cpu {

template <class T>
struct GridPair {
  Grid<T> before, after;
};

/// P: the type of the ranges.
template <class T, class P>
GridPair<T> make_grids(const QuantizerPair& pair) {
  const auto grid = [](const CheckedQuantizer& one) {
    return make_grid<T>(one.kind, ContiguousRanges(one.ranges.tensors()).pointers<P>().load(0));
  };
  return {grid(pair.before), grid(pair.after)};
}

/// Sums of both quantizers' ranges; one per task.
struct SumsPair {
  Sums<double> before, after;
};

/// Writes the gradients that are wanted of the learned parameters: first and second of the
/// quantizer before, then of the one after.
template <class T, class P>
void store_gradients(const QuantizerPair& pair, const std::vector<SumsPair>& parts,
                     const std::array<at::Tensor, 4>& gradients) {
  const auto store = [&](const CheckedQuantizer& one, Sums<double> SumsPair::*which,
                         const at::Tensor& first, const at::Tensor& second) {
    Sums<double> total{};
    for (const SumsPair& part : parts) {
      total.inside += (part.*which).inside;
      total.below += (part.*which).below;
      total.above += (part.*which).above;
    }
    const ContiguousRanges ranges(one.ranges.tensors());
    const auto map = make_gradient_map<T>(one.kind, ranges.pointers<P>().load(0));
    const RangeGradient gradient = range_gradient(one.kind, map, total);
    if (first.defined()) *first.mutable_data_ptr<P>() = static_cast<P>(gradient.first);
    if (second.defined()) *second.mutable_data_ptr<P>() = static_cast<P>(gradient.second);
  };
  store(pair.before, &SumsPair::before, gradients[0], gradients[1]);
  store(pair.after, &SumsPair::after, gradients[2], gradients[3]);
}

/// Elements as the compute type.
template <class S, class T>
void load(const S* from, T* to, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    std::copy_n(from, n, to);
  } else {
    widen(from, to, n);
  }
}

template <class S, class T>
void store(const T* from, S* to, int64_t n) {
  if constexpr (std::is_same_v<S, T>) {
    std::copy_n(from, n, to);
  } else {
    narrow(from, to, n);
  }
}

/// backward_run of any number of elements.
template <class T>
void backward_long_run(const T* grad, const T* x, T* dx, int64_t n, const Grid<T>& grid,
                       Sums<double>* sums) {
  for (int64_t first = 0; first < n; first += kMaxRun) {
    backward_run(grad + first, x + first, dx + first, std::min(kMaxRun, n - first), grid, sums);
  }
}

}  // namespace asymq::cpu
