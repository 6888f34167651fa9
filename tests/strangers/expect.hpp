/// What a program promises itself, counted. Numbers are compared inside LibTorch: a program that is compiled with -ffast-math
/// does not see a NaN.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <iostream>
#include <string>

inline int& failures() {
  static int count = 0;
  return count;
}

inline void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures();
  std::cout << "failed: " << what << std::endl;
}

/// Half the distance from 1 to the next number of a type: the most that a rounding is off.
inline double rounding_of(at::ScalarType type) {
  const int bits = type == at::kDouble ? 53 : type == at::kHalf ? 11 : type == at::kBFloat16 ? 8 : 24;
  return std::ldexp(1.0, -bits);
}

/// Sixteen roundings of the largest number, or of what is added up to it: an exponential, a logarithm, a pairwise sum, a
/// product or two. A NaN is close to nothing.
inline void expect_close(const at::Tensor& found, const at::Tensor& expected, const std::string& what,
                         const at::Tensor& of = {}) {
  if (!found.defined() || found.sizes() != expected.sizes()) return expect(false, what + ": another shape, or nothing");
  const at::Tensor largest = (of.defined() ? of : expected).detach().to(at::kDouble).abs().max();
  const at::Tensor error = (found.detach().to(at::kDouble) - expected.detach().to(at::kDouble)).abs().max();
  const at::Tensor bound = largest * (16 * rounding_of(found.scalar_type()));
  expect((error <= bound).item<bool>(), what + ": off by " + std::to_string(error.item<double>()) + ", may be off by " +
                                            std::to_string(bound.item<double>()));
}

/// The program's exit status.
inline int verdict(const std::string& program) {
  std::cout << program << ": " << failures() << " failures" << std::endl;
  return failures() == 0 ? 0 : 1;
}
