/// What the test files measure with: the steps of each type, finite differences, equal bits, the text of an error.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "../reference/references.hpp"
#include "catch.hpp"
#include "free_transformer/reduction.hpp"
#include "test_device.hpp"

namespace numeric {

using torch::Tensor;

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

inline constexpr torch::ScalarType all_types[] = {torch::kDouble, torch::kFloat, torch::kHalf, torch::kBFloat16};

inline const free_transformer::Reduction all_reductions[] = {torch::kMean, torch::kSum, torch::kNone};

/// Distance from 1 to the next number.
inline double epsilon(torch::ScalarType type) {
  const int fraction_bits = type == torch::kDouble ? 52 : type == torch::kFloat ? 23 : type == torch::kHalf ? 10 : 7;
  return std::ldexp(1.0, -fraction_bits);
}

/// The type that half types are computed in, and that reduced losses come in.
inline torch::ScalarType arithmetic(torch::ScalarType type) { return type == torch::kDouble ? type : torch::kFloat; }

/// Half the distance between neighbours of the type around a value: what rounding to it may cost.
inline double half_step(double value, torch::ScalarType type) {
  const int smallest_exponent = type == torch::kDouble ? -1022 : type == torch::kHalf ? -14 : -126;
  const int exponent = value == 0 ? smallest_exponent : std::max(std::ilogb(value), smallest_exponent);
  return std::ldexp(epsilon(type), exponent) / 2;
}

inline bool holds(torch::ScalarType type, reference::Exact exact) {
  return exact == reference::Exact::in_half || type == torch::kDouble ||
         (type == torch::kFloat && exact == reference::Exact::in_float32);
}

inline Tensor tensor(const std::vector<double>& values, torch::IntArrayRef shape,
                     torch::ScalarType type = torch::kDouble) {
  return torch::tensor(values, torch::kDouble).reshape(shape).to(type);
}

inline Tensor tensor(const std::vector<int64_t>& values, torch::IntArrayRef shape) {
  return torch::tensor(values, torch::kLong).reshape(shape);
}

inline Tensor indices(const std::vector<int64_t>& values) {
  return tensor(values, {static_cast<int64_t>(values.size())});
}

/// A copy whose last dimension is not contiguous: it goes the way of LibTorch operations.
inline Tensor with_strided_rows(const Tensor& values) { return torch::stack({values, values}, -1).select(-1, 1); }

inline Tensor leaf(const Tensor& values) { return values.detach().requires_grad_(); }

/// Logits or an upstream gradient, the same each time: multiples of 1/8 in [-8, 8), exact in every type.
inline Tensor eighths(torch::IntArrayRef shape, torch::ScalarType type = torch::kDouble, int64_t seed = 1) {
  const Tensor index = torch::arange(c10::multiply_integers(shape), torch::kLong) + seed * 7919;
  return (index * 2654435761 % 127 - index % 3)
      .remainder(128)
      .sub(64)
      .to(torch::kDouble)
      .div(8)
      .reshape(shape)
      .to(type);
}

inline std::vector<double> values(const Tensor& actual) {
  const Tensor wide = actual.detach().to(torch::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}

/// Empty if every |actual - expected| is at most `relative` (|expected| + also) and half a step of the type of `actual`
/// for each rounding to it (two if `expected` was rounded, too); else the first element that is further off.
inline std::string difference(const Tensor& actual, const std::vector<double>& expected, double relative,
                              double also = 0, int roundings = 1) {
  const auto found = values(actual);
  std::ostringstream text;
  text.precision(17);
  if (found.size() != expected.size()) {
    text << found.size() << " values where " << expected.size() << " are expected";
    return text.str();
  }
  for (size_t index = 0; index < found.size(); ++index) {
    const double tolerance =
        relative * (std::abs(expected[index]) + also) + roundings * half_step(expected[index], actual.scalar_type());
    if (found[index] == expected[index] || std::abs(found[index] - expected[index]) <= tolerance) continue;
    text << found[index] << " at " << index << " where " << expected[index] << " is expected, " << tolerance
         << " at most off";
    return text.str();
  }
  return {};
}

inline std::string difference(const Tensor& actual, const Tensor& expected, double relative, double also = 0,
                              int roundings = 1) {
  return difference(actual, values(expected), relative, also, roundings);
}

/// How many numbers are further off than those of eager LibTorch in the same type by more than half a step of the half
/// type that they come from; a NaN is.
inline int64_t worse_than_eager(const Tensor& actual, const Tensor& of_eager, const Tensor& expected,
                                torch::ScalarType half_type) {
  const auto found = values(actual), eager = values(of_eager.to(actual.scalar_type())), exact = values(expected);
  int64_t worse = 0;
  for (size_t index = 0; index < exact.size(); ++index) {
    const double allowed = std::abs(eager[index] - exact[index]) + half_step(exact[index], half_type);
    if (!(std::abs(found[index] - exact[index]) <= allowed)) ++worse;
  }
  return worse;
}

inline bool same_bits(const Tensor& left, const Tensor& right) {
  const Tensor a = left.detach().contiguous(), b = right.detach().contiguous();
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.numel() == 0 || std::memcmp(a.data_ptr(), b.data_ptr(), a.nbytes()) == 0);
}

inline Tensor gradient(const Tensor& loss, const Tensor& input, const Tensor& upstream = {},
                       bool create_graph = false) {
  return torch::autograd::grad({loss}, {input}, {upstream}, /*retain_graph=*/true, create_graph)[0];
}

/// Gradient of a scalar function at x (float64) by five points. With steps h = 1/256 the error is h^4/30 |f^(5)|, 1e-9
/// for a fifth derivative of 100, and the rounding of values near 10 adds 1e-15/h < 1e-12.
inline Tensor five_point_gradient(const std::function<double(const Tensor&)>& function, const Tensor& x) {
  constexpr double step = 1.0 / 256;
  Tensor result = torch::zeros(x.sizes(), torch::kDouble);
  const Tensor point = x.detach().clone(torch::MemoryFormat::Contiguous);
  for (int64_t index = 0; index < x.numel(); ++index) {
    double& element = point.data_ptr<double>()[index];
    const double center = element;
    const auto at = [&](double offset) {
      element = center + offset;
      return function(point);
    };
    const double slope = (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
    element = center;
    result.data_ptr<double>()[index] = slope;
  }
  return result;
}

/// Both orders of the gradient of a scalar-valued loss against finite differences: the second through d/dx (dL/dx . v).
inline void check_gradients(const std::function<Tensor(const Tensor&)>& loss, const Tensor& at) {
  const Tensor x = leaf(at);
  const Tensor direction = eighths(at.sizes(), torch::kDouble, 3) / 8;
  const Tensor first = gradient(loss(x), x, {}, /*create_graph=*/true);
  const auto value = [&](const Tensor& point) { return loss(point).item<double>(); };
  const auto slope = [&](const Tensor& point) {
    const Tensor input = leaf(point);
    return (gradient(loss(input), input) * direction).sum().item<double>();
  };
  CHECK(difference(gradient(loss(x), x), five_point_gradient(value, at), 1e-9, 1) == "");
  CHECK(difference(first, gradient(loss(x), x), 1e-14, 1) == "");
  CHECK(difference(gradient((first * direction).sum(), x), five_point_gradient(slope, at), 1e-9, 1) == "");
}

/// What the error says; empty if there is none.
template <typename Function>
std::string error_of(const Function& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return {};
}

/// What an error says behind the name of the function that refuses, with which it must begin.
inline std::string after_name(const std::string& name, const std::string& error) {
  const std::string front = name + ": ";
  CHECK(error.substr(0, front.size()) == front);
  return error.substr(std::min(error.size(), front.size()));
}

/// The result of a function while ATen may use so many threads.
template <typename Function>
auto with_threads(int threads, const Function& function) {
  const int before = torch::get_num_threads();
  torch::set_num_threads(threads);
  auto result = function();
  torch::set_num_threads(before);
  return result;
}

}  // namespace numeric
