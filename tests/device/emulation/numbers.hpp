/// Numbers as a device's memory holds them, and how near a computed one must be to a wanted one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "block.hpp"
#include "kernels.hpp"

namespace emulation {

/// The reference's numbers: the equations as they stand, in 64 binary digits.
using Real = long double;

inline constexpr Real epsilon = 0x1p-24L;  ///< a rounding of float32
inline constexpr float infinite = std::numeric_limits<float>::infinity();
inline constexpr float quiet_nan = std::numeric_limits<float>::quiet_NaN();

inline uint16_t narrowed(float value, device::Element element) {
  if (element == device::Element::float16) return half_of_float(value);
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float widened(uint16_t number, device::Element element) {
  return element == device::Element::float16 ? float_of_half(number) : __uint_as_float(uint32_t{number} << 16);
}

/// What rounding to the element's type may move a number of this size by.
inline Real rounding_of(Real size, device::Element element) {
  if (element == device::Element::float32) return size * epsilon + 0x1p-150L;
  return element == device::Element::float16 ? size * 0x1p-11L + 0x1p-25L : size * 0x1p-8L + 0x1p-134L;
}

/// Memory with NaN around what is used, from an address that 16 divides but for `offset` elements.
class Memory {
 public:
  Memory(device::Element element, size_t count, size_t offset)
      : element_(element), begin_(guard + offset), count_(count), words_((begin_ + count + guard) / 2 + 8) {
    std::memset(words_.data(), 0xff, words_.size() * sizeof(words_[0]));
  }

  void* data() { return bytes() + begin_ * bytes_of_number(); }
  float read(size_t index) const {
    if (element_ == device::Element::float32) {
      float value;
      std::memcpy(&value, bytes() + (begin_ + index) * 4, 4);
      return value;
    }
    uint16_t number;
    std::memcpy(&number, bytes() + (begin_ + index) * 2, 2);
    return widened(number, element_);
  }
  void write(size_t index, float value) {
    if (element_ == device::Element::float32) {
      std::memcpy(bytes() + (begin_ + index) * 4, &value, 4);
    } else {
      const uint16_t number = narrowed(value, element_);
      std::memcpy(bytes() + (begin_ + index) * 2, &number, 2);
    }
  }
  /// True if nothing beside `count` numbers was written.
  bool is_guarded() const {
    const size_t first = begin_ * bytes_of_number(), last = (begin_ + count_) * bytes_of_number();
    const size_t size = words_.size() * sizeof(words_[0]) - (bytes() - reinterpret_cast<const char*>(words_.data()));
    for (size_t byte = 0; byte < size; ++byte) {
      if ((byte < first || byte >= last) && bytes()[byte] != char(-1)) return false;
    }
    return true;
  }
  bool operator==(const Memory& other) const { return words_ == other.words_; }

 private:
  static constexpr size_t guard = 64;

  device::Element element_;
  size_t begin_, count_;
  std::vector<uint64_t> words_;

  size_t bytes_of_number() const { return static_cast<size_t>(device::bytes_of(element_)); }
  const char* bytes() const {
    const char* first = reinterpret_cast<const char*>(words_.data());
    return first + (16 - reinterpret_cast<uintptr_t>(first) % 16) % 16;
  }
  char* bytes() { return const_cast<char*>(static_cast<const Memory*>(this)->bytes()); }
};

/// Counts what is not as wanted, and says so of the first few.
class Findings {
 public:
  template <typename... Values>
  void expect(bool holds, const std::string& of, const char* what, Values... values) {
    ++checks_;
    if (holds || ++failures_ > 20) return;
    std::printf("%s: %s", of.c_str(), what);
    ((std::printf(" %.9g", static_cast<double>(values))), ...);
    std::printf("\n");
  }
  void expect_near(Real got, Real wanted, Real tolerance, const std::string& of, const char* what, size_t index = 0) {
    bool holds = std::fabs(got - wanted) <= tolerance;
    if (std::isnan(wanted)) holds = std::isnan(got);
    if (std::isinf(wanted)) holds = got == wanted;
    expect(holds, of, what, index, got, wanted, tolerance);
  }
  int report(const char* name) const {
    std::printf("%s: %ld checks, %ld failures\n", name, checks_, failures_);
    return failures_ == 0 && checks_ > 0 ? 0 : 1;
  }

 private:
  long checks_ = 0, failures_ = 0;
};

}  // namespace emulation
