// The table of a model's quantizers, letter by letter.
#include <asymq/nn.h>
#include <torch/nn/modules/container/sequential.h>

#include "support.h"

namespace asymq_test {
namespace {

using namespace asymq::nn;

TEST(SummaryTest, HasARowPerQuantizerAndSaysWhatHasNone) {
  QuantAct act(QuantActOptions().bits(6).parameterization("min_max"));
  QuantLinear last(QuantLinearOptions(8, 1000)
                       .weight(QuantizerOptions().bits(4).granularity(PerGroup{4}))
                       .output(QuantActOptions().granularity(PerToken()).link("exp")));
  torch::nn::Sequential net(
      QuantEmbedding(16, 8), act, QuantLayerNorm(std::vector<int64_t>{8}), act,
      QuantLinear(QuantLinearOptions(8, 8).input(QuantActOptions()).weight(std::nullopt)), last);
  const auto end = [](double value) { return at::full({1}, value); };
  const auto rows = named_quantizers(*net);
  // Two of sixteen have collapsed.
  const Tensor high = at::ones({16, 1});
  high.slice(0, 0, 2).fill_(1e-12);
  rows["0.weight_quantizer"].ptr()->set_range(-high, high);
  act->set_range(end(-1.0 / 3), end(12345.678));
  rows["4.input_quantizer"].ptr()->set_range(end(0), end(255e-7));
  EXPECT_EQ("\n" + summary(*net), R"(
name                kind         bits  granularity  parameterization        range                               collapsed
------------------  -----------  ----  -----------  ----------------------  ----------------------------------  ---------
0.weight_quantizer  weight       4     per channel  symmetric beta_gamma    16 ranges within [-0.9333, 0.9333]  2 of 16
1                   activation   6     per tensor   min_max                 [0, 1.235e+04]                      no
2.weight_quantizer  norm_weight  12    per tensor   beta_gamma              uncalibrated                        -
4.input_quantizer   input        8     per tensor   beta_gamma              [0, 2.55e-05]                       no
5.weight_quantizer  weight       4     groups of 4  beta_gamma              uncalibrated                        -
5.output_quantizer  activation   8     per token    beta_gamma exp dynamic  dynamic range, beta 0, gamma 0      -

1: one quantizer with 3
not quantized: 1,080 of 9,216 parameters (11.72%): *.bias, 4.weight)");
}

TEST(SummaryTest, SaysWhereAWeightHasSeveralQuantizers) {
  torch::nn::Embedding embedding(4, 8);
  torch::nn::Linear head(torch::nn::LinearOptions(8, 4).bias(false));
  head->weight = embedding->weight;
  const auto first = QuantEmbedding::from_float(embedding);
  const std::string text = summary(*torch::nn::Sequential(first, QuantLinear::from_float(head)));
  EXPECT_EQ(text.substr(text.find("\n\n")),
            "\n\n0.weight_quantizer, 1.weight_quantizer: several quantizers of one weight");
  const std::string tied =
      summary(*torch::nn::Sequential(first, QuantLinear::from_float(head, *first)));
  EXPECT_EQ(tied.substr(tied.find("\n\n")),
            "\n\n0.weight_quantizer: one quantizer with 1.weight_quantizer");
}

TEST(SummaryTest, OfNothingIsAHead) {
  torch::nn::Sequential net;
  EXPECT_EQ(summary(*net),
            "name  kind  bits  granularity  parameterization  range  collapsed\n"
            "----  ----  ----  -----------  ----------------  -----  ---------");
}

}  // namespace
}  // namespace asymq_test
