/// A number that stands for some bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace example {

/// FNV-1a: unlike std::hash, the same with every compiler.
inline uint64_t fingerprint(const void* data, size_t size) {
  uint64_t value = 14695981039346656037U;
  const auto* bytes = static_cast<const unsigned char*>(data);
  for (size_t index = 0; index < size; ++index) {
    value = (value ^ bytes[index]) * 1099511628211U;
  }
  return value;
}

}  // namespace example
