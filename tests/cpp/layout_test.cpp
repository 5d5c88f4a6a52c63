// Every granularity, memory layout and dtype against the oracle: one case at least for each kernel
// path.
#include "support.h"

namespace asymq_test {
namespace {

struct Shape {
  std::string name;
  std::vector<int64_t> x, range;
};

// Small enough for every operator and dtype.
const std::vector<Shape>& small_shapes() {
  static const std::vector<Shape> shapes = {
      {"zero_dim", {}, {}},
      {"zero_dim_range_of_one_element", {}, {1}},
      {"one_element", {1}, {1}},
      {"empty", {0}, {1}},
      {"empty_rows", {0, 5}, {0, 1}},
      {"rows_without_elements", {5, 0}, {5, 1}},
      {"odd", {7, 9, 11}, {1, 1, 1}},
      {"range_of_more_dims", {13}, {1, 1, 1}},
      {"rows", {6, 37}, {6, 1}},
      {"short_rows", {65, 3}, {65, 1}},
      {"groups_of_128", {4, 384}, {4, 3}},
      {"groups_of_3", {5, 12}, {5, 4}},
      {"last_axis", {33, 40}, {1, 40}},
      {"odd_last_axis", {33, 7}, {1, 7}},
      {"middle_axis", {4, 6, 50}, {1, 6, 1}},
      {"first_and_middle_axis", {4, 6, 50}, {4, 6, 1}},
      {"first_and_last_axis", {4, 6, 9}, {4, 1, 9}},
      {"blocks_along_the_first_axis", {12, 40}, {3, 1}},
      {"blocks_along_the_middle_axis", {3, 8, 10}, {1, 2, 1}},
      {"blocks_along_two_axes", {12, 24}, {4, 3}},
      {"range_per_element", {5, 7}, {5, 7}},
      {"five_dims", {2, 3, 4, 5, 6}, {2, 1, 4, 1, 2}},
  };
  return shapes;
}

// Past a block, a warp, a vector and a thread's share of each kernel; one operator and dtype each.
const std::vector<Shape>& large_shapes() {
  static const std::vector<Shape> shapes = {
      {"per_tensor_power_of_two", {1 << 18}, {1}},
      {"per_tensor_odd", {(1 << 19) + 3}, {1}},
      {"rows_of_768", {768, 768}, {768, 1}},
      {"rows_of_3072", {96, 3072}, {96, 1}},
      {"long_odd_rows", {3, 70001}, {3, 1}},
      {"short_odd_rows", {4099, 17}, {4099, 1}},
      {"groups_of_128", {256, 768}, {256, 6}},
      {"groups_of_32", {64, 1024}, {64, 32}},
      {"odd_groups", {64, 999}, {64, 9}},
      {"last_axis", {1024, 768}, {1, 768}},
      {"odd_last_axis", {2049, 77}, {1, 77}},
      {"wide_last_axis", {9, 20011}, {1, 20011}},
      {"middle_axis", {8, 64, 257}, {1, 64, 1}},
      {"first_and_last_axis", {16, 65, 96}, {16, 1, 96}},
      {"blocks_along_the_first_axis", {1024, 96}, {8, 1}},
      {"blocks_along_two_axes", {512, 256}, {16, 8}},
  };
  return shapes;
}

constexpr at::ScalarType kTypes[] = {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf};

Tensor sample(at::IntArrayRef shape) { return at::randn(shape, at::kDouble) * 2; }

class LayoutTest : public DeviceTest {};
ASYMQ_ON_EVERY_DEVICE(LayoutTest);

TEST_P(LayoutTest, EveryOperatorAndTypeOnSmallShapes) {
  for (const Shape& shape : small_shapes()) {
    for (const Op& op : ops()) {
      for (const at::ScalarType dtype : kTypes) {
        SCOPED_TRACE(shape.name + ", " + c10::toString(dtype));
        const Tensor x = sample(shape.x).to(device(), dtype),
                     g = sample(shape.x).to(device(), dtype);
        expect_matches_oracle(op, x, random_parameters(op, shape.range, 4), g, 4);
      }
    }
  }
}

TEST_P(LayoutTest, LargeShapes) {
  size_t turn = 0;
  for (const Shape& shape : large_shapes()) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(shape.name + ", " + c10::toString(dtype));
      const Op& op = ops()[turn++ % ops().size()];
      const Tensor x = sample(shape.x).to(device(), dtype), g = sample(shape.x).to(device(), dtype);
      expect_matches_oracle(op, x, random_parameters(op, shape.range, 8), g, 8);
    }
  }
}

TEST_P(LayoutTest, DoubleParameters) {
  for (const Op& op : ops()) {
    // float64 sigmoids may differ by an ulp between libraries, so their values are compared in the
    // golden test.
    if (op.sigmoid) continue;
    const Tensor x = sample({6, 37}).to(device());
    expect_matches_oracle(op, x, random_parameters(op, {6, 1}, 12, at::kDouble),
                          sample({6, 37}).to(device()), 12);
  }
}

TEST_P(LayoutTest, EveryBitWidth) {
  for (int64_t bits = 2; bits <= 16; ++bits) {
    SCOPED_TRACE(bits);
    const Op& op = ops()[bits % ops().size()];
    const Tensor x = sample({9, 130}).to(device(), at::kFloat),
                 g = sample({9, 130}).to(device(), at::kFloat);
    expect_matches_oracle(op, x, random_parameters(op, {9, 1}, bits), g, bits);
  }
}

TEST_P(LayoutTest, NonContiguousTensors) {
  const Op& op = op_named("min_max");
  for (const at::ScalarType dtype : kTypes) {
    SCOPED_TRACE(c10::toString(dtype));
    const auto on_device = [&](at::IntArrayRef shape) { return sample(shape).to(device(), dtype); };
    const auto check = [&](const std::string& name, const Tensor& x, at::IntArrayRef range,
                           const Tensor& g) {
      SCOPED_TRACE(name);
      expect_matches_oracle(op, x, random_parameters(op, range, 4), g, 4);
    };
    const Tensor buffer = on_device({40 * 260 + 1});
    check("unaligned", buffer.slice(0, 1).view({40, 260}), {40, 1}, on_device({40, 260}));
    check("unaligned, per tensor", buffer.slice(0, 1), {1}, on_device({40 * 260}));
    check("unaligned, last axis", buffer.slice(0, 1).view({40, 260}), {1, 260},
          on_device({40, 260}));
    check("unaligned, groups", buffer.slice(0, 1).narrow(0, 0, 10240).view({40, 256}), {40, 2},
          on_device({40, 256}));
    check("aligned x, unaligned upstream", on_device({40, 260}), {40, 1},
          buffer.slice(0, 1).view({40, 260}));
    check("transposed", on_device({36, 50}).t(), {50, 1}, on_device({50, 36}));
    check("transposed, last axis", on_device({36, 50}).t(), {1, 36}, on_device({50, 36}));
    check("transposed with its upstream", on_device({36, 50}).t(), {50, 1},
          on_device({36, 50}).t());
    check("every other column", on_device({20, 66}).slice(1, 0, 66, 2), {20, 1},
          on_device({20, 33}));
    check("slice of rows", on_device({20, 66}).slice(1, 3, 50), {20, 1}, on_device({20, 47}));
    check("permuted", on_device({4, 5, 6}).permute({2, 0, 1}), {6, 1, 1}, on_device({6, 4, 5}));
    check("channels last", on_device({2, 8, 5, 7}).contiguous(at::MemoryFormat::ChannelsLast),
          {1, 8, 1, 1}, on_device({2, 8, 5, 7}));
    check("channels last, per tensor",
          on_device({2, 8, 5, 7}).contiguous(at::MemoryFormat::ChannelsLast), {1},
          on_device({2, 8, 5, 7}).contiguous(at::MemoryFormat::ChannelsLast));
    check("expanded x", on_device({1, 30}).expand({12, 30}), {12, 1}, on_device({12, 30}));
    check("expanded upstream", on_device({12, 30}), {12, 1}, on_device({}).expand({12, 30}));
  }
}

TEST_P(LayoutTest, NonContiguousRanges) {
  const Op& op = op_named("beta_gamma");
  const Tensor x = sample({8, 24}).to(device(), at::kFloat),
               g = sample({8, 24}).to(device(), at::kFloat);
  Tensors parameters = random_parameters(op, {8, 3}, 4);
  for (Tensor& p : parameters) p = p.t().contiguous().t().to(device());
  ASSERT_FALSE(parameters[0].is_contiguous());
  expect_matches_oracle(op, x, parameters, g, 4);
}

}  // namespace
}  // namespace asymq_test
