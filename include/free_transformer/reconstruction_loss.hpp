/// The reconstruction term: cross entropy of the tokens given the latent bits, with what real training runs add to it.
#pragma once

#include <ATen/ATen.h>
#include <torch/arg.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/autograd/cross_entropy.hpp"
#include "free_transformer/detail/checks.hpp"
#include "free_transformer/reduction.hpp"

namespace free_transformer {

/// Options of `compute_reconstruction_loss`.
struct ReconstructionLossOptions {
  /// Positions with this target are left out; any value, also one inside the vocabulary. Default: -100.
  TORCH_ARG(int64_t, ignore_index) = -100;

  /// `torch::kMean` (default), `torch::kSum` or `torch::kNone`.
  TORCH_ARG(Reduction, reduction) = torch::enumtype::kMean{};
};

/// What a source of logits answers: the loss, with a graph, and the sums that `LossMetrics` keeps, without one.
struct ReconstructionResult {
  torch::Tensor loss;
  torch::Tensor sums;  ///< in the order of `detail::ReconstructionSum`, in the widest type, on the device of the logits
};

/// Dense logits. A type of your own becomes a source of logits by an overload of this function in its namespace; it may
/// make dense logits of itself and hand them on.
inline ReconstructionResult reconstruct(const torch::Tensor& logits, const torch::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_reconstruction_loss";
  detail::check_logits(function, "logits", logits);
  const auto positions = logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
  detail::CrossEntropyTerms terms;
  terms.targets = detail::checked_targets(function, targets, positions, logits.size(-1), logits.device(),
                                          options.ignore_index());
  terms.ignore_index = options.ignore_index();
  const auto normalization = detail::checked_normalization(function, options.reduction(), {});
  auto result = detail::cross_entropy(logits, terms, normalization, /*count_hits=*/false);
  return {std::move(result.loss), std::move(result.sums)};
}

/// Cross entropy of the targets, in nats:
///     L = 1/T sum_t (log sum_j exp(x_tj) - x_ty),   y the target of t, over the T positions that are not ignored
/// logits   [..., vocab_size], floating, any strides; half and bfloat16 are computed in float32. -inf masks a class
/// targets  [...], any integer type; or class probabilities of the logits' shape and a floating type
/// Returns  a scalar, or [...] with kNone (0 where ignored); float32, or float64 for float64. 0 if nothing counts, NaN if
///          a NaN counts. Relative accuracy holds for a confident model, too
/// Saved    logits, five numbers a position. Double backward works. Ignored rows have a gradient of exactly 0
/// Throws   c10::Error if a type or a shape does not fit, or (on the CPU) a target is out of range; on other devices such
///          a target makes the loss NaN
template <typename Logits>
torch::Tensor compute_reconstruction_loss(const Logits& logits, const torch::Tensor& targets,
                                          const ReconstructionLossOptions& options) {
  return reconstruct(logits, targets, options).loss;
}

template <typename Logits>
torch::Tensor compute_reconstruction_loss(const Logits& logits, const torch::Tensor& targets,
                                          int64_t ignore_index = -100) {
  return compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().ignore_index(ignore_index));
}

}  // namespace free_transformer
