/// Where the rows of a tensor of any strides lie.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <cstddef>
#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Offset of each row of a tensor [..., columns], in elements; the columns themselves must be adjacent.
class RowOffsets {
 public:
  explicit RowOffsets(const at::Tensor& tensor) {
    for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
      const bool joins = !sizes_.empty() && strides_.back() == tensor.size(dim) * tensor.stride(dim);
      if (joins) {
        sizes_.back() *= tensor.size(dim);
        strides_.back() = tensor.stride(dim);
      } else {
        sizes_.push_back(tensor.size(dim));
        strides_.push_back(tensor.stride(dim));
      }
    }
  }

  int64_t operator()(int64_t row) const {
    int64_t offset = 0;
    for (size_t dim = sizes_.size(); dim-- > 1;) {
      offset += row % sizes_[dim] * strides_[dim];
      row /= sizes_[dim];
    }
    return sizes_.empty() ? 0 : offset + row * strides_[0];
  }

  /// True if each row starts where the last one ends.
  bool are_adjacent(int64_t columns) const { return sizes_.empty() || (sizes_.size() == 1 && strides_[0] == columns); }

 private:
  c10::SmallVector<int64_t, 4> sizes_, strides_;
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
