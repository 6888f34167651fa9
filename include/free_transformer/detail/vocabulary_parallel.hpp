/// A loss over a vocabulary that is split among ranks, up to its rows: what a rank makes of its own arguments, and, in
/// two messages, what all ranks say together.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <exception>
#include <optional>
#include <utility>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/overwritten_logits.hpp"
#include "free_transformer/detail/checks/linear_logits.hpp"
#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/checks/vocabulary_parallel.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy_values.hpp"
#include "free_transformer/detail/distributed/agreement.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/distributed/shard_blocks.hpp"
#include "free_transformer/detail/distributed/vocabulary_rows.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// A call with this rank's part of the logits. `own` has logits(), a tensor or a head with hidden, weight and bias, and
/// ranks(), vocab_size() and padded_size().
template <typename Own, typename Options>
struct ShardCall {
  const char* function;
  const Own& own;
  const at::Tensor& targets;
  const Options& options;
  WantedOfRows wanted;
  bool records_graph = at::GradMode::is_enabled();
};

/// What a rank knows before it has heard of the others.
struct ShardProblem {
  VocabularyShard shard;
  CrossEntropySettings settings;
  Normalization normalization;
  CrossEntropyPositions positions;  ///< without what the class weights of other ranks say
  ShardRows rows;
  at::ScalarType type;  ///< of arithmetic
  ShardNumbers common;
};

/// What a rank makes of its arguments, or why it refuses them.
struct ShardAttempt {
  std::optional<ShardProblem> problem;
  std::exception_ptr refusal;
};

/// What all ranks have found out.
struct RowsOfRanks {
  VocabularyRows vocabulary;
  CrossEntropyPositions positions;
  CrossEntropyRows rows;
};

/// What has the positions of a rank's logits in front of its last size, and their device.
inline const at::Tensor& positioned(const at::Tensor& logits) { return logits; }
template <typename Head>
const at::Tensor& positioned(const Head& head) {
  return head.hidden;
}

inline CrossEntropyPositions shard_positions(const ShardProblem& problem) {
  CrossEntropySettings settings = problem.settings;
  settings.class_weight.reset();
  settings.z_loss = 1;  // the weights of single positions are wanted, on any device
  auto positions = plain::cross_entropy_positions(settings, problem.shard.vocab_size, at::kDouble, Normalization());
  if (!positions.left_out.defined()) positions.left_out = at::zeros_like(settings.targets, at::kBool);
  return positions;
}

/// All but the rows, which follow from the columns.
template <typename Call>
ShardProblem checked_problem(const Call& call, const VocabularyShard& shard, bool wants_hidden) {
  ShardProblem of;
  of.shard = shard;
  const at::Tensor& like = positioned(call.own.logits());
  of.settings = checked_shard_settings(call.function, call.targets, call.options, like, shard);
  of.normalization = checked_normalization(call.function, call.options.reduction(), call.options.normalizer());
  of.type = arithmetic_type(like.scalar_type());
  of.common = common_numbers(of.settings, of.normalization, call.wanted, wants_hidden, like.scalar_type(),
                             call.own.vocab_size(), call.own.padded_size());
  of.positions = shard_positions(of);
  return of;
}

template <typename Call>
ShardProblem shard_problem(const Call& call, const VocabularyShard& shard, const at::Tensor& logits) {
  check_shard_logits(call.function, logits, shard, call.own.ranks().rank());
  check_not_overwritten_before(call.function, logits);
  ShardProblem of = checked_problem(call, shard, /*wants_hidden=*/false);
  const at::Tensor values = logits.detach();
  of.rows = shard_rows([&](const auto& visit) { for_each_shard_block(values, shard, visit); }, shard, of.settings,
                       call.wanted);
  return of;
}

template <typename Call, typename Head>
ShardProblem shard_problem(const Call& call, const VocabularyShard& shard, const Head& head) {
  const LinearInputs inputs = checked_linear_inputs(call.function, head);
  check_columns(call.function, "weight", inputs.classes(), shard, call.own.ranks().rank());
  ShardProblem of = checked_problem(call, shard, /*wants_hidden=*/call.records_graph && inputs.hidden.requires_grad());
  const LinearInputs classes = without_padding(inputs, shard);
  const at::Tensor hidden = rows_of_hidden(inputs, of.positions.left_out);
  const auto walk = [&](const auto& visit) {
    for_each_shard_block(classes, hidden,
                         [&](const at::Tensor& logits, int64_t first, const at::Tensor&) { visit(logits, first); });
  };
  of.rows = shard_rows(walk, shard, of.settings, call.wanted);
  return of;
}

template <typename Call>
ShardAttempt attempted_problem(const Call& call) {
  const at::NoGradGuard no_grad;
  try {
    const auto shard = checked_shard(call.function, call.own.ranks().rank(), call.own.ranks().size(),
                                     call.own.vocab_size(), call.own.padded_size());
    return {shard_problem(call, shard, call.own.logits()), nullptr};
  } catch (...) {
    return {std::nullopt, std::current_exception()};
  }
}

/// The first message of a call that this rank refuses to begin. Throws the refusal.
template <typename Own>
void refuse_for_all_ranks(const char* function, const Own& own, const std::exception_ptr& refusal) {
  const at::Tensor& like = positioned(own.logits());
  agree<2>(function, own.ranks(), like.defined() ? like.device() : at::Device(at::kCPU), ShardNumbers(), at::Tensor(),
           refusal);
}

/// From the messages of all ranks, each of which has refused or brings its problem.
template <typename Call>
RowsOfRanks rows_of_ranks(const Call& call, const ShardAttempt& attempt) {
  const at::NoGradGuard no_grad;
  if (attempt.refusal) refuse_for_all_ranks(call.function, call.own, attempt.refusal);
  const ShardProblem& of = *attempt.problem;
  const RankGroup& ranks = call.own.ranks();
  const at::Tensor& targets = of.settings.targets;
  const auto [highest, floor] =
      agree<2>(call.function, ranks, targets.device(), of.common,
               range_of(of.rows, ShardTargets(targets, of.shard), of.positions.left_out), nullptr);
  const bool has_one_reference = floor > highest - widest_range;
  RowsOfRanks result;
  result.vocabulary = call.wanted.prediction || !has_one_reference
                          ? gathered_rows(call.function, ranks, of.rows, targets)
                          : summed_rows(call.function, ranks, of.rows, common_reference(highest));
  result.positions = of.positions;
  result.positions.target_weight = result.vocabulary.target_weight;
  result.positions.scales = plain::reconstruction_scales(result.positions, of.normalization);
  result.rows = rows_of_vocabulary(result.vocabulary, of.settings, result.positions, of.shard.vocab_size);
  return result;
}

/// What all columns say of each position. A target out of range, which no one has looked for on a device, shows.
template <typename Own, typename Options>
CrossEntropyValues vocabulary_parallel_values(const char* function, const Own& own, const at::Tensor& targets,
                                              const Options& options) {
  const ShardCall<Own, Options> call{function, own, targets, options, everything_of_rows};
  const ShardAttempt attempt = attempted_problem(call);
  const RowsOfRanks of = rows_of_ranks(call, attempt);
  const CrossEntropyValues values = values_of_rows(of.rows, attempt.problem->settings, of.positions);
  const at::Tensor wrong = of.positions.token_weight * 0;
  const auto shown = [&](const at::Tensor& value) { return (value + wrong).to(attempt.problem->type); };
  return {shown(values.loss),    shown(values.nll), shown(values.log_sum_exp),
          shown(values.entropy), values.prediction, values.hit};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
