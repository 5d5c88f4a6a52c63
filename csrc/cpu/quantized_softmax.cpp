// CPU kernels of the quantized softmax. A task takes whole rows: their probabilities pass through a
// buffer, and exp is torch's, which has it vectorized.
#include "ops/quantized_softmax.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/quantizer_pair.h"

namespace asymq {
namespace {

using detail::AttentionMask;
using detail::AttentionShape;
using detail::MaskRow;

/// One call of quantized_softmax, or of its backward, on contiguous tensors.
template <class S>
struct Softmax {
  using T = Compute<S>;
  AttentionShape shape;
  AttentionMask<T> mask;
  cpu::GridPair<T> grids;
  const S* scores;

  bool masked() const {
    return mask.window > 0 || mask.visible != nullptr || mask.added != nullptr;
  }

  int64_t rows_per_task() const {
    return std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, shape.keys));
  }
  int64_t tasks() const { return (shape.rows() + rows_per_task() - 1) / rows_per_task(); }

  /// Calls body(task, first row, last row) for all tasks, on all threads.
  template <class Body>
  void for_each_task(const Body& body) const {
    at::parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * rows_per_task();
        body(task, first, std::min(first + rows_per_task(), shape.rows()));
      }
    });
  }

  /// The unquantized probabilities of rows, one row of `keys` after the other; what no query sees
  /// is 0. `statistics` of the rows are written, or where they are `known` read.
  void probabilities(int64_t first, int64_t last, T* buffer, T* statistics, bool known) const {
    constexpr T kHidden = -std::numeric_limits<T>::infinity();
    for (int64_t index = first; index < last; ++index) {
      const MaskRow<T> row = mask.row(shape, index);
      T* const values = buffer + (index - first) * shape.keys;
      cpu::load(scores + index * shape.keys, values, row.end);
      cpu::forward_run(values, values, row.end, grids.before);
      if (masked()) {
        for (int64_t key = 0; key < row.end; ++key) {
          values[key] = row.sees(key) ? row.apply(values[key], key) : kHidden;
        }
      }
      T& largest = statistics[2 * index];
      if (!known) largest = cpu::largest_run(values, row.end);
      // Nothing is seen where the largest is hidden: any finite number will do in its place.
      const T subtracted = largest == kHidden ? T(0) : largest;
      cpu::subtract_run(values, row.end, subtracted);
      // Not -infinity, of which exp takes many times as long.
      for_each_hidden(row, [&](int64_t key) { values[key] = 0; });
      std::fill(values + row.end, values + shape.keys, T(0));
    }
    at::from_blob(buffer, {(last - first) * shape.keys}, c10::CppTypeToScalarType<T>::value).exp_();
    for (int64_t index = first; index < last; ++index) {
      const MaskRow<T> row = mask.row(shape, index);
      T* const values = buffer + (index - first) * shape.keys;
      for_each_hidden(row, [&](int64_t key) { values[key] = 0; });
      std::fill(values + row.end, values + shape.keys, T(0));
      T& sum = statistics[2 * index + 1];
      if (!known) sum = cpu::sum_run(values, row.end);
      if (sum != 0) cpu::divide_run(values, row.end, sum);
    }
  }

  /// Calls visit(key) for the hidden keys before a row's end.
  template <class Visit>
  void for_each_hidden(const MaskRow<T>& row, const Visit& visit) const {
    if (!masked()) return;
    for (int64_t key = 0; key < row.end; ++key) {
      if (!row.sees(key)) visit(key);
    }
  }

  void forward(S* out, T* statistics) const {
    for_each_task([&](int64_t, int64_t first, int64_t last) {
      std::vector<T> buffer((last - first) * shape.keys);
      probabilities(first, last, buffer.data(), statistics, /*known=*/false);
      for (int64_t index = first; index < last; ++index) {
        const MaskRow<T> row = mask.row(shape, index);
        T* const values = buffer.data() + (index - first) * shape.keys;
        cpu::forward_run(values, values, row.end, grids.after);
        for_each_hidden(row, [&](int64_t key) { values[key] = 0; });
        cpu::store(values, out + index * shape.keys, shape.keys);
      }
    });
  }

  /// dscores is null where not wanted; so are the sums, which are one per task.
  void backward(const S* grad, const T* statistics, S* dscores, bool needs_scores_sums,
                bool needs_probabilities_sums, std::vector<cpu::SumsPair>& sums) const {
    for_each_task([&](int64_t task, int64_t first, int64_t last) {
      const int64_t keys = shape.keys;
      std::vector<T> buffer((last - first) * keys), gradients(keys), values(keys);
      probabilities(first, last, buffer.data(), const_cast<T*>(statistics), /*known=*/true);
      for (int64_t index = first; index < last; ++index) {
        const MaskRow<T> row = mask.row(shape, index);
        const T* const probability = buffer.data() + (index - first) * keys;
        T* const gradient = gradients.data();
        cpu::load(grad + index * keys, gradient, row.end);
        for_each_hidden(row, [&](int64_t key) { gradient[key] = 0; });
        cpu::backward_long_run(gradient, probability, gradient, row.end, grids.after,
                               needs_probabilities_sums ? &sums[task].after : nullptr);
        if (dscores == nullptr && !needs_scores_sums) continue;
        cpu::softmax_gradient_run(probability, gradient, row.end);
        cpu::load(scores + index * keys, values.data(), row.end);
        // A hidden score, which may be NaN, adds to no sum.
        for_each_hidden(row, [&](int64_t key) { gradient[key] = values[key] = 0; });
        cpu::backward_long_run(gradient, values.data(), gradient, row.end, grids.before,
                               needs_scores_sums ? &sums[task].before : nullptr);
        if (dscores == nullptr) continue;
        std::fill(gradients.begin() + row.end, gradients.end(), T(0));
        cpu::store(gradient, dscores + index * keys, keys);
      }
    });
  }
};

template <class S, class P>
Softmax<S> make_softmax(const at::Tensor& scores, const QuantizerPair& pair,
                        const MaskTensor& mask) {
  using T = Compute<S>;
  return {{scores.size(0), scores.size(1), scores.size(2), scores.size(3)},
          mask.view<T>(),
          cpu::make_grids<T, P>(pair),
          scores.const_data_ptr<S>()};
}

std::tuple<at::Tensor, at::Tensor> quantized_softmax_cpu(
    const at::Tensor& scores, const OptionalTensor& mask, bool causal,
    std::optional<int64_t> window, const QuantizerArguments& of_scores,
    const QuantizerArguments& of_probabilities) {
  const QuantizerPair pair =
      check_quantized_softmax(scores, mask, causal, window, of_scores, of_probabilities);
  const at::Tensor dense = scores.contiguous();
  const MaskTensor mask_tensor(mask, scores.sizes(), compute_dtype(scores.scalar_type()), causal,
                               window);
  at::Tensor out = at::empty(scores.sizes(), scores.options());
  at::Tensor statistics = at::empty({scores.size(0), scores.size(1), scores.size(2), 2},
                                    scores.options().dtype(compute_dtype(scores.scalar_type())));
  dispatch_dtypes(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    make_softmax<S, decltype(range)>(dense, pair, mask_tensor)
        .forward(out.mutable_data_ptr<S>(), statistics.mutable_data_ptr<Compute<S>>());
  });
  return {out, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
quantized_softmax_backward_cpu(const at::Tensor& grad, const at::Tensor& scores,
                               const at::Tensor& statistics, const OptionalTensor& mask,
                               bool causal, std::optional<int64_t> window,
                               const QuantizerArguments& of_scores,
                               const QuantizerArguments& of_probabilities,
                               std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_softmax_backward(grad, scores, mask, causal, window,
                                                              of_scores, of_probabilities);
  const at::Tensor dense = scores.contiguous(), upstream = grad.contiguous();
  const MaskTensor mask_tensor(mask, scores.sizes(), compute_dtype(scores.scalar_type()), causal,
                               window);
  at::Tensor dscores = needs[0] ? at::empty(scores.sizes(), scores.options()) : at::Tensor();
  const auto gradients = empty_gradients(pair, needs);
  dispatch_dtypes(scores, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    const auto softmax = make_softmax<S, P>(dense, pair, mask_tensor);
    std::vector<cpu::SumsPair> parts(softmax.tasks());
    softmax.backward(upstream.const_data_ptr<S>(), statistics.const_data_ptr<Compute<S>>(),
                     needs[0] ? dscores.mutable_data_ptr<S>() : nullptr, needs[1] || needs[2],
                     needs[3] || needs[4], parts);
    cpu::store_gradients<Compute<S>, P>(pair, parts, gradients);
  });
  return {dscores, gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CPU, m) {
  m.impl("_quantized_softmax", flat<quantized_softmax_cpu>);
  m.impl("_quantized_softmax_backward", flat<quantized_softmax_backward_cpu>);
}

}  // namespace asymq
