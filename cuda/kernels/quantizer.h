// Quantizers of kernels that do more than quantize.
#pragma once

#include <cuda_runtime_api.h>

#include "asymq/detail/layout.h"

namespace asymq::cuda {

/// A quantizer with one range, of a kernel that does more than quantize.
template <class P>
struct QuantizerPointers {
  QuantizerKind kind;
  detail::RangePointers<P> ranges;
  P* first = nullptr;  ///< backward: gradients of the learned parameters; null where not wanted
  P* second = nullptr;

  /// Whether any gradient is wanted.
  ASYMQ_HOST_DEVICE bool learns() const { return first != nullptr || second != nullptr; }
};

/// What a quantizer takes the ends of its range from.
enum class Ends {
  kNone,    ///< there is no quantizer
  kStored,  ///< one range for all elements
  kToken    ///< each row's own extrema, and the factors that all rows share
};

template <class P>
struct RowQuantizer : QuantizerPointers<P> {
  Ends ends = Ends::kNone;
};

}  // namespace asymq::cuda
