// The table of contents: every operator of the library.
//
// The public fake-quantize functions decompose into one private operator, `_fake_quantize`, whose
// `parameterization` is a position in Parameterizations (parameterization.h) and whose first and
// second are the learned parameters. Of them, autograd, CPU, CUDA and Meta know only that one and
// its backward. The same holds for the functions of live ranges, which decompose into
// `_fake_quantize_dynamic`, and for the operators that do more than quantize.
//
// *_ranges: the range tensors that a parameterization has, in the order first, second, min, max.
// Where an operator can do without a quantizer, none is the parameterization "none", kNoQuantizer.
// needs: which gradients to compute; the others come back undefined. After the tensor's come those
// of first and second of each range.
#include <torch/library.h>

#include "ops/fake_quantize_dynamic.h"
#include "ops/flat.h"

TORCH_LIBRARY(asymq, m) {
  using namespace asymq;
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto define = [&](const std::string& schema) {
    m.def(torch::schema(schema.c_str(), c10::AliasAnalysisKind::FROM_SCHEMA), tags);
  };
  const std::string linked = "str link=\"identity\", float gradient_scale=1";

  define(
      "fake_quantize_scale_offset(Tensor x, Tensor scale, Tensor offset, int bits, "
      "float eps=1e-8, float gradient_scale=1) -> Tensor");
  define(
      "fake_quantize_min_max(Tensor x, Tensor min, Tensor max, int bits, float eps=1e-8, "
      "float gradient_scale=1) -> Tensor");
  define(
      "fake_quantize_beta_gamma(Tensor x, Tensor beta, Tensor gamma, Tensor min, Tensor max, "
      "int bits, bool sigmoid=False, float eps=1e-8, " +
      linked + ") -> Tensor");
  define(
      "fake_quantize_kscale_koffset(Tensor x, Tensor kscale, Tensor koffset, int bits, "
      "float eps=1e-8, float gradient_scale=1) -> Tensor");
  define(
      "fake_quantize_symmetric_scale(Tensor x, Tensor scale, int bits, float eps=1e-8, "
      "bool full_range=False, float gradient_scale=1) -> Tensor");
  define(
      "fake_quantize_symmetric_max(Tensor x, Tensor max, int bits, float eps=1e-8, "
      "bool full_range=False, float gradient_scale=1) -> Tensor");
  define(
      "fake_quantize_symmetric_gamma(Tensor x, Tensor gamma, Tensor max, int bits, "
      "bool sigmoid=False, float eps=1e-8, bool full_range=False, " +
      linked + ") -> Tensor");
  define(
      "fake_quantize_dynamic_beta_gamma(Tensor x, Tensor beta, Tensor gamma, int? group, int bits, "
      "bool sigmoid=False, float eps=1e-8, " +
      linked + ") -> Tensor");
  define(
      "fake_quantize_dynamic_symmetric_gamma(Tensor x, Tensor gamma, int? group, int bits, "
      "bool sigmoid=False, bool full_range=False, float eps=1e-8, " +
      linked + ") -> Tensor");
  define(
      "effective_scale_offset(str parameterization, Tensor[] parameters, int bits, "
      "bool symmetric=False, bool sigmoid=False, float eps=1e-8, bool full_range=False, "
      "str link=\"identity\") -> Tensor[]");
  define(
      "parameters_of_range(str parameterization, Tensor min, Tensor max, int bits, "
      "bool symmetric=False, bool sigmoid=False, bool full_range=False, "
      "str link=\"identity\") -> Tensor[]");
  define(
      "range_of_extrema(Tensor min, Tensor max, int bits, bool symmetric=False, "
      "bool force_zero=True, float fallback=1.0, float eps=1e-8, bool full_range=False) -> "
      "(Tensor min, Tensor max, Tensor without_width)");

  define(
      "quantize(Tensor x, Tensor scale, Tensor? offset, int bits, float eps=1e-8, "
      "bool full_range=False) -> Tensor");
  define(
      "update_codes_(Tensor(a!) codes, Tensor x, Tensor scale, Tensor? offset, int bits, "
      "float eps=1e-8, bool full_range=False) -> Tensor");
  define(
      "dequantize(Tensor codes, Tensor scale, Tensor? offset, int bits, float eps=1e-8, "
      "bool full_range=False) -> Tensor");

  define("quantized_softmax(Tensor scores, Tensor? mask, bool causal, " + range_schema("scores_") +
         ", " + range_schema("probabilities_") + ", int? window=None) -> Tensor");
  define(
      "quantized_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool causal, "
      "float scaling, " +
      range_schema("scores_") + ", " + range_schema("probabilities_") +
      ", int? window=None) -> Tensor");
  define("quantized_gelu(Tensor x, " + range_schema("input_") + ", " + range_schema("output_") +
         ") -> Tensor");
  define("quantized_cross_entropy(Tensor logits, Tensor labels, int ignore_index, " +
         range_schema() + ", int? classes=None) -> Tensor");
  define(
      "quantized_kl_div(Tensor logits, Tensor teacher_logits, Tensor? labels, float temperature, "
      "int ignore_index, " +
      range_schema() + ", int? classes=None) -> Tensor");

  define("quantized_rms_norm(Tensor x, Tensor weight, float eps, " + range_schema("output_") +
         ") -> Tensor");
  define("quantized_glu(Tensor gate, Tensor up, str activation, " + range_schema("gate_") + ", " +
         range_schema("activation_") + ", " + range_schema("up_") + ", " +
         range_schema("product_") + ") -> Tensor");

  define("_fake_quantize(Tensor x, " + granular_quantizer_schema() + ") -> Tensor");
  define("_fake_quantize_backward(Tensor grad, Tensor x, " + granular_quantizer_schema() +
         ", bool[3] needs) -> (Tensor, Tensor, Tensor)");
  define("_fake_quantize_dynamic(Tensor x, " + live_quantizer_schema() + ") -> Tensor");
  define(
      "_fake_quantize_live(Tensor x, Tensor first, Tensor? second, int? group, int bits, "
      "bool sigmoid=False, bool full_range=False, float eps=1e-8, " +
      linked + ") -> Tensor");
  define("_fake_quantize_dynamic_backward(Tensor grad, Tensor x, " + live_quantizer_schema() +
         ", bool[3] needs) -> (Tensor, Tensor, Tensor)");
  // statistics: of each row the largest masked score and the sum of exponentials.
  define("_quantized_softmax(Tensor scores, Tensor? mask, bool causal, int? window, " +
         quantizer_schema("scores_") + ", " + quantizer_schema("probabilities_") +
         ") -> (Tensor probabilities, Tensor statistics)");
  define(
      "_quantized_softmax_backward(Tensor grad, Tensor scores, Tensor statistics, Tensor? mask, "
      "bool causal, int? window, " +
      quantizer_schema("scores_") + ", " + quantizer_schema("probabilities_") +
      ", bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  const std::string attention = "Tensor? mask, bool causal, int? window, float scaling, " +
                                quantizer_schema("scores_") + ", " +
                                quantizer_schema("probabilities_");
  define("_quantized_attention(Tensor query, Tensor key, Tensor value, " + attention +
         ") -> (Tensor context, Tensor statistics)");
  define(
      "_quantized_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, "
      "Tensor context, Tensor statistics, " +
      attention + ", bool[7] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  define("_quantized_gelu(Tensor x, " + quantizer_schema("input_") + ", " +
         quantizer_schema("output_") + ") -> Tensor");
  define("_quantized_gelu_backward(Tensor grad, Tensor x, " + quantizer_schema("input_") + ", " +
         quantizer_schema("output_") +
         ", bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // statistics: of each row the largest quantized logit and the logarithm of the sum of
  // exponentials.
  define("_quantized_cross_entropy(Tensor logits, Tensor labels, " + quantizer_schema() +
         ", int? classes, int ignore_index) -> (Tensor losses, Tensor statistics)");
  define(
      "_quantized_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, "
      "Tensor statistics, " +
      quantizer_schema() +
      ", int? classes, int ignore_index, bool[3] needs) -> (Tensor, Tensor, Tensor)");
  // statistics: of each row 1 / sqrt(mean square + eps).
  define("_quantized_rms_norm(Tensor x, Tensor weight, float eps, " + quantizer_schema("output_") +
         ") -> (Tensor normalized, Tensor statistics)");
  define("_quantized_rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor statistics, " +
         quantizer_schema("output_") + ", bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  const std::string glu = "Tensor gate, Tensor up, int activation, " + quantizer_schema("gate_") +
                          ", " + quantizer_schema("activation_") + ", " + quantizer_schema("up_") +
                          ", " + quantizer_schema("product_");
  define("_quantized_glu(" + glu + ") -> Tensor");
  define("_quantized_glu_backward(Tensor grad, " + glu +
         ", bool[10] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
         "Tensor, Tensor)");
  // statistics: of each row the largest quantized logit and the logarithm of the sum of
  // exponentials, and the teacher's.
  define("_quantized_kl_div(Tensor logits, Tensor teacher_logits, Tensor? labels, " +
         quantizer_schema() +
         ", float temperature, int? classes, int ignore_index) -> "
         "(Tensor losses, Tensor statistics)");
  define(
      "_quantized_kl_div_backward(Tensor grad, Tensor logits, Tensor teacher_logits, "
      "Tensor? labels, Tensor statistics, " +
      quantizer_schema() +
      ", float temperature, int? classes, int ignore_index, bool[3] needs) -> (Tensor, Tensor, "
      "Tensor)");
  define("_effective_scale_offset(" + granular_quantizer_schema() + ") -> (Tensor, Tensor)");
}
