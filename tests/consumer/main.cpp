// Uses the package as its users do: learns a range with the functions, trains, saves and reloads a
// quantized network with the modules. Exits with 1 if any of it fails.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <asymq/asymq.h>
#include <asymq/nn.h>
#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adam.h>
#include <torch/serialize.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace {

at::Device device() { return at::hasCUDA() ? at::kCUDA : at::kCPU; }

bool check(bool holds, const char* what) {
  if (!holds) std::fprintf(stderr, "failed: %s\n", what);
  return holds;
}

/// The range of a 4-bit quantizer for normal data.
bool learn_a_range() {
  const at::Tensor x = at::randn({10000}).to(device());
  const at::Tensor min = x.min().reshape({1}).requires_grad_();
  const at::Tensor max = (3 * x.max()).reshape({1}).requires_grad_();

  torch::optim::Adam optimizer({min, max}, torch::optim::AdamOptions(2e-2));
  double first = 0, last = 0;
  for (int step = 0; step <= 500; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss =
        (asymq::fake_quantize_min_max(x, min, max, /*bits=*/4) - x).square().mean();
    loss.backward();
    optimizer.step();
    last = loss.item<double>();
    if (step == 0) first = last;
    if (step % 100 == 0) {
      std::printf("step %3d  loss %.5f  range [%.3f, %.3f]\n", step, last, min.item<double>(),
                  max.item<double>());
    }
  }
  return check(last < first, "the loss of the range falls");
}

/// Two layers with weights and outputs of 3 bits, uncalibrated.
torch::nn::Sequential quantized(const torch::nn::Linear& first, const torch::nn::Linear& second) {
  const auto weight =
      asymq::nn::QuantizerOptions().bits(3).symmetric(true).granularity(asymq::nn::PerChannel());
  const auto output = asymq::nn::QuantActOptions().bits(3).parameterization("min_max");
  return torch::nn::Sequential(asymq::nn::QuantLinear::from_float(first, weight, output),
                               torch::nn::ReLU(),
                               asymq::nn::QuantLinear::from_float(second, weight, output));
}

/// Learns the ranges, with frozen weights, such that the network computes what it did in float.
/// Saves it with an input and its output.
bool train_a_network(const std::string& folder) {
  const at::Tensor x = at::randn({512, 32}).to(device());
  torch::nn::Linear first(32, 64), second(64, 8);
  first->to(device());
  second->to(device());
  const at::Tensor target = second(at::relu(first(x))).detach();

  auto net = quantized(first, second);
  asymq::nn::calibrate(*net, [&] { net->forward(x); });
  asymq::nn::freeze_weights(*net);
  torch::optim::Adam optimizer(asymq::nn::range_parameters(*net), torch::optim::AdamOptions(1e-2));
  double before = 0, after = 0;
  for (int step = 0; step <= 40; ++step) {
    optimizer.zero_grad();
    const at::Tensor loss = (net->forward(x) - target).square().mean();
    loss.backward();
    optimizer.step();
    after = loss.item<double>();
    if (step == 0) before = after;
    std::printf("step %2d  loss %.6f\n", step, after);
  }
  torch::save(net, folder + "/net.pt");
  torch::save(x, folder + "/x.pt");
  torch::save(net->forward(x).detach(), folder + "/y.pt");
  return check(after < before, "the loss of the network falls");
}

/// Whether the saved network computes the saved output, bit for bit.
bool reload(const std::string& folder) {
  auto net = quantized(torch::nn::Linear(32, 64), torch::nn::Linear(64, 8));
  net->to(device());
  at::Tensor x, y;
  torch::load(net, folder + "/net.pt");
  torch::load(x, folder + "/x.pt");
  torch::load(y, folder + "/y.pt");
  return check(at::equal(net->forward(x), y), "a reloaded network computes the same");
}

}  // namespace

/// Without argument: everything. With one: reload from that folder, as a process of its own.
int main(int argc, char** argv) {
  if (argc > 1) return reload(argv[1]) ? 0 : 1;

  at::manual_seed(0);
  // The C++ functions alone keep the library, and with it every registered operator, in the
  // program.
  const auto op = c10::Dispatcher::singleton().findSchema({"asymq::fake_quantize_min_max", ""});
  const std::string program = argv[0], folder = program + ".saved";
  std::filesystem::create_directories(folder);
  const bool good = check(op.has_value(), "asymq::fake_quantize_min_max is registered") &&
                    learn_a_range() && train_a_network(folder) &&
                    std::system(("'" + program + "' '" + folder + "'").c_str()) == 0;
  return good ? 0 : 1;
}
