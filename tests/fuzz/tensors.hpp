/// Tensors of any shape, strides, type and values, as views of a buffer that is larger than they are.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "choices.hpp"

namespace fuzz {

using Shape = std::vector<int64_t>;

inline constexpr double infinity = std::numeric_limits<double>::infinity();
inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

inline at::ScalarType some_type(Choices& choices) {
  return choices.one_of({at::kFloat, at::kBFloat16, at::kHalf, at::kDouble});
}

/// Up to three dimensions of positions, or so many in one that their rows fill vectors.
inline Shape some_positions(Choices& choices) {
  if (choices.seldom(4)) return {choices.below(130)};
  Shape positions(static_cast<size_t>(choices.below(4)));
  for (int64_t& size : positions) size = choices.one_of<int64_t>({2, 1, 3, 4, 0, 5});
  return positions;
}

inline Shape with_last(Shape sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

/// Where the elements of a view lie in its buffer.
struct Layout {
  Shape sizes, strides;
  int64_t offset = 0, buffer_size = 1;
  bool may_overlap = false;

  at::Tensor view(const at::Tensor& buffer) const { return buffer.as_strided(sizes, strides, offset); }

  /// Of each element in order.
  at::Tensor places() const { return view(at::arange(buffer_size, at::kLong)).reshape({-1}); }
};

inline Layout layout(Shape sizes, Shape strides, int64_t offset, int64_t rest) {
  Layout result{sizes, strides, offset, offset + 1 + rest, false};
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    result.buffer_size += std::max<int64_t>(0, sizes[dim] - 1) * strides[dim];
  }
  return result;
}

/// Contiguous, if `stride` is 1; no vector kernel takes rows of any other.
inline Layout plain_layout(const Shape& sizes, int64_t stride) {
  Shape strides(sizes.size());
  for (size_t dim = sizes.size(); dim-- > 0; stride *= std::max<int64_t>(1, sizes[dim])) strides[dim] = stride;
  return layout(sizes, strides, 0, 0);
}

/// Dimensions in any order, with gaps between them, behind an offset; now and then one overlaps the others.
inline Layout some_layout(Choices& choices, const Shape& sizes) {
  if (sizes.empty() || !choices.seldom(2)) return plain_layout(sizes, 1);
  std::vector<size_t> innermost_first;
  for (size_t dim = sizes.size(); dim-- > 0;) innermost_first.push_back(dim);
  if (choices.seldom(3)) {
    const auto by = choices.below(static_cast<int64_t>(sizes.size()));
    std::rotate(innermost_first.begin(), innermost_first.begin() + by, innermost_first.end());
  }
  Shape strides(sizes.size());
  int64_t stride = choices.seldom(4) ? 2 : 1;
  for (const size_t dim : innermost_first) {
    strides[dim] = stride;
    stride = stride * std::max<int64_t>(1, sizes[dim]) + choices.below(4);
  }
  const bool may_overlap = choices.seldom(6);
  if (may_overlap) strides[static_cast<size_t>(choices.below(static_cast<int64_t>(sizes.size())))] = choices.below(3);
  Layout result = layout(sizes, strides, choices.below(9), 5);
  result.may_overlap = may_overlap;
  return result;
}

/// Pseudo-random numbers that a few bytes name.
class Sequence {
 public:
  explicit Sequence(Choices& choices) : state_(static_cast<uint32_t>(choices.large()) * 2654435761U + 1) {}

  /// In [0, count), count up to 65536.
  int64_t below(int64_t count) {
    state_ = state_ * 1664525U + 1013904223U;
    return static_cast<int64_t>(state_ >> 16) * count >> 16;
  }

 private:
  uint32_t state_;
};

/// Numbers of one scale and offset, with some between them that are out of the ordinary.
inline at::Tensor some_numbers(Choices& choices, const Shape& sizes, at::ScalarType type) {
  const double scale = choices.one_of({0.125, 1.0, 1.0 / 128, 1.0 / 7, 8.0, 1e-6, 0.0});
  const double offset = choices.one_of({0.0, 0.0, 0.0, 1000.0, -30000.0});
  Sequence sequence(choices);
  const at::Tensor numbers = at::empty(sizes, at::kDouble);
  auto* number = numbers.data_ptr<double>();
  for (int64_t i = 0; i < numbers.numel(); ++i)
    number[i] = offset + scale * static_cast<double>(sequence.below(128) - 64);
  const bool has_limits = choices.seldom(3);
  for (int64_t singles = choices.below(6); singles > 0 && numbers.numel() > 0; --singles) {
    double& single = number[choices.large() % numbers.numel()];
    single = choices.one_of({-0.0, offset, 20.0, -87.5, 104.0, 733.0, -30000.0, 1.0 / 3, 1e-7, -1e-40, 4e-8});
    if (has_limits)
      single = choices.one_of({-infinity, infinity, not_a_number, 3e38, -3e38, 65504.0, 1e-310, -infinity});
  }
  return numbers.to(type);
}

/// Weights of 0 and 1 as bool, or multiples of a half.
inline at::Tensor some_weights(Choices& choices, const Shape& sizes) {
  const bool is_mask = choices.seldom(3);
  Sequence sequence(choices);
  const at::Tensor weights = at::empty(sizes, at::kDouble);
  auto* weight = weights.data_ptr<double>();
  for (int64_t i = 0; i < weights.numel(); ++i)
    weight[i] = static_cast<double>(sequence.below(is_mask ? 2 : 8)) / (is_mask ? 1 : 2);
  if (is_mask) return weights.to(at::kBool);
  if (weights.numel() > 0 && choices.goes_wrong()) {
    weight[choices.large() % weights.numel()] = choices.one_of({-1.0, not_a_number, infinity, -infinity});
  }
  return weights.to(some_type(choices));
}

}  // namespace fuzz
