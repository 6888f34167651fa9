/// The latent term of one position in numbers and tensors: what it depends on beside the latent logits.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

namespace free_transformer::detail {

struct LatentTerms {
  at::Tensor token_weight;  ///< [N] in the widest type, or undefined
  double free_bits = 0.0;   ///< nats
};

/// The sums over positions that the latent loss and `LossMetrics` are made of; the KL of each bit follows after them.
enum LatentSum : int64_t {
  penalty_sum,        ///< sum of u penalty
  latent_weight_sum,  ///< sum of u
  active_sum,         ///< sum of u where the penalty is not 0
  latent_sum_count    ///< index of the first bit's sum of u KL, before any hinge
};

}  // namespace free_transformer::detail
