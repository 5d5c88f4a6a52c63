// Learns the range of a 4-bit quantizer for normal data with torch's Adam.
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <asymq/asymq.h>
#include <torch/optim/adam.h>

#include <cstdio>

int main() {
  at::manual_seed(0);
  const at::Device device(at::hasCUDA() ? at::kCUDA : at::kCPU);
  const at::Tensor x = at::randn({10000}).to(device);
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

  // The C++ functions alone keep the library, and with it every registered operator, in the
  // program.
  const auto op = c10::Dispatcher::singleton().findSchema({"asymq::fake_quantize_min_max", ""});
  if (!op) std::fprintf(stderr, "asymq::fake_quantize_min_max is not registered\n");
  if (!(last < first)) std::fprintf(stderr, "the loss did not fall: %g to %g\n", first, last);
  return op && last < first ? 0 : 1;
}
