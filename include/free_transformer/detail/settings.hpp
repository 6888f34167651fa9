/// What a loss depends on beside the logits, in numbers and tensors: the options once they are checked, and the sums that
/// a loss and the metrics are made of.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// With N positions and V classes, y the target, u, w, epsilon, z the settings, x the (capped) logits:
///     loss = u [(1-epsilon) w_y nll + epsilon/V sum_c w_c (lse - x_c)] + u z lse^2,     nll = lse - x_y
/// and for class probabilities q instead of y the bracket is sum_c w_c ((1-epsilon) q_c + epsilon/V) (lse - x_c).
struct CrossEntropySettings {
  at::Tensor targets;       ///< [N] int64, or [N, V] class probabilities; every tensor here is contiguous
  at::Tensor token_weight;  ///< [N] in the type of arithmetic, or undefined
  at::Tensor class_weight;  ///< [V] in the type of arithmetic, or undefined
  int64_t ignore_index = -100;
  double label_smoothing = 0.0;
  double z_loss = 0.0;
  double softcap = 0.0;

  bool has_probabilities() const { return targets.is_floating_point(); }
};

/// What a forward pass says of each position, [N] in the type of arithmetic; 0 where the position does not count.
struct CrossEntropyRows {
  at::Tensor nll;              ///< lse - x_y
  at::Tensor likelihood_loss;  ///< the bracket: with class weights and label smoothing, without the token weight
  at::Tensor log_sum_exp;      ///< lse
  at::Tensor prediction;       ///< int64, the most likely class, the lowest on a tie; undefined if not asked for
  at::Tensor entropy;          ///< of the prediction, -sum_c p_c log p_c; undefined if not asked for
};

/// The sums over positions that the loss and `LossMetrics` are made of.
enum ReconstructionSum : int64_t {
  likelihood_loss_sum,    ///< sum of u [...]
  likelihood_weight_sum,  ///< sum of u w_y, or of u for probabilities
  z_loss_sum,             ///< sum of u z lse^2
  token_weight_sum,       ///< sum of u
  nll_sum,                ///< sum of u nll: without class weights, smoothing and z-loss
  hit_sum,                ///< sum of u where the most likely class is the target
  reconstruction_sum_count
};

struct LatentSettings {
  at::Tensor token_weight;  ///< [N] in the widest type, or undefined
  at::Tensor prior_logits;  ///< [latent_dim] or like z_logits, or undefined for the uniform prior
  double free_bits = 0.0;   ///< nats
};

/// The sums over positions that the latent loss and `LossMetrics` are made of; the KL of each bit follows after them.
enum LatentSum : int64_t {
  penalty_sum,        ///< sum of u penalty
  latent_weight_sum,  ///< sum of u
  active_sum,         ///< sum of u where the penalty is not 0
  latent_sum_count    ///< index of the first bit's sum of u KL, before any hinge
};

/// What a sum of weighted losses is divided by.
enum class ReductionKind { mean, sum, none };

struct Normalization {
  ReductionKind reduction = ReductionKind::mean;
  std::optional<double> number;
  at::Tensor tensor;  ///< 0-dim, or undefined
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
