/// Vectors of float32 on GCC's and Clang's vector types: loads, stores, tails, sums and maxima.
///
/// Everything is inlined into an entry function that carries the instruction set (`instruction_set.hpp`), so that no copy
/// compiled for a richer set can be linked in for a poorer processor. Vectors travel inside a struct: passed bare they
/// would warn of an ABI that depends on the instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Of the widest instruction set.
inline constexpr int64_t most_lanes = 16;

template <int lanes>
struct Lanes {
  // NOLINTBEGIN(modernize-use-using): g++ leaves the attribute out of a `using` of a template
  typedef float Values __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
  typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
  // NOLINTEND(modernize-use-using)
  Values values;
};

/// All lanes the same number.
template <int lanes>
[[gnu::always_inline]] inline Lanes<lanes> broadcast(float value) {
  return {typename Lanes<lanes>::Values{} + value};
}

template <int lanes>
[[gnu::always_inline]] inline void load(const float* source, Lanes<lanes>& result) {
  std::memcpy(&result.values, source, sizeof(result.values));
}

template <int lanes>
[[gnu::always_inline]] inline void store(const Lanes<lanes>& values, float* target) {
  std::memcpy(target, &values.values, sizeof(values.values));
}

/// The first `count` elements, and `filler` in the other lanes: nothing behind the end of a row is read.
template <int lanes>
[[gnu::always_inline]] inline void load_part(const float* source, int64_t count, float filler, Lanes<lanes>& result) {
  float part[size_t{lanes}];
  for (int lane = 0; lane < lanes; ++lane) part[lane] = filler;
  std::memcpy(part, source, sizeof(float) * static_cast<size_t>(count));
  load<lanes>(part, result);
}

/// The larger of each lane; a NaN in `values` is passed over.
template <int lanes>
[[gnu::always_inline]] inline void take_larger(Lanes<lanes>& largest, const Lanes<lanes>& values) {
  largest.values = values.values > largest.values ? values.values : largest.values;
}

template <int lanes>
[[gnu::always_inline]] inline float largest_lane(const Lanes<lanes>& values) {
  if constexpr (lanes > 1) {
    Lanes<lanes / 2> halves[2];
    std::memcpy(&halves, &values, sizeof(values));
    take_larger<lanes / 2>(halves[0], halves[1]);
    return largest_lane<lanes / 2>(halves[0]);
  } else {
    return values.values[0];
  }
}

/// Pairwise sum of the lanes.
template <int lanes>
[[gnu::always_inline]] inline float sum_of_lanes(const Lanes<lanes>& values) {
  if constexpr (lanes > 4) {
    Lanes<lanes / 2> halves[2];
    std::memcpy(&halves, &values, sizeof(values));
    return sum_of_lanes<lanes / 2>({halves[0].values + halves[1].values});
  } else {
    return (values.values[0] + values.values[2]) + (values.values[1] + values.values[3]);
  }
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
