/// In which types numbers are computed.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Half types are computed in float32, the others in themselves.
inline at::ScalarType arithmetic_type(at::ScalarType type) {
  return type == at::kHalf || type == at::kBFloat16 ? at::kFloat : type;
}

/// The type for values that float32 would round too early: sums, counts, the latent KL. MPS has no float64.
inline at::ScalarType widest_type(const at::Device& device) { return device.is_mps() ? at::kFloat : at::kDouble; }

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
