/// What is expected of a number, and how far off it may be.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tensors.hpp"

namespace fuzz {

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::abort();
}

inline Real epsilon(at::ScalarType type) {
  const int bits = type == at::kDouble ? 52 : type == at::kFloat ? 23 : type == at::kHalf ? 10 : 7;
  return std::ldexp(Real{1}, -bits);
}

inline at::ScalarType arithmetic(at::ScalarType type) { return type == at::kDouble ? type : at::kFloat; }

/// Half the distance between neighbours of the type around a value.
inline Real half_step(Real value, at::ScalarType type) {
  const int smallest = type == at::kDouble ? -1022 : type == at::kHalf ? -14 : -126;
  const int exponent = std::abs(value) > 0 ? std::max(std::ilogb(value), smallest) : smallest;
  return std::ldexp(epsilon(type), exponent) / 2;
}

inline Real largest(at::ScalarType type) {
  return type == at::kHalf ? 65504 : type == at::kDouble ? std::numeric_limits<double>::max() : 3.4e38L;
}

struct Expected {
  Real value = 0, tolerance = 0;
  bool is_known = true;

  void add(const Expected& other) {
    value += other.value;
    tolerance += other.tolerance;
    is_known = is_known && other.is_known;
  }
  Expected times(Real factor) const { return {value * factor, tolerance * std::abs(factor), is_known}; }
};

using AllExpected = std::vector<Expected>;

/// `roundings` to the type of `found`, each of a value that is not larger than the expected one times `growth`.
inline void check(const char* what, const at::Tensor& found, const AllExpected& expected, Real roundings = 1) {
  const auto type = found.scalar_type();
  const Reals numbers = reals(found);
  if (numbers.size() != expected.size()) fail(std::string(what) + ": another number of values");
  for (size_t i = 0; i < numbers.size(); ++i) {
    if (!expected[i].is_known) continue;
    const Real value = expected[i].value, number = numbers[i];
    if (std::isnan(value) ? std::isnan(number) : number == value) continue;
    const Real tolerance = expected[i].tolerance + roundings * half_step(value, type);
    if (std::abs(number - value) <= tolerance) continue;
    if (std::abs(value) + tolerance >= largest(type) && std::isinf(number)) continue;
    char text[300];
    std::snprintf(text, sizeof(text), "%s: %.10Lg at %zu where %.10Lg is expected, at most %.3Lg off", what, number, i,
                  value, tolerance);
    fail(text);
  }
}

/// The gradient of a buffer from that of its view: elements that overlap add up, and LibTorch rounds each sum.
inline AllExpected of_buffer(const AllExpected& of_view, const Geometry& geometry, at::ScalarType type) {
  AllExpected result(static_cast<size_t>(geometry.buffer_size));
  std::vector<Real> magnitude(result.size()), terms(result.size());
  const auto places = geometry.places();
  for (size_t i = 0; i < of_view.size(); ++i) {
    const auto place = static_cast<size_t>(places[i]);
    result[place].add(of_view[i]);
    magnitude[place] += std::abs(of_view[i].value);
    terms[place] += 1;
  }
  for (size_t place = 0; place < result.size(); ++place) {
    if (terms[place] > 1) result[place].tolerance += 2 * terms[place] * half_step(magnitude[place], type);
  }
  return result;
}

}  // namespace fuzz
