// A quantizer of a kernel that does more than quantize.
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
};

}  // namespace asymq::cuda
