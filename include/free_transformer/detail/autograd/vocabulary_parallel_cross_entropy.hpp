/// Cross entropy over a vocabulary that is split among ranks, as a node of the graph.
///
/// Forward, in two messages: one that all ranks agree by, one with the rows' sums. Saved for backward: the columns of
/// this rank (or what makes them) and ten numbers a row. Backward is local, but for the gradient of hidden, which all
/// ranks' heads add to.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <array>
#include <cstdint>
#include <exception>
#include <optional>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/loss_node.hpp"
#include "free_transformer/detail/checks/vocabulary_parallel.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/distributed/agreement.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/distributed/shard_blocks.hpp"
#include "free_transformer/detail/distributed/vocabulary_rows.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"
#include "free_transformer/detail/linear_head/gradients.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

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

/// The loss of all ranks, and what this one's gradient is made of.
struct ShardLoss {
  LossAndSums result;
  ShardGradient gradient;
};

inline CrossEntropyPositions shard_positions(const ShardProblem& problem) {
  CrossEntropySettings settings = problem.settings;
  settings.class_weight.reset();
  settings.z_loss = 1;  // the weights of single positions are wanted, on any device
  auto positions = plain::cross_entropy_positions(settings, problem.shard.vocab_size, at::kDouble, Normalization());
  if (!positions.left_out.defined()) positions.left_out = at::zeros_like(settings.targets, at::kBool);
  return positions;
}

/// The device on which the ranks speak of these columns.
inline at::Device device_of_shard(const at::Tensor& logits) {
  return logits.defined() ? logits.device() : at::Device(at::kCPU);
}

template <typename Head>
at::Device device_of_shard(const Head& head) {
  return device_of_shard(head.hidden);
}

/// From the messages of all ranks, each of which has refused or brings its problem. `positioned` has the positions in
/// front of its last size.
inline ShardLoss loss_of_ranks(const char* function, const RankGroup& ranks, const at::Tensor& positioned,
                               const std::optional<ShardProblem>& problem, bool count_hits,
                               const std::exception_ptr& refusal) {
  const at::NoGradGuard no_grad;
  ShardRange own{0, 0};
  if (problem) {
    own = range_of(problem->rows, ShardTargets(problem->settings.targets, problem->shard), problem->positions.left_out);
  }
  const auto range = agree(function, ranks, device_of_shard(positioned), problem ? problem->common : ShardNumbers(),
                           std::array<double, 2>{own.highest, own.floor}, refusal);
  const auto& [shard, settings, normalization, known, rows_here, type, common] = *problem;
  const double highest = range[0], floor = range[1];
  const bool has_one_reference = floor > highest - widest_range;
  const VocabularyRows all = count_hits || !has_one_reference
                                 ? gathered_rows(function, ranks, rows_here, settings.targets)
                                 : summed_rows(function, ranks, rows_here, common_reference(highest));
  CrossEntropyPositions positions = known;
  positions.target_weight = all.target_weight;
  positions.scales = plain::reconstruction_scales(positions, normalization);
  const CrossEntropyRows rows = rows_of_vocabulary(all, settings, positions, shard.vocab_size);
  ShardLoss loss;
  loss.gradient = shard_gradient(rows_here, all, rows, settings, positions, shard.vocab_size);
  loss.result.sums = plain::reconstruction_sums(rows, settings, positions);
  loss.result.loss = normalization.reduction == ReductionKind::none
                         ? losses_of_rows(rows, settings, positions).reshape(shape_of_positions(positioned)).to(type)
                         : reduced_loss(loss.result.sums, positions.scales, settings.z_loss > 0, type);
  return loss;
}

/// The first message of a loss that this rank refuses to begin. Throws the refusal.
template <typename Logits>
void refuse_for_all_ranks(const char* function, const RankGroup& ranks, const Logits& logits,
                          const std::exception_ptr& refusal) {
  agree(function, ranks, device_of_shard(logits), ShardNumbers(), std::array<double, 2>(), refusal);
}

/// The loss that is known already, on its way into the graph.
class VocabularyParallelPass : public LossPass {
 public:
  VocabularyParallelPass(const ShardProblem& problem, ShardLoss loss)
      : shard_(problem.shard), settings_(kept_settings(problem.settings)), loss_(std::move(loss)) {}

  LossAndSums forward(const Tensors&, bool /*needs_gradient*/) override { return std::move(loss_.result); }

  Tensors backward(const Tensors& inputs, const at::Tensor& upstream) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "compute_reconstruction_loss: VocabParallelLogits must not be differentiated twice (create_graph)");
    const int64_t positions = settings_.targets.size(0);
    return gradients(inputs, upstream.reshape({-1}).to(at::kDouble).expand({positions}));
  }

  std::vector<at::Tensor*> saved_tensors() override {
    auto tensors = loss_.gradient.tensors();
    tensors.push_back(&settings_.targets);
    tensors.push_back(&settings_.class_weight);
    return tensors;
  }

 protected:
  virtual Tensors gradients(const Tensors& inputs, const at::Tensor& upstream) = 0;

  /// Of the columns of a block of logits.
  at::Tensor gradient_of(const at::Tensor& block, int64_t first, const at::Tensor& upstream) const {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    return gradient_of_shard_block(block, ShardTargets(part(settings_.targets), shard_), part_of(loss_.gradient, part),
                                   settings_, part(upstream));
  }

  VocabularyShard shard_;
  CrossEntropySettings settings_;
  ShardLoss loss_;
};

class ShardLogitsPass final : public VocabularyParallelPass {
 public:
  using VocabularyParallelPass::VocabularyParallelPass;

 private:
  Tensors gradients(const Tensors& inputs, const at::Tensor& upstream) override {
    const at::Tensor& logits = inputs[0];
    const at::Tensor gradient = at::empty(logits.sizes(), logits.options());
    const at::Tensor rows = gradient.view({settings_.targets.size(0), shard_.columns});
    rows.narrow(1, shard_.classes, shard_.columns - shard_.classes).zero_();
    for_each_shard_block(logits.detach(), shard_, [&](const at::Tensor& block, int64_t first) {
      rows.narrow(0, first, block.size(0)).narrow(1, 0, shard_.classes).copy_(gradient_of(block, first, upstream));
    });
    return {gradient};
  }
};

/// The logits are made once more in backward: their gradient depends on the other ranks' shards, and does not exist
/// before.
class ShardHeadPass final : public VocabularyParallelPass {
 public:
  ShardHeadPass(const ShardProblem& problem, ShardLoss loss, RankGroup ranks, int64_t block_bytes)
      : VocabularyParallelPass(problem, std::move(loss)), ranks_(std::move(ranks)), block_bytes_(block_bytes) {}

 private:
  Tensors gradients(const Tensors& tensors, const at::Tensor& upstream) override {
    const LinearInputs inputs{tensors[0], tensors[1], tensors[2], block_bytes_};
    const bool wants_bias = inputs.bias.defined() && inputs.bias.requires_grad();
    const auto type = arithmetic_type(inputs.hidden.scalar_type());
    const LinearInputs classes = without_padding(inputs, shard_);
    const at::Tensor hidden = rows_of_hidden(inputs, loss_.gradient.is_zero);
    LinearGradients wanted;
    if (inputs.hidden.requires_grad()) wanted.hidden = at::zeros(hidden.sizes(), hidden.options().dtype(type));
    if (inputs.weight.requires_grad()) wanted.weight = WeightGradient(classes), wanted.weight.zero();
    if (wants_bias) wanted.bias = at::zeros({shard_.classes}, hidden.options().dtype(type));
    for_each_shard_block(classes, hidden, [&](const at::Tensor& logits, int64_t first, const at::Tensor& block) {
      logits.copy_(gradient_of(logits, first, upstream));
      const at::Tensor of_hidden =
          wanted.hidden.defined() ? wanted.hidden.narrow(0, first, block.size(0)) : at::Tensor();
      add_to_gradients(classes, block, logits, of_hidden, wanted, /*is_first_block=*/first == 0);
    });
    return finished(wanted, inputs);
  }

  Tensors finished(LinearGradients& sums, const LinearInputs& inputs) const {
    const auto padded = [&](const at::Tensor& gradient, const at::Tensor& like) {
      if (shard_.classes == shard_.columns) return gradient.to(like.scalar_type());
      const at::Tensor all = at::zeros(like.sizes(), like.options());
      all.narrow(0, 0, shard_.classes).copy_(gradient);
      return all;
    };
    Tensors result(3);
    if (sums.hidden.defined()) {
      ranks_.sum("compute_reconstruction_loss (backward)", sums.hidden);
      result[0] = sums.hidden.to(inputs.hidden.scalar_type()).reshape(inputs.hidden.sizes());
    }
    if (sums.weight.defined()) result[1] = padded(sums.weight.finished(), inputs.weight);
    if (sums.bias.defined()) result[2] = padded(sums.bias, inputs.bias);
    return result;
  }

  RankGroup ranks_;
  int64_t block_bytes_;
};

/// What `prepare` makes of this rank's arguments, or why it refuses them.
template <typename Prepare>
std::pair<std::optional<ShardProblem>, std::exception_ptr> prepared(const Prepare& prepare) {
  const at::NoGradGuard no_grad;
  try {
    return {prepare(), nullptr};
  } catch (...) {
    return {std::nullopt, std::current_exception()};
  }
}

/// All but the rows, which follow from the columns. `positioned` has their positions, device and type; normalization()
/// checks that of the options.
template <typename Options, typename CheckedNormalization>
ShardProblem checked_problem(const char* function, const VocabularyShard& shard, int64_t padded_size,
                             const at::Tensor& positioned, const at::Tensor& targets, const Options& options,
                             const CheckedNormalization& normalization, bool wants_hidden) {
  ShardProblem of;
  of.shard = shard;
  of.settings = checked_shard_settings(function, targets, options, positioned, shard);
  of.normalization = normalization();
  of.type = arithmetic_type(positioned.scalar_type());
  of.common = common_numbers(of.settings, of.normalization, options.accuracy(), wants_hidden, positioned.scalar_type(),
                             shard.vocab_size, padded_size);
  of.positions = shard_positions(of);
  return of;
}

/// Dense columns, [..., columns of this rank].
template <typename Options, typename CheckedNormalization>
LossAndSums vocabulary_parallel_loss(const char* function, const RankGroup& ranks, const at::Tensor& logits,
                                     int64_t vocab_size, int64_t padded_size, const at::Tensor& targets,
                                     const Options& options, const CheckedNormalization& normalization) {
  const bool count_hits = options.accuracy();
  const auto [problem, refusal] = prepared([&] {
    const auto shard = checked_shard(function, ranks.rank(), ranks.size(), vocab_size, padded_size);
    check_shard_logits(function, logits, shard, ranks.rank());
    ShardProblem of = checked_problem(function, shard, padded_size, logits, targets, options, normalization,
                                      /*wants_hidden=*/false);
    const at::Tensor values = logits.detach();
    of.rows = shard_rows([&](const auto& visit) { for_each_shard_block(values, of.shard, visit); }, of.shard,
                         of.settings, count_hits);
    return of;
  });
  ShardLoss loss = loss_of_ranks(function, ranks, logits, problem, count_hits, refusal);
  return run(c10::make_intrusive<ShardLogitsPass>(*problem, std::move(loss)), logits);
}

/// A shard of the fused head: `head` has hidden, weight and bias.
template <typename Head, typename Options, typename CheckedNormalization>
LossAndSums vocabulary_parallel_loss(const char* function, const RankGroup& ranks, const Head& head, int64_t vocab_size,
                                     int64_t padded_size, const at::Tensor& targets, const Options& options,
                                     const CheckedNormalization& normalization) {
  const bool count_hits = options.accuracy();
  const bool wants_hidden = at::GradMode::is_enabled() && head.hidden.defined() && head.hidden.requires_grad();
  const auto [problem, refusal] = prepared([&] {
    const auto shard = checked_shard(function, ranks.rank(), ranks.size(), vocab_size, padded_size);
    const LinearInputs inputs = checked_linear_inputs(function, head);
    check_columns(function, "weight", inputs.classes(), shard, ranks.rank());
    ShardProblem of =
        checked_problem(function, shard, padded_size, inputs.hidden, targets, options, normalization, wants_hidden);
    const LinearInputs classes = without_padding(inputs, of.shard);
    const at::Tensor hidden = rows_of_hidden(inputs, of.positions.left_out);
    const auto walk = [&](const auto& visit) {
      for_each_shard_block(classes, hidden,
                           [&](const at::Tensor& logits, int64_t first, const at::Tensor&) { visit(logits, first); });
    };
    of.rows = shard_rows(walk, of.shard, of.settings, count_hits);
    return of;
  });
  ShardLoss loss = loss_of_ranks(function, ranks, head.hidden, problem, count_hits, refusal);
  return run(c10::make_intrusive<ShardHeadPass>(*problem, std::move(loss), ranks, head.block_bytes()), head.hidden,
             head.weight, head.bias);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
