// Modules that learn quantization ranges, in LibTorch's manner.
//
//   asymq::nn::QuantLinear layer(asymq::nn::QuantLinearOptions(64, 10).output(
//       asymq::nn::QuantActOptions().bits(8)));
//   asymq::nn::calibrate(*layer, [&] { layer(x); });
//   torch::optim::Adam optimizer(asymq::nn::range_parameters(*layer), 1e-3);
//
// A quantizer's tensors are named as the arguments of its function (fake_quantize.h): learned ones
// are parameters, constant ones buffers. `initial_<name>` is a buffer with the value that
// calibration gave a learned one. All are NaN before, so that torch::save and torch::load keep the
// calibrated state, and all stay float32 whatever dtype a module is cast to. Only calibration,
// loading and the first forward pass after loading wait for the device. Every error is a
// c10::Error.
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <variant>
#include <vector>

#include "asymq/fake_quantize.h"

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq::nn {

/// One range for the whole tensor.
struct PerTensor {};

/// One range per index of `axis`, an axis of QuantizerOptions::sizes.
struct PerChannel {
  int64_t axis = 0;
};

/// One range per `size` consecutive elements along `axis` and per index of the other axes of
/// QuantizerOptions::sizes.
struct PerGroup {
  int64_t size;
  int64_t axis = -1;
};

/// The live range of every token, or of every group of `group` elements of its last axis, with zero
/// in it, on factors that all tokens share (fake_quantize_dynamic_*): one of each, or with groups
/// one per group of the last of QuantizerOptions::sizes. They are known at once: calibration passes
/// such a quantizer by. beta_gamma without fix_min alone, and no weight's.
struct PerToken {
  std::optional<int64_t> group = std::nullopt;
};

using Granularity = std::variant<PerTensor, PerChannel, PerGroup, PerToken>;

/// What a quantizer is.
struct QuantizerOptions {
  /// 2 to 16.
  TORCH_ARG(int64_t, bits) = 8;

  /// A grid symmetric around 0; what is learned then is s, θmax or γ.
  TORCH_ARG(bool, symmetric) = false;

  /// "scale_offset", "min_max", "beta_gamma" or "kscale_koffset" (which has no symmetric
  /// counterpart).
  TORCH_ARG(std::string, parameterization) = "beta_gamma";

  /// One more step below zero, such as -8 to 7 with 4 bits; symmetric alone.
  TORCH_ARG(bool, full_range) = false;

  /// The same as the link "sigmoid".
  TORCH_ARG(bool, sigmoid) = false;

  /// The lower end does not learn; asymmetric min_max and beta_gamma alone.
  TORCH_ARG(bool, fix_min) = false;

  /// Least effective scale.
  TORCH_ARG(double, eps) = 1e-8;

  /// Which elements share a range.
  TORCH_ARG(Granularity, granularity) = PerTensor();

  /// Sizes of the last axes of the tensor, as many as the granularity is about; the axes before
  /// share ranges. {768} for [..., 768], {64, 1, 1} for the 64 channels of [N, 64, H, W]. A layer
  /// fills in those of its weight and output.
  TORCH_ARG(std::vector<int64_t>, sizes) = {};

  /// What errors call the quantizer.
  TORCH_ARG(std::string, name) = "asymq::nn::QuantAct";

  /// What the factors are of what is learned (fake_quantize.h); beta_gamma alone.
  TORCH_ARG(std::string, link) = "identity";

  /// What the gradients of the range are multiplied by.
  TORCH_ARG(double, gradient_scale) = 1.0;
};

/// Quantizes one tensor: an activation, or the weight of the layer it belongs to.
///
/// Its range tensors have shape [1] per tensor; else they have the dimensions of `sizes`: [C] for
/// an activation of C channels, [out, 1] for the rows of a weight, [out, in / size] for groups. The
/// factors per token have shape [1], or [C / group].
class QuantizerImpl : public torch::nn::Cloneable<QuantizerImpl> {
 public:
  enum class State {
    quantizing,  ///< an error before calibration
    observing,   ///< records the extrema of what passes, and passes it on
    off          ///< passes everything on
  };

  explicit QuantizerImpl(QuantizerOptions options = {});

  /// Registers all tensors, uncalibrated.
  void reset() override;

  /// x on its grid, of x's dtype; what x may be, see fake_quantize.h.
  at::Tensor forward(const at::Tensor& x);

  /// Starts to record, from nothing; nothing at all per token.
  void start_observing();

  /// Makes what was recorded the range, as range_of_extrema does, and quantizes from then on.
  /// Returns false where what was seen has no width in some range, which is then a guess: ±fallback
  /// where all was 0. Error, without any change: nothing was recorded, or a NaN or infinity.
  bool finish_observing(bool force_zero = true, double fallback = 1.0);

  /// Makes [low, high] the range and its parameters' first values. low, high: of the range tensors'
  /// shape, or one element. A symmetric quantizer looks at high alone. Error per token, where the
  /// range is that of x.
  void set_range(const at::Tensor& low, const at::Tensor& high);

  /// Forgets the range; per token, what the factors have learned.
  void clear_range();

  /// Whether the range is set, which the tensors alone say: they are NaN before. Reading them waits
  /// for the device; a yes is remembered.
  bool calibrated() const;

  /// Moves the ranges; they stay float32.
  void to(torch::Device device, torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Dtype dtype, bool non_blocking = false) override;
  void to(torch::Device device, bool non_blocking = false) override;

  /// Error: the archive has the state of a quantizer with other options.
  void load(torch::serialize::InputArchive& archive) override;
  void save(torch::serialize::OutputArchive& archive) const override;

  void pretty_print(std::ostream& stream) const override;

  QuantizerOptions options;
  State state = State::quantizing;

 private:
  bool per_token() const;
  /// The value of a learned tensor before calibration.
  double uncalibrated() const;
  /// Bits, parameterization and so on in words: what a saved state must agree in.
  std::string describe() const;
  /// The range tensors' shape against x.
  std::vector<int64_t> shape_on(const at::Tensor& x) const;
  void observe(const at::Tensor& x);

  int64_t parameterization_;
  std::vector<int64_t> range_shape_;
  /// In the order of Traits: first, second, min, max; undefined where there is none.
  std::array<at::Tensor, 4> ranges_;
  /// First values of the first two; undefined where they do not learn.
  std::array<at::Tensor, 2> initial_;
  at::Tensor observed_low_, observed_high_;
  /// Whether the tensors have said yes already.
  mutable bool known_calibrated_ = false;
};

TORCH_MODULE(Quantizer);

/// The quantizer of an activation.
using QuantAct = Quantizer;
using QuantActOptions = QuantizerOptions;

struct QuantLinearOptions {
  QuantLinearOptions(int64_t in_features, int64_t out_features);

  TORCH_ARG(int64_t, in_features);

  TORCH_ARG(int64_t, out_features);

  TORCH_ARG(bool, bias) = true;

  /// Of the weight [out_features, in_features]; by default one range per output channel.
  TORCH_ARG(std::optional<QuantizerOptions>,
            weight) = QuantizerOptions().bits(4).symmetric(true).granularity(PerChannel());

  /// Of the output [..., out_features]; none by default.
  TORCH_ARG(std::optional<QuantActOptions>, output) = std::nullopt;
};

/// torch::nn::Linear whose weight, and output on request, are quantized. The bias is not.
class QuantLinearImpl : public torch::nn::Cloneable<QuantLinearImpl> {
 public:
  QuantLinearImpl(int64_t in_features, int64_t out_features);
  explicit QuantLinearImpl(QuantLinearOptions options);
  /// Shares the parameters of `linear`, which must be of the options' sizes.
  QuantLinearImpl(QuantLinearOptions options, const torch::nn::Linear& linear);

  void reset() override;

  /// x: [..., in_features], of the weight's dtype.
  at::Tensor forward(const at::Tensor& x);

  /// From an archive of this layer or of a torch::nn::Linear, whose weights leave the quantizers
  /// uncalibrated.
  void load(torch::serialize::InputArchive& archive) override;

  void pretty_print(std::ostream& stream) const override;

  QuantLinearOptions options;
  at::Tensor weight;
  /// Undefined without bias.
  at::Tensor bias;
  /// Empty where there is none.
  Quantizer weight_quantizer = nullptr;
  QuantAct output_quantizer = nullptr;

 private:
  void register_all(const torch::nn::Linear& linear);
};

class QuantLinear : public torch::nn::ModuleHolder<QuantLinearImpl> {
 public:
  using torch::nn::ModuleHolder<QuantLinearImpl>::ModuleHolder;
  using Impl = QuantLinearImpl;

  /// Shares weight and bias with `linear`. The quantizers are on its device, uncalibrated.
  static QuantLinear from_float(
      const torch::nn::Linear& linear,
      std::optional<QuantizerOptions> weight = *QuantLinearOptions(1, 1).weight(),
      std::optional<QuantActOptions> output = std::nullopt);
};

/// The quantizers of a model by their path in it, a shared one once.
torch::OrderedDict<std::string, Quantizer> named_quantizers(const torch::nn::Module& model);

/// Sets the range of every quantizer: weights' from the weights, then, with quantized weights, all
/// others' from what passes them while `run` runs the model over some batches:
///
///   calibrate(*model, [&] { for (const auto& batch : batches) model->forward(batch); });
///
/// Runs in eval mode without gradient, and turns every quantizer to `quantizing`. A second call
/// starts afresh. force_zero: see range_of_extrema, whose `fallback` is 1 for activations and
/// 1/√in_features, the bound of torch's initial weights, for weights. Warns, naming the quantizers,
/// where what they saw has no width.
/// Error, leaving every range and state as it was: there is no quantizer, or one has seen no data,
/// or a NaN or infinity.
void calibrate(torch::nn::Module& model, const std::function<void()>& run, bool force_zero = true);

/// Sets the state of every quantizer; `off` gives the float model.
void set_state(torch::nn::Module& model, QuantizerImpl::State state);

/// The learned range tensors, for an optimizer.
std::vector<at::Tensor> range_parameters(const torch::nn::Module& model);

/// All parameters but the range tensors, for an optimizer.
std::vector<at::Tensor> weight_parameters(const torch::nn::Module& model);

/// Makes the weight_parameters require no gradient.
void freeze_weights(torch::nn::Module& model);

}  // namespace asymq::nn

#pragma GCC visibility pop
