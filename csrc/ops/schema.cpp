// The table of contents: every operator of the library.
//
// The public fake-quantize functions decompose into one private operator, `_fake_quantize`, whose
// `parameterization` is a position in Parameterizations (parameterization.h) and whose first and
// second are the learned parameters. Of them, autograd, CPU, CUDA and Meta know only that one and
// its backward. The same holds for quantized_softmax, quantized_gelu and quantized_cross_entropy.
//
// *_ranges: the range tensors that a parameterization has, in the order first, second, min, max.
// needs: which gradients to compute; the others come back undefined. After the tensor's come those
// of first and second of each range.
#include <torch/library.h>

TORCH_LIBRARY(asymq, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto define = [&](const char* schema) {
    m.def(torch::schema(schema, c10::AliasAnalysisKind::FROM_SCHEMA), tags);
  };

  define(
      "fake_quantize_scale_offset(Tensor x, Tensor scale, Tensor offset, int bits, "
      "float eps=1e-8) -> Tensor");
  define(
      "fake_quantize_min_max(Tensor x, Tensor min, Tensor max, int bits, float eps=1e-8) -> "
      "Tensor");
  define(
      "fake_quantize_beta_gamma(Tensor x, Tensor beta, Tensor gamma, Tensor min, Tensor max, "
      "int bits, bool sigmoid=False, float eps=1e-8) -> Tensor");
  define(
      "fake_quantize_kscale_koffset(Tensor x, Tensor kscale, Tensor koffset, int bits, "
      "float eps=1e-8) -> Tensor");
  define(
      "fake_quantize_symmetric_scale(Tensor x, Tensor scale, int bits, float eps=1e-8) -> "
      "Tensor");
  define("fake_quantize_symmetric_max(Tensor x, Tensor max, int bits, float eps=1e-8) -> Tensor");
  define(
      "fake_quantize_symmetric_gamma(Tensor x, Tensor gamma, Tensor max, int bits, "
      "bool sigmoid=False, float eps=1e-8) -> Tensor");
  define(
      "effective_scale_offset(str parameterization, Tensor[] parameters, int bits, "
      "bool symmetric=False, bool sigmoid=False, float eps=1e-8) -> Tensor[]");
  define(
      "parameters_of_range(str parameterization, Tensor min, Tensor max, int bits, "
      "bool symmetric=False, bool sigmoid=False) -> Tensor[]");
  define(
      "range_of_extrema(Tensor min, Tensor max, int bits, bool symmetric=False, "
      "bool force_zero=True, float fallback=1.0, float eps=1e-8) -> "
      "(Tensor min, Tensor max, Tensor without_width)");

  define("quantize(Tensor x, Tensor scale, Tensor? offset, int bits, float eps=1e-8) -> Tensor");
  define(
      "dequantize(Tensor codes, Tensor scale, Tensor? offset, int bits, float eps=1e-8) -> "
      "Tensor");

  define(
      "quantized_softmax(Tensor scores, Tensor? mask, bool causal, str scores_parameterization, "
      "Tensor[] scores_parameters, int scores_bits, bool scores_symmetric, bool scores_sigmoid, "
      "float scores_eps, str probabilities_parameterization, Tensor[] probabilities_parameters, "
      "int probabilities_bits, bool probabilities_symmetric, bool probabilities_sigmoid, "
      "float probabilities_eps) -> Tensor");
  define(
      "quantized_gelu(Tensor x, str input_parameterization, Tensor[] input_parameters, "
      "int input_bits, bool input_symmetric, bool input_sigmoid, float input_eps, "
      "str output_parameterization, Tensor[] output_parameters, int output_bits, "
      "bool output_symmetric, bool output_sigmoid, float output_eps) -> Tensor");
  define(
      "quantized_cross_entropy(Tensor logits, Tensor labels, int ignore_index, "
      "str parameterization, Tensor[] parameters, int bits, bool symmetric, bool sigmoid, "
      "float eps) -> Tensor");

  define(
      "_fake_quantize(Tensor x, Tensor first, Tensor? second, Tensor? min, Tensor? max, "
      "int parameterization, int bits, float eps) -> Tensor");
  define(
      "_fake_quantize_backward(Tensor grad, Tensor x, Tensor first, Tensor? second, Tensor? min, "
      "Tensor? max, int parameterization, int bits, float eps, bool[3] needs) -> "
      "(Tensor, Tensor, Tensor)");
  // statistics: of each row the largest masked score and the sum of exponentials.
  define(
      "_quantized_softmax(Tensor scores, Tensor? mask, bool causal, Tensor[] scores_ranges, "
      "int scores_parameterization, int scores_bits, float scores_eps, "
      "Tensor[] probabilities_ranges, int probabilities_parameterization, int probabilities_bits, "
      "float probabilities_eps) -> (Tensor probabilities, Tensor statistics)");
  define(
      "_quantized_softmax_backward(Tensor grad, Tensor scores, Tensor statistics, Tensor? mask, "
      "bool causal, Tensor[] scores_ranges, int scores_parameterization, int scores_bits, "
      "float scores_eps, Tensor[] probabilities_ranges, int probabilities_parameterization, "
      "int probabilities_bits, float probabilities_eps, bool[5] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  define(
      "_quantized_gelu(Tensor x, Tensor[] input_ranges, int input_parameterization, "
      "int input_bits, float input_eps, Tensor[] output_ranges, int output_parameterization, "
      "int output_bits, float output_eps) -> Tensor");
  define(
      "_quantized_gelu_backward(Tensor grad, Tensor x, Tensor[] input_ranges, "
      "int input_parameterization, int input_bits, float input_eps, Tensor[] output_ranges, "
      "int output_parameterization, int output_bits, float output_eps, bool[5] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  // statistics: of each row the largest quantized logit and the logarithm of the sum of
  // exponentials.
  define(
      "_quantized_cross_entropy(Tensor logits, Tensor labels, Tensor[] ranges, "
      "int parameterization, int bits, float eps, int ignore_index) -> "
      "(Tensor losses, Tensor statistics)");
  define(
      "_quantized_cross_entropy_backward(Tensor grad, Tensor logits, Tensor labels, "
      "Tensor statistics, Tensor[] ranges, int parameterization, int bits, float eps, "
      "int ignore_index, bool[3] needs) -> (Tensor, Tensor, Tensor)");
  define(
      "_effective_scale_offset(Tensor first, Tensor? second, Tensor? min, Tensor? max, "
      "int parameterization, int bits, float eps) -> (Tensor, Tensor)");
}
