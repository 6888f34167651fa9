/// Vectors of numbers on GCC's and Clang's vector types: loads and stores of each element type, tails, sums and maxima.
///
/// Everything is inlined into an entry function that carries the instruction set (`__attribute__((target(...)))`), so
/// that no copy compiled for a richer set can be linked in for a poorer processor. Vectors travel inside a struct:
/// passed bare they would warn of an ABI that depends on the instruction set.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

template <typename Real, int lanes>
struct Lanes {
  using Integer = std::conditional_t<sizeof(Real) == 4, int32_t, int64_t>;
  typedef Real Values __attribute__((vector_size(sizeof(Real) * lanes)));
  typedef Integer Integers __attribute__((vector_size(sizeof(Real) * lanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
  Values values;
};

/// All lanes the same number.
template <typename Real, int lanes>
[[gnu::always_inline]] inline Lanes<Real, lanes> broadcast(Real value) {
  return {typename Lanes<Real, lanes>::Values{} + value};
}

/// float32 and float64 are loaded as they are; half types become float32.
template <int lanes, typename Real>
[[gnu::always_inline]] inline void load(const Real* source, Lanes<Real, lanes>& result) {
  std::memcpy(&result.values, source, sizeof(result.values));
}

/// Sixteen bits of each lane as the upper half of thirty-two. As a shuffle it is two instructions with AVX2, and one
/// with AVX-512; g++ 12 makes five of the obvious conversion, but many more of the shuffle for the short vectors of the
/// baseline.
template <int lanes, int... halves>
[[gnu::always_inline]] inline void load_upper_halves(const void* source, typename Lanes<float, lanes>::Integers& bits,
                                                     std::integer_sequence<int, halves...>) {
  using Type = Lanes<float, lanes>;
  typename Type::Halves loaded;
  std::memcpy(&loaded, source, sizeof(loaded));
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  if constexpr (lanes > 4) {
    const auto shuffled =
        __builtin_shufflevector(typename Type::Halves{}, loaded, (halves % 2 == 0 ? 0 : lanes + halves / 2)...);
    std::memcpy(&bits, &shuffled, sizeof(bits));
    return;
  }
#endif
#endif
  bits = __builtin_convertvector(loaded, typename Type::Integers) << 16;
}

template <int lanes>
[[gnu::always_inline]] inline void load_upper_halves(const void* source, typename Lanes<float, lanes>::Integers& bits) {
  load_upper_halves<lanes>(source, bits, std::make_integer_sequence<int, 2 * lanes>{});
}

template <int lanes>
[[gnu::always_inline]] inline void load(const c10::BFloat16* source, Lanes<float, lanes>& result) {
  typename Lanes<float, lanes>::Integers bits;
  load_upper_halves<lanes>(source, bits);
  std::memcpy(&result.values, &bits, sizeof(bits));
}

/// The exponent is moved from bias 15 to bias 127. A subnormal number is put behind the point of 2^-14, which is then taken
/// away: no number on the way is subnormal in float32, so flush-to-zero changes nothing.
template <int lanes>
[[gnu::always_inline]] inline void load(const c10::Half* source, Lanes<float, lanes>& result) {
  using Type = Lanes<float, lanes>;
  using Integers = typename Type::Integers;
  Integers bits;
  load_upper_halves<lanes>(source, bits);
  const Integers magnitude = bits & 0x7fff0000, shifted = (magnitude >> 3) + 0x38000000;
  const Integers is_small = magnitude < 0x04000000, is_not_finite = magnitude >= 0x7c000000;
  const Integers with_point = shifted + 0x00800000;
  typename Type::Values small;
  std::memcpy(&small, &with_point, sizeof(small));
  small -= 0x1p-14f;
  Integers converted;
  std::memcpy(&converted, &small, sizeof(converted));
  converted = (is_small & converted) | (~is_small & shifted);
  converted |= (is_not_finite & 0x7f800000) | (bits & static_cast<int32_t>(0x80000000u));
  std::memcpy(&result.values, &converted, sizeof(converted));
}

/// Two vectors of elements that lie behind each other, in any order.
template <int lanes, typename Element, typename Real>
[[gnu::always_inline]] inline void load_unordered(const Element* source, Lanes<Real, lanes> (&results)[2]) {
  load<lanes>(source, results[0]);
  load<lanes>(source + lanes, results[1]);
}

/// Every other element, and those between, which takes half the instructions.
template <int lanes>
[[gnu::always_inline]] inline void load_unordered(const c10::BFloat16* source, Lanes<float, lanes> (&results)[2]) {
  typename Lanes<float, lanes>::Integers words;
  std::memcpy(&words, source, sizeof(words));
  const typename Lanes<float, lanes>::Integers bits[2] = {words << 16, words & static_cast<int32_t>(0xffff0000u)};
  for (int k = 0; k < 2; ++k) std::memcpy(&results[k].values, &bits[k], sizeof(bits[k]));
}

template <int lanes, typename Real>
[[gnu::always_inline]] inline void store(const Lanes<Real, lanes>& values, Real* target) {
  std::memcpy(target, &values.values, sizeof(values.values));
}

/// The bits of bfloat16 in the upper halves, rounded to nearest, ties to even. A NaN stays one if its lower half is 0,
/// as that of every NaN is that comes from a half type or from an operation; see `without_payload`.
template <int lanes>
[[gnu::always_inline]] inline void round_to_upper_halves(const Lanes<float, lanes>& values,
                                                         typename Lanes<float, lanes>::Integers& bits) {
  std::memcpy(&bits, &values.values, sizeof(bits));
  bits += 0x7fff + ((bits >> 16) & 1);
}

/// For numbers that may come from a caller, before they are stored as bfloat16.
inline double without_payload(double value) {
  return std::isnan(value) ? std::numeric_limits<double>::quiet_NaN() : value;
}

template <int lanes>
[[gnu::always_inline]] inline void store(const Lanes<float, lanes>& values, c10::BFloat16* target) {
  using Type = Lanes<float, lanes>;
  typename Type::Integers bits;
  round_to_upper_halves<lanes>(values, bits);
  const typename Type::Halves halves = __builtin_convertvector(bits >> 16, typename Type::Halves);
  std::memcpy(target, &halves, sizeof(halves));
}

/// Two vectors one behind the other.
template <int lanes, typename Real, typename Element>
[[gnu::always_inline]] inline void store_pair(const Lanes<Real, lanes> (&values)[2], Element* target) {
  store<lanes>(values[0], target);
  store<lanes>(values[1], target + lanes);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
template <int lanes, int... halves>
[[gnu::always_inline]] inline void store_upper_halves(const Lanes<float, lanes> (&values)[2], void* target,
                                                      std::integer_sequence<int, halves...>) {
  typename Lanes<float, 2 * lanes>::Halves wide[2];
  for (int k = 0; k < 2; ++k) {
    typename Lanes<float, lanes>::Integers bits;
    round_to_upper_halves<lanes>(values[k], bits);
    std::memcpy(&wide[k], &bits, sizeof(bits));
  }
  const auto packed = __builtin_shufflevector(wide[0], wide[1], (2 * halves + 1)...);
  std::memcpy(target, &packed, sizeof(packed));
}

/// Packed into one vector, which takes half the instructions.
template <int lanes>
[[gnu::always_inline]] inline void store_pair(const Lanes<float, lanes> (&values)[2], c10::BFloat16* target) {
  store_upper_halves<lanes>(values, target, std::make_integer_sequence<int, 2 * lanes>{});
}
#endif
#endif

/// Rounds to nearest, ties to even; too large becomes infinite, a NaN stays one.
template <int lanes>
[[gnu::always_inline]] inline void store(const Lanes<float, lanes>& values, c10::Half* target) {
  using Type = Lanes<float, lanes>;
  using Integers = typename Type::Integers;
  Integers bits;
  std::memcpy(&bits, &values.values, sizeof(bits));
  const Integers magnitude = bits & 0x7fffffff;
  // Subnormal: adding 1/2 puts the last bit of a half at the last bit of the sum, and the processor rounds there.
  typename Type::Values small;
  std::memcpy(&small, &magnitude, sizeof(small));
  small += 0.5f;
  Integers small_bits;
  std::memcpy(&small_bits, &small, sizeof(small_bits));
  const Integers subnormal = small_bits - 0x3f000000;
  const Integers normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Integers is_small = magnitude < 0x38800000;
  const Integers is_large = magnitude >= 0x477ff000;
  const Integers is_nan = magnitude > 0x7f800000;
  Integers result = (is_small & subnormal) | (~is_small & normal);
  result = (is_large & 0x7c00) | (~is_large & result) | (is_nan & 0x200) | ((bits >> 16) & 0x8000);
  const typename Type::Halves halves = __builtin_convertvector(result & 0xffff, typename Type::Halves);
  std::memcpy(target, &halves, sizeof(halves));
}

/// The first `count` elements, and `filler` in the other lanes: nothing behind the end of a row is read.
template <int lanes, typename Element, typename Real>
[[gnu::always_inline]] inline void load_part(const Element* source, int64_t count, Element filler,
                                             Lanes<Real, lanes>& result) {
  Element part[size_t{lanes}];
  for (int lane = 0; lane < lanes; ++lane) part[lane] = filler;
  std::memcpy(part, source, sizeof(Element) * static_cast<size_t>(count));
  load<lanes>(part, result);
}

template <int lanes, typename Element, typename Real>
[[gnu::always_inline]] inline void store_part(const Lanes<Real, lanes>& values, int64_t count, Element* target) {
  Element part[size_t{lanes}];
  store<lanes>(values, part);
  std::memcpy(target, part, sizeof(Element) * static_cast<size_t>(count));
}

/// The larger of each lane; a NaN in `values` is passed over.
template <typename Real, int lanes>
[[gnu::always_inline]] inline void take_larger(Lanes<Real, lanes>& largest, const Lanes<Real, lanes>& values) {
  largest.values = values.values > largest.values ? values.values : largest.values;
}

template <typename Real, int lanes>
[[gnu::always_inline]] inline Real largest_lane(const Lanes<Real, lanes>& values) {
  Real part[size_t{lanes}];
  std::memcpy(part, &values.values, sizeof(part));
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane)
      part[lane] = part[lane + width] > part[lane] ? part[lane + width] : part[lane];
  }
  return part[0];
}

/// Pairwise sum of the lanes.
template <typename Real, int lanes>
[[gnu::always_inline]] inline Real sum_of_lanes(const Lanes<Real, lanes>& values) {
  Real part[size_t{lanes}];
  std::memcpy(part, &values.values, sizeof(part));
  for (int width = lanes / 2; width > 0; width /= 2) {
    for (int lane = 0; lane < width; ++lane) part[lane] += part[lane + width];
  }
  return part[0];
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
