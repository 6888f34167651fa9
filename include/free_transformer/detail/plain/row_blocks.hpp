/// Walks over the rows of a tensor in blocks, and sums in an order that does not depend on the number of threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Elements of one block: small enough for a core's cache on the CPU, large enough to fill any other device.
inline int64_t block_elements(const at::Device& device) { return int64_t{1} << (device.is_cpu() ? 18 : 26); }

/// True if `view({-1, last size})` needs no copy.
inline bool rows_are_viewable(const at::Tensor& tensor) {
  bool is_outer = false;
  int64_t wanted = 0;  // stride of a dimension outside those seen so far
  for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
    if (tensor.size(dim) == 1) continue;  // its stride means nothing
    if (is_outer && tensor.stride(dim) != wanted) return false;
    is_outer = true;
    wanted = tensor.size(dim) * tensor.stride(dim);
  }
  return true;
}

/// Calls visit(block, first_row) for blocks [rows, last size] that together are all rows of the tensor, in order.
/// Shifted or permuted tensors are visited where they lie: a contiguous copy of the logits would cost as much as their
/// gradient.
template <typename Visit>
void for_each_row_block(const at::Tensor& tensor, int64_t first_row, const Visit& visit) {
  if (tensor.dim() == 1) return visit(tensor.unsqueeze(0), first_row);
  const int64_t columns = tensor.size(-1);
  if (tensor.numel() == 0) return;
  if (!rows_are_viewable(tensor)) {
    const int64_t rows_of_each = tensor.numel() / tensor.size(0) / columns;
    for (int64_t index = 0; index < tensor.size(0); ++index) {
      for_each_row_block(tensor.select(0, index), first_row + index * rows_of_each, visit);
    }
    return;
  }
  const at::Tensor rows = tensor.dim() == 2 ? tensor : tensor.view({-1, columns});
  const int64_t rows_of_block = std::max<int64_t>(1, block_elements(tensor.device()) / columns);
  for (int64_t row = 0; row < rows.size(0); row += rows_of_block) {
    visit(rows.narrow(0, row, std::min(rows_of_block, rows.size(0) - row)), first_row + row);
  }
}

/// Sum of each row, [rows, columns] -> [rows]. ATen would split a single row among the threads, but never one of two.
inline at::Tensor sum_of_rows(const at::Tensor& values) {
  if (values.size(0) != 1) return values.sum(-1);
  return values.expand({2, values.size(1)}).sum(-1).narrow(0, 0, 1);
}

/// Sum over the last dimension in a given type, on the CPU in a tree of segments, which ATen sums without splitting them
/// among threads.
inline at::Tensor ordered_sum(at::Tensor values, at::ScalarType type) {
  constexpr int64_t segment = 1024;
  if (!values.device().is_cpu()) return values.sum(-1, /*keepdim=*/false, type);
  values = values.to(type);
  while (values.size(-1) > segment) {
    const int64_t padding = (segment - values.size(-1) % segment) % segment;
    auto shape = values.sizes().vec();
    shape.back() = (values.size(-1) + padding) / segment;
    shape.push_back(segment);
    values = at::constant_pad_nd(values, {0, padding}).reshape(shape).sum(-1);
  }
  return values.sum(-1);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
FREE_TRANSFORMER_SMALL_CODE_END
