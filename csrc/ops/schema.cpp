// The table of contents: every operator of the library.
//
// The public fake-quantize functions decompose into one private operator, `_fake_quantize`, whose
// `parameterization` is a position in Parameterizations (parameterization.h) and whose first and
// second are the learned parameters. Of them, autograd, CPU, CUDA and Meta know only that one and
// its backward. The same holds for quantized_softmax and `_quantized_softmax`.
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
      "_fake_quantize(Tensor x, Tensor first, Tensor? second, Tensor? min, Tensor? max, "
      "int parameterization, int bits, float eps) -> Tensor");
  // needs: which of dL/dx, dL/dfirst and dL/dsecond to compute; the others come back undefined.
  define(
      "_fake_quantize_backward(Tensor grad, Tensor x, Tensor first, Tensor? second, Tensor? min, "
      "Tensor? max, int parameterization, int bits, float eps, bool[3] needs) -> "
      "(Tensor, Tensor, Tensor)");
  // *_ranges: the range tensors that the parameterization has, in the order first, second, min,
  // max. statistics: of each row the largest masked score and the sum of exponentials.
  define(
      "_quantized_softmax(Tensor scores, Tensor? mask, bool causal, Tensor[] scores_ranges, "
      "int scores_parameterization, int scores_bits, float scores_eps, "
      "Tensor[] probabilities_ranges, int probabilities_parameterization, int probabilities_bits, "
      "float probabilities_eps) -> (Tensor probabilities, Tensor statistics)");
  // needs: which of dL/dscores and the gradients of the learned parameters (first and second of the
  // scores' range, then of the probabilities') to compute.
  define(
      "_quantized_softmax_backward(Tensor grad, Tensor scores, Tensor statistics, Tensor? mask, "
      "bool causal, Tensor[] scores_ranges, int scores_parameterization, int scores_bits, "
      "float scores_eps, Tensor[] probabilities_ranges, int probabilities_parameterization, "
      "int probabilities_bits, float probabilities_eps, bool[5] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  define(
      "_effective_scale_offset(Tensor first, Tensor? second, Tensor? min, Tensor? max, "
      "int parameterization, int bits, float eps) -> (Tensor, Tensor)");
}
