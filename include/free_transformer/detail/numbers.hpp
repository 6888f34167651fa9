/// Questions about a number that are answered from its bits: comparisons lie under -ffast-math, which lets the compiler
/// assume that no number is a NaN or infinite.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline constexpr uint64_t bits_of_infinity = 0x7ff0000000000000;

inline uint64_t bits_without_sign(double number) {
  uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(bits));
  return bits & 0x7fffffffffffffff;
}

inline bool is_finite(double number) { return bits_without_sign(number) < bits_of_infinity; }
inline bool is_nan(double number) { return bits_without_sign(number) > bits_of_infinity; }
inline bool is_zero(double number) { return bits_without_sign(number) == 0; }

/// For numbers that may come from a caller, before they are rounded to bfloat16, which looks at a NaN's upper half alone.
inline double without_payload(double number) {
  return is_nan(number) ? std::numeric_limits<double>::quiet_NaN() : number;
}

/// True for a number that multiplies nothing.
inline bool is_one(double number) {
  const double one = 1;
  return std::memcmp(&number, &one, sizeof(one)) == 0;  // NOLINT(bugprone-suspicious-memory-comparison)
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
