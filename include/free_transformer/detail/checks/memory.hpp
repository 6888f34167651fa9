/// Which elements of tensors lie in the same memory: what is written in place must lie alone.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <numeric>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// True if no two elements can lie in the same place: each stride is beyond all that the smaller ones reach. Tensors that
/// interleave in another way (as_strided alone makes them) are taken for shared.
inline bool elements_lie_apart(const at::Tensor& tensor) {
  if (tensor.numel() == 0) return true;
  const auto strides = tensor.strides(), sizes = tensor.sizes();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    int64_t reach = 0;
    for (size_t other = 0; other < sizes.size(); ++other) {
      const bool is_smaller = strides[other] < strides[dim] || (strides[other] == strides[dim] && other < dim);
      if (is_smaller) reach += strides[other] * (sizes[other] - 1);
    }
    if (sizes[dim] > 1 && strides[dim] <= reach) return false;
  }
  return true;
}

/// Where a tensor's rows lie, in bytes: within [begin, end), `width` each, begun at multiples of `period` from `begin`.
struct MemoryOfRows {
  explicit MemoryOfRows(const at::Tensor& tensor) : begin(reinterpret_cast<intptr_t>(tensor.data_ptr())), end(begin) {
    if (tensor.numel() == 0) return;
    const auto bytes = static_cast<int64_t>(tensor.itemsize());
    end += bytes;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
      end += bytes * tensor.stride(dim) * (tensor.size(dim) - 1);
      if (dim + 1 < tensor.dim() && tensor.size(dim) > 1) period = std::gcd(period, bytes * tensor.stride(dim));
    }
    const int64_t columns = tensor.dim() == 0 ? 1 : tensor.size(-1);
    width = columns == 1 ? bytes : bytes * (tensor.stride(-1) * (columns - 1) + 1);
  }

  intptr_t begin, end;
  int64_t period = 0;  ///< 0 for a single row
  int64_t width = 0;
};

/// True if two tensors may share an element. Two ranges of columns of one matrix do not, though their rows take turns.
inline bool may_share_memory(const MemoryOfRows& left, const MemoryOfRows& right) {
  if (left.end <= right.begin || right.end <= left.begin) return false;
  const int64_t period = std::gcd(left.period, right.period);
  if (period == 0) return true;
  const int64_t ahead = ((right.begin - left.begin) % period + period) % period;
  return ahead < left.width || ahead + right.width > period;
}

/// Before `written` is written over: `read` is looked at afterwards.
inline void check_not_overwritten(const char* function, const char* argument, const at::Tensor& read,
                                  const at::Tensor& written) {
  if (!read.defined() || read.device() != written.device()) return;
  TORCH_CHECK(!may_share_memory(MemoryOfRows(written), MemoryOfRows(read)), function, ": ", argument,
              " must not lie in the memory of logits that are given inplace, as these are overwritten");
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
