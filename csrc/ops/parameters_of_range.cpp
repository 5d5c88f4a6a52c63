#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include "asymq/fake_quantize.h"
#include "ops/checks.h"
#include "ops/quantizer.h"

namespace asymq {
namespace {

/// A new tensor of `like`'s shape and dtype, never an alias of an argument.
at::Tensor new_like(const at::Tensor& like, const at::Tensor& values) {
  return values.to(like.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

at::Tensor new_like(const at::Tensor& like, double value) { return at::full_like(like, value); }

}  // namespace

std::vector<at::Tensor> parameters_of_range(std::string_view parameterization,
                                            const at::Tensor& min, const at::Tensor& max,
                                            int64_t bits, bool symmetric, bool sigmoid,
                                            bool full_range, std::string_view link) {
  constexpr const char* op = "parameters_of_range";
  const int64_t id = find_parameterization(op, parameterization, symmetric, full_range);
  constexpr double no_matter = 1;
  const QuantizerKind kind =
      checked_kind({op}, {id, bits, /*eps=*/no_matter, link_number(Where{op}, sigmoid, link)});
  check_ends({op}, min, max);
  const at::Tensor low = min.detach().to(at::kDouble), high = max.detach().to(at::kDouble);
  std::vector<at::Tensor> result;
  visit_parameterization(id, Parameterizations{}, [&](auto visited) {
    const auto [first, second] = visited.first_values(low, high, kind);
    result.push_back(new_like(max, first));
    if (visited.traits.second[0] != '\0') result.push_back(new_like(max, second));
  });
  return result;
}

TORCH_LIBRARY_IMPL(asymq, CompositeImplicitAutograd, m) {
  m.impl("parameters_of_range", parameters_of_range);
}

}  // namespace asymq
