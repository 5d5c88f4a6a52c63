#include "support.h"

#include <algorithm>
#include <array>

namespace asymq_test {

const std::vector<Op>& ops() {
  using at::Tensor;
  const auto beta_gamma = [](bool sigmoid) {
    return [sigmoid](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
      return asymq::fake_quantize_beta_gamma(x, p[0], p[1], p[2], p[3], bits, sigmoid, eps);
    };
  };
  const auto symmetric_scale = [](bool full_range) {
    return [full_range](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
      return asymq::fake_quantize_symmetric_scale(x, p[0], bits, eps, full_range);
    };
  };
  const auto symmetric_max = [](bool full_range) {
    return [full_range](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
      return asymq::fake_quantize_symmetric_max(x, p[0], bits, eps, full_range);
    };
  };
  const auto symmetric_gamma = [](bool sigmoid, bool full_range) {
    return [=](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
      return asymq::fake_quantize_symmetric_gamma(x, p[0], p[1], bits, sigmoid, eps, full_range);
    };
  };
  static const std::vector<Op> table = {
      {Kind::scale_offset, "scale_offset", "scale_offset", 2, 2, false, false,
       [](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
         return asymq::fake_quantize_scale_offset(x, p[0], p[1], bits, eps);
       }},
      {Kind::min_max, "min_max", "min_max", 2, 2, false, false,
       [](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
         return asymq::fake_quantize_min_max(x, p[0], p[1], bits, eps);
       }},
      {Kind::beta_gamma, "beta_gamma", "beta_gamma", 2, 4, false, false, beta_gamma(false)},
      {Kind::beta_gamma, "beta_gamma_sigmoid", "beta_gamma", 2, 4, false, true, beta_gamma(true)},
      {Kind::kscale_koffset, "kscale_koffset", "kscale_koffset", 2, 2, false, false,
       [](const Tensor& x, const Tensors& p, int64_t bits, double eps) {
         return asymq::fake_quantize_kscale_koffset(x, p[0], p[1], bits, eps);
       }},
      {Kind::symmetric_scale, "symmetric_scale", "scale_offset", 1, 1, true, false,
       symmetric_scale(false)},
      {Kind::symmetric_max, "symmetric_max", "min_max", 1, 1, true, false, symmetric_max(false)},
      {Kind::symmetric_gamma, "symmetric_gamma", "beta_gamma", 1, 2, true, false,
       symmetric_gamma(false, false)},
      {Kind::symmetric_gamma, "symmetric_gamma_sigmoid", "beta_gamma", 1, 2, true, true,
       symmetric_gamma(true, false)},
      {Kind::symmetric_scale, "symmetric_scale_full_range", "scale_offset", 1, 1, true, false,
       symmetric_scale(true), true},
      {Kind::symmetric_max, "symmetric_max_full_range", "min_max", 1, 1, true, false,
       symmetric_max(true), true},
      {Kind::symmetric_gamma, "symmetric_gamma_full_range", "beta_gamma", 1, 2, true, false,
       symmetric_gamma(false, true), true},
      {Kind::symmetric_gamma, "symmetric_gamma_sigmoid_full_range", "beta_gamma", 1, 2, true, true,
       symmetric_gamma(true, true), true},
  };
  return table;
}

const Op& op_named(std::string_view name) {
  for (const Op& op : ops()) {
    if (op.name == name) return op;
  }
  throw std::invalid_argument("no operator named " + std::string(name));
}

std::ostream& operator<<(std::ostream& out, const Op& op) { return out << op.name; }

std::vector<at::DeviceType> devices() {
  std::vector<at::DeviceType> found = {at::kCPU};
  if (at::hasCUDA()) found.push_back(at::kCUDA);
  return found;
}

namespace {

double levels(int64_t bits) { return static_cast<double>((int64_t{1} << bits) - 1); }

// What a symmetric range's end is divided by for the scale.
double half(const Op& op, int64_t bits) { return (levels(bits) + op.full_range) / 2; }

double logistic(double v) { return 1 / (1 + std::exp(-v)); }

// d xhat / d parameter = in * e inside, lo below, up above.
struct Row {
  double in, lo, up;
  Row operator*(double factor) const { return {in * factor, lo * factor, up * factor}; }
};

template <typename T>
std::array<Row, 2> rows(const Op& op, const std::vector<double>& v, const Grid<T>& grid,
                        int64_t bits) {
  const double k = levels(bits), s = grid.s, n = grid.n, p = grid.p;
  const double zeta = std::nearbyint(static_cast<double>(grid.z)) - grid.z;
  const Row scale = {1, n, p};
  const Row min = {-1 / k, 1 - zeta / k, -zeta / k};
  const Row max = {1 / k, zeta / k, 1 + zeta / k};
  const auto slope = [&](size_t i) {
    return op.sigmoid ? logistic(v[i]) * (1 - logistic(v[i])) : 1.0;
  };
  switch (op.kind) {
    case Kind::scale_offset:
      return {scale, Row{0, s, s}};
    case Kind::min_max:
      return {min, max};
    case Kind::beta_gamma:
      return {min * v[2] * slope(0), max * v[3] * slope(1)};
    case Kind::kscale_koffset:
      return {scale * (1 / k), Row{0, k * s, k * s}};
    case Kind::symmetric_scale:
      return {scale};
    case Kind::symmetric_max:
      return {scale * (1 / half(op, bits))};
    case Kind::symmetric_gamma:
      return {scale * (1 / half(op, bits)) * v[1] * slope(0)};
  }
  return {};
}

// For every element of x, the linear index of its range.
Tensor range_of_element(const Tensor& x, const Tensor& range) {
  if (range.numel() == 1) return at::zeros(x.sizes(), at::kLong);
  Tensor index = at::arange(range.numel()).reshape(range.sizes());
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (range.size(d) > 0) index = index.repeat_interleave(x.size(d) / range.size(d), d);
  }
  return index.contiguous();
}

// P: the parameters' type, T: the type of the arithmetic on elements.
template <typename P, typename T>
Expected oracle_in(const Op& op, const Tensor& x_any, const Tensors& parameters,
                   const Tensor& g_any, int64_t bits, double eps) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const Tensor x = x_any.detach().cpu().to(type).contiguous();
  const Tensor g = g_any.detach().cpu().to(type).contiguous();
  const Tensor index = range_of_element(x, parameters[0]);
  const int64_t ranges = parameters[0].numel();

  std::vector<std::vector<double>> values(ranges);
  std::vector<Grid<P>> grids;
  Tensors columns;
  for (const Tensor& p : parameters)
    columns.push_back(p.detach().cpu().to(at::kDouble).contiguous());
  for (int64_t i = 0; i < ranges; ++i) {
    for (const Tensor& c : columns) values[i].push_back(c.const_data_ptr<double>()[i]);
    grids.push_back(grid<P>(op, values[i], bits, eps));
  }

  struct Sums {
    Row sum{}, magnitude{};
  };
  std::vector<Sums> sums(ranges);
  Tensor xhat = at::empty_like(x), dx = at::empty_like(x);
  const T* xs = x.const_data_ptr<T>();
  const T* gs = g.const_data_ptr<T>();
  const int64_t* is = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    const Grid<P>& range = grids[is[i]];
    Sums& total = sums[is[i]];
    const T s = range.s, n = range.n,
            p = op.symmetric ? static_cast<T>(range.p) : n + static_cast<T>(levels(bits));
    const T u = xs[i] / s, r = std::nearbyint(u);
    const double upstream = gs[i];
    T level = r;
    if (r < n) {
      level = n;
      total.sum.lo += upstream;
      total.magnitude.lo += std::abs(upstream);
    } else if (r > p) {
      level = p;
      total.sum.up += upstream;
      total.magnitude.up += std::abs(upstream);
    } else {
      const double term = upstream * static_cast<double>(r - u);
      total.sum.in += term;
      total.magnitude.in += std::abs(term);
    }
    const bool nan_range = std::isnan(s) || std::isnan(n);
    xhat.mutable_data_ptr<T>()[i] = nan_range ? std::numeric_limits<T>::quiet_NaN() : s * level;
    dx.mutable_data_ptr<T>()[i] = (r < n || r > p) ? T(0) : gs[i];
  }

  Expected expected{xhat.to(x_any.scalar_type()), dx.to(x_any.scalar_type()), {}, {}};
  for (size_t j = 0; j < op.learnable; ++j) {
    Tensor grad = at::empty_like(columns[j]), magnitude = at::empty_like(columns[j]);
    for (int64_t i = 0; i < ranges; ++i) {
      const Row row = rows(op, values[i], grids[i], bits)[j];
      const Sums& total = sums[i];
      const double inside = row.in == 0 ? 0 : row.in * total.sum.in;  // 0 * NaN must not reach dz
      grad.mutable_data_ptr<double>()[i] = inside + row.lo * total.sum.lo + row.up * total.sum.up;
      magnitude.mutable_data_ptr<double>()[i] =
          (row.in == 0 ? 0 : std::abs(row.in) * total.magnitude.in) +
          std::abs(row.lo) * total.magnitude.lo + std::abs(row.up) * total.magnitude.up;
    }
    expected.grads.push_back(grad);
    expected.magnitudes.push_back(magnitude);
  }
  return expected;
}

}  // namespace

template <typename T>
Grid<T> grid(const Op& op, const std::vector<double>& v, int64_t bits, double eps) {
  const T k = static_cast<T>(levels(bits));
  const auto value = [&](size_t i) { return static_cast<T>(v[i]); };
  const auto ratio = [&](size_t i) {
    return op.sigmoid ? static_cast<T>(logistic(v[i])) : value(i);
  };
  const auto guarded = [&](T raw) { return raw < static_cast<T>(eps) ? static_cast<T>(eps) : raw; };
  T s = 0, z = 0;
  switch (op.kind) {
    case Kind::scale_offset:
      s = guarded(value(0));
      z = value(1);
      break;
    case Kind::min_max:
      s = guarded((value(1) - value(0)) / k);
      z = value(0) / s;
      break;
    case Kind::beta_gamma: {
      const T low = ratio(0) * value(2);
      s = guarded((ratio(1) * value(3) - low) / k);
      z = low / s;
      break;
    }
    case Kind::kscale_koffset:
      s = guarded(value(0) / k);
      z = k * value(1);
      break;
    case Kind::symmetric_scale:
      s = guarded(value(0));
      break;
    case Kind::symmetric_max:
      s = guarded(value(0) / static_cast<T>(half(op, bits)));
      break;
    case Kind::symmetric_gamma:
      s = guarded(ratio(0) * value(1) / static_cast<T>(half(op, bits)));
      break;
  }
  if (op.symmetric) return {s, 0, -(k - 1) / 2 - op.full_range, (k - 1) / 2};
  const T n = std::nearbyint(z);
  return {s, z, n, n + k};
}
template Grid<float> grid(const Op&, const std::vector<double>&, int64_t, double);
template Grid<double> grid(const Op&, const std::vector<double>&, int64_t, double);

Expected oracle(const Op& op, const Tensor& x, const Tensors& parameters, const Tensor& upstream,
                int64_t bits, double eps) {
  if (parameters[0].scalar_type() == at::kDouble)
    return oracle_in<double, double>(op, x, parameters, upstream, bits, eps);
  if (x.scalar_type() == at::kDouble)
    return oracle_in<float, double>(op, x, parameters, upstream, bits, eps);
  return oracle_in<float, float>(op, x, parameters, upstream, bits, eps);
}

namespace {

Tensors parameters_of_range(const Op& op, const Tensor& min, const Tensor& max, int64_t bits) {
  const double k = levels(bits);
  const Tensor scale = ((max - min) / k).clamp_min(kEps);
  // A logit per range, so that sigmoid(logit) * bound is the wanted end.
  const Tensor logit = at::full_like(max, 1.25), weight = at::sigmoid(logit);
  switch (op.kind) {
    case Kind::scale_offset:
      return {scale, min / scale};
    case Kind::min_max:
      return {min, max};
    case Kind::beta_gamma:
      if (op.sigmoid) return {logit, logit.clone(), min / weight, max / weight};
      return {at::full_like(min, 0.5), at::full_like(max, 0.75), min / 0.5, max / 0.75};
    case Kind::kscale_koffset:
      return {scale * k, min / scale / k};
    case Kind::symmetric_scale:
      return {max / half(op, bits)};
    case Kind::symmetric_max:
      return {max};
    case Kind::symmetric_gamma:
      if (op.sigmoid) return {logit, max / weight};
      return {at::full_like(max, 0.75), max / 0.75};
  }
  return {};
}

Tensors to_type(Tensors tensors, at::ScalarType dtype) {
  for (Tensor& t : tensors) t = t.to(dtype);
  return tensors;
}

}  // namespace

Tensors random_parameters(const Op& op, at::IntArrayRef shape, int64_t bits, at::ScalarType dtype) {
  const Tensor min = -1.5 - at::rand(shape, at::kDouble), max = 2 + at::rand(shape, at::kDouble);
  return to_type(parameters_of_range(op, min, max, bits), dtype);
}

Tensors parameters_of_range(const Op& op, double min, double max, int64_t bits,
                            at::ScalarType dtype) {
  const auto scalar = [](double v) { return at::full({1}, v, at::kDouble); };
  return to_type(parameters_of_range(op, scalar(min), scalar(max), bits), dtype);
}

Result evaluate(const Op& op, const Tensor& x, const Tensors& parameters, const Tensor& upstream,
                int64_t bits, double eps) {
  const Tensor leaf = x.detach().requires_grad_();
  Tensors arguments, inputs = {leaf};
  for (size_t i = 0; i < parameters.size(); ++i) {
    arguments.push_back(parameters[i].detach().to(x.device(), parameters[i].scalar_type()));
    if (i < op.learnable) inputs.push_back(arguments.back().requires_grad_());
  }
  const Tensor xhat = op.call(leaf, arguments, bits, eps);
  Tensors grads = torch::autograd::grad({xhat}, inputs, {upstream.to(x.device())});
  const Tensor dx = grads[0];
  grads.erase(grads.begin());
  return {xhat.detach(), dx, grads};
}

testing::AssertionResult bit_equal(const Tensor& a_any, const Tensor& b_any) {
  const Tensor a = a_any.detach().cpu().contiguous(), b = b_any.detach().cpu().contiguous();
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) {
    return testing::AssertionFailure()
           << a.scalar_type() << a.sizes() << " and " << b.scalar_type() << b.sizes();
  }
  const auto bits_type = a.element_size() == 8   ? at::kLong
                         : a.element_size() == 4 ? at::kInt
                                                 : at::kShort;
  const Tensor differ = at::logical_and(a.view(bits_type).ne(b.view(bits_type)),
                                        at::logical_and(a.isnan(), b.isnan()).logical_not())
                            .flatten();
  const int64_t count = differ.sum().item<int64_t>();
  if (count == 0) return testing::AssertionSuccess();
  const Tensor where = differ.nonzero().flatten();
  const int64_t first = where[0].item<int64_t>();
  return testing::AssertionFailure()
         << count << " of " << a.numel() << " differ, first at " << first << ": "
         << a.flatten()[first].item<double>() << " and " << b.flatten()[first].item<double>();
}

testing::AssertionResult close(const Tensor& got_any, const Tensor& want_any,
                               const Tensor& magnitude, double unit) {
  const Tensor got = got_any.detach().cpu().to(at::kDouble).flatten();
  const Tensor want = want_any.detach().cpu().to(at::kDouble).flatten();
  if (got.numel() != want.numel())
    return testing::AssertionFailure() << got.numel() << " and " << want.numel() << " values";
  const Tensor allowed = unit * magnitude.cpu().flatten();
  const Tensor agree =
      at::logical_or((got - want).abs().le(allowed),
                     at::logical_or(got.eq(want), at::logical_and(got.isnan(), want.isnan())));
  const Tensor where = agree.logical_not().nonzero().flatten();
  if (where.numel() == 0) return testing::AssertionSuccess();
  const int64_t first = where[0].item<int64_t>();
  return testing::AssertionFailure()
         << where.numel() << " of " << got.numel() << " differ, first at " << first << ": got "
         << got[first].item<double>() << ", want " << want[first].item<double>() << ", allowed "
         << allowed.expand_as(got)[first].item<double>();
}

void expect_matches_oracle(const Op& op, const Tensor& x, const Tensors& parameters,
                           const Tensor& upstream, int64_t bits, double eps) {
  const Result result = evaluate(op, x, parameters, upstream, bits, eps);
  const Expected expected = oracle(op, x, parameters, upstream, bits, eps);
  const Tensor like = at::zeros_like(x);
  EXPECT_EQ(result.xhat.scalar_type(), x.scalar_type());
  EXPECT_EQ(result.dx.scalar_type(), x.scalar_type());
  EXPECT_EQ(result.xhat.strides(), like.strides());
  EXPECT_EQ(result.dx.strides(), like.strides());
  EXPECT_TRUE(close(result.xhat, expected.xhat, like, 0)) << "xhat of " << op;
  EXPECT_TRUE(close(result.dx, expected.dx, like, 0)) << "dx of " << op;
  if (x.is_cuda()) {
    const Result cpu = evaluate(op, x.cpu(), parameters, upstream, bits, eps);
    EXPECT_TRUE(bit_equal(result.xhat, cpu.xhat)) << "xhat of " << op << " on CPU and CUDA";
    EXPECT_TRUE(bit_equal(result.dx, cpu.dx)) << "dx of " << op << " on CPU and CUDA";
  }
  for (size_t i = 0; i < op.learnable; ++i) {
    EXPECT_EQ(result.grads[i].scalar_type(), parameters[i].scalar_type());
    EXPECT_EQ(result.grads[i].sizes(), parameters[i].sizes());
    EXPECT_TRUE(close(result.grads[i], expected.grads[i], expected.magnitudes[i]))
        << "gradient of parameter " << i << " of " << op;
  }
}

Tensor tensor_of(const nlohmann::json& value) {
  if (value.is_number()) return at::full({}, value.get<double>(), at::kDouble);
  if (value.empty() || !value[0].is_array())
    return at::tensor(value.get<std::vector<double>>(), at::kDouble);
  Tensors rows;
  for (const nlohmann::json& row : value) rows.push_back(tensor_of(row));
  return at::stack(rows);
}

void expect_error(const std::function<void()>& body, const std::vector<std::string>& parts) {
  try {
    body();
  } catch (const c10::Error& error) {
    const std::string message = error.what_without_backtrace();
    for (const std::string& part : parts) {
      EXPECT_TRUE(message.find(part) != std::string::npos) << "no '" << part << "' in: " << message;
    }
    return;
  }
  ADD_FAILURE() << "no exception";
}

}  // namespace asymq_test
