#include <ATen/ATen.h>
#include <asymq/asymq.h>

int main() {
  const at::Tensor end = at::ones({1});
  const at::Tensor x = asymq::fake_quantize_min_max(at::full({3}, 2.0), -end, end, 8);
  return at::allclose(x, at::ones({3}), 1e-2) ? 0 : 1;
}
