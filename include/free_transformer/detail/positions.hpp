/// Positions: their shape, and which of them count.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The shape of logits without their last dimension.
inline at::IntArrayRef shape_of_positions(const at::Tensor& logits) {
  return logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
}

/// True where a position is ignored or has no weight, in the shape of both; undefined if each counts for sure. Small types of
/// targets are compared as int64: in their own an ignore_index that they cannot hold would be another number.
inline at::Tensor left_out_positions(const at::Tensor& targets, int64_t ignore_index, const at::Tensor& token_weight) {
  at::Tensor left_out;
  if (!targets.is_floating_point()) left_out = targets.to(at::kLong) == ignore_index;
  if (!token_weight.defined()) return left_out;
  const at::Tensor is_weightless = token_weight == 0;
  return left_out.defined() ? left_out | is_weightless : is_weightless;
}

/// The same for the kernels, as the weight of a position: 0 if it is left out.
struct PositionWeights {
  const int64_t* targets;
  int64_t ignore_index;
  const float* token_weight;  ///< null for 1

  double operator()(int64_t row) const {
    if (targets[row] == ignore_index) return 0;
    return token_weight ? static_cast<double>(token_weight[row]) : 1.0;
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
