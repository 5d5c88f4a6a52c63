// The parameterizations of a quantization range: how learned parameters become a grid, and how the
// three sums of a backward pass become the parameters' gradients. No torch in here.
//
// A parameterization is one struct with
//   traits               its public name and the names of its parameters,
//   scale_offset(range)  parameters -> guarded scale s and offset z, in the parameters' type P and
//                        exactly in the order written: CPU, CUDA and reference must round z alike,
//   gradient(...)        sums -> gradients of the learned parameters, in double,
//   first_values(...)    ends of a range -> the learned parameters that have this range, for double
//                        and for tensor types T; one that does not depend on the range is a double,
// and one entry in `Parameterizations` at the end.
#pragma once

#include <cstddef>
#include <cstdint>
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
  bool symmetric, sigmoid;
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

/// σ is computed in double and rounded once: float sigmoids differ between libraries.
ASYMQ_HOST_DEVICE double sigmoid(double value) {
  using std::exp;
  return 1.0 / (1.0 + exp(-value));
}

/// dσ/dv = σ(v)(1 - σ(v)), as σ(v)·σ(-v): the difference 1 - σ loses all digits for large v.
ASYMQ_HOST_DEVICE double sigmoid_derivative(double value) {
  return sigmoid(value) * sigmoid(-value);
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

/// β or γ as it is applied.
template <bool kSigmoid, class P>
ASYMQ_HOST_DEVICE P factor_of(P learned) {
  return kSigmoid ? static_cast<P>(sigmoid(learned)) : learned;
}

/// d(factor_of)/d(learned).
template <bool kSigmoid>
ASYMQ_HOST_DEVICE double factor_derivative(double learned) {
  return kSigmoid ? sigmoid_derivative(learned) : 1.0;
}

/// First value of a factor on a constant end: 1, or 4 under a sigmoid (Table 3), where it is nearly
/// 1 and still learns: σ(4) = 0.982, so the range starts 2 % narrower than its ends.
template <bool kSigmoid>
inline constexpr double kFirstFactor = kSigmoid ? 4.0 : 1.0;

struct ScaleOffsetParameterization {
  static constexpr Traits traits{"scale_offset", "scale_offset", false, false, false,
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
  static auto first_values(const T& low, const T& high, const Divisors<double>& by) {
    const T scale = (high - low) / by.width;
    return std::pair(scale, T(low / scale));
  }
};

struct MinMax {
  static constexpr Traits traits{"min_max", "min_max", false, false, false, "min", "max", "", ""};

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
  static auto first_values(const T& low, const T& high, const Divisors<double>&) {
    return std::pair(low, high);
  }
};

/// θmin and θmax scaled by β and γ, or by σ(β) and σ(γ) (eq. 3).
template <bool kSigmoid>
struct BetaGamma {
  static constexpr Traits traits{"beta_gamma", "beta_gamma", false, kSigmoid, false,
                                 "beta",       "gamma",      "min", "max"};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_offset_of_ends(factor_of<kSigmoid>(range.first) * range.min,
                                factor_of<kSigmoid>(range.second) * range.max, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>& range, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {factor_derivative<kSigmoid>(range.first) * range.min * min_gradient(grid, sums),
            factor_derivative<kSigmoid>(range.second) * range.max * max_gradient(grid, sums)};
  }
  template <class T>
  static auto first_values(const T&, const T&, const Divisors<double>&) {
    return std::pair(kFirstFactor<kSigmoid>, kFirstFactor<kSigmoid>);
  }
};

/// s = s'/k, z = k·z' (eq. 9): scale and offset freed of the bit width.
struct KscaleKoffset {
  static constexpr Traits traits{"kscale_koffset", "kscale_koffset", false, false, false,
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
  static auto first_values(const T& low, const T& high, const Divisors<double>&) {
    const T kscale = high - low;
    return std::pair(kscale, T(low / kscale));
  }
};

template <bool kFullRange>
struct SymmetricScale {
  static constexpr Traits traits{
      "symmetric_scale", "scale_offset", true, false, kFullRange, "scale", "", "", ""};

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
  static auto first_values(const T&, const T& high, const Divisors<double>& by) {
    return std::pair(T(high / by.end), 0.0);
  }
};

/// s = 2θmax/k, in full range 2θmax/(k + 1).
template <bool kFullRange>
struct SymmetricMax {
  static constexpr Traits traits{"symmetric_max", "min_max", true, false, kFullRange,
                                 "max",           "",        "",   ""};

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
  static auto first_values(const T&, const T& high, const Divisors<double>&) {
    return std::pair(high, 0.0);
  }
};

/// s = 2γθmax/k, or 2σ(γ)θmax/k (Table 3), in full range with k + 1 for k.
template <bool kSigmoid, bool kFullRange>
struct SymmetricGamma {
  static constexpr Traits traits{"symmetric_gamma", "beta_gamma", true, kSigmoid, kFullRange,
                                 "gamma",           "",           "",   "max"};

  template <class P>
  ASYMQ_HOST_DEVICE static ScaleOffset<P> scale_offset(const Range<P>& range, const Divisors<P>& by,
                                                       P eps) {
    return scale_of_end(factor_of<kSigmoid>(range.first) * range.max, by, eps);
  }
  ASYMQ_HOST_DEVICE static RangeGradient gradient(const Range<double>& range, const GridPoint& grid,
                                                  const Sums<double>& sums) {
    return {factor_derivative<kSigmoid>(range.first) * range.max * grid.inverse_end *
                scale_gradient(grid, sums),
            0.0};
  }
  template <class T>
  static auto first_values(const T&, const T&, const Divisors<double>&) {
    return std::pair(kFirstFactor<kSigmoid>, 0.0);
  }
};

template <class... Ps>
struct ParameterizationList {
  static constexpr Traits traits[sizeof...(Ps)] = {Ps::traits...};
};

/// All parameterizations. Kernels and the dispatcher know one by its position here.
using Parameterizations =
    ParameterizationList<ScaleOffsetParameterization, MinMax, BetaGamma<false>, BetaGamma<true>,
                         KscaleKoffset, SymmetricScale<false>, SymmetricMax<false>,
                         SymmetricGamma<false, false>, SymmetricGamma<true, false>,
                         SymmetricScale<true>, SymmetricMax<true>, SymmetricGamma<false, true>,
                         SymmetricGamma<true, true>>;

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
inline constexpr uint32_t kSigmoidBits = bits_of(&Traits::sigmoid);
inline constexpr uint32_t kFullRangeBits = bits_of(&Traits::full_range);

/// Position of the parameterization with these traits, or -1.
constexpr int find_parameterization(std::string_view family, bool symmetric, bool sigmoid,
                                    bool full_range = false) {
  int position = 0;
  for (const Traits& traits : Parameterizations::traits) {
    if (traits.family == family && traits.symmetric == symmetric && traits.sigmoid == sigmoid &&
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

/// A kind of quantizer: the parameterization (its position in Parameterizations), bits and guard,
/// and what follows from them, so that no kernel divides in double.
struct QuantizerKind {
  int parameterization;
  int bits;
  double eps;
  double inverse_steps;     ///< 1/k
  double end, inverse_end;  ///< Divisors::end and its reciprocal

  template <class P>
  ASYMQ_HOST_DEVICE Divisors<P> divisors() const {
    return {grid_steps<P>(bits), static_cast<P>(end)};
  }
};

/// token: of a live range that has the largest element on the grid (live_range.h).
constexpr QuantizerKind make_kind(int64_t parameterization, int64_t bits, double eps,
                                  bool token = false) {
  const auto steps = static_cast<double>((int64_t{1} << bits) - 1);
  const bool full_range = (kFullRangeBits >> parameterization & 1) != 0;
  const double end = (full_range ? steps + 1 : token ? steps - 1 : steps) / 2;
  return {static_cast<int>(parameterization), static_cast<int>(bits), eps, 1 / steps, end, 1 / end};
}

ASYMQ_HOST_DEVICE bool is_symmetric(const QuantizerKind& kind) {
  return (kSymmetricBits >> kind.parameterization & 1) != 0;
}

ASYMQ_HOST_DEVICE bool has_sigmoid(const QuantizerKind& kind) {
  return (kSigmoidBits >> kind.parameterization & 1) != 0;
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
  ScaleOffset<P> result{};
  visit_parameterization(kind.parameterization, Parameterizations{}, [&](auto parameterization) {
    result = parameterization.scale_offset(range, kind.divisors<P>(), static_cast<P>(kind.eps));
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

/// Gradients of the learned parameters of one range from its three sums.
ASYMQ_HOST_DEVICE RangeGradient range_gradient(const QuantizerKind& kind,
                                               const RangeGradientMap& map,
                                               const Sums<double>& sums) {
  RangeGradient result{};
  visit_parameterization(kind.parameterization, Parameterizations{}, [&](auto parameterization) {
    result = parameterization.gradient(map.range, map.grid, sums);
  });
  return result;
}

}  // namespace asymq
