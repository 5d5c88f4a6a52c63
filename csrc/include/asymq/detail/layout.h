// How the elements of x map to ranges and to memory: the one description that the CPU loops and the
// CUDA kernels share. No torch in here.
#pragma once

#include <cstdint>

#include "asymq/parameterization.h"

namespace asymq::detail {

/// One loop over x. Strides count elements; range_stride 0 means that the loop stays in one range.
struct Dim {
  int64_t size;
  int64_t x_stride;
  int64_t out_stride;
  int64_t range_stride;
};

/// x has at most kMaxAxes axes; a blocked axis becomes two loops.
constexpr int kMaxAxes = 16;
constexpr int kMaxDims = 2 * kMaxAxes;

/// Loops over x, outermost first, in the memory order of the output, which is dense: out_stride is
/// the product of the sizes further in. Neighbouring loops that step alike are merged, loops of
/// size 1 are gone, so per tensor is one loop, a row-wise weight two, groups along the last axis
/// two.
struct Layout {
  int ndim;
  int64_t numel;
  int64_t ranges;
  Dim dims[kMaxDims];
};

/// The parameter tensors of all ranges, contiguous. Missing ones are null.
template <class P>
struct RangePointers {
  const P* first;
  const P* second;
  const P* min;
  const P* max;

  ASYMQ_HOST_DEVICE Range<P> load(int64_t index) const {
    return {first ? first[index] : P(0), second ? second[index] : P(0), min ? min[index] : P(0),
            max ? max[index] : P(0)};
  }
};

}  // namespace asymq::detail
