/// exp and tanh on vectors, for the losses' kernels.
#pragma once

#include <cstdint>
#include <cstring>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/lanes.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// x = n log 2 + r with |r| <= log(2)/2 becomes exp(r), 1 + r + r^2 times a polynomial that is fitted to the equation
/// in 50 digits by tests/reference/fit_polynomials.py (relative error 8e-9, in all 1.2 ulp), and `scale` 2^(n + more),
/// with n + more in [-126, 127]. The product is rounded by adding 1.5 2^23, whose last digit counts ones; with 127 +
/// more added to it, the last bits of the sum are the exponent of `scale`. (x + c) - c must not become x: clang defines no
/// macro of -fassociative-math, which `compilation.hpp` could see, but can be told here.
template <int lanes, int more>
[[gnu::always_inline]] inline void split_exponential(Lanes<float, lanes>& x, Lanes<float, lanes>& scale) {
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
  using Values = typename Lanes<float, lanes>::Values;
  constexpr float round = 12582912.0f + 127.0f + more;
  const Values shifted = x.values * 1.44269504f + round;
  const Values n = shifted - round;
  Values r = x.values - n * 0.693359375f;  // log 2 in two parts: n times the first is exact
  r = r + n * 2.12194440e-4f;
  const Values square = r * r;  // in pairs of terms: a chain of products would keep the next vector waiting
  Values power = square * 1.390128513e-03f + (r * 8.363140747e-03f + 4.166685417e-02f);
  power = power * square + (r * 1.666657776e-01f + 0.5f);
  x.values = power * square + r + 1.0f;
  typename Lanes<float, lanes>::Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  std::memcpy(&scale.values, &bits, sizeof(bits));
}

/// exp(x) for x <= 0, float32: 0 below -87, where the result would leave the normal numbers; exp(-inf) = 0; NaN stays
/// NaN, as 2^n is a product: adding n to the exponent could make a number of a NaN.
template <int lanes>
[[gnu::always_inline]] inline void exponentiate(Lanes<float, lanes>& x) {
  Lanes<float, lanes> result = x, scale;
  split_exponential<lanes, 0>(result, scale);
  result.values *= scale.values;
  typename Lanes<float, lanes>::Integers bits;
  std::memcpy(&bits, &result.values, sizeof(bits));
  bits &= ~(x.values < -87.0f);
  std::memcpy(&x.values, &bits, sizeof(bits));
}

/// The same for float64: the series to r^13 (remainder 4e-18), 0 below -708.
template <int lanes>
[[gnu::always_inline]] inline void exponentiate(Lanes<double, lanes>& x) {
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
  using Values = typename Lanes<double, lanes>::Values;
  using Integers = typename Lanes<double, lanes>::Integers;
  constexpr double round = 6755399441055744.0 + 1023.0;
  const Values shifted = x.values * 1.4426950408889634 + round;
  const Values n = shifted - round;
  Values r = x.values - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Values power = r * (1.0 / 6227020800) + 1.0 / 479001600;
  power = power * r + 1.0 / 39916800;
  power = power * r + 1.0 / 3628800;
  power = power * r + 1.0 / 362880;
  power = power * r + 1.0 / 40320;
  power = power * r + 1.0 / 5040;
  power = power * r + 1.0 / 720;
  power = power * r + 1.0 / 120;
  power = power * r + 1.0 / 24;
  power = power * r + 1.0 / 6;
  power = power * r + 0.5;
  power = power * (r * r) + r + 1.0;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 52;
  Values scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  power *= scale;
  std::memcpy(&bits, &power, sizeof(bits));
  bits &= ~(x.values < -708.0);
  std::memcpy(&x.values, &bits, sizeof(bits));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
