#include <ATen/ATen.h>
#include <torch/serialize/input-archive.h>
#include <torch/serialize/output-archive.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>
#include <utility>

#include "asymq/nn.h"
#include "asymq/parameterization.h"
#include "ops/fake_quantize.h"
#include "ops/fake_quantize_dynamic.h"

namespace asymq::nn {
namespace {

using at::Tensor;

Link link_of(const QuantizerOptions& options) {
  return Link{static_cast<int>(link_number(options.name(), options.sigmoid(), options.link()))};
}

/// Empty for the identity.
std::string link_name(const QuantizerOptions& options) {
  const Link link = link_of(options);
  return link == Link::identity ? "" : std::string(kLinks[static_cast<int>(link)].name);
}

/// Position in Parameterizations of what the options name.
int64_t checked_parameterization(const QuantizerOptions& options) {
  const auto& name = options.name();
  const auto& family = options.parameterization();
  TORCH_CHECK(options.bits() >= 2 && options.bits() <= 16, name,
              ": bits must be between 2 and 16, got ", options.bits());
  TORCH_CHECK(options.eps() > 0 && std::isfinite(options.eps()), name,
              ": eps must be positive and finite, got ", options.eps());
  TORCH_CHECK(options.gradient_scale() > 0 && std::isfinite(options.gradient_scale()), name,
              ": gradient_scale must be positive and finite, got ", options.gradient_scale());
  TORCH_CHECK(
      find_parameterization(family, false) >= 0, name,
      ": parameterization must be scale_offset, min_max, beta_gamma or kscale_koffset, got ",
      family);
  const std::string link = link_name(options);
  TORCH_CHECK(link.empty() || family == "beta_gamma", name, ": the link ", link,
              " needs the parameterization beta_gamma, got ", family);
  TORCH_CHECK(!options.symmetric() || find_parameterization(family, true) >= 0, name,
              ": symmetric needs the parameterization scale_offset, min_max or beta_gamma, got ",
              family);
  TORCH_CHECK(!options.fix_min() ||
                  (!options.symmetric() && (family == "min_max" || family == "beta_gamma")),
              name, ": fix_min needs asymmetric min_max or beta_gamma, got ",
              options.symmetric() ? "symmetric " : "", family);
  TORCH_CHECK(!options.full_range() || options.symmetric(), name, ": full_range needs symmetric");
  if (std::holds_alternative<PerToken>(options.granularity())) {
    TORCH_CHECK(family == "beta_gamma", name,
                ": PerToken needs the parameterization beta_gamma, got ", family);
    TORCH_CHECK(!options.fix_min(), name,
                ": PerToken has no minimum to fix, its ends are those of each token");
  }
  return find_parameterization(family, options.symmetric(), options.full_range());
}

KindArguments kind_of(const QuantizerOptions& options, int64_t parameterization) {
  return {parameterization, options.bits(), options.eps(), static_cast<int64_t>(link_of(options)),
          options.gradient_scale()};
}

int64_t checked_axis(const QuantizerOptions& options, int64_t axis) {
  const int64_t dims = static_cast<int64_t>(options.sizes().size());
  TORCH_CHECK(axis >= -dims && axis < dims, options.name(), ": axis ", axis,
              " of the granularity needs sizes that have it, got sizes ",
              at::IntArrayRef(options.sizes()));
  return axis < 0 ? axis + dims : axis;
}

std::vector<int64_t> range_shape(const QuantizerOptions& options) {
  if (const auto* channel = std::get_if<PerChannel>(&options.granularity())) {
    const int64_t axis = checked_axis(options, channel->axis);
    std::vector<int64_t> shape(options.sizes().size(), 1);
    shape[axis] = options.sizes()[axis];
    return shape;
  }
  if (const auto* group = std::get_if<PerGroup>(&options.granularity())) {
    const bool last = group->axis == PerGroup::kReduction;
    const int64_t axis = checked_axis(options, last ? -1 : group->axis);
    std::vector<int64_t> shape = options.sizes();
    TORCH_CHECK(group->size > 0 && shape[axis] % group->size == 0, options.name(),
                ": size of a group must be positive and divide the axis of ", shape[axis],
                " elements, got ", group->size);
    shape[axis] /= group->size;
    return shape;
  }
  if (const auto* token = std::get_if<PerToken>(&options.granularity()); token && token->group) {
    const int64_t size = options.sizes()[checked_axis(options, -1)];
    TORCH_CHECK(*token->group > 0 && size % *token->group == 0, options.name(),
                ": group of PerToken must be positive and divide the last axis of ", size,
                " elements, got ", *token->group);
    return {size / *token->group};
  }
  return {1};
}

std::array<const char*, 4> range_names(int64_t parameterization) {
  const Traits& traits = Parameterizations::traits[parameterization];
  return {traits.first, traits.second, traits.min, traits.max};
}

/// Least and greatest element of each range, where `shape` divides x's axis by axis or has one
/// element. NaN shows in both.
std::tuple<Tensor, Tensor> extrema(const Tensor& x, at::IntArrayRef shape) {
  if (c10::multiply_integers(shape) == 1) return at::aminmax(x);
  std::vector<int64_t> blocks, within;
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    blocks.insert(blocks.end(), {shape[axis], x.size(axis) / shape[axis]});
    within.push_back(2 * axis + 1);
  }
  const Tensor blocked = x.reshape(blocks);
  return {blocked.amin(within), blocked.amax(within)};
}

bool all_finite(const Tensor& tensor) { return tensor.isfinite().all().is_nonzero(); }

}  // namespace

QuantizerImpl::QuantizerImpl(QuantizerOptions options)
    : options(std::move(options)),
      parameterization_(checked_parameterization(this->options)),
      range_shape_(range_shape(this->options)) {
  reset();
}

void QuantizerImpl::reset() {
  const auto names = range_names(parameterization_);
  const auto new_range = [&] { return at::full(range_shape_, uncalibrated(), at::kFloat); };
  for (size_t i = 0; i < names.size(); ++i) {
    const std::string name = names[i];
    const bool may_learn = i < initial_.size();
    // The ends of a token are not stored.
    if (name.empty() || (per_token() && !may_learn)) continue;
    if (may_learn && !(i == 0 && options.fix_min())) {
      ranges_[i] = register_parameter(name, new_range());
      initial_[i] = register_buffer("initial_" + name, new_range());
    } else {
      ranges_[i] = register_buffer(name, new_range());
    }
  }
  known_calibrated_ = false;
}

Tensor QuantizerImpl::forward(const Tensor& x) {
  if (state == State::off) return x;
  if (state == State::observing) {
    observe(x);
    return x;
  }
  TORCH_CHECK(calibrated(), options.name(),
              ": its range is not set; calibrate the model first (asymq::nn::calibrate) or load a "
              "calibrated state");
  const auto optional = [](const Tensor& tensor) {
    return tensor.defined() ? std::optional(tensor) : std::nullopt;
  };
  if (const auto* token = std::get_if<PerToken>(&options.granularity())) {
    return fake_quantize_dynamic_op(x, {ranges_[0], optional(ranges_[1]), token->group,
                                        kind_of(options, parameterization_), /*token=*/true});
  }
  const auto shape = shape_on(x);
  const auto range = [&](size_t i) -> std::optional<Tensor> {
    if (!ranges_[i].defined() || shape == range_shape_) return optional(ranges_[i]);
    return ranges_[i].view(shape);
  };
  return fake_quantize_op(
      x, {{*range(0), range(1), range(2), range(3)}, kind_of(options, parameterization_)});
}

std::vector<int64_t> QuantizerImpl::shape_on(const Tensor& x) const {
  if (c10::multiply_integers(range_shape_) == 1) return range_shape_;
  const auto& sizes = options.sizes();
  const int64_t shared = x.dim() - static_cast<int64_t>(sizes.size());
  bool fits = shared >= 0;
  std::vector<int64_t> shape(std::max<int64_t>(shared, 0), 1);
  for (size_t axis = 0; axis < sizes.size() && fits; ++axis) {
    shape.push_back(range_shape_[axis]);
    fits = range_shape_[axis] == 1 || x.size(shared + axis) == sizes[axis];
  }
  TORCH_CHECK(fits, options.name(), ": x must end in the sizes ", at::IntArrayRef(sizes),
              " (those that share one range may differ), got shape ", x.sizes());
  return shape;
}

void QuantizerImpl::observe(const Tensor& x) {
  if (x.numel() == 0 || per_token()) return;
  const at::NoGradGuard no_grad;
  auto [low, high] = extrema(x.detach(), shape_on(x));
  low = low.to(at::kFloat).reshape(range_shape_);
  high = high.to(at::kFloat).reshape(range_shape_);
  observed_low_ = observed_low_.defined() ? at::minimum(observed_low_, low) : low;
  observed_high_ = observed_high_.defined() ? at::maximum(observed_high_, high) : high;
}

void QuantizerImpl::start_observing() {
  state = State::observing;
  observed_low_ = observed_high_ = Tensor();
}

bool QuantizerImpl::finish_observing(bool force_zero, double fallback) {
  if (per_token()) {
    state = State::quantizing;
    return true;
  }
  TORCH_CHECK(observed_low_.defined(), options.name(), ": calibration brought it no data");
  TORCH_CHECK(all_finite(observed_low_) && all_finite(observed_high_), options.name(),
              ": calibration brought it NaN or infinite values");
  const Tensor widest = at::maximum(observed_low_.abs(), observed_high_.abs()).max();
  if (widest.is_nonzero()) fallback = at::_local_scalar_dense(widest).toDouble();
  const auto [low, high, without_width] =
      range_of_extrema(observed_low_, observed_high_, options.bits(), options.symmetric(),
                       force_zero, fallback, options.eps(), options.full_range());
  set_range(low, high);
  observed_low_ = observed_high_ = Tensor();
  state = State::quantizing;
  return !without_width.all().is_nonzero();
}

void QuantizerImpl::set_range(const Tensor& low, const Tensor& high) {
  TORCH_CHECK(!per_token(), options.name(),
              ": its range is that of each token, so that there is none to set");
  const at::NoGradGuard no_grad;
  const auto end = [&](const Tensor& tensor) {
    return tensor.to(ranges_[0].options()).expand(range_shape_);
  };
  std::array<Tensor, 4> values{Tensor(), Tensor(), end(low), end(high)};
  const auto learned = parameters_of_range(options.parameterization(), values[2], values[3],
                                           options.bits(), options.symmetric(), options.sigmoid(),
                                           options.full_range(), options.link());
  std::copy(learned.begin(), learned.end(), values.begin());
  for (size_t i = 0; i < ranges_.size(); ++i) {
    if (ranges_[i].defined()) ranges_[i].copy_(values[i]);
  }
  for (size_t i = 0; i < initial_.size(); ++i) {
    if (initial_[i].defined()) initial_[i].copy_(values[i]);
  }
  known_calibrated_ = true;
}

void QuantizerImpl::clear_range() {
  const at::NoGradGuard no_grad;
  for (const Tensor& range : ranges_) {
    if (range.defined()) range.fill_(uncalibrated());
  }
  for (const Tensor& initial : initial_) {
    if (initial.defined()) initial.fill_(uncalibrated());
  }
  known_calibrated_ = false;
}

bool QuantizerImpl::calibrated() const {
  if (!known_calibrated_) {
    // Not the learned values, which training may make NaN.
    known_calibrated_ = all_finite(initial_[0].defined() ? initial_[0] : initial_[1]);
  }
  return known_calibrated_;
}

std::tuple<Tensor, std::optional<Tensor>> QuantizerImpl::scale_offset() const {
  TORCH_CHECK(!per_token(), options.name(), ": its scale and offset are those of each token");
  std::vector<Tensor> parameters;
  for (const Tensor& range : ranges_) {
    if (range.defined()) parameters.push_back(range);
  }
  return effective_scale_offset(options.parameterization(), parameters, options.bits(),
                                options.symmetric(), options.sigmoid(), options.eps(),
                                options.full_range(), options.link());
}

std::tuple<Tensor, Tensor> QuantizerImpl::bounds() const {
  const auto [scale, offset] = scale_offset();
  const Tensor s = scale.to(at::kDouble);
  const std::optional<Tensor> z = offset ? std::optional(offset->to(at::kDouble)) : std::nullopt;
  const auto end = [&](double beyond) {
    const Tensor code = quantize(at::full_like(s, beyond), s, z, options.bits(), options.eps(),
                                 options.full_range());
    return dequantize(code, s, z, options.bits(), options.eps(), options.full_range());
  };
  constexpr double infinity = std::numeric_limits<double>::infinity();
  return {end(-infinity), end(infinity)};
}

void QuantizerImpl::to(torch::Device device, torch::Dtype, bool non_blocking) {
  to(device, non_blocking);
}

void QuantizerImpl::to(torch::Dtype, bool) {}

void QuantizerImpl::to(torch::Device device, bool non_blocking) {
  Module::to(device, non_blocking);
}

void QuantizerImpl::load(torch::serialize::InputArchive& archive) {
  c10::IValue saved;
  archive.read("quantizer", saved);
  TORCH_CHECK(saved.toStringRef() == describe(), options.name(),
              ": the state to load is of another quantizer: it has ", saved.toStringRef(),
              ", this one ", describe());
  Module::load(archive);
  known_calibrated_ = false;
}

void QuantizerImpl::save(torch::serialize::OutputArchive& archive) const {
  archive.write("quantizer", c10::IValue(describe()));
  Module::save(archive);
}

bool QuantizerImpl::per_token() const {
  return std::holds_alternative<PerToken>(options.granularity());
}

double QuantizerImpl::uncalibrated() const {
  if (!per_token()) return std::numeric_limits<double>::quiet_NaN();
  return first_factor(link_of(options));
}

std::string QuantizerImpl::describe() const {
  std::ostringstream text;
  const std::string link = link_name(options);
  text << options.bits() << " bits, " << (options.symmetric() ? "symmetric " : "")
       << (options.full_range() ? "full range " : "") << options.parameterization()
       << (link.empty() ? "" : ", " + link) << (options.fix_min() ? ", fix_min" : "") << ", eps "
       << options.eps();
  if (options.gradient_scale() != 1) text << ", gradient scale " << options.gradient_scale();
  if (const auto* token = std::get_if<PerToken>(&options.granularity())) {
    text << ", per token";
    if (token->group) text << " in groups of " << *token->group;
  }
  text << ", ranges " << at::IntArrayRef(range_shape_);
  return text.str();
}

void QuantizerImpl::pretty_print(std::ostream& stream) const {
  stream << "asymq::nn::Quantizer(" << describe() << ")";
}

}  // namespace asymq::nn
