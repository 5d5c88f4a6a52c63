// CPU kernels of the quantized GELU. A task's elements pass through a buffer, and GELU is torch's,
// which has it vectorized. Called on whole tensors its bits would depend on the number of threads:
// the elements that a thread has left over are not computed as the others are.
#include "ops/quantized_gelu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "cpu/quantizer_pair.h"

namespace asymq {
namespace {

/// Elements in a buffer as a tensor.
template <class T>
at::Tensor as_tensor(std::vector<T>& buffer) {
  return at::from_blob(buffer.data(), {static_cast<int64_t>(buffer.size())},
                       c10::CppTypeToScalarType<T>::value);
}

int64_t task_count(int64_t numel) { return (numel + kTaskElements - 1) / kTaskElements; }

/// Calls body(task, first element, elements) for all tasks, on all threads.
template <class Body>
void for_each_task(int64_t numel, const Body& body) {
  at::parallel_for(0, task_count(numel), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * kTaskElements;
      body(task, first, std::min(kTaskElements, numel - first));
    }
  });
}

template <class S>
void forward(const S* x, S* out, int64_t numel, const cpu::GridPair<Compute<S>>& grids) {
  for_each_task(numel, [&](int64_t, int64_t first, int64_t n) {
    std::vector<Compute<S>> buffer(n);
    cpu::load(x + first, buffer.data(), n);
    cpu::forward_run(buffer.data(), buffer.data(), n, grids.before);
    at::Tensor values = as_tensor(buffer);
    at::gelu_(values, "tanh");
    cpu::forward_run(buffer.data(), buffer.data(), n, grids.after);
    cpu::store(buffer.data(), out + first, n);
  });
}

/// dx is null where not wanted; sums are one per task.
template <class S>
void backward(const S* grad, const S* x, S* dx, int64_t numel,
              const cpu::GridPair<Compute<S>>& grids, std::vector<cpu::SumsPair>& sums) {
  using T = Compute<S>;
  for_each_task(numel, [&](int64_t task, int64_t first, int64_t n) {
    std::vector<T> raw(n), quantized(n), gradient(n), activated(n);
    cpu::load(x + first, raw.data(), n);
    cpu::load(grad + first, gradient.data(), n);
    cpu::forward_run(raw.data(), quantized.data(), n, grids.before);
    at::Tensor to = as_tensor(activated), of = as_tensor(gradient);
    at::gelu_out(to, as_tensor(quantized), "tanh");
    cpu::backward_long_run(gradient.data(), activated.data(), gradient.data(), n, grids.after,
                           &sums[task].after);
    at::gelu_backward_out(to, of, as_tensor(quantized), "tanh");
    cpu::backward_long_run(activated.data(), raw.data(), activated.data(), n, grids.before,
                           &sums[task].before);
    if (dx != nullptr) cpu::store(activated.data(), dx + first, n);
  });
}

at::Tensor quantized_gelu_cpu(const at::Tensor& x, const QuantizerArguments& input,
                              const QuantizerArguments& output) {
  const QuantizerPair pair = check_quantized_gelu(x, input, output);
  at::Tensor out = at::empty_like(x);
  const at::Tensor dense = match_layout(x, x);
  dispatch_dtypes(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    forward(dense.const_data_ptr<S>(), out.mutable_data_ptr<S>(), x.numel(),
            cpu::make_grids<Compute<S>, decltype(range)>(pair));
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> quantized_gelu_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const QuantizerArguments& input,
    const QuantizerArguments& output, std::array<bool, 5> needs) {
  const QuantizerPair pair = check_quantized_gelu_backward(grad, x, input, output);
  at::Tensor dx = needs[0] ? at::empty_like(x) : at::Tensor();
  const auto gradients = empty_gradients(pair, needs);
  const at::Tensor dense = match_layout(x, x), upstream = match_layout(grad, x);
  dispatch_dtypes(x, pair.before.ranges.first, [&](auto element, auto range) {
    using S = decltype(element);
    using P = decltype(range);
    std::vector<cpu::SumsPair> sums(task_count(x.numel()));
    backward(upstream.const_data_ptr<S>(), dense.const_data_ptr<S>(),
             needs[0] ? dx.mutable_data_ptr<S>() : nullptr, x.numel(),
             cpu::make_grids<Compute<S>, P>(pair), sums);
    cpu::store_gradients<Compute<S>, P>(pair, sums, gradients);
  });
  return {dx, gradients[0], gradients[1], gradients[2], gradients[3]};
}

}  // namespace

TORCH_LIBRARY_IMPL(asymq, CPU, m) {
  m.impl("_quantized_gelu", flat<quantized_gelu_cpu>);
  m.impl("_quantized_gelu_backward", flat<quantized_gelu_backward_cpu>);
}

}  // namespace asymq
