// Checks of arguments that operators share. Sizes may be symbolic.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>
#include <ostream>
#include <string_view>

#include "ops/quantizer.h"

namespace asymq {

/// What an error is about, in pieces: an operator, and where that does not say it, the quantizer.
struct Where {
  const char* pieces[4];

  friend std::ostream& operator<<(std::ostream& stream, const Where& where) {
    stream << "asymq::";
    for (const char* piece : where.pieces) {
      if (piece != nullptr) stream << piece;
    }
    return stream;
  }
};

/// The range tensors that are there, with the names users know them by.
class NamedTensors {
 public:
  struct Item {
    const char* name;
    const at::Tensor* tensor;
  };

  void add(const char* name, const at::Tensor& tensor) { items_[size_++] = {name, &tensor}; }
  const Item* begin() const { return items_; }
  const Item* end() const { return items_ + size_; }

 private:
  Item items_[4];
  int size_ = 0;
};

/// Throws where the tensors are not those that the parameterization has.
NamedTensors name_ranges(const Where& where, const Traits& traits, const RangeTensors& ranges);

void check_bits(const Where& where, int64_t bits);
void check_positive(const Where& where, const char* name, double value);

/// Number of the link that users name, or ask for by `sigmoid`. Throws where there is none of that
/// name, or they say both, and different things. whose: a Where, or what errors call a quantizer.
template <class Whose>
int64_t link_number(const Whose& whose, bool sigmoid, std::string_view link) {
  const int found = find_link(link);
  TORCH_CHECK(found >= 0, whose, ": link must be identity, sigmoid, exp, softplus or clamp, got ",
              link);
  if (!sigmoid) return found;
  TORCH_CHECK(
      Link{found} == Link::identity || Link{found} == Link::sigmoid, whose,
      ": sigmoid is a link itself: leave it out or the other one, got sigmoid and the link ", link);
  return static_cast<int64_t>(Link::sigmoid);
}

/// A quantizer's kind. token: of a range of each token.
QuantizerKind checked_kind(const Where& where, const KindArguments& kind, bool token = false);

/// float32, float64, bfloat16 or float16.
void check_elements(const Where& where, const char* name, const at::Tensor& x);

/// Ranges of one shape, device and dtype, which goes with `wide` (float64) elements or not.
void check_alike(const Where& where, const NamedTensors& ranges, bool wide);

/// Ranges that divide x.
void check_granularity(const Where& where, const at::Tensor& x, const NamedTensors& ranges);

/// Two floating ends of ranges, of one shape, device and dtype.
void check_ends(const Where& where, const at::Tensor& min, const at::Tensor& max);

/// Logits [tokens, classes] of at least one class and less than 2^31.
void check_logits(const Where& where, const at::Tensor& logits, std::optional<int64_t> classes);

/// int64 labels, one for each row of the logits. What they say is not looked at.
void check_labels(const Where& where, const at::Tensor& labels, const at::Tensor& logits);

/// An upstream gradient of the shape, dtype and device of the argument `name`.
void check_grad(const Where& where, const char* name, const at::Tensor& grad, const at::Tensor& x);

/// A quantizer with one range, of the operator's argument `name`. whose: what errors call it, such
/// as "input's ".
CheckedQuantizer check_quantizer(const char* op, const char* whose, const char* name,
                                 const at::Tensor& x, const QuantizerArguments& quantizer);

/// The same of any quantizer: with one range, with one of each token, or none. Sizes of x's last
/// axis are those of the tensor that it quantizes.
std::optional<CheckedQuantizer> check_any_quantizer(const char* op, const char* whose,
                                                    const char* name, const at::Tensor& x,
                                                    const QuantizerArguments& quantizer);

/// A quantizer before and one after another function of the argument `name`.
QuantizerPair check_quantizers(const char* op, const char* name, const at::Tensor& x,
                               const char* whose_before, const QuantizerArguments& before,
                               const char* whose_after, const QuantizerArguments& after);

}  // namespace asymq
