/// The fuzzer's bytes as choices. Behind their end all are 0, so that the first of several values is the plainest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

namespace fuzz {

class Choices {
 public:
  Choices(const uint8_t* data, size_t size) : next_(data), end_(data + size), may_go_wrong_(seldom(4)) {}

  int64_t byte() { return next_ == end_ ? 0 : *next_++; }

  /// Up to 65535.
  int64_t large() {
    const int64_t low = byte();
    return low + 256 * byte();
  }

  int64_t below(int64_t count) { return byte() % count; }

  /// Once in so many times.
  bool seldom(int64_t times) { return below(times) == times - 1; }

  template <typename Value>
  Value one_of(std::initializer_list<Value> values) {
    return values.begin()[below(static_cast<int64_t>(values.size()))];
  }

  /// Now and then one of the values that the library must refuse.
  template <typename Value>
  Value one_of(std::initializer_list<Value> right, std::initializer_list<Value> wrong) {
    return goes_wrong() ? one_of(wrong) : one_of(right);
  }

  /// True if what is chosen next is to be refused.
  bool goes_wrong() {
    const bool is_wrong = may_go_wrong_ && seldom(8);
    has_gone_wrong_ = has_gone_wrong_ || is_wrong;
    return is_wrong;
  }
  bool has_gone_wrong() const { return has_gone_wrong_; }

 private:
  const uint8_t* next_;
  const uint8_t* end_;
  bool may_go_wrong_;
  bool has_gone_wrong_ = false;
};

}  // namespace fuzz
