// The parameterizations of a quantization range: how learned parameters become a grid, and how the
// three sums of a backward pass become the parameters' gradients. No torch in here.
//
// A parameterization is one struct with
//   traits               its public name and the names of its parameters,
//   scale_offset(range)  parameters -> guarded scale s and offset z, in the parameters' type P and
//                        exactly in the order written: CPU, CUDA and reference must round z alike,
//   gradient(...)        sums -> gradients of these parameters, in double,
//   first_values(...)    ends of a range -> the learned parameters that have this range, for double
//                        and for tensor types T; one that does not depend on the range is a double,
// and one entry in `Parameterizations` at the end. Factors are there as they are applied: what a
// link makes of the learned ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <utility>

#include "asymq/quant_math.h"

namespace asymq {

/// The parameters of one range in the order of the public functions: up to two learned ones, then
/// up to two constants. Those that a parameterization does not have are 0.
template <class P>
struct Range {
  P first, second, min, max;
};

/// s and z of one range. `offset` is 0 and unused for symmetric parameterizations.
template <class P>
struct ScaleOffset {
  P scale, offset;
};

/// What a learned factor v becomes before it is applied, f(v).
enum class Link : int {
  identity,  ///< v
  sigmoid,   ///< σ(v), as in OmniQuant
  exp,       ///< e^v: positive, so that an end keeps its sign
  softplus,  ///< log(1 + e^v): likewise
  clamp      ///< v held in [1/4, 4]; the gradient passes straight through
};

/// A link's name, and the first value of a factor under it: where f is 1, or with a sigmoid nearly
/// 1 and still learns (Table 3): σ(4) = 0.982, so the range starts 2 % narrower than its ends.
struct LinkTraits {
  std::string_view name;
  double first;
};

/// By their numbers.
inline constexpr LinkTraits kLinks[] = {{"identity", 1.0},
                                        {"sigmoid", 4.0},
                                        {"exp", 0.0},
                                        {"softplus", 0.54132485461291810},  // log(e - 1)
                                        {"clamp", 1.0}};

/// Number of the link of this name, or -1.
constexpr int find_link(std::string_view name) {
  for (size_t i = 0; i < std::size(kLinks); ++i) {
    if (kLinks[i].name == name) return static_cast<int>(i);
  }
  return -1;
}

/// What a factor starts from.
constexpr double first_factor(Link link) { return kLinks[static_cast<int>(link)].first; }

/// Sums over all elements of one range: G_in = Σ_inside g·e, G_lo = Σ_below g, G_up = Σ_above g.
template <class T>
struct Sums {
  T inside, below, above;
};

/// What divided by gives the scale: the width of an asymmetric range by `width` = k, the end θmax
/// of a symmetric one by `end` = k/2 (eq. 10 prints b for k; Table 3 shows that k is meant), in
/// full range (k + 1)/2, of a token (k - 1)/2 (live_range.h).
template <class P>
struct Divisors {
  P width, end;
};

/// A kind of quantizer: the parameterization (its position in Parameterizations), bits and guard,
/// the link of its factors and what the gradients of its parameters are multiplied by, and what
/// follows from them, so that no kernel divides in double.
struct QuantizerKind {
  int parameterization;
  int bits;
  double eps;
  Link link;  ///< identity where there are no factors
  double gradient_scale;
  double inverse_steps;     ///< 1/k
  double end, inverse_end;  ///< Divisors::end and its reciprocal

  template <class P>
  ASYMQ_HOST_DEVICE Divisors<P> divisors() const {
    return {grid_steps<P>(bits), static_cast<P>(end)};
  }
};

/// One range's grid in double, as the gradients need it.
struct GridPoint {
  double scale;          ///< s
  double lower, upper;   ///< n, p
  double steps;          ///< k
  double inverse_steps;  ///< 1/k
  double inverse_end;    ///< 1/Divisors::end
  double zeta;           ///< ζ/k = (rint(z) - z)/k
};

/// dL/d(first), dL/d(second).
struct RangeGradient {
  double first, second;
};

/// Names of one parameterization: of its public function fake_quantize_<name>, of the asymmetric
/// parameterization whose counterpart it is (its own if it is one), and of its parameters, "" where
/// it has none.
struct Traits {
  const char* name;
  const char* family;
  bool symmetric;
  bool full_range;  ///< symmetric, with one more step below zero: codes -(k+1)/2 to (k-1)/2
  const char* first;
  const char* second;
  const char* min;
  const char* max;
};

/// s = max(raw, eps), written so that NaN stays NaN. The gradient passes straight through, which
/// lets a collapsed or reversed range recover.
template <class P>
ASYMQ_HOST_DEVICE P guard_scale(P raw, P eps) {
  return raw < eps ? eps : raw;
}

ASYMQ_HOST_DEVICE double sigmoid(double value) {
  using std::exp;
  return 1.0 / (1.0 + exp(-value));
}

/// dσ/dv = σ(v)(1 - σ(v)), as σ(v)·σ(-v): the difference 1 - σ loses all digits for large v.
ASYMQ_HOST_DEVICE double sigmoid_derivative(double value) {
  return sigmoid(value) * sigmoid(-value);
}

/// f(v) of a link; NaN stays NaN. One exponential for all, so that kernels hold the code of one.
ASYMQ_HOST_DEVICE double linked(Link link, double value) {
  using std::exp;
  using std::fabs;
  using std::log1p;
  if (link == Link::clamp) return value < 0.25 ? 0.25 : value > 4.0 ? 4.0 : value;
  const double e = exp(link == Link::exp        ? value
                       : link == Link::softplus ? -fabs(value)  // e^|v| would overflow
                                                : -value);
  switch (link) {
    case Link::sigmoid:
      return 1.0 / (1.0 + e);
    case Link::exp:
      return e;
    case Link::softplus:
      return (value > 0.0 ? value : 0.0) + log1p(e);
    default:
      return value;
  }
}

/// f'(v) of a link.
ASYMQ_HOST_DEVICE double link_derivative(Link link, double value) {
  using std::exp;
  switch (link) {
    case Link::sigmoid:
      return sigmoid_derivative(value);
    case Link::exp:
      return exp(value);
    case Link::softplus:
      return sigmoid(value);
    default:
      return 1.0;
  }
}

/// β or γ as it is applied: f in double, rounded once, as float functions differ between libraries.
template <class P>
ASYMQ_HOST_DEVICE P factor_of(Link link, P learned) {
  return link == Link::identity ? learned : static_cast<P>(linked(link, learned));
}

/// dL/ds at fixed z (Table 1, row s): e inside, n below, p above.
ASYMQ_HOST_DEVICE double scale_gradient(const GridPoint& grid, const Sums<double>& sums) {
  return sums.inside + grid.lower * sums.below + grid.upper * sums.above;
}

/// dL/dz at fixed s: 0 inside, s outside.
ASYMQ_HOST_DEVICE double offset_gradient(const GridPoint& grid, const Sums<double>& sums) {
  return grid.scale * (sums.below + sums.above);
}

/// dL/dθmin: -e/k inside, 1 - ζ/k below, -ζ/k above, with ζ = rint(z) - z. Not composed from dL/ds
/// and dL/dz, which cancel catastrophically for a collapsed or reversed range.
ASYMQ_HOST_DEVICE double min_gradient(const GridPoint& grid, const Sums<double>& sums) {
  return -sums.inside * grid.inverse_steps + (1.0 - grid.zeta) * sums.below -
         grid.zeta * sums.above;
}

/// dL/dθmax: e/k inside, ζ/k below, 1 + ζ/k above.
ASYMQ_HOST_DEVICE double max_gradient(const GridPoint& grid, const Sums<double>& sums) {
  return sums.inside * grid.inverse_steps + grid.zeta * sums.below + (1.0 + grid.zeta) * sums.above;
}

/// s and z of a range given by its ends (eq. 1).
template <class P>
ASYMQ_HOST_DEVICE ScaleOffset<P> scale_offset_of_ends(P min, P max, const Divisors<P>& by, P eps) {
  const P scale = guard_scale((max - min) / by.width, eps);
  return {scale, min / scale};
}

/// s of a symmetric range given by its end (Table 3).
template <class P>
ASYMQ_HOST_DEVICE ScaleOffset<P> scale_of_end(P max, const Divisors<P>& by, P eps) {
  return {guard_scale(max / by.end, eps), P(0)};
}

struct ScaleOffsetParameterization {
  static constexpr Traits traits{"scale_offset", "scale_offset", false, false,
                                 "scale",        "offset",       "",    ""};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>&,
                                                       P eps) {
    return {guard_scale(range.first, eps), range.second};
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>&, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {scale_gradient(grid, sums), offset_gradient(grid, sums)};
  }
  template <class T>
  static auto first_values(const T& low, const T& high, const QuantizerKind& kind) {
    const T scale = (high - low) / kind.divisors<double>().width;
    return std::pair(scale, T(low / scale));
  }
};

struct MinMax {
  static constexpr Traits traits{"min_max", "min_max", false, false, "min", "max", "", ""};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_offset_of_ends(range.first, range.second, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>&, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {min_gradient(grid, sums), max_gradient(grid, sums)};
  }
  template <class T>
  static auto first_values(const T& low, const T& high, const QuantizerKind&) {
    return std::pair(low, high);
  }
};

/// θmin and θmax scaled by β and γ (eq. 3).
struct BetaGamma {
  static constexpr Traits traits{"beta_gamma", "beta_gamma", false, false,
                                 "beta",       "gamma",      "min", "max"};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_offset_of_ends(range.first * range.min, range.second * range.max, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>& range, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {range.min * min_gradient(grid, sums), range.max * max_gradient(grid, sums)};
  }
  template <class T>
  static auto first_values(const T&, const T&, const QuantizerKind& kind) {
    return std::pair(first_factor(kind.link), first_factor(kind.link));
  }
};

/// s = s'/k, z = k·z' (eq. 9): scale and offset freed of the bit width.
struct KscaleKoffset {
  static constexpr Traits traits{"kscale_koffset", "kscale_koffset", false, false,
                                 "kscale",         "koffset",        "",    ""};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return {guard_scale(range.first / by.width, eps), by.width * range.second};
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>&, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {scale_gradient(grid, sums) * grid.inverse_steps,
            grid.steps * offset_gradient(grid, sums)};
  }
  template <class T>
  static auto first_values(const T& low, const T& high, const QuantizerKind&) {
    const T kscale = high - low;
    return std::pair(kscale, T(low / kscale));
  }
};

template <bool kFullRange>
struct SymmetricScale {
  static constexpr Traits traits{
      "symmetric_scale", "scale_offset", true, kFullRange, "scale", "", "", ""};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>&,
                                                       P eps) {
    return {guard_scale(range.first, eps), P(0)};
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>&, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {scale_gradient(grid, sums), 0.0};
  }
  template <class T>
  static auto first_values(const T&, const T& high, const QuantizerKind& kind) {
    return std::pair(T(high / kind.end), 0.0);
  }
};

/// s = 2θmax/k, in full range 2θmax/(k + 1).
template <bool kFullRange>
struct SymmetricMax {
  static constexpr Traits traits{"symmetric_max", "min_max", true, kFullRange, "max", "", "", ""};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_of_end(range.first, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>&, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {grid.inverse_end * scale_gradient(grid, sums), 0.0};
  }
  template <class T>
  static auto first_values(const T&, const T& high, const QuantizerKind&) {
    return std::pair(high, 0.0);
  }
};

/// s = 2γθmax/k (Table 3), in full range with k + 1 for k.
template <bool kFullRange>
struct SymmetricGamma {
  static constexpr Traits traits{"symmetric_gamma", "beta_gamma", true, kFullRange,
                                 "gamma",           "",           "",   "max"};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_of_end(range.first * range.max, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>& range, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {range.max * grid.inverse_end * scale_gradient(grid, sums), 0.0};
  }
  template <class T>
  static auto first_values(const T&, const T&, const QuantizerKind& kind) {
    return std::pair(first_factor(kind.link), 0.0);
  }
};

template <class... Ps>
struct ParameterizationList {
  static constexpr Traits traits[sizeof...(Ps)] = {Ps::traits...};
};

/// All parameterizations. Kernels and the dispatcher know one by its position here.
using Parameterizations =
    ParameterizationList<ScaleOffsetParameterization, MinMax, BetaGamma, KscaleKoffset,
                         SymmetricScale<false>, SymmetricMax<false>, SymmetricGamma<false>,
                         SymmetricScale<true>, SymmetricMax<true>, SymmetricGamma<true>>;

/// Bit i tells whether the parameterization at position i has a property.
constexpr uint32_t bits_of(bool Traits::*property) {
  uint32_t bits = 0, bit = 1;
  for (const Traits& traits : Parameterizations::traits) {
    if (traits.*property) bits |= bit;
    bit <<= 1;
  }
  return bits;
}

inline constexpr uint32_t kSymmetricBits = bits_of(&Traits::symmetric);
inline constexpr uint32_t kFullRangeBits = bits_of(&Traits::full_range);

/// Position of the parameterization with these traits, or -1.
constexpr int find_parameterization(std::string_view family, bool symmetric,
                                    bool full_range = false) {
  int position = 0;
  for (const Traits& traits : Parameterizations::traits) {
    if (traits.family == family && traits.symmetric == symmetric &&
        traits.full_range == full_range) {
      return position;
    }
    ++position;
  }
  return -1;
}

/// Calls visitor(P{}) for the P at position `id`; an id outside the list calls nothing.
template <class Visitor, class... Ps>
ASYMQ_HOST_DEVICE void visit_parameterization(int id, ParameterizationList<Ps...>,
                                              Visitor&& visitor) {
  int position = 0;
  ((position++ == id ? visitor(Ps{}) : void()), ...);
}

/// token: of a live range that has the largest element on the grid (live_range.h).
constexpr QuantizerKind make_kind(int64_t parameterization, int64_t bits, double eps,
                                  bool token = false, Link link = Link::identity,
                                  double gradient_scale = 1.0) {
  const auto steps = static_cast<double>((int64_t{1} << bits) - 1);
  const bool full_range = (kFullRangeBits >> parameterization & 1) != 0;
  const double end = (full_range ? steps + 1 : token ? steps - 1 : steps) / 2;
  return {static_cast<int>(parameterization),
          static_cast<int>(bits),
          eps,
          link,
          gradient_scale,
          1 / steps,
          end,
          1 / end};
}

ASYMQ_HOST_DEVICE bool is_symmetric(const QuantizerKind& kind) {
  return (kSymmetricBits >> kind.parameterization & 1) != 0;
}

ASYMQ_HOST_DEVICE bool has_full_range(const QuantizerKind& kind) {
  return (kFullRangeBits >> kind.parameterization & 1) != 0;
}

/// A NaN offset makes the scale NaN: compare and select alone would let it through to finite
/// results.
template <class P>
ASYMQ_HOST_DEVICE ScaleOffset<P> show_nan(ScaleOffset<P> result) {
  if (result.offset != result.offset) result.scale = result.offset;
  return result;
}

/// Guarded s and z of one range.
template <class P>
ASYMQ_HOST_DEVICE ScaleOffset<P> effective_scale_offset(const QuantizerKind& kind,
                                                        const Range<P>& range) {
  const Range<P> applied{factor_of(kind.link, range.first), factor_of(kind.link, range.second),
                         range.min, range.max};
  ScaleOffset<P> result{};
  visit_parameterization(kind.parameterization, Parameterizations{}, [&](auto parameterization) {
    result = parameterization.scale_offset(applied, kind.divisors<P>(), static_cast<P>(kind.eps));
  });
  return show_nan(result);
}

/// First and last integer code of quantize: 0 and k, or ±(k-1)/2 if symmetric, with one code more
/// below in full range.
template <class T>
struct CodeRange {
  T first, last;
};

template <class T>
ASYMQ_HOST_DEVICE CodeRange<T> code_range(const QuantizerKind& kind) {
  const T steps = grid_steps<T>(kind.bits);
  const T limit = (steps - 1) / 2;
  if (!is_symmetric(kind)) return {T(0), steps};
  return {has_full_range(kind) ? -limit - 1 : -limit, limit};
}

/// The grid of one range for elements of compute type T.
template <class T, class P>
ASYMQ_HOST_DEVICE Grid<T> make_grid(const QuantizerKind& kind, const ScaleOffset<P>& effective) {
  const CodeRange<T> codes = code_range<T>(kind);
  const T origin = static_cast<T>(round_half_even(effective.offset));
  return {static_cast<T>(effective.scale), origin + codes.first, origin + codes.last};
}

template <class T, class P>
ASYMQ_HOST_DEVICE Grid<T> make_grid(const QuantizerKind& kind, const Range<P>& range) {
  return make_grid<T>(kind, effective_scale_offset(kind, range));
}

/// T is the compute type of the elements whose sums will go with it: n and p are theirs.
template <class T, class P>
ASYMQ_HOST_DEVICE GridPoint make_grid_point(const QuantizerKind& kind,
                                            const ScaleOffset<P>& effective) {
  const Grid<T> grid = make_grid<T>(kind, effective);
  const double lower = static_cast<double>(grid.lower);
  return {static_cast<double>(grid.scale),
          lower,
          static_cast<double>(grid.upper),
          grid_steps<double>(kind.bits),
          kind.inverse_steps,
          kind.inverse_end,
          (lower - static_cast<double>(effective.offset)) * kind.inverse_steps};
}

/// What turns one range's sums into gradients: its parameters and its grid, in double.
struct RangeGradientMap {
  Range<double> range;
  GridPoint grid;
};

template <class T, class P>
ASYMQ_HOST_DEVICE RangeGradientMap make_gradient_map(const QuantizerKind& kind,
                                                     const Range<P>& range) {
  return {{static_cast<double>(range.first), static_cast<double>(range.second),
           static_cast<double>(range.min), static_cast<double>(range.max)},
          make_grid_point<T>(kind, effective_scale_offset(kind, range))};
}

/// Gradient of a learned parameter from that of what is applied.
ASYMQ_HOST_DEVICE double learned_gradient(const QuantizerKind& kind, double learned,
                                          double applied) {
  return kind.gradient_scale * (link_derivative(kind.link, learned) * applied);
}

/// Gradients of the learned parameters of one range from its three sums.
ASYMQ_HOST_DEVICE RangeGradient range_gradient(const QuantizerKind& kind,
                                               const RangeGradientMap& map,
                                               const Sums<double>& sums) {
  RangeGradient result{};
  visit_parameterization(kind.parameterization, Parameterizations{}, [&](auto parameterization) {
    result = parameterization.gradient(map.range, map.grid, sums);
  });
  return {learned_gradient(kind, map.range.first, result.first),
          learned_gradient(kind, map.range.second, result.second)};
}

}  // namespace asymq
