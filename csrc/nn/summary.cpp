// Every quantizer of a model as a row of a table, and what has none.
#include <ATen/ATen.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdio>
#include <map>
#include <sstream>
#include <unordered_map>
#include <unordered_set>
#include <utility>

#include "asymq/nn.h"

namespace asymq::nn {
namespace {

using at::Tensor;
using Row = std::array<std::string, 7>;

constexpr std::array<const char*, 7> kTitles{
    "name", "kind", "bits", "granularity", "parameterization", "range", "collapsed"};

std::string formatted(const char* format, double value) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), format, value);
  return text.data();
}

double on_host(const Tensor& value) { return at::_local_scalar_dense(value).toDouble(); }

std::string short_number(const Tensor& value) { return formatted("%.4g", on_host(value)); }

/// One value, or the least and the largest.
std::string spread(const Tensor& values) {
  const std::string low = short_number(values.min()), high = short_number(values.max());
  return low == high ? low : low + " to " + high;
}

struct Granularities {
  std::string operator()(const PerTensor&) const { return "per tensor"; }
  std::string operator()(const PerChannel& channel) const {
    return "per channel" + (channel.axis == 0 ? "" : c10::str(", axis ", channel.axis));
  }
  std::string operator()(const PerGroup& group) const {
    const bool last = group.axis == PerGroup::kReduction || group.axis == -1;
    return c10::str("groups of ", group.size) + (last ? "" : c10::str(", axis ", group.axis));
  }
  std::string operator()(const PerToken& token) const {
    return token.group ? c10::str("per token, groups of ", *token.group) : "per token";
  }
};

bool per_token(const QuantizerImpl& quantizer) {
  return std::holds_alternative<PerToken>(quantizer.options.granularity());
}

std::string parameterization(const QuantizerImpl& quantizer) {
  const QuantizerOptions& options = quantizer.options;
  std::ostringstream text;
  text << (options.symmetric() ? "symmetric " : "") << options.parameterization();
  if (options.sigmoid()) {
    text << " sigmoid";
  } else if (options.link() != "identity") {
    text << " " << options.link();
  }
  if (per_token(quantizer)) text << " dynamic";
  if (options.fix_min()) text << " fix_min";
  if (options.full_range()) text << " full_range";
  if (options.gradient_scale() != 1) text << " gradient_scale=" << options.gradient_scale();
  return text.str();
}

/// The present range in a few characters: its ends, or the extreme ends of all ranges.
std::string range(const QuantizerImpl& quantizer) {
  if (per_token(quantizer)) {
    std::string text = "dynamic range";
    for (const auto& factor : quantizer.named_parameters()) {
      text += ", " + factor.key() + " " + spread(factor.value());
    }
    return text;
  }
  if (!quantizer.calibrated()) return "uncalibrated";
  const auto [low, high] = quantizer.bounds();
  const std::string ends = "[" + short_number(low.min()) + ", " + short_number(high.max()) + "]";
  return low.numel() == 1 ? ends : c10::str(low.numel(), " ranges within ", ends);
}

std::string collapsed(const QuantizerImpl& quantizer) {
  if (per_token(quantizer) || !quantizer.calibrated()) return "-";
  const Tensor scale = std::get<0>(quantizer.scale_offset());
  const double count = on_host(scale.le(quantizer.options.eps()).sum());
  return count == 0 ? "no" : c10::str(count, " of ", scale.numel());
}

/// Columns as wide as they need to be.
std::vector<std::string> lines_of(const std::vector<Row>& rows) {
  std::array<size_t, kTitles.size()> widths{};
  for (const Row& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  Row rule;
  for (size_t i = 0; i < rule.size(); ++i) rule[i] = std::string(widths[i], '-');
  std::vector<std::string> lines;
  const auto add = [&](const Row& row) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      line += row[i] + std::string(widths[i] - row[i].size() + 2, ' ');
    }
    lines.push_back(line.substr(0, line.find_last_not_of(' ') + 1));
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    add(rows[i]);
    if (i == 0) add(rule);
  }
  return lines;
}

/// A line with * for the numbers that are parts of names, such as layers.3.weight.
std::string without_indices(const std::string& line) {
  std::string text;
  for (size_t i = 0; i < line.size();) {
    size_t end = i;
    while (end < line.size() && std::isdigit(static_cast<unsigned char>(line[end]))) ++end;
    const bool starts = i == 0 || line[i - 1] == '.' || line[i - 1] == ' ';
    if (starts && end > i && end < line.size() && line[end] == '.') {
      text += '*';
      i = end;
    } else {
      text += line[i++];
    }
  }
  return text;
}

/// Lines with names, those that differ by the indices of layers alone once.
std::vector<std::string> alike(const std::vector<std::string>& lines) {
  std::map<std::string, size_t> counts;
  for (const std::string& line : lines) ++counts[without_indices(line)];
  std::vector<std::string> result;
  for (const std::string& line : lines) {
    const std::string pattern = without_indices(line);
    const size_t count = std::exchange(counts[pattern], 0);
    if (count > 0) result.push_back(count == 1 ? line : pattern);
  }
  return result;
}

/// The other names of quantizers that stand in several places.
std::vector<std::string> shared(const torch::nn::Module& model) {
  std::unordered_map<const torch::nn::Module*, std::vector<std::string>> names;
  model.apply([&](const std::string& name, const torch::nn::Module& module) {
    if (module.as<Quantizer>() != nullptr) names[&module].push_back(name);
  });
  std::vector<std::string> lines;
  for (const auto& item : named_quantizers(model)) {
    auto places = names[item.value().ptr().get()];
    places.erase(places.begin());
    if (!places.empty()) {
      lines.push_back(item.key() + ": one quantizer with " + c10::Join(", ", places));
    }
  }
  return alike(lines);
}

/// Weights by their quantizers.
using Weights = std::unordered_map<const QuantizerImpl*, const c10::TensorImpl*>;

Weights weights_of(const torch::nn::Module& model) {
  Weights weights;
  model.apply([&](const torch::nn::Module& module) {
    const auto* layer = dynamic_cast<const QuantLayer*>(&module);
    if (layer != nullptr && layer->weight_quantizer) {
      weights.emplace(layer->weight_quantizer.get(), layer->weight.unsafeGetTensorImpl());
    }
  });
  return weights;
}

/// Quantizers of one weight, which learn a range each.
std::vector<std::string> rivals(const torch::nn::Module& model, const Weights& weights) {
  std::unordered_map<const c10::TensorImpl*, std::vector<std::string>> names;
  for (const auto& item : named_quantizers(model)) {
    const auto found = weights.find(item.value().get());
    if (found != weights.end()) names[found->second].push_back(item.key());
  }
  std::vector<std::string> lines;
  for (const auto& [weight, quantizers] : names) {
    if (quantizers.size() > 1) {
      lines.push_back(c10::Join(", ", quantizers) + ": several quantizers of one weight");
    }
  }
  std::sort(lines.begin(), lines.end());
  return alike(lines);
}

std::string with_commas(int64_t count) {
  const std::string digits = std::to_string(count);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

/// The parameters without a quantizer, as a share of all; empty where there is none.
std::string unquantized(const torch::nn::Module& model, const Weights& weights) {
  std::unordered_set<const c10::TensorImpl*> quantized, seen;
  for (const auto& [quantizer, weight] : weights) quantized.insert(weight);
  for (const auto& item : named_quantizers(model)) {
    for (const Tensor& tensor : item.value()->parameters())
      seen.insert(tensor.unsafeGetTensorImpl());
  }
  std::vector<std::string> names;
  int64_t count = 0, total = 0;
  for (const auto& item : model.named_parameters()) {
    if (!seen.insert(item.value().unsafeGetTensorImpl()).second) continue;
    total += item.value().numel();
    if (quantized.contains(item.value().unsafeGetTensorImpl())) continue;
    count += item.value().numel();
    names.push_back(item.key());
  }
  if (names.empty()) return "";
  const double share = 100.0 * static_cast<double>(count) / static_cast<double>(total);
  return "not quantized: " + with_commas(count) + " of " + with_commas(total) + " parameters (" +
         formatted("%.2f%%", share) + "): " + c10::Join(", ", alike(names));
}

}  // namespace

std::string summary(const torch::nn::Module& model) {
  std::vector<Row> rows(1);
  std::copy(kTitles.begin(), kTitles.end(), rows[0].begin());
  for (const auto& item : named_quantizers(model)) {
    const QuantizerImpl& quantizer = *item.value();
    rows.push_back({item.key(), quantizer.options.kind(), std::to_string(quantizer.options.bits()),
                    std::visit(Granularities(), quantizer.options.granularity()),
                    parameterization(quantizer), range(quantizer), collapsed(quantizer)});
  }
  auto lines = lines_of(rows);
  auto notes = shared(model);
  const auto weights = weights_of(model);
  for (auto& line : rivals(model, weights)) notes.push_back(std::move(line));
  if (auto text = unquantized(model, weights); !text.empty()) notes.push_back(std::move(text));
  if (!notes.empty()) lines.emplace_back();
  lines.insert(lines.end(), notes.begin(), notes.end());
  return c10::Join("\n", lines);
}

}  // namespace asymq::nn
