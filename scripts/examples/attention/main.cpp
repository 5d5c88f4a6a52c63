// Self-attention in LibTorch, quantized at every operation, that learns to sort: of 8 numbers from
// 0 to 15 in any order it gives them in order. Weights and ranges learn together.
#include <asymq/nn.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>

namespace {

using namespace asymq::nn;

constexpr int64_t kWidth = 64, kHeads = 4, kNumbers = 16, kLength = 8;

QuantLinear quantized_linear(int64_t in, int64_t out) {
  return QuantLinear(QuantLinearOptions(in, out).output(QuantActOptions().bits(8)));
}

struct SorterImpl : torch::nn::Module {
  SorterImpl() {
    register_module("embedding", embedding);
    register_module("places", places);
    register_module("qkv", qkv);
    register_module("scores", scores);
    register_module("probabilities", probabilities);
    register_module("context", context);
    register_module("out", out);
    register_module("up", up);
    register_module("head", head);
  }

  torch::Tensor forward(const torch::Tensor& numbers) {
    auto x = embedding(numbers) + places(torch::arange(kLength));
    const auto heads =
        qkv(x).view({-1, kLength, 3, kHeads, kWidth / kHeads}).permute({2, 0, 3, 1, 4});
    const auto q = heads[0], k = heads[1], v = heads[2];
    const auto s = scores(q.matmul(k.transpose(-1, -2)) / std::sqrt(double(kWidth / kHeads)));
    const auto attended = context(probabilities(torch::softmax(s, -1)).matmul(v));
    x = x + out(attended.transpose(1, 2).flatten(2));
    return head(torch::relu(up(x)));
  }

  QuantEmbedding embedding{kNumbers, kWidth}, places{kLength, kWidth};
  QuantLinear qkv = quantized_linear(kWidth, 3 * kWidth), out = quantized_linear(kWidth, kWidth);
  QuantLinear up = quantized_linear(kWidth, 4 * kWidth);
  QuantLinear head = quantized_linear(4 * kWidth, kNumbers);
  QuantAct scores{QuantActOptions().bits(8)}, probabilities{QuantActOptions().bits(8)};
  QuantAct context{QuantActOptions().bits(8)};
};
TORCH_MODULE(Sorter);

}  // namespace

int main() {
  torch::manual_seed(0);
  Sorter model;
  const auto numbers = [] { return torch::randint(kNumbers, {128, kLength}); };
  calibrate(*model, [&] { model->forward(numbers()); });
  torch::optim::AdamW optimizer(weight_parameters(*model), torch::optim::AdamWOptions(3e-3));
  // Ranges have a rate of their own, and no weight decay.
  add_range_parameters(optimizer, *model, torch::optim::AdamWOptions(1e-3));
  for (int step = 0; step <= 300; ++step) {
    const auto given = numbers(), sorted = std::get<0>(given.sort(-1));
    optimizer.zero_grad();
    const auto logits = model->forward(given);
    const auto loss = torch::cross_entropy_loss(logits.flatten(0, 1), sorted.flatten());
    loss.backward();
    optimizer.step();
    if (step % 50 == 0) std::cout << "step " << step << "  loss " << loss.item<float>() << "\n";
  }
  std::cout << summary(*model) << "\n";
  torch::save(model, "sorter.pt");
}
