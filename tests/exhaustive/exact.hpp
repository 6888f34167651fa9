/// The functions that the kernels compute, from their equations: in float64, which decides nearly all numbers, and in long
/// double for those that come near the worst. How far one is from the other is tried on the way.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

namespace exhaustive {

/// KL(Bernoulli(sigmoid(x)) || Bernoulli(1/2)) for x >= 0. With u = x/2 it is u tanh u - log cosh u, in two forms that each
/// lose at most a factor of 3 to cancellation on its side of u = 1: with a tanh of 2 steps and a log1p of 1, less than 20
/// steps in all.
template <typename Number>
Number kl(Number x) {
  const Number u = x / 2;
  if (u < 1) {
    const Number t = std::tanh(u);
    return u * t + std::log1p(-t * t) / 2;
  }
  const Number s = std::exp(-x);
  const Number entropy = s > 0 ? x * s / (1 + s) + std::log1p(s) : 0;
  return std::log(Number{2}) - entropy;
}

/// Its derivative x sigmoid(x) sigmoid(-x).
template <typename Number>
Number kl_derivative(Number x) {
  const Number s = std::exp(-x);
  return s > 0 ? x * s / ((1 + s) * (1 + s)) : 0;
}

/// exp(-x), and 0 where the kernel leaves the normal numbers.
template <typename Number>
Number exponential(Number x) {
  return x > 87 ? 0 : std::exp(-x);
}

template <typename Number>
Number logarithm_of_one_plus(Number x) {
  return std::log1p(x);
}

/// Steps of a type of so many fraction bits that `value` is one of; `smallest_exponent` is that of its normal numbers.
template <typename Number>
Number steps_in_one(Number value, int fraction_bits, int smallest_exponent) {
  const int exponent = value > 0 ? std::max(std::ilogb(value), smallest_exponent) : smallest_exponent;
  return std::ldexp(Number{1}, fraction_bits - exponent);
}

/// 20 steps of float64 are 4e-8 of float32.
inline constexpr double reference_error_in_ulp = 1e-7;

struct Known {
  long double x, kl, derivative;
};

/// x in float32, and the equations p log 2p + q log 2q and x p q with p = 1/(1 + exp(-x)), q = 1/(1 + exp(x)) in mpmath with
/// 120 digits.
inline constexpr Known known[] = {
    {1.0000000031710769e-30L, 1.250000007927692139997289e-61L, 2.500000007927692127427628e-31L},
    {9.999999747378752e-05L, 1.249999935282188866230937e-9L, 0.00002499999930594688392969357L},
    {0.75L, 0.06566019882659009561715194L, 0.1634212453213605221101879L},
    {1.9999998807907104L, 0.3278133004403158640992192L, 0.2099871773553476103510372L},
    {2.0L, 0.3278133254727377010929636L, 0.2099871708070130346972484L},
    {3.5L, 0.5608039546575776281939075L, 0.09958558357907445943890739L},
    {4.0L, 0.6030524127937693369550763L, 0.07065082485316446568624766L},
    {9.25L, 0.6921621261829426908307188L, 0.0008888619133831843161959468L},
    {30.0L, 0.6931471805570444462968919L, 2.807286890651526990828988e-12L},
    {87.5L, 0.6931471805599453094172321L, 8.734557064248091611486878e-37L},
    {104.0L, 0.6931471805599453094172321L, 7.086099094407110453954914e-44L},
};

/// Whether the equations above are those of mpmath to 16 digits (x is rounded to as many, whose share a derivative sees
/// x times as large).
inline bool equations_hold() {
  return std::all_of(std::begin(known), std::end(known), [](const Known& of) {
    const auto x = static_cast<long double>(static_cast<float>(of.x));
    return std::abs(kl(x) - of.kl) <= 1e-16L * of.kl &&
           std::abs(kl_derivative(x) - of.derivative) <= 1e-16L * of.derivative;
  });
}

}  // namespace exhaustive
