/// Tensors of any shape, strides, type and values, as views of a buffer that is larger than they are.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "bytes.hpp"

namespace fuzz {

using Real = long double;
using Reals = std::vector<Real>;

inline Reals reals(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.detach().to(at::kDouble).contiguous();
  return Reals(wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel());
}

/// Where the elements of a view lie in its buffer.
struct Geometry {
  std::vector<int64_t> sizes, strides;
  int64_t offset = 0, buffer_size = 0;

  int64_t numel() const { return c10::multiply_integers(sizes); }

  /// Of each element in order.
  std::vector<int64_t> places() const {
    std::vector<int64_t> result;
    std::vector<int64_t> index(sizes.size());
    for (int64_t count = numel(); count > 0; --count) {
      int64_t place = offset;
      for (size_t dim = 0; dim < sizes.size(); ++dim) place += index[dim] * strides[dim];
      result.push_back(place);
      for (size_t dim = sizes.size(); dim-- > 0 && ++index[dim] == sizes[dim];) index[dim] = 0;
    }
    return result;
  }
};

/// Dimensions lie in the buffer in any order with gaps between them; now and then one overlaps the others.
inline Geometry some_geometry(Bytes& bytes, const std::vector<int64_t>& sizes) {
  Geometry geometry{sizes, std::vector<int64_t>(sizes.size()), 0, 0};
  const bool is_contiguous = bytes.below(2) == 0;
  std::vector<size_t> order;  // innermost first
  for (size_t dim = sizes.size(); dim-- > 0;) order.push_back(dim);
  if (!is_contiguous) {
    geometry.offset = bytes.below(9);
    if (bytes.seldom(3)) std::rotate(order.begin(), order.begin() + bytes.below(static_cast<int64_t>(order.size())), order.end());
  }
  int64_t stride = is_contiguous || !bytes.seldom(4) ? 1 : 2;
  for (const size_t dim : order) {
    geometry.strides[dim] = stride;
    stride *= std::max<int64_t>(1, sizes[dim]);
    if (!is_contiguous) stride += bytes.below(4);
  }
  if (!is_contiguous && bytes.seldom(6)) {
    geometry.strides[static_cast<size_t>(bytes.below(static_cast<int64_t>(sizes.size())))] = bytes.below(3);
  }
  geometry.buffer_size = geometry.offset + 1 + (is_contiguous ? 0 : 5);
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    geometry.buffer_size += std::max<int64_t>(0, sizes[dim] - 1) * geometry.strides[dim];
  }
  return geometry;
}

/// A buffer of pseudo-random numbers, with single ones of the fuzzer's choice between them.
inline at::Tensor some_numbers(Bytes& bytes, int64_t count, at::ScalarType type, bool with_specials) {
  const double scale = bytes.one_of({0.125, 1.0, 1.0 / 128, 1.0 / 7, 8.0, 1e-6});
  const double offset = bytes.one_of({0.0, 0.0, 0.0, 1000.0, -30000.0});
  uint32_t state = static_cast<uint32_t>(bytes.large()) * 2654435761u + 1;
  const at::Tensor numbers = at::empty({count}, at::kDouble);
  for (int64_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    numbers.data_ptr<double>()[i] = offset + scale * static_cast<double>(static_cast<int64_t>(state >> 25) - 64);
  }
  constexpr double infinity = std::numeric_limits<double>::infinity();
  for (int64_t singles = bytes.below(6); singles > 0 && count > 0; --singles) {
    double& number = numbers.data_ptr<double>()[bytes.large() % count];
    number = bytes.one_of({offset, -0.0, 87.5, -87.5, 30000.0, -30000.0, 1e-7, 20.0, -104.0, 1.0 / 3});
    if (with_specials && bytes.seldom(2)) number = bytes.one_of({-infinity, infinity, double{NAN}});
  }
  return numbers.to(type);
}

inline at::Tensor view_of(const at::Tensor& buffer, const Geometry& geometry) {
  return buffer.as_strided(geometry.sizes, geometry.strides, geometry.offset);
}

inline bool same_bytes(const at::Tensor& left, const at::Tensor& right) {
  return left.nbytes() == right.nbytes() &&
         (left.nbytes() == 0 || std::memcmp(left.data_ptr(), right.data_ptr(), left.nbytes()) == 0);
}

}  // namespace fuzz
