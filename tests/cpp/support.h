// The operators as a table, and an oracle that evaluates their definition one element at a time.
#pragma once

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "asymq/asymq.h"

namespace asymq_test {

using at::Tensor;
using Tensors = std::vector<Tensor>;

constexpr double kEps = 1e-8;

enum class Kind {
  scale_offset,
  min_max,
  beta_gamma,
  kscale_koffset,
  symmetric_scale,
  symmetric_max,
  symmetric_gamma
};

struct Op {
  Kind kind;
  std::string name;
  std::string parameterization;  // as effective_scale_offset calls it
  size_t learnable;              // the first `learnable` parameters get gradients
  size_t parameters;
  bool symmetric;
  bool sigmoid;
  std::function<Tensor(const Tensor& x, const Tensors& p, int64_t bits, double eps)> call;
  bool full_range = false;
};

const std::vector<Op>& ops();
const Op& op_named(std::string_view name);
std::ostream& operator<<(std::ostream& out, const Op& op);

// CPU, and CUDA where there is one.
std::vector<at::DeviceType> devices();

class DeviceTest : public testing::TestWithParam<at::DeviceType> {
 protected:
  void SetUp() override { at::manual_seed(0); }
  at::Device device() const { return at::Device(GetParam()); }
};

#define ASYMQ_ON_EVERY_DEVICE(suite)                     \
  INSTANTIATE_TEST_SUITE_P(                              \
      , suite, testing::ValuesIn(asymq_test::devices()), \
      [](const auto& info) { return c10::DeviceTypeName(info.param, /*lower_case=*/true); })

// Scale, offset and the closed interval [n, p] of one range, computed in T in the order of the
// definition.
template <typename T>
struct Grid {
  T s, z, n, p;
};
template <typename T>
Grid<T> grid(const Op& op, const std::vector<double>& parameters, int64_t bits, double eps);

struct Expected {
  Tensor xhat, dx;
  Tensors grads;       // float64, one per learnable parameter
  Tensors magnitudes;  // sum of |terms| of each gradient, the unit of its tolerance
};
Expected oracle(const Op& op, const Tensor& x, const Tensors& parameters, const Tensor& upstream,
                int64_t bits, double eps = kEps);

// Parameters of `op` for ranges near [-2, 3], each a little different.
Tensors random_parameters(const Op& op, at::IntArrayRef shape, int64_t bits,
                          at::ScalarType dtype = at::kFloat);
// Parameters of `op` for the range [min, max]; the symmetric ones take max alone.
Tensors parameters_of_range(const Op& op, double min, double max, int64_t bits,
                            at::ScalarType dtype = at::kFloat);

struct Result {
  Tensor xhat, dx;
  Tensors grads;
};
// Forward and backward on the device of x; the layout of x is kept.
Result evaluate(const Op& op, const Tensor& x, const Tensors& parameters, const Tensor& upstream,
                int64_t bits, double eps = kEps);

// Equal bit for bit, except that every NaN equals every other.
testing::AssertionResult bit_equal(const Tensor& a, const Tensor& b);
// |got - want| <= unit * magnitude, NaN equal to NaN.
testing::AssertionResult close(const Tensor& got, const Tensor& want, const Tensor& magnitude,
                               double unit = 1e-6);

// Evaluates and compares everything with the oracle: values and dx exactly (-0 = 0), sums to 1e-6
// of their terms. On CUDA, values and dx are also those of the CPU bit for bit.
void expect_matches_oracle(const Op& op, const Tensor& x, const Tensors& parameters,
                           const Tensor& upstream, int64_t bits, double eps = kEps);

// Of a number, a list, or a list of lists of equal length.
Tensor tensor_of(const nlohmann::json& value);

// Expects an exception whose message contains every one of `parts`.
void expect_error(const std::function<void()>& body, const std::vector<std::string>& parts);

}  // namespace asymq_test
