// The dispatcher knows tensors, numbers and lists of them, but no quantizer. Here, and nowhere
// else, a quantizer becomes some of these in a schema and in a call, and is read from them again:
//
//   quantizer_schema("input_")   its part of a schema,
//   Op<"asymq::_name", R(A...)>  calls an operator with quantizers among A,
//   flat<function>               a function with quantizers among its arguments, to register.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "ops/quantizer.h"

namespace asymq {

/// How an argument of type A passes the dispatcher: as itself,
template <class A>
struct Flat {
  using Types = std::tuple<A>;
  static Types write(A argument) { return Types(std::forward<A>(argument)); }
  static A read(A argument) { return std::forward<A>(argument); }
};

/// whose: what its arguments' names start with, here and below.
inline std::string kind_schema(const std::string& whose = "") {
  return "int " + whose + "parameterization, int " + whose + "bits, float " + whose + "eps, int " +
         whose + "link, float " + whose + "gradient_scale";
}

/// or as the parts of a quantizer.
template <>
struct Flat<const GranularQuantizer&> {
  using Types = std::tuple<const at::Tensor&, const OptionalTensor&, const OptionalTensor&,
                           const OptionalTensor&, int64_t, int64_t, double, int64_t, double>;
  static Types write(const GranularQuantizer& q) {
    const auto& [first, second, min, max] = q.ranges;
    const auto& [parameterization, bits, eps, link, gradient_scale] = q.kind;
    return {first, second, min, max, parameterization, bits, eps, link, gradient_scale};
  }
  static GranularQuantizer read(const at::Tensor& first, const OptionalTensor& second,
                                const OptionalTensor& min, const OptionalTensor& max,
                                int64_t parameterization, int64_t bits, double eps, int64_t link,
                                double gradient_scale) {
    return {{first, second, min, max}, {parameterization, bits, eps, link, gradient_scale}};
  }
};

inline std::string granular_quantizer_schema() {
  return "Tensor first, Tensor? second, Tensor? min, Tensor? max, " + kind_schema();
}

template <>
struct Flat<const QuantizerArguments&> {
  using Types = std::tuple<at::TensorList, int64_t, int64_t, double, int64_t, double, bool,
                           std::optional<int64_t>>;
  static Types write(const QuantizerArguments& q) {
    const auto& [parameterization, bits, eps, link, gradient_scale] = q.kind;
    return {q.ranges, parameterization, bits, eps, link, gradient_scale, q.token, q.group};
  }
  static QuantizerArguments read(at::TensorList ranges, int64_t parameterization, int64_t bits,
                                 double eps, int64_t link, double gradient_scale, bool token,
                                 std::optional<int64_t> group) {
    return {ranges, {parameterization, bits, eps, link, gradient_scale}, token, group};
  }
};

inline std::string quantizer_schema(const std::string& whose = "") {
  return "Tensor[] " + whose + "ranges, " + kind_schema(whose) + ", bool " + whose +
         "token, int? " + whose + "group";
}

template <>
struct Flat<const RangeArguments&> {
  using Types = std::tuple<std::string_view, at::TensorList, int64_t, bool, bool, double, bool,
                           bool, std::optional<int64_t>, std::string_view, double>;
  static Types write(const RangeArguments& r) {
    return {r.parameterization, r.parameters, r.bits,  r.symmetric, r.sigmoid,       r.eps,
            r.full_range,       r.token,      r.group, r.link,      r.gradient_scale};
  }
  static RangeArguments read(std::string_view parameterization, at::TensorList parameters,
                             int64_t bits, bool symmetric, bool sigmoid, double eps,
                             bool full_range, bool token, std::optional<int64_t> group,
                             std::string_view link, double gradient_scale) {
    return {parameterization, parameters, bits,  symmetric, sigmoid,       eps,
            full_range,       token,      group, link,      gradient_scale};
  }
};

/// No range: the parameterization "none".
template <>
struct Flat<const std::optional<RangeArguments>&> {
  using Range = Flat<const RangeArguments&>;
  using Types = Range::Types;
  static Types write(const std::optional<RangeArguments>& range) {
    return Range::write(range.value_or(RangeArguments{"none", {}, 8}));
  }
  template <class... Parts>
  static std::optional<RangeArguments> read(std::string_view parameterization,
                                            const Parts&... parts) {
    if (parameterization == "none") return std::nullopt;
    return Range::read(parameterization, parts...);
  }
};

inline std::string range_schema(const std::string& whose = "") {
  return "str " + whose + "parameterization, Tensor[] " + whose + "parameters, int " + whose +
         "bits, bool " + whose + "symmetric, bool " + whose + "sigmoid, float " + whose +
         "eps, bool " + whose + "full_range, bool " + whose + "token, int? " + whose +
         "group, str " + whose + "link, float " + whose + "gradient_scale";
}

namespace detail {

template <class R, class Arguments>
struct Signature;
template <class R, class... F>
struct Signature<R, std::tuple<F...>> {
  using type = R(F...);
};

template <class... A>
using FlatTypes = decltype(std::tuple_cat(std::declval<typename Flat<A>::Types>()...));

template <class A>
constexpr size_t kParts = std::tuple_size_v<typename Flat<A>::Types>;

/// Position of the first part of an argument among the parts of all.
template <class... A>
constexpr size_t first_part(size_t argument) {
  const size_t parts[] = {kParts<A>...};
  return std::accumulate(parts, parts + argument, size_t{0});
}

/// The argument whose parts start at `first` of the tuple.
template <class A, size_t first, class Parts>
decltype(auto) read(const Parts& parts) {
  return [&]<size_t... i>(std::index_sequence<i...>)->decltype(auto) {
    return Flat<A>::read(std::get<first + i>(parts)...);
  }
  (std::make_index_sequence<kParts<A>>());
}

template <auto function, class Type, class Parts>
struct Registered;
template <auto function, class R, class... A, class... F>
struct Registered<function, R (*)(A...), std::tuple<F...>> {
  static R call(F... flat) {
    const std::tuple<F&...> parts(flat...);
    return [&]<size_t... i>(std::index_sequence<i...>) {
      return function(read<A, first_part<A...>(i)>(parts)...);
    }
    (std::index_sequence_for<A...>());
  }
};

template <auto function, class R, class... A>
constexpr auto* register_flat(R (*)(A...)) {
  return &Registered<function, R (*)(A...), FlatTypes<A...>>::call;
}

/// A string literal as a template argument.
template <size_t kSize>
struct Literal {
  char text[kSize];

  constexpr Literal(const char (&literal)[kSize]) { std::copy_n(literal, kSize, text); }
};

}  // namespace detail

/// `function` as the dispatcher calls it.
template <auto function>
inline constexpr auto* flat = detail::register_flat<function>(function);

/// The operator of this name as a function that goes through the dispatcher.
template <detail::Literal name, class Function>
struct Op;
template <detail::Literal name, class R, class... A>
struct Op<name, R(A...)> {
  R operator()(A... arguments) const {
    // The search by name takes longer than many a call.
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow(name.text, "")
            .template typed<typename detail::Signature<R, detail::FlatTypes<A...>>::type>();
    return std::apply(
        [](auto&&... flat) -> R { return op.call(std::forward<decltype(flat)>(flat)...); },
        std::tuple_cat(Flat<A>::write(std::forward<A>(arguments))...));
  }
};

}  // namespace asymq
