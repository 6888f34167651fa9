/// What is expected of a tensor, how far off its numbers may be, and which of them are anybody's guess.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>

#include "tensors.hpp"

namespace fuzz {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::abort();
}

/// The type that losses compute in, and that they come in.
inline at::ScalarType arithmetic(at::ScalarType type) { return type == at::kDouble ? type : at::kFloat; }

/// Distance from 1 to the next number.
inline double epsilon(at::ScalarType type) {
  return std::ldexp(1.0, type == at::kDouble ? -52 : type == at::kFloat ? -23 : type == at::kHalf ? -10 : -7);
}

inline double smallest(at::ScalarType type) {
  return type == at::kDouble ? std::numeric_limits<double>::min() : std::ldexp(1.0, type == at::kHalf ? -14 : -126);
}

/// Beyond it a number may be infinite: the type's largest, or what overflows float32 on the way, before a weight or a scale below
/// 1 has come.
inline double largest(at::ScalarType type) { return type == at::kHalf ? 65504 : std::ldexp(1.0, 120); }

/// What one rounding in the arithmetic of a loss may cost, relatively. The equations are computed in float64: beside a loss in
/// that type their own errors are as large.
inline double arithmetic_step(at::ScalarType type) { return (type == at::kDouble ? 2 : 1) * epsilon(arithmetic(type)); }

/// Three tensors of one shape: float64, float64, bool.
struct Expected {
  at::Tensor value, tolerance, is_known;

  Expected() = default;
  explicit Expected(const at::Tensor& value_)
      : Expected(value_, at::zeros_like(value_), at::ones_like(value_, at::kBool)) {}
  Expected(at::Tensor value_, at::Tensor tolerance_) : Expected(value_, tolerance_, at::ones_like(value_, at::kBool)) {}
  Expected(at::Tensor value_, at::Tensor tolerance_, at::Tensor is_known_)
      : value(std::move(value_)), tolerance(std::move(tolerance_)), is_known(std::move(is_known_)) {}

  Expected times(const at::Tensor& factor) const {
    return {value * factor, tolerance * factor.abs(), is_known.expand_as(value * factor)};
  }
  Expected times(double factor) const { return {value * factor, tolerance * std::abs(factor), is_known}; }
  Expected plus(const Expected& other) const {
    return {value + other.value, tolerance + other.tolerance, is_known & other.is_known};
  }
  Expected known_where(const at::Tensor& condition) const { return {value, tolerance, is_known & condition}; }

  /// Exactly 0 elsewhere.
  Expected only(const at::Tensor& condition) const {
    const at::Tensor not_here = condition.logical_not();
    return {value.masked_fill(not_here, 0), tolerance.masked_fill(not_here, 0), is_known | not_here};
  }

  /// Added up in float64 in any order.
  Expected sum(bool of_rows = false) const {
    const double rounding = 64 * epsilon(at::kDouble);
    if (of_rows) return {value.sum(-1), tolerance.sum(-1) + rounding * value.abs().sum(-1), is_known.all(-1)};
    return {value.sum(), tolerance.sum() + rounding * value.abs().sum(), is_known.all()};
  }
  Expected reshape(at::IntArrayRef sizes) const {
    return {value.reshape(sizes), tolerance.reshape(sizes), is_known.reshape(sizes)};
  }
};

/// Aborts unless `found` is what is expected, rounded so many times to its type, last after a factor of at most `growth`.
inline void check(const std::string& what, const at::Tensor& found, const Expected& expected, double roundings = 1,
                  double growth = 1) {
  if (!found.defined()) fail(what + ": undefined");
  const auto type = found.scalar_type();
  if (found.sizes() != expected.value.sizes()) {
    fail(what + ": shape " + c10::str(found.sizes()) + " where " + c10::str(expected.value.sizes()) + " is expected");
  }
  const at::Tensor numbers = found.detach().to(at::kDouble), &value = expected.value;
  const at::Tensor tolerance =
      expected.tolerance + roundings * (value.abs() * (epsilon(type) / 2) + growth * smallest(type) * epsilon(type));
  const at::Tensor is_beyond_type =
      ((value.abs() + tolerance >= largest(type)) & (numbers * value == infinity)) |
      ((tolerance >= largest(type)) & (numbers.abs() == infinity));  // of a sign that nothing is known of
  const at::Tensor is_right = (numbers == value) | ((numbers - value).abs() <= tolerance) |
                              (numbers.isnan() & value.isnan()) | is_beyond_type | expected.is_known.logical_not();
  if (is_right.all().item<bool>()) return;
  const auto wrong = is_right.reshape({-1}).logical_not().nonzero()[0].item<int64_t>();
  const auto of = [&](const at::Tensor& all) { return all.reshape({-1})[wrong].item<double>(); };
  char text[200];
  std::snprintf(text, sizeof(text), ": %.17g at %ld where %.17g is expected, at most %.3g off", of(numbers),
                static_cast<long>(wrong), of(value), of(tolerance));
  fail(what + text);
}

}  // namespace fuzz
