/// What a loss depends on, in numbers and tensors: the options once they are checked, what is wanted of it, and the sums
/// that it and the metrics are made of.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

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

/// A copy that the caller cannot change under the graph, but for the targets.
inline CrossEntropySettings kept_weights(CrossEntropySettings settings) {
  if (settings.token_weight.defined()) settings.token_weight = settings.token_weight.clone();
  if (settings.class_weight.defined()) settings.class_weight = settings.class_weight.clone();
  return settings;
}

/// The same with the targets. Class probabilities are too large for a copy: they are watched.
inline CrossEntropySettings kept_settings(CrossEntropySettings settings) {
  if (!settings.has_probabilities()) settings.targets = settings.targets.clone();
  return kept_weights(std::move(settings));
}

/// The fused head's operands.
struct LinearInputs {
  at::Tensor hidden;  ///< [..., D]
  at::Tensor weight;  ///< [V, D]
  at::Tensor bias;    ///< [V], or undefined
  int64_t block_bytes = 0;

  int64_t classes() const { return weight.size(0); }
};

/// Which of its gradients are wanted.
struct WantedOfHead {
  bool hidden = false, weight = false, bias = false;

  bool any() const { return hidden || weight || bias; }
};

/// A reduced loss, and what it was made of: see `ReconstructionSum` and `LatentSum`.
struct LossAndSums {
  at::Tensor loss, sums;
};

/// What is to be said of the rows.
struct WantedOfRows {
  bool sums = false;
  bool each = false;                         ///< the first three of `CrossEntropyRows`
  bool prediction = false, entropy = false;  ///< the prediction also makes the sums count hits
  bool unscaled_gradient = false;            ///< softmax minus one-hot, see `plain::takes_few_operations`
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

/// What the targets and weights alone say, so that the gradient can be finished in the forward pass: `scales`, and what
/// whoever computes the rows wants to know beside them, [N], for LibTorch operations.
struct CrossEntropyPositions {
  at::Tensor scales;         ///< see `ReconstructionScale`
  at::Tensor left_out;       ///< bool; undefined if every position counts
  at::Tensor token_weight;   ///< u, 0 where left out; NaN where the target is out of range
  at::Tensor class_index;    ///< the target, some class where there is none; undefined for probabilities
  at::Tensor target_weight;  ///< w_y; undefined for 1
  bool has_weights = true;   ///< false: u is 0 or 1, and a target out of range makes the scales NaN
};

/// Factors of every position's loss on its way to the final value, and the weights that they come from.
enum ReconstructionScale : int64_t {
  scale_of_likelihood,
  scale_of_z,  ///< a mean divides the z-loss by another weight
  weight_of_likelihood,
  weight_of_tokens,
  reconstruction_scale_count
};

/// What settings and positions hold in tensors.
inline std::vector<at::Tensor*> tensors_of(CrossEntropySettings& settings, CrossEntropyPositions& positions) {
  return {&settings.targets,   &settings.token_weight,  &settings.class_weight, &positions.scales,
          &positions.left_out, &positions.token_weight, &positions.class_index, &positions.target_weight};
}

/// What belongs to some of the rows, of which select(values) are the values.
template <typename Select>
CrossEntropySettings part_of(CrossEntropySettings settings, const Select& select) {
  for (at::Tensor* values : {&settings.targets, &settings.token_weight}) {
    if (values->defined()) *values = select(*values);
  }
  return settings;
}
template <typename Select>
CrossEntropyPositions part_of(CrossEntropyPositions positions, const Select& select) {
  for (at::Tensor* values :
       {&positions.left_out, &positions.token_weight, &positions.class_index, &positions.target_weight}) {
    if (values->defined()) *values = select(*values);
  }
  return positions;
}

struct CrossEntropyOfRows {
  CrossEntropyRows rows;  ///< undefined where not asked for
  at::Tensor sums;        ///< see `ReconstructionSum`
  at::Tensor loss;        ///< reduced, 0-dim; undefined where it is left to be made of the sums
};

struct LatentSettings {
  at::Tensor token_weight;  ///< [N] in the widest type, or undefined
  at::Tensor prior_logits;  ///< [latent_dim] or like z_logits, or undefined for the uniform prior
  double free_bits = 0.0;   ///< nats
};

/// What is to be computed of the latent term beside its sums.
struct WantedOfLatents {
  bool penalty = false, gradient = false, prior_gradient = false;
  bool unscaled_gradient = false;  ///< instead of the gradient, by whoever can leave its scale to backward
  bool metrics = false;            ///< all sums; else whoever has to make them one by one may leave the penalty's alone
};

struct LatentRows {
  at::Tensor sums;   ///< see `LatentSum`; empty where the loss is all that was wanted of them
  at::Tensor scale;  ///< of every penalty on its way to the loss: 0-dim in the widest type, of the host where it knows
  at::Tensor loss;   ///< reduced, 0-dim; undefined where it is left to be made of the sums
  at::Tensor penalty;   ///< [N] in the type of arithmetic, weighted; this and the following undefined if not asked for
  at::Tensor gradient;  ///< of the shape and type of z_logits
  at::Tensor prior_gradient;
  at::Tensor unscaled_gradient{};  ///< [N, latent_dim] in the widest type, before scale and upstream
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
