/// What the model said of each token: for evaluation, sampling weights, distillation and error analysis.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/autograd/overwritten_logits.hpp"
#include "free_transformer/detail/checks/reconstruction.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy_values.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/reconstruction_loss.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// Each of the shape of the positions, and 0 or false (the prediction: -1) where a position does not count.
struct TokenStatistics {
  at::Tensor loss;         ///< what `torch::kNone` returns, all options applied; nats
  at::Tensor log_sum_exp;  ///< log sum_j exp(x_j) of the capped logits
  /// log p_y, nats, without weights and smoothing; sum_c q_c log p_c for probabilities
  at::Tensor target_log_probability;
  at::Tensor prediction;  ///< int64, the most likely class, the lowest on a tie; -1 where a position does not count
  at::Tensor hit;  ///< bool, the prediction is the target (or the most likely class of q); not where the loss is NaN
  at::Tensor entropy;  ///< of the prediction, -sum_c p_c log p_c of the capped logits; nats
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// The loss, log-sum-exp, log-probability, prediction, hit and entropy of every token from one forward pass, without a graph.
/// logits, targets, options  as in `compute_reconstruction_loss`; reduction and normalizer do not matter here
/// Returns                   `TokenStatistics`; float32, or float64 for float64
/// Throws                    c10::Error as `compute_reconstruction_loss` does
template <typename Logits>
TokenStatistics compute_token_statistics(const Logits& logits, const at::Tensor& targets,
                                         const ReconstructionLossOptions& options = {});

/// Statistics of dense logits; a source of logits of your own gets an overload of this function beside its
/// `reconstruct`.
TokenStatistics token_statistics(const at::Tensor& logits, const at::Tensor& targets,
                                 const ReconstructionLossOptions& options);

}  // namespace FREE_TRANSFORMER_FUNCTIONS

namespace FREE_TRANSFORMER_DETAIL {

inline TokenStatistics shaped_statistics(const CrossEntropyValues& values, at::IntArrayRef positions) {
  return {values.loss.reshape(positions),      values.log_sum_exp.reshape(positions),
          values.nll.neg().reshape(positions), values.prediction.reshape(positions),
          values.hit.reshape(positions),       values.entropy.reshape(positions)};
}

}  // namespace FREE_TRANSFORMER_DETAIL

inline namespace FREE_TRANSFORMER_FUNCTIONS {

inline TokenStatistics token_statistics(const at::Tensor& logits, const at::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_token_statistics";
  detail::check_logits(function, "logits", logits);
  detail::check_not_overwritten_before(function, logits);
  const auto positions = detail::shape_of_positions(logits);
  const auto settings = detail::checked_cross_entropy_settings(function, targets, options, logits.sizes(),
                                                               logits.device(), logits.scalar_type());
  return detail::shaped_statistics(detail::cross_entropy_values(logits, settings), positions);
}

template <typename Logits>
TokenStatistics compute_token_statistics(const Logits& logits, const at::Tensor& targets,
                                         const ReconstructionLossOptions& options) {
  const at::NoGradGuard no_grad;
  return token_statistics(logits, targets, options);
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
