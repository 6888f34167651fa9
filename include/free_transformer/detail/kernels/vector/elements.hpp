/// Element types as a load and a store around kernels that compute in float32: half numbers are widened and narrowed a
/// stretch of a row at a time, in memory that stays in the first-level cache.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/TypeCast.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/instruction_set.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

enum class Element : int { float32, float16, bfloat16 };

inline Element element_of(c10::ScalarType type) {
  return type == c10::ScalarType::Half       ? Element::float16
         : type == c10::ScalarType::BFloat16 ? Element::bfloat16
                                             : Element::float32;
}

inline int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

/// One number of a row.
inline float load_number(const void* source, Element element, int64_t index) {
  switch (element) {
    case Element::float16:
      return static_cast<float>(static_cast<const c10::Half*>(source)[index]);
    case Element::bfloat16:
      return static_cast<float>(static_cast<const c10::BFloat16*>(source)[index]);
    default:
      return static_cast<const float*>(source)[index];
  }
}

inline void store_number(float number, void* target, Element element, int64_t index) {
  switch (element) {
    case Element::float16:
      static_cast<c10::Half*>(target)[index] = c10::convert<c10::Half>(number);  // on Arm it is made of __fp16
      return;
    case Element::bfloat16:
      static_cast<c10::BFloat16*>(target)[index] = number;
      return;
    default:
      static_cast<float*>(target)[index] = number;
  }
}

/// Sixteen bits of each lane as the upper half of thirty-two. As a shuffle it is two instructions with AVX2, and one
/// with AVX-512; g++ 12 makes five of the obvious conversion, but many more of the shuffle for the short vectors of the
/// baseline.
template <int lanes, int... halves>
[[gnu::always_inline]] inline void load_upper_halves(const uint16_t* source, typename Lanes<lanes>::Integers& bits,
                                                     std::integer_sequence<int, halves...>) {
  using Halves = typename Lanes<lanes>::Halves;
  Halves loaded;
  std::memcpy(&loaded, source, sizeof(loaded));
#if defined(__clang__) || __GNUC__ >= 12  // which have __builtin_shufflevector
  if constexpr (lanes > 4) {
    const auto shuffled = __builtin_shufflevector(Halves{}, loaded, (halves % 2 == 0 ? 0 : lanes + halves / 2)...);
    std::memcpy(&bits, &shuffled, sizeof(bits));
    return;
  }
#endif
  bits = __builtin_convertvector(loaded, typename Lanes<lanes>::Integers) << 16;
}

/// The bits of a float32 with the value of a float16 in the upper half. The exponent is moved from bias 15 to bias 127. A
/// subnormal number is put behind the point of 2^-14, which is then taken away: no number on the way is subnormal in
/// float32, so flush-to-zero changes nothing.
template <int lanes>
[[gnu::always_inline]] inline void widen_float16(typename Lanes<lanes>::Integers& bits) {
  using Integers = typename Lanes<lanes>::Integers;
  const Integers magnitude = bits & 0x7fff0000, shifted = (magnitude >> 3) + 0x38000000;
  const Integers is_small = magnitude < 0x04000000, is_not_finite = magnitude >= 0x7c000000;
  const Integers with_point = shifted + 0x00800000;
  typename Lanes<lanes>::Values small;
  std::memcpy(&small, &with_point, sizeof(small));
  small -= 0x1p-14f;
  Integers converted;
  std::memcpy(&converted, &small, sizeof(converted));
  converted = (is_small & converted) | (~is_small & shifted);
  bits = converted | (is_not_finite & 0x7f800000) | (bits & static_cast<int32_t>(0x80000000u));
}

/// float32 numbers rounded to bfloat16 in the upper half: to nearest, ties to even. A NaN stays one if its lower half is 0,
/// as that of every NaN is that comes from a half type or from an operation; see `without_payload`.
template <int lanes>
[[gnu::always_inline]] inline void narrow_bfloat16(typename Lanes<lanes>::Integers& bits) {
  bits += 0x7fff + ((bits >> 16) & 1);
}

/// The same to float16: too large becomes infinite, a NaN stays one.
template <int lanes>
[[gnu::always_inline]] inline void narrow_float16(typename Lanes<lanes>::Integers& bits) {
  using Integers = typename Lanes<lanes>::Integers;
  const Integers magnitude = bits & 0x7fffffff;
  // Subnormal: adding 1/2 puts the last bit of a half at the last bit of the sum, and the processor rounds there.
  typename Lanes<lanes>::Values small;
  std::memcpy(&small, &magnitude, sizeof(small));
  small += 0.5f;
  Integers small_bits;
  std::memcpy(&small_bits, &small, sizeof(small_bits));
  const Integers subnormal = small_bits - 0x3f000000;
  const Integers normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Integers is_small = magnitude < 0x38800000, is_large = magnitude >= 0x477ff000;
  const Integers is_nan = magnitude > 0x7f800000;
  const Integers result = (is_small & subnormal) | (~is_small & normal);
  bits = ((is_large & 0x7c00) | (~is_large & result) | (is_nan & 0x200) | ((bits >> 16) & 0x8000)) << 16;
}

/// Two vectors of upper halves, one behind the other, packed into one: half the instructions of two stores.
template <int lanes, int... halves>
[[gnu::always_inline]] inline void store_upper_halves(const typename Lanes<lanes>::Integers (&bits)[2],
                                                      uint16_t* target, std::integer_sequence<int, halves...>) {
#if defined(__clang__) || __GNUC__ >= 12
  typename Lanes<2 * lanes>::Halves wide[2];
  for (int k = 0; k < 2; ++k) std::memcpy(&wide[k], &bits[k], sizeof(bits[k]));
  const auto packed = __builtin_shufflevector(wide[0], wide[1], (2 * halves + 1)...);
  std::memcpy(target, &packed, sizeof(packed));
#else
  for (int k = 0; k < 2; ++k) {
    const auto packed = __builtin_convertvector(bits[k] >> 16, typename Lanes<lanes>::Halves);
    std::memcpy(target + k * lanes, &packed, sizeof(packed));
  }
#endif
}

/// `count` half numbers as float32. What lies behind the last whole vector is taken through a vector on the stack.
struct WidenHalves {
  const uint16_t* source;
  Element element;
  int64_t count;
  float* target;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    element == Element::bfloat16 ? widen<lanes, true>() : widen<lanes, false>();
  }

 private:
  template <int lanes, bool is_bfloat16>
  [[gnu::always_inline]] void widen() const {
    const auto convert = [](const uint16_t* from, float* to) __attribute__((always_inline)) {
      typename Lanes<lanes>::Integers bits;
      load_upper_halves<lanes>(from, bits, std::make_integer_sequence<int, 2 * lanes>{});
      if constexpr (!is_bfloat16) widen_float16<lanes>(bits);
      std::memcpy(to, &bits, sizeof(bits));
    };
    int64_t index = 0;
    for (; index + lanes <= count; index += lanes) convert(source + index, target + index);
    if (index == count) return;
    uint16_t part[size_t{lanes}] = {};
    float widened_part[size_t{lanes}];
    std::memcpy(part, source + index, sizeof(uint16_t) * static_cast<size_t>(count - index));
    convert(part, widened_part);
    std::memcpy(target + index, widened_part, sizeof(float) * static_cast<size_t>(count - index));
  }
};

/// `count` numbers times a factor, in the element type.
struct StoreProducts {
  const float* source;
  int64_t count;
  float factor;
  void* target;
  Element element;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    if (element == Element::float32) return store_floats<lanes>();
    element == Element::bfloat16 ? store_halves<lanes, true>() : store_halves<lanes, false>();
  }

 private:
  template <int lanes>
  [[gnu::always_inline]] void store_floats() const {
    auto* const products = static_cast<float*>(target);
    Lanes<lanes> values;
    int64_t index = 0;
    for (; index + lanes <= count; index += lanes) {
      load<lanes>(source + index, values);
      values.values *= factor;
      store<lanes>(values, products + index);
    }
    for (; index < count; ++index) products[index] = source[index] * factor;
  }

  template <int lanes, bool is_bfloat16>
  [[gnu::always_inline]] void store_halves() const {
    constexpr int together = 2 * lanes;
    auto* const products = static_cast<uint16_t*>(target);
    const auto convert = [](const float* from, float by, uint16_t* to) __attribute__((always_inline)) {
      typename Lanes<lanes>::Integers bits[2];
      for (int k = 0; k < 2; ++k) {
        Lanes<lanes> values;
        load<lanes>(from + k * lanes, values);
        values.values *= by;
        std::memcpy(&bits[k], &values.values, sizeof(bits[k]));
        is_bfloat16 ? narrow_bfloat16<lanes>(bits[k]) : narrow_float16<lanes>(bits[k]);
      }
      store_upper_halves<lanes>(bits, to, std::make_integer_sequence<int, together>{});
    };
    int64_t index = 0;
    for (; index + together <= count; index += together) convert(source + index, factor, products + index);
    if (index == count) return;
    float part[size_t{together}] = {};
    uint16_t narrowed_part[size_t{together}];
    std::memcpy(part, source + index, sizeof(float) * static_cast<size_t>(count - index));
    convert(part, factor, narrowed_part);
    std::memcpy(products + index, narrowed_part, sizeof(uint16_t) * static_cast<size_t>(count - index));
  }
};

/// `count` numbers from `first` on as float32: where they lie, or widened into `room`.
inline const float* widened(const void* source, Element element, int64_t first, int64_t count, float* room) {
  if (element == Element::float32) return static_cast<const float*>(source) + first;
  run_vectorized(WidenHalves{static_cast<const uint16_t*>(source) + first, element, count, room});
  return room;
}

/// `count` numbers times a factor, in the element type, from `first` on; `source` may be the target.
inline void store_products(const float* source, int64_t count, float factor, void* target, Element element,
                           int64_t first) {
  void* const from_first = static_cast<char*>(target) + first * bytes_of(element);
  run_vectorized(StoreProducts{source, count, factor, from_first, element});
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
