/// The fuzzer's bytes as choices and numbers. Behind their end all are 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace fuzz {

class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}

  int64_t byte() { return next_ == end_ ? 0 : *next_++; }

  /// In [0, choices).
  int64_t below(int64_t choices) { return byte() % choices; }

  /// Up to 65535.
  int64_t large() {
    const int64_t low = byte();
    return low + 256 * byte();
  }

  /// One in so many; never behind the end.
  bool seldom(int64_t times) { return below(times) == times - 1; }

  template <typename Value>
  Value one_of(std::initializer_list<Value> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
};

}  // namespace fuzz
