// Ranges that are live: factors, learned and shared by many groups of elements, on the extrema that
// each group has at the moment. No torch in here.
//
//   of a token   Zero is in the range, θmin = min(0, min x) and θmax = max(0, max x), and a
//                symmetric grid has its largest element on the grid, s = γθmax/((k-1)/2): with k/2
//                it would be a tie at γ = 1 in every group.
//   of a weight  θmin and θmax are the extrema themselves, and s is that of BetaGamma and
//                SymmetricGamma (parameterization.h) on them.
//
// A group's way is
//   factors   apply_factors    once for all groups that share them
//   extrema   live_ends        θmin and θmax, constants to the gradient
//   grid      live_scale_offset, then make_grid or make_grid_point
//   sums      live_gradient    what the group adds to the gradients of the applied factors
//   total     learned_gradient of the factors themselves, in double, as everything after the sums
// with the kind that make_kind gives, where parameterization is a BetaGamma or SymmetricGamma.
#pragma once

#include "asymq/parameterization.h"

namespace asymq {

/// β and γ as they are applied: what the link makes of the learned ones. Symmetric: γ is `first`,
/// as in Range, and `second` unused.
template <class P>
struct Factors {
  P first, second;
};

/// Smallest and largest element of a group; at least one is NaN if an element is.
template <class T>
struct Extrema {
  T min, max;
};

template <class P>
ASYMQ_HOST_DEVICE Factors<P> apply_factors(const QuantizerKind& kind, P first, P second) {
  return {factor_of(kind.link, first), factor_of(kind.link, second)};
}

/// θmin and θmax in the factors' type. Symmetric: both say the same, -max |x| and max |x|. A NaN or
/// an infinity makes both NaN, whatever the factors.
template <class P, class T>
ASYMQ_HOST_DEVICE Extrema<P> live_ends(const QuantizerKind& kind, bool token,
                                       const Extrema<T>& extrema) {
  P min = static_cast<P>(extrema.min), max = static_cast<P>(extrema.max);
  const P wrong = (min - min) + (max - max);  // 0 or NaN
  if (is_symmetric(kind)) {
    max = -min > max ? -min : max;
    min = -max;
  } else if (token) {
    min = min < P(0) ? min : P(0);
    max = max > P(0) ? max : P(0);
  }
  return {min + wrong, max + wrong};
}

/// Guarded s and z of a group.
template <class P>
ASYMQ_HOST_DEVICE ScaleOffset<P> live_scale_offset(const QuantizerKind& kind,
                                                   const Factors<P>& factors,
                                                   const Extrema<P>& ends) {
  const Divisors<P> by = kind.divisors<P>();
  const P eps = static_cast<P>(kind.eps);
  if (is_symmetric(kind)) return scale_of_end(factors.first * ends.max, by, eps);
  return show_nan(
      scale_offset_of_ends(factors.first * ends.min, factors.second * ends.max, by, eps));
}

/// What a group adds to the gradients of its applied factors, before those of other groups are
/// added in a fixed order.
ASYMQ_HOST_DEVICE RangeGradient live_gradient(const QuantizerKind& kind,
                                              const Extrema<double>& ends, const GridPoint& grid,
                                              const Sums<double>& sums) {
  if (is_symmetric(kind)) return {ends.max * grid.inverse_end * scale_gradient(grid, sums), 0.0};
  return {ends.min * min_gradient(grid, sums), ends.max * max_gradient(grid, sums)};
}

}  // namespace asymq
