/// exp on vectors of float32. Worst error 1.2 ulp over the whole range.
#pragma once

#include <cstdint>
#include <cstring>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// 2^more exp(x). With x = n log 2 + r and |r| <= log(2)/2 that is 2^(n + more) (1 + r + r^2 times a polynomial that is
/// fitted to the equation in 50 digits by tests/reference/fit_polynomials.py: relative error 8e-9, in all 1.2 ulp), for
/// n + more in [-126, 127]. x/log 2 is rounded by adding 1.5 2^23, whose last digit counts ones; with 127 + more added to
/// it, the last bits of the sum are the exponent of the power of two. (x + c) - c must not become x: clang defines no
/// macro of -fassociative-math, which `compilation.hpp` could see, but can be told here.
template <int lanes, int more>
[[gnu::always_inline]] inline void scaled_exponential(Lanes<lanes>& x) {
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
  using Values = typename Lanes<lanes>::Values;
  constexpr float round = 12582912.0f + 127.0f + more;
  const Values shifted = x.values * 1.44269504f + round;
  const Values n = shifted - round;
  Values r = x.values - n * 0.693359375f;  // log 2 in two parts: n times the first is exact
  r = r + n * 2.12194440e-4f;
  const Values square = r * r;  // in pairs of terms: a chain of products would keep the next vector waiting
  Values power = square * 1.390128513e-03f + (r * 8.363140747e-03f + 4.166685417e-02f);
  power = power * square + (r * 1.666657776e-01f + 0.5f);
  typename Lanes<lanes>::Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits <<= 23;
  Values scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  x.values = (power * square + r) * scale + scale;
}

/// exp(x) for x <= 0: 0 below -87, where the result would leave the normal numbers; exp(-inf) = 0; NaN stays NaN, as 2^n
/// is a product: adding n to the exponent could make a number of a NaN.
template <int lanes>
[[gnu::always_inline]] inline void exponentiate(Lanes<lanes>& x) {
  Lanes<lanes> result = x;
  scaled_exponential<lanes, 0>(result);
  typename Lanes<lanes>::Integers bits;
  std::memcpy(&bits, &result.values, sizeof(bits));
  bits &= ~(x.values < -87.0f);
  std::memcpy(&x.values, &bits, sizeof(bits));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
