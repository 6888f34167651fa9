/// Losses of many ranks that are one number: a batch that is split among processes, and a vocabulary that is.
///
/// Needs a LibTorch with c10d; `losses.hpp` does not include it. Wherever a group is asked for, that is a pointer
/// (intrusive, shared or plain) to a c10d::ProcessGroup or c10d::Backend, or to what has their getRank, getSize,
/// allreduce and allgather. All its ranks make the same calls in the same order. What they cost, and what was measured:
/// docs/distributed.md.
#pragma once

#if !__has_include(<torch/csrc/distributed/c10d/Types.hpp>)
#error "free_transformer/distributed.hpp needs a LibTorch with c10d"
#endif

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <exception>
#include <tuple>
#include <utility>

#include "free_transformer/detail/autograd/vocabulary_parallel_cross_entropy.hpp"
#include "free_transformer/detail/checks/rank_counts.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/metrics_message.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/vocabulary_parallel.hpp"
#include "free_transformer/linear_logits.hpp"
#include "free_transformer/loss_metrics.hpp"
#include "free_transformer/reconstruction_loss.hpp"
#include "free_transformer/token_statistics.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// The fields of `LossMetrics` for who adds them up.
struct LossMetricsOfRanks {
  static auto fields(LossMetrics& metrics) {
    return std::tie(metrics.sums_, metrics.hinge_on_batch_mean_, metrics.has_accuracy_, metrics.has_z_loss_,
                    metrics.has_kl_of_each_bit_);
  }
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// This rank's columns [P r/R, P (r+1)/R), rounded down, of logits with P columns, wherever a loss takes logits. The
/// loss, its metrics and these columns' gradient are those of one call with all columns, on every rank.
/// logits       [..., columns], as for `compute_reconstruction_loss`; or `LinearLogits` of this rank's rows of weight and
///              bias (at least one) and of the whole hidden, whose gradient is then the sum over ranks
/// vocab_size   V; a rank may have no class
/// padded_size  P >= V, default V: columns from V on are padding, which is not read and gets a gradient of 0
/// Targets are classes of the whole vocabulary and, like all options, the same on all ranks; but `weight` has this
/// rank's columns. Options all hold, but for class probabilities and `inplace`, which are refused.
/// Messages     two forward: an all-reduce of 37 numbers by which the ranks agree, and one of two numbers a position
///              (one more with `weight`, one more with label smoothing), in float64. The second is an all-gather, of
///              which each rank gets R times as many, with `accuracy` (two numbers more), and where each rank has a
///              position with all logits 600 below the highest of the call (one more). None backward, but for the
///              all-reduce of hidden's gradient, D numbers a position in the type of arithmetic
/// Accuracy     sums of exp(x - max) and single logits alone are combined, in float64
/// Saved        this rank's logits (or hidden, weight and bias: backward makes their logits once more) and ten numbers
///              a position. A second backward works; double backward is an error
/// Throws       c10::Error on every rank if one of them refuses its arguments, such as a target out of range, or if they
///              differ in vocab_size, positions, type, options or (on the CPU) targets; and with c10d's text, if a rank
///              is missing: its time-out or the lost connection. What `compute_vae_loss` refuses of z_logits and of its
///              options is such an argument, too. On other devices than the CPU the first message is one stall
template <typename Logits = at::Tensor>
class VocabParallelLogits {
 public:
  template <typename GroupPointer>
  VocabParallelLogits(Logits logits, GroupPointer group, int64_t vocab_size)
      : logits_(std::move(logits)),
        ranks_("VocabParallelLogits", std::move(group)),
        vocab_size_(vocab_size),
        padded_size_(vocab_size) {}

  VocabParallelLogits& padded_size(int64_t columns) { return padded_size_ = columns, *this; }

  const Logits& logits() const { return logits_; }
  const detail::RankGroup& ranks() const { return ranks_; }
  int64_t vocab_size() const { return vocab_size_; }
  int64_t padded_size() const { return padded_size_; }

 private:
  Logits logits_;
  detail::RankGroup ranks_;
  int64_t vocab_size_, padded_size_;
};

/// What a mean over the whole batch divides by, where each rank has a part of its positions: the sum of u w_y over all
/// ranks, as `compute_reconstruction_loss` counts it in each. As the `normalizer` of every rank it makes the ranks'
/// losses, and so their gradients, add up to those of one call with the whole batch (but for class weights beside a
/// z-loss: that mean has two divisors, this one only the first):
///     options.normalizer(count_across_ranks(targets, group, options))
/// targets  this rank's, as in `compute_reconstruction_loss`; ranks may have different shapes, or no position at all
/// options  ignore_index, token_weight and weight count, the rest is not looked at
/// Returns  0-dim float64 on the targets' device, without a graph. One all-reduce of one number, and no copy to the host
/// Throws   c10::Error if an argument does not fit or, on the CPU, if one of another rank does not; and what c10d
///          reports when a rank is missing: its time-out or the lost connection
template <typename GroupPointer>
at::Tensor count_across_ranks(const at::Tensor& targets, const GroupPointer& group,
                              const ReconstructionLossOptions& options = {}) {
  constexpr const char* function = "count_across_ranks";
  return detail::count_of_ranks(function, targets, detail::RankGroup(function, group), options);
}

/// The metrics of all ranks' positions together, as one call with the whole batch would have given them. Every rank gets
/// them. One all-reduce of 64 numbers; above 45 latent bits one more, of a number for each bit above. On the CPU nothing
/// else is read before a figure is.
/// metrics  this rank's; those of ranks that had no call yet count as none
/// Throws   c10::Error, on the CPU, if ranks disagree on latent_dim, the hinge's place or accuracy, as += does; and what
///          c10d reports when a rank is missing
template <typename GroupPointer>
LossMetrics sum_across_ranks(const LossMetrics& metrics, const GroupPointer& group) {
  constexpr const char* function = "sum_across_ranks";
  LossMetrics own = metrics, result;
  auto [sums, on_batch_mean, accuracy, z_loss, each_bit] = LossMetricsOfRanks::fields(own);
  const detail::MetricsShape shape{sums.defined() ? sums.numel() : 0, on_batch_mean, accuracy, z_loss, each_bit};
  const auto [total, common] = detail::sum_metrics(function, detail::RankGroup(function, group), sums, shape);
  if (common.sums > 0) {
    LossMetricsOfRanks::fields(result) = std::make_tuple(total, common.hinge_on_batch_mean, common.has_accuracy,
                                                         common.has_z_loss, common.has_kl_of_each_bit);
  }
  return result;
}

/// A shard of dense logits, or of the fused head, as a source of logits: see `compute_reconstruction_loss`.
template <typename Logits>
ReconstructionResult reconstruct(const VocabParallelLogits<Logits>& shard, const at::Tensor& targets,
                                 const ReconstructionLossOptions& options) {
  auto result = detail::vocabulary_parallel_loss("compute_reconstruction_loss", shard, targets, options);
  return {std::move(result.loss), std::move(result.sums)};
}

/// The same shard as a source of logits for `compute_token_statistics`: every rank gets the statistics of all columns.
/// Messages  the first, and an all-gather of five numbers a position (one more with `weight`, one more with label
///           smoothing)
template <typename Logits>
TokenStatistics token_statistics(const VocabParallelLogits<Logits>& shard, const at::Tensor& targets,
                                 const ReconstructionLossOptions& options) {
  const auto without_reduction = ReconstructionLossOptions(options).reduction(torch::enumtype::kMean{}).normalizer({});
  return detail::shaped_statistics(
      detail::vocabulary_parallel_values("compute_token_statistics", shard, targets, without_reduction),
      detail::shape_of_positions(detail::positioned(shard.logits())));
}

/// Tells the other ranks, which wait for the first message.
template <typename Logits>
void abandon_reconstruction(const VocabParallelLogits<Logits>& shard, const std::exception_ptr& refusal) {
  detail::refuse_for_all_ranks("compute_vae_loss", shard, refusal);
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
