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
// loading, the first forward pass after loading and summary wait for the device. Every error is a
// c10::Error.
#pragma once

#include <torch/arg.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>
#include <torch/nn/pimpl.h>
#include <torch/optim/lbfgs.h>
#include <torch/optim/optimizer.h>
#include <torch/ordered_dict.h>

#include <array>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>
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
/// QuantizerOptions::sizes. By default the last axis, of a convolution's weight that of its input
/// channels.
struct PerGroup {
  static constexpr int64_t kReduction = std::numeric_limits<int64_t>::min();

  int64_t size;
  int64_t axis = kReduction;
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
  /// fills in those of its weight, and of its input and output where channels are the last axis.
  TORCH_ARG(std::vector<int64_t>, sizes) = {};

  /// What errors call the quantizer.
  TORCH_ARG(std::string, name) = "asymq::nn::QuantAct";

  /// What the factors are of what is learned (fake_quantize.h); beta_gamma alone.
  TORCH_ARG(std::string, link) = "identity";

  /// What the gradients of the range are multiplied by.
  TORCH_ARG(double, gradient_scale) = 1.0;

  /// What summary calls it. A layer fills in "weight", "norm_weight" or "input".
  TORCH_ARG(std::string, kind) = "activation";
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

  /// Makes what was recorded the range, as range_of_extrema does, and quantizes from then on. A
  /// range that saw zeros alone gets the widest of the others, or where all did, ±fallback; then,
  /// or where no range saw a width, false is returned: they are guesses. Error, without any change:
  /// nothing was recorded, or a NaN or infinity.
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

  /// Effective scale s and offset z (none if symmetric), of the range tensors' shape, without
  /// gradient. Error per token, where they are those of x.
  std::tuple<at::Tensor, std::optional<at::Tensor>> scale_offset() const;

  /// The ends of the grid, s·n and s·p, in float64. Error per token.
  std::tuple<at::Tensor, at::Tensor> bounds() const;

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

/// What a layer's weight gets where nothing is said.
inline QuantizerOptions default_weight() {
  return QuantizerOptions().bits(4).symmetric(true).granularity(PerChannel());
}

/// What a normalization layer's weight gets where nothing is said.
inline QuantizerOptions default_norm_weight() { return QuantizerOptions().bits(12); }

/// What all quantized layers are beside modules.
class QuantLayer {
 public:
  virtual ~QuantLayer() = default;

  /// Undefined where the float layer has none.
  at::Tensor weight, bias;
  /// Empty where there is none.
  Quantizer weight_quantizer = nullptr;
  QuantAct output_quantizer = nullptr, input_quantizer = nullptr;

  /// The end of the first range of a weight of zeros: the bound of torch's initial weights, 1 of
  /// normalization layers.
  double typical_end() const { return typical_end_; }

 protected:
  double typical_end_ = 1;
};

/// A layer of torch::nn (Float, such as torch::nn::Conv2dImpl) whose weight, and on request output
/// and input, are quantized. The bias is not. Its parameters have the names of the float layer's.
template <typename Derived, typename FloatLayer>
class QuantLayerImpl : public torch::nn::Cloneable<Derived>, public QuantLayer {
 public:
  using Float = FloatLayer;

  /// Shares the parameters of `layer`. Options: none for what is not quantized. Error: options that
  /// such a layer cannot have.
  QuantLayerImpl(const std::shared_ptr<Float>& layer, const std::optional<QuantizerOptions>& weight,
                 const std::optional<QuantActOptions>& output = std::nullopt,
                 const std::optional<QuantActOptions>& input = std::nullopt);

  void reset() override;

  /// x: what Float takes.
  at::Tensor forward(const at::Tensor& x);

  /// Quantizes the weight with what `other` does, so that the two learn one range. Error: the
  /// weight of `other` is another tensor.
  void share_weight_quantizer(const QuantLayer& other);

  /// From an archive of this layer or of a Float, whose weights leave the quantizers uncalibrated.
  void load(torch::serialize::InputArchive& archive) override;

  void pretty_print(std::ostream& stream) const override;

 private:
  void register_all(std::shared_ptr<Float> layer, const std::optional<QuantizerOptions>& weight,
                    const std::optional<QuantActOptions>& output,
                    const std::optional<QuantActOptions>& input);

  /// Its parameters are those of this module.
  std::shared_ptr<Float> layer_;
};

/// The holder of a quantized layer.
template <typename Implementation>
class QuantLayerHolder : public torch::nn::ModuleHolder<Implementation> {
 public:
  using torch::nn::ModuleHolder<Implementation>::ModuleHolder;
  using Impl = Implementation;

  /// Shares the parameters of `layer`. The quantizers are on its device, uncalibrated.
  static QuantLayerHolder from_float(
      const torch::nn::ModuleHolder<typename Impl::Float>& layer,
      const std::optional<QuantizerOptions>& weight = Impl::Options::default_weight_options(),
      const std::optional<QuantActOptions>& output = std::nullopt,
      const std::optional<QuantActOptions>& input = std::nullopt) {
    return std::make_shared<Impl>(layer.ptr(), weight, output, input);
  }

  /// The same of a layer that is tied to `other`, as a head to its embedding: their one weight has
  /// one quantizer. A clone has copies of both, as of torch's tied layers. Error: the weight of
  /// `other` is another tensor.
  static QuantLayerHolder from_float(const torch::nn::ModuleHolder<typename Impl::Float>& layer,
                                     const QuantLayer& other,
                                     const std::optional<QuantActOptions>& output = std::nullopt,
                                     const std::optional<QuantActOptions>& input = std::nullopt) {
    const Quantizer& shared = other.weight_quantizer;
    auto made =
        from_float(layer, shared ? std::optional(shared->options) : std::nullopt, output, input);
    made->share_weight_quantizer(other);
    return made;
  }
};

/// What a quantized layer is: the options of its float layer, from which or from whose arguments it
/// is made, and those of its quantizers:
///
///   QuantConv2dOptions(torch::nn::Conv2dOptions(3, 64, 7).stride(2)).output(QuantActOptions())
template <typename FloatOptions, QuantizerOptions (*default_options)() = default_weight>
struct QuantLayerOptions {
  template <typename... Arguments>
  requires std::constructible_from<FloatOptions, Arguments...>
  explicit QuantLayerOptions(Arguments&&... arguments)
      : layer(std::forward<Arguments>(arguments)...) {}

  static QuantizerOptions default_weight_options() { return default_options(); }

  FloatOptions layer;

  TORCH_ARG(std::optional<QuantizerOptions>, weight) = default_options();

  /// None by default.
  TORCH_ARG(std::optional<QuantActOptions>, output) = std::nullopt;

  /// None by default.
  TORCH_ARG(std::optional<QuantActOptions>, input) = std::nullopt;
};

/// A layer made of such options.
template <typename Derived, typename FloatLayer, typename LayerOptions>
class QuantLayerOfOptions : public QuantLayerImpl<Derived, FloatLayer> {
 public:
  using Options = LayerOptions;
  using QuantLayerImpl<Derived, FloatLayer>::QuantLayerImpl;

  explicit QuantLayerOfOptions(Options options)
      : QuantLayerImpl<Derived, FloatLayer>(std::make_shared<FloatLayer>(options.layer),
                                            options.weight(), options.output(), options.input()) {}

  template <typename... Arguments>
  requires std::constructible_from<Options, Arguments...>
  explicit QuantLayerOfOptions(Arguments&&... arguments)
      : QuantLayerOfOptions(Options(std::forward<Arguments>(arguments)...)) {}
};

struct QuantLinearOptions {
  QuantLinearOptions(int64_t in_features, int64_t out_features);

  static QuantizerOptions default_weight_options() { return default_weight(); }

  TORCH_ARG(int64_t, in_features);

  TORCH_ARG(int64_t, out_features);

  TORCH_ARG(bool, bias) = true;

  /// Of the weight [out_features, in_features]; by default one range per output channel.
  TORCH_ARG(std::optional<QuantizerOptions>, weight) = default_weight();

  /// Of the output [..., out_features]; none by default.
  TORCH_ARG(std::optional<QuantActOptions>, output) = std::nullopt;

  /// Of the input [..., in_features]; none by default.
  TORCH_ARG(std::optional<QuantActOptions>, input) = std::nullopt;
};

/// torch::nn::Linear whose weight, and on request output and input, are quantized.
class QuantLinearImpl : public QuantLayerImpl<QuantLinearImpl, torch::nn::LinearImpl> {
 public:
  using Options = QuantLinearOptions;

  QuantLinearImpl(int64_t in_features, int64_t out_features);
  explicit QuantLinearImpl(const QuantLinearOptions& options);
  /// Shares the parameters of `linear`, which must be of the options' sizes.
  QuantLinearImpl(const QuantLinearOptions& options, const torch::nn::Linear& linear);
  QuantLinearImpl(const std::shared_ptr<torch::nn::LinearImpl>& linear,
                  const std::optional<QuantizerOptions>& weight,
                  const std::optional<QuantActOptions>& output = std::nullopt,
                  const std::optional<QuantActOptions>& input = std::nullopt);

  QuantLinearOptions options;
};

using QuantLinear = QuantLayerHolder<QuantLinearImpl>;

/// torch::nn::Embedding with a quantized weight, whose ranges are [1], [num_embeddings, 1] or
/// [num_embeddings, embedding_dim / size]. What it returns is on its weight's grid: output and
/// input must be none. Error: max_norm or sparse, which change rows of the weight or of its
/// gradient.
using QuantEmbeddingOptions = QuantLayerOptions<torch::nn::EmbeddingOptions>;
class QuantEmbeddingImpl : public QuantLayerOfOptions<QuantEmbeddingImpl, torch::nn::EmbeddingImpl,
                                                      QuantEmbeddingOptions> {
 public:
  using QuantLayerOfOptions::QuantLayerOfOptions;
};
using QuantEmbedding = QuantLayerHolder<QuantEmbeddingImpl>;

/// torch::nn::LayerNorm with a quantized weight, by default 12 bits and one range, output and
/// input. Error: weight options where the float layer has no weight (elementwise_affine(false)).
using QuantLayerNormOptions = QuantLayerOptions<torch::nn::LayerNormOptions, default_norm_weight>;
class QuantLayerNormImpl : public QuantLayerOfOptions<QuantLayerNormImpl, torch::nn::LayerNormImpl,
                                                      QuantLayerNormOptions> {
 public:
  using QuantLayerOfOptions::QuantLayerOfOptions;
};
using QuantLayerNorm = QuantLayerHolder<QuantLayerNormImpl>;

/// torch::nn::Conv1d and Conv2d with a quantized weight, whose ranges are [1], [out, 1, ...] or
/// [out, in / groups / size, ...], output and input. Their channels are not the last axis: ranges
/// of the output or input that lie along an axis need `sizes`, such as {64, 1, 1}.
using QuantConv1dOptions = QuantLayerOptions<torch::nn::Conv1dOptions>;
class QuantConv1dImpl
    : public QuantLayerOfOptions<QuantConv1dImpl, torch::nn::Conv1dImpl, QuantConv1dOptions> {
 public:
  using QuantLayerOfOptions::QuantLayerOfOptions;
};
using QuantConv1d = QuantLayerHolder<QuantConv1dImpl>;

using QuantConv2dOptions = QuantLayerOptions<torch::nn::Conv2dOptions>;
class QuantConv2dImpl
    : public QuantLayerOfOptions<QuantConv2dImpl, torch::nn::Conv2dImpl, QuantConv2dOptions> {
 public:
  using QuantLayerOfOptions::QuantLayerOfOptions;
};
using QuantConv2d = QuantLayerHolder<QuantConv2dImpl>;

// Defined in the library.
extern template class QuantLayerImpl<QuantLinearImpl, torch::nn::LinearImpl>;
extern template class QuantLayerImpl<QuantEmbeddingImpl, torch::nn::EmbeddingImpl>;
extern template class QuantLayerImpl<QuantLayerNormImpl, torch::nn::LayerNormImpl>;
extern template class QuantLayerImpl<QuantConv1dImpl, torch::nn::Conv1dImpl>;
extern template class QuantLayerImpl<QuantConv2dImpl, torch::nn::Conv2dImpl>;

/// The quantizers of a model by their path in it, a shared one once.
torch::OrderedDict<std::string, Quantizer> named_quantizers(const torch::nn::Module& model);

/// Sets the range of every quantizer: weights' from the weights, then, with quantized weights, all
/// others' from what passes them while `run` runs the model over some batches:
///
///   calibrate(*model, [&] { for (const auto& batch : batches) model->forward(batch); });
///
/// Runs in eval mode without gradient, and turns every quantizer to `quantizing`. A second call
/// starts afresh. force_zero: see range_of_extrema. Weights of normalization layers stay in float
/// meanwhile, and zero is not put into their ranges. Warns, naming the quantizers, where what they
/// saw has no width: their ranges are then ±1, of weights ±QuantLayer::typical_end.
/// Error, leaving every range and state as it was: there is no quantizer, or one has seen no data,
/// or a NaN or infinity.
void calibrate(torch::nn::Module& model, const std::function<void()>& run, bool force_zero = true);

/// Sets the state of every quantizer; `off` gives the float model.
void set_state(torch::nn::Module& model, QuantizerImpl::State state);

/// The learned range tensors, for an optimizer. Error: there are none.
std::vector<at::Tensor> range_parameters(const torch::nn::Module& model);

/// Adds the learned range tensors to an optimizer, as a group with exactly these options, but
/// without weight decay, which would shrink the ranges. (The constructors of torch::optim cannot
/// tell an option of a group that equals its default from one that was left out.)
/// Error: options of another optimizer, no learned ranges, or LBFGS, which has one group: give its
/// constructor weight_parameters and range_parameters together.
template <typename Options>
void add_range_parameters(torch::optim::Optimizer& optimizer, const torch::nn::Module& model,
                          Options options) {
  TORCH_CHECK(typeid(optimizer.defaults()) == typeid(options),
              "asymq::nn::add_range_parameters: options must be of the optimizer's own type");
  TORCH_CHECK((!std::is_same_v<Options, torch::optim::LBFGSOptions>),
              "asymq::nn::add_range_parameters: LBFGS steps its first group alone, and the ranges "
              "would not learn: give its constructor both kinds of parameters as one group");
  if constexpr (requires { options.weight_decay(0); }) options.weight_decay(0);
  optimizer.add_param_group(torch::optim::OptimizerParamGroup(range_parameters(model)));
  optimizer.param_groups().back().set_options(std::make_unique<Options>(std::move(options)));
}

/// All parameters but the range tensors, for an optimizer; a tied one once.
std::vector<at::Tensor> weight_parameters(const torch::nn::Module& model);

/// Makes the weight_parameters require no gradient.
void freeze_weights(torch::nn::Module& model);

/// Takes an optimizer's steps, and multiplies those of the range tensors per element:
///
///   StepRule rule(optimizer, *model, "sophisticated");
///   ...
///   rule.step();  // and never optimizer.step(), whose steps are not scaled
///
/// "min_max_plus" (min_max: the calibrated |θ|), "naive" (scale_offset: the first |s| and |z|),
/// "naive_current" (the present ones), "sophisticated" (2/k and 1/s, equations 5 to 8 of the
/// paper). The step is scaled, not the gradient, whose factors Adam would cancel.
class StepRule {
 public:
  /// The optimizer must live as long. Error: an unknown rule; none of the model's ranges in the
  /// optimizer; one in it that has another parameterization, or is not calibrated.
  StepRule(torch::optim::Optimizer& optimizer, const torch::nn::Module& model,
           const std::string& rule);

  /// What the optimizer's step returns.
  at::Tensor step(torch::optim::Optimizer::LossClosure closure = nullptr);

 private:
  using Factor = at::Tensor (*)(const QuantizerImpl& quantizer, const std::string& name);

  struct Site {
    Quantizer quantizer;
    std::string name;
    at::Tensor parameter;
  };

  torch::optim::Optimizer& optimizer_;
  Factor factor_;
  std::vector<Site> sites_;
};

/// A table with one row per quantizer: name, kind, bits, granularity, parameterization, range (the
/// outermost ends where there are several, per token the factors) and how many of its ranges have
/// collapsed, which is a raw scale of at most eps. Below it the quantizers that stand in several
/// places, those that are several of one weight (from_float of a tied layer makes them one), and
/// what is not quantized, biases included, as a share of all parameters.
std::string summary(const torch::nn::Module& model);

}  // namespace asymq::nn

#pragma GCC visibility pop
