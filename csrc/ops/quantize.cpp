#include "ops/quantize.h"

#include <ATen/MemoryOverlap.h>

#include "asymq/fake_quantize.h"
#include "ops/checks.h"
#include "ops/flat.h"

namespace asymq {
namespace {

bool is_symmetric(const OptionalTensor& offset) {
  return !offset.has_value() || !offset->defined();
}

/// What they have in common. wide: whether float64 ranges will do.
QuantizerKind check_ranges(const Where& where, const at::Tensor& x, const at::Tensor& scale,
                           const OptionalTensor& offset, int64_t bits, double eps, bool full_range,
                           bool wide) {
  NamedTensors ranges;
  ranges.add("scale", scale);
  if (!is_symmetric(offset)) ranges.add("offset", *offset);
  check_alike(where, ranges, wide);
  check_granularity(where, x, ranges);
  TORCH_CHECK(is_symmetric(offset) || !full_range, where,
              ": full_range needs a symmetric grid, which has no offset, got an offset");
  return make_kind(find_parameterization("scale_offset", is_symmetric(offset), full_range), bits,
                   eps);
}

QuantizerKind check_elements_and_ranges(const Where& where, const at::Tensor& x,
                                        const at::Tensor& scale, const OptionalTensor& offset,
                                        int64_t bits, double eps, bool full_range) {
  check_bits(where, bits);
  check_positive(where, "eps", eps);
  check_elements(where, "x", x);
  return check_ranges(where, x, scale, offset, bits, eps, full_range,
                      x.scalar_type() == at::kDouble);
}

void check_codes(const Where& where, const at::Tensor& codes, int64_t bits, bool symmetric) {
  const auto expected = code_dtype(bits, symmetric);
  TORCH_CHECK(codes.scalar_type() == expected, where, ": codes must be ", expected, " for ", bits,
              " bits ", symmetric ? "without" : "with", " offset, got ", codes.scalar_type());
}

}  // namespace

at::ScalarType code_dtype(int64_t bits, bool symmetric) {
  if (symmetric) return bits <= 8 ? at::kChar : at::kShort;
  return bits <= 8 ? at::kByte : at::kInt;
}

QuantizerKind check_quantize(const at::Tensor& x, const at::Tensor& scale,
                             const OptionalTensor& offset, int64_t bits, double eps,
                             bool full_range) {
  return check_elements_and_ranges({"quantize"}, x, scale, offset, bits, eps, full_range);
}

QuantizerKind check_update_codes(const at::Tensor& codes, const at::Tensor& x,
                                 const at::Tensor& scale, const OptionalTensor& offset,
                                 int64_t bits, double eps, bool full_range) {
  constexpr Where where{"update_codes_"};
  const QuantizerKind kind =
      check_elements_and_ranges(where, x, scale, offset, bits, eps, full_range);
  check_codes(where, codes, bits, is_symmetric(offset));
  TORCH_CHECK(codes.sym_sizes() == x.sym_sizes(), where, ": codes must have x's shape ",
              x.sym_sizes(), ", got ", codes.sym_sizes());
  TORCH_CHECK(codes.device() == x.device(), where, ": codes must be on x's device ", x.device(),
              ", got ", codes.device());
  at::assert_no_internal_overlap(codes);
  return kind;
}

QuantizerKind check_dequantize(const at::Tensor& codes, const at::Tensor& scale,
                               const OptionalTensor& offset, int64_t bits, double eps,
                               bool full_range) {
  constexpr Where where{"dequantize"};
  check_bits(where, bits);
  check_positive(where, "eps", eps);
  check_codes(where, codes, bits, is_symmetric(offset));
  return check_ranges(where, codes, scale, offset, bits, eps, full_range, /*wide=*/true);
}

at::Tensor quantize(const at::Tensor& x, const at::Tensor& scale, const OptionalTensor& offset,
                    int64_t bits, double eps, bool full_range) {
  return Op<"asymq::quantize", decltype(quantize)>()(x, scale, offset, bits, eps, full_range);
}

at::Tensor update_codes_(const at::Tensor& codes, const at::Tensor& x, const at::Tensor& scale,
                         const OptionalTensor& offset, int64_t bits, double eps, bool full_range) {
  return Op<"asymq::update_codes_", decltype(update_codes_)>()(codes, x, scale, offset, bits, eps,
                                                               full_range);
}

at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& scale,
                      const OptionalTensor& offset, int64_t bits, double eps, bool full_range) {
  return Op<"asymq::dequantize", decltype(dequantize)>()(codes, scale, offset, bits, eps,
                                                         full_range);
}

}  // namespace asymq
