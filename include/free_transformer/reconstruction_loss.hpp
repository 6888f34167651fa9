/// The reconstruction term: cross entropy of the tokens given the latent bits, with what real training runs add to it.
#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>

#include <cstdint>
#include <exception>
#include <utility>

#include "free_transformer/detail/autograd/cross_entropy.hpp"
#include "free_transformer/detail/autograd/overwritten_logits.hpp"
#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/checks/reconstruction.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/reduction.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// Options of `compute_reconstruction_loss`.
struct ReconstructionLossOptions {
  /// Positions with this target are left out; any value, also one inside the vocabulary. Class probabilities have no such
  /// target: there it must be the default, -100.
  TORCH_ARG(int64_t, ignore_index) = -100;

  /// `torch::kMean` (default), `torch::kSum` or `torch::kNone`.
  TORCH_ARG(Reduction, reduction) = torch::enumtype::kMean{};

  /// Weight u of each position, the shape of the targets, bool or floating, finite and >= 0, without a graph. Default: 1
  /// everywhere.
  TORCH_ARG(at::Tensor, token_weight);

  /// Divides the sum under `torch::kMean`, instead of the weights counted here; the other reductions ignore it.
  TORCH_ARG(Normalizer, normalizer);

  /// Weight w of each class, `[vocab_size]`, floating, finite and >= 0, without a graph. Default: 1 for all.
  TORCH_ARG(at::Tensor, weight);

  /// epsilon in [0, 1]: the share of the target that is spread evenly over the vocabulary. Default: 0.
  TORCH_ARG(double, label_smoothing) = 0.0;

  /// Factor >= 0 of (log sum_j exp(x_j))^2, added at each position (PaLM). Default: 0.
  TORCH_ARG(double, z_loss) = 0.0;

  /// c > 0, in [1e-30, 1e30], replaces every logit x by c tanh(x/c) before everything else (Gemma 2). Default: 0, none.
  TORCH_ARG(double, softcap) = 0.0;

  /// True lets the gradient be written over the logits, which saves memory and time. They then must be no leaf, share no
  /// memory (their own rows, other arguments), not retain a gradient, and not be used again: another call of this
  /// library with them, reading them through the graph, a second backward or create_graph is an error. A hook that was
  /// registered on them afterwards is not called. Without a gradient to compute, and where there is no vector kernel, it
  /// changes nothing. Default: false.
  TORCH_ARG(bool, inplace) = false;

  /// True also counts the positions whose most likely class is the target, for `metrics/accuracy`. Default: false.
  TORCH_ARG(bool, accuracy) = false;
};

/// What a source of logits answers: the loss, with a graph, and the sums that `LossMetrics` keeps, without one: [6],
/// float64 on the logits' device, over the positions that count
///     sum of u [...]   sum u w_y   sum u z_loss lse^2   sum u   sum u (lse - x_y)   sum u (most likely class = target)
/// in the symbols of `compute_reconstruction_loss`; the last is 0 unless `accuracy` asks for it.
struct ReconstructionResult {
  at::Tensor loss, sums;
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// Cross entropy of the targets, in nats. With y the target of position t, u its weight, w the class weights, epsilon
/// the label smoothing, x the logits (capped first of all) and lse = log sum_j exp(x_j):
///     loss_t = u [(1-epsilon) w_y (lse - x_y) + epsilon/V sum_c w_c (lse - x_c)] + u z_loss lse^2
///     mean   = sum of the first terms / sum u w_y + sum of the last / sum u, or all of it / normalizer; kSum: no divisor
/// which without options is 1/T sum_t (lse - x_y) over the T positions that are not ignored.
/// logits   [..., vocab_size], floating, any strides; half and bfloat16 are computed in float32. -inf masks a class
/// targets  [...], any integer type; or class probabilities q of the logits' shape: the bracket is then
///          sum_c w_c ((1-epsilon) q_c + epsilon/V) (lse - x_c), and its sum is divided by sum u
/// Returns  a scalar, or [...] with kNone; float32, or float64 for float64. 0 if nothing counts, NaN if a NaN counts.
///          Relative accuracy holds for a confident model, too
/// Saved    logits, their gradient for the first backward (not with kNone), copies of targets and weights. Double backward
///          works. Positions that are ignored or of weight 0 have a loss and a gradient of exactly 0; a class
///          of weight 0 has no likelihood term
/// Throws   c10::Error, before anything is written, if a type, shape, device or setting does not fit, or (on the CPU) a
///          target or a weight is out of range; on other devices a target out of range makes the loss NaN. Also for dual
///          tensors, under functorch's transforms and while tracing, whose derivatives and traces would be lost
template <typename Logits>
at::Tensor compute_reconstruction_loss(const Logits& logits, const at::Tensor& targets,
                                       const ReconstructionLossOptions& options);

/// The same with the one option that the paper's model needs.
template <typename Logits>
at::Tensor compute_reconstruction_loss(const Logits& logits, const at::Tensor& targets, int64_t ignore_index = -100);

/// Dense logits. A type of your own becomes a source of logits by an overload of this function in its namespace; it may
/// make dense logits of itself and hand them on.
ReconstructionResult reconstruct(const at::Tensor& logits, const at::Tensor& targets,
                                 const ReconstructionLossOptions& options);

/// Called in place of `reconstruct` where `compute_vae_loss` refuses an argument of its other term, before it throws.
/// Where others wait for this call of `reconstruct`, an overload beside it tells them; other sources of logits need none.
template <typename Logits>
void abandon_reconstruction(const Logits&, const std::exception_ptr& /*refusal*/) {}

inline ReconstructionResult reconstruct(const at::Tensor& logits, const at::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_reconstruction_loss";
  detail::check_logits(function, "logits", logits);
  detail::check_not_overwritten_before(function, logits);
  const auto settings = detail::checked_cross_entropy_settings(function, targets, options, logits.sizes(),
                                                               logits.device(), logits.scalar_type());
  const auto normalization = detail::checked_normalization(function, options.reduction(), options.normalizer());
  auto result = detail::cross_entropy(function, logits, settings, normalization, options.accuracy(), options.inplace());
  return {std::move(result.loss), std::move(result.sums)};
}

template <typename Logits>
at::Tensor compute_reconstruction_loss(const Logits& logits, const at::Tensor& targets,
                                       const ReconstructionLossOptions& options) {
  return reconstruct(logits, targets, options).loss;
}

template <typename Logits>
at::Tensor compute_reconstruction_loss(const Logits& logits, const at::Tensor& targets, int64_t ignore_index) {
  return compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().ignore_index(ignore_index));
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
