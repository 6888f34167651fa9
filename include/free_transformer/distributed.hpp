/// Losses of many ranks that are one number: token counts and metrics of a batch that is split among processes.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/checks/rank_counts.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/metrics_message.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/loss_metrics.hpp"
#include "free_transformer/reconstruction_loss.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// Reads and makes `LossMetrics` of the message that ranks add up.
struct LossMetricsOfRanks {
  template <typename GroupPointer>
  static LossMetrics summed(const LossMetrics& metrics, const GroupPointer& group) {
    constexpr const char* function = "sum_across_ranks";
    const detail::RankGroup ranks(function, group);
    const detail::MetricsShape shape{metrics.sums_.defined() ? metrics.sums_.numel() : 0, metrics.hinge_on_batch_mean_,
                                     metrics.has_accuracy_, metrics.has_z_loss_, metrics.has_kl_of_each_bit_};
    const auto [sums, common] = detail::sum_metrics(function, ranks, metrics.sums_, shape);
    LossMetrics result;
    if (common.sums == 0) return result;
    result.sums_ = sums;
    result.hinge_on_batch_mean_ = common.hinge_on_batch_mean;
    result.has_accuracy_ = common.has_accuracy;
    result.has_z_loss_ = common.has_z_loss;
    result.has_kl_of_each_bit_ = common.has_kl_of_each_bit;
    return result;
  }
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// What a mean over the whole batch divides by, where each rank has a part of its positions: the sum of u w_y over all
/// ranks, as `compute_reconstruction_loss` counts it in each. As the `normalizer` of every rank it makes the ranks'
/// losses, and so their gradients, add up to those of one call with the whole batch (but for class weights beside a
/// z-loss: that mean has two divisors, this one only the first):
///     options.normalizer(count_across_ranks(targets, group, options))
/// targets  this rank's, as in `compute_reconstruction_loss`; ranks may have different shapes, or no position at all
/// group    a pointer to a c10d::ProcessGroup or c10d::Backend, or to what has their getRank, getSize and allreduce
/// options  ignore_index, token_weight and weight count, the rest is not looked at
/// Returns  0-dim float64 on the targets' device, without a graph. One all-reduce of one number; nothing is copied to the host
/// Throws   c10::Error if an argument does not fit or, on the CPU, if one of another rank does not; and what c10d
///          reports when a rank is missing: its time-out or the lost connection
template <typename GroupPointer>
at::Tensor count_across_ranks(const at::Tensor& targets, const GroupPointer& group,
                              const ReconstructionLossOptions& options = {}) {
  constexpr const char* function = "count_across_ranks";
  return detail::count_of_ranks(function, targets, detail::RankGroup(function, group), options);
}

/// The metrics of all ranks' positions together, as one call with the whole batch would have given them. Every rank gets
/// them. One all-reduce of 64 numbers (more above 48 latent bits); on the CPU nothing else is read before a figure is.
/// metrics  this rank's; those of ranks that had no call yet count as none
/// Throws   c10::Error, on the CPU, if ranks disagree on latent_dim, the hinge's place or accuracy, as += does; and what
///          c10d reports when a rank is missing
template <typename GroupPointer>
LossMetrics sum_across_ranks(const LossMetrics& metrics, const GroupPointer& group) {
  return LossMetricsOfRanks::summed(metrics, group);
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
