/// log(1 + x) on vectors of float32, for x from 0 to 2^127, which no sum of exponentials reaches. Worst error 2 ulp.
#pragma once

#include <cstdint>
#include <cstring>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// 1 + x = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2); log(1 + f) = f - f^2/2 + f^3 times a polynomial that is fitted by
/// tests/reference/fit_polynomials.py. What 1 + x loses of x is brought back; for n = 0, f is x itself, so that a small x
/// keeps its digits. Infinity and NaN stay what they are; below 0 lie only rounding errors of sums, which are small.
template <int lanes>
[[gnu::always_inline]] inline void logarithm_of_one_plus(Lanes<lanes>& x) {
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
  using Values = typename Lanes<lanes>::Values;
  using Integers = typename Lanes<lanes>::Integers;
  const Values one = Values{} + 1.0f;
  const Values sum = x.values + one;
  Integers bits;
  std::memcpy(&bits, &sum, sizeof(bits));
  const Integers exponent =
      (bits - 0x3f3504f3) >> 23;  // of 2^n, as the bits of sqrt(1/2) are the smallest of a mantissa
  bits -= exponent << 23;
  Values mantissa;
  std::memcpy(&mantissa, &bits, sizeof(mantissa));
  const Integers scale_bits = (127 - exponent) << 23;
  Values scale;  // 2^-n
  std::memcpy(&scale, &scale_bits, sizeof(scale));
  const Values lost = x.values < 1.0f ? x.values - (sum - one) : one - (sum - x.values);
  const Values f = exponent == 0 ? x.values : (mantissa - one) + lost * scale;
  const Values n = __builtin_convertvector(exponent, Values);
  const Values square = f * f;
  Values power = square * (f * -7.902743667e-02f + 1.262231916e-01f) + (f * -1.299818307e-01f + 1.421449631e-01f);
  power = power * square + (f * -1.664128155e-01f + 2.000104487e-01f);
  power = power * square + (f * -2.500030696e-01f + 3.333333135e-01f);
  const Values result = n * 0.693359375f + (f + (square * f * power - square * 0.5f - n * 2.12194440e-4f));
  x.values = sum < 3.0e38f ? result : sum;  // which leaves a NaN and infinity
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
