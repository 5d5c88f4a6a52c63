// Differentiable fake-quantize with learnable ranges, for LibTorch.
//
// Common to all functions
//   x       float32, float64, bfloat16 or float16, any strides, up to 16 dimensions, CPU or CUDA.
//           The result has x's shape and dtype and the strides of empty_like(x).
//   ranges  float32 (float64 allowed where x is float64), on x's device, all of one shape, which is
//           the granularity: one element (per tensor), or x's number of dimensions with each size
//           1, x's size there, or a divisor of it (blocks). [C, 1] is per row, [1, C] per column,
//           [C, K/G] groups of G along the last axis.
//   bits    2 to 16; k = 2^bits - 1.
//   eps     least effective scale: s = max(raw s, eps), the gradient passes straight through.
//   full_range  of a symmetric grid: one more step below zero, codes -(k+1)/2 to (k-1)/2, such as
//           -8 to 7 with 4 bits, and k + 1 for k in the scale.
//   link    what a learned factor v becomes before it is applied: "identity" v, "sigmoid" σ(v)
//           (which `sigmoid` asks for, too), "exp" e^v, "softplus" log(1 + e^v), or "clamp", v held
//           in [1/4, 4], whose gradient passes straight through. In double, rounded once.
//   gradient_scale  positive; the gradients of the learned parameters are multiplied by it.
// A grid starts at s·rint(z): torch's zero_point is -rint(z) with quant_min 0 and quant_max k.
// Gradients are the straight-through ones of eq. 1 of "How to Parameterize Asymmetric Quantization
// Ranges for Quantization-Aware Training", exact also for ranges without zero, collapsed and
// reversed ranges. No function synchronises with the host. Second derivatives raise c10::Error, and
// so does every argument that does not fit.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

// The library hides what it does not declare here.
#pragma GCC visibility push(default)

namespace asymq {

/// Scale s and offset z, both learned: x̂ = s·clip(rint(x/s), rint(z), rint(z) + k).
at::Tensor fake_quantize_scale_offset(const at::Tensor& x, const at::Tensor& scale,
                                      const at::Tensor& offset, int64_t bits, double eps = 1e-8,
                                      double gradient_scale = 1.0);

/// Ends of the range θmin and θmax, both learned: s = (θmax - θmin)/k, z = θmin/s.
at::Tensor fake_quantize_min_max(const at::Tensor& x, const at::Tensor& min, const at::Tensor& max,
                                 int64_t bits, double eps = 1e-8, double gradient_scale = 1.0);

/// Learned factors on constant ends: θmin = f(β)·min, θmax = f(γ)·max (eq. 3), where f is the link.
/// min and max must not require grad.
at::Tensor fake_quantize_beta_gamma(const at::Tensor& x, const at::Tensor& beta,
                                    const at::Tensor& gamma, const at::Tensor& min,
                                    const at::Tensor& max, int64_t bits, bool sigmoid = false,
                                    double eps = 1e-8, std::string_view link = "identity",
                                    double gradient_scale = 1.0);

/// Scale and offset without the bit width, both learned: s = kscale/k, z = k·koffset (eq. 9).
at::Tensor fake_quantize_kscale_koffset(const at::Tensor& x, const at::Tensor& kscale,
                                        const at::Tensor& koffset, int64_t bits, double eps = 1e-8,
                                        double gradient_scale = 1.0);

/// Symmetric grid with indices ±(k-1)/2 and a learned scale s (eq. 10).
at::Tensor fake_quantize_symmetric_scale(const at::Tensor& x, const at::Tensor& scale, int64_t bits,
                                         double eps = 1e-8, bool full_range = false,
                                         double gradient_scale = 1.0);

/// Symmetric grid with a learned end θmax: s = 2θmax/k.
at::Tensor fake_quantize_symmetric_max(const at::Tensor& x, const at::Tensor& max, int64_t bits,
                                       double eps = 1e-8, bool full_range = false,
                                       double gradient_scale = 1.0);

/// Symmetric grid with a learned factor on a constant end: s = 2f(γ)·max/k, where f is the link.
/// max must not require grad.
at::Tensor fake_quantize_symmetric_gamma(const at::Tensor& x, const at::Tensor& gamma,
                                         const at::Tensor& max, int64_t bits, bool sigmoid = false,
                                         double eps = 1e-8, bool full_range = false,
                                         std::string_view link = "identity",
                                         double gradient_scale = 1.0);

/// Learned factors on the live range of every token: x is [..., D], and each group of `group`
/// consecutive elements of the last axis (none: all D, the token) has the range of its own
/// elements, with zero in it,
///     θmin = min(0, min x), θmax = max(0, max x),  s = (γθmax - βθmin)/k, z = βθmin/s (eq. 3),
/// with f(β) and f(γ) for them where there is a link. θmin and θmax are constants to the gradient.
/// beta, gamma: of one shape, with one value or D/group (one per position in the token), which all
/// tokens share; float32 (float64 allowed where x is float64). A NaN or infinity makes its own
/// group NaN and no other. Saves x alone.
at::Tensor fake_quantize_dynamic_beta_gamma(const at::Tensor& x, const at::Tensor& beta,
                                            const at::Tensor& gamma, std::optional<int64_t> group,
                                            int64_t bits, bool sigmoid = false, double eps = 1e-8,
                                            std::string_view link = "identity",
                                            double gradient_scale = 1.0);

/// The same with a symmetric grid: θmax = max |x|, s = γθmax/h with h = (k-1)/2, so that at γ = 1
/// the largest element is on the grid; in full range h = (k+1)/2.
at::Tensor fake_quantize_dynamic_symmetric_gamma(const at::Tensor& x, const at::Tensor& gamma,
                                                 std::optional<int64_t> group, int64_t bits,
                                                 bool sigmoid = false, bool full_range = false,
                                                 double eps = 1e-8,
                                                 std::string_view link = "identity",
                                                 double gradient_scale = 1.0);

/// Integer codes, without gradient. With offset clip(rint(x/s) - rint(z), 0, k): uint8 up to 8
/// bits, else int32. Without offset (symmetric) clip(rint(x/s), -(k-1)/2, (k-1)/2), in full range
/// from -(k+1)/2: int8 up to 8 bits, else int16. NaN gives code 0. full_range needs no offset.
at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale,
                    const std::optional<at::Tensor>& offset, int64_t bits, double eps = 1e-8,
                    bool full_range = false);

/// Overwrites `codes`, of the shape and dtype that quantize gives for x, with x's codes, and
/// returns how many of them changed: int64, 0-d, on x's device. Reads and writes each element once.
at::Tensor update_codes_(const at::Tensor& codes, const at::Tensor& x, const at::Tensor& scale,
                         const std::optional<at::Tensor>& offset, int64_t bits, double eps = 1e-8,
                         bool full_range = false);

/// The values s·(code + rint(z)) of quantize's codes, in scale's dtype, without gradient.
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale,
                      const std::optional<at::Tensor>& offset, int64_t bits, double eps = 1e-8,
                      bool full_range = false);

/// Guarded scale s and offset z (none if symmetric) of a parameterization: "scale_offset",
/// "min_max", "beta_gamma" or "kscale_koffset", whose symmetric counterparts learn s, θmax and γ.
/// `parameters` are its tensors in the order of the function of that name, constants included.
/// Without gradient.
std::tuple<at::Tensor, std::optional<at::Tensor>> effective_scale_offset(
    std::string_view parameterization, at::TensorList parameters, int64_t bits,
    bool symmetric = false, bool sigmoid = false, double eps = 1e-8, bool full_range = false,
    std::string_view link = "identity");

/// The learned parameters that have the range [min, max], one or two in the order of the function
/// of that name (Table 3): what learning starts from. A factor on constant ends starts where its
/// link is 1, under a sigmoid at 4, and `min` and `max` themselves are the constants, which are not
/// returned.
/// Symmetric parameterizations look at max alone.
/// min and max are floating tensors of one shape, dtype and device, which the result has too. It is
/// computed in double, without gradient, and max <= min is not repaired.
std::vector<at::Tensor> parameters_of_range(std::string_view parameterization,
                                            const at::Tensor& min, const at::Tensor& max,
                                            int64_t bits, bool symmetric = false,
                                            bool sigmoid = false, bool full_range = false,
                                            std::string_view link = "identity");

/// The range to start learning from where min and max are the smallest and largest value that were
/// seen, and where it has to be a guess: (min, max, without_width).
///
/// symmetric: ±max(-min, max). Else [min, max], with zero put inside if `force_zero`, and otherwise
/// only where the values do not vary (by no more than 1e-6 of the larger end): one value says
/// nothing but its distance from 0. Where all values seen were 0, ±fallback. No range is narrower
/// than k·eps ((k+1)·eps in full range), where the guard of the scale would hold it. without_width
/// tells where one of the last two rules decided.
///
/// min, max: float32 or float64, of one shape, dtype and device, which the results have too, but
/// for the bool without_width. Finite values are the caller's to see to. Without gradient.
std::tuple<at::Tensor, at::Tensor, at::Tensor> range_of_extrema(
    const at::Tensor& min, const at::Tensor& max, int64_t bits, bool symmetric = false,
    bool force_zero = true, double fallback = 1.0, double eps = 1e-8, bool full_range = false);

/// A quantizer as the functions take it that do more than quantize. parameterization, parameters
/// and the rest are those of effective_scale_offset; every parameter has one element. Refers to the
/// name and the parameters, which must live as long: a braced list lives to the end of its
/// statement.
///
/// token: a range of each token, as fake_quantize_dynamic_* have it: of "beta_gamma", with the
/// factors alone for parameters, and `group`.
struct RangeArguments {
  std::string_view parameterization;
  at::TensorList parameters;
  int64_t bits;
  bool symmetric = false;
  bool sigmoid = false;
  double eps = 1e-8;
  bool full_range = false;
  bool token = false;
  std::optional<int64_t> group = std::nullopt;
  std::string_view link = "identity";
  double gradient_scale = 1.0;
};

}  // namespace asymq

#pragma GCC visibility pop
