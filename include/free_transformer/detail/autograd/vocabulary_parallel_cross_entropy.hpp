/// Cross entropy over a vocabulary that is split among ranks, as a node of the graph.
///
/// Forward, in two messages: one that all ranks agree by, one with the rows' sums. Saved for backward: the columns of
/// this rank (or what makes them) and ten numbers a row. Backward is local, but for the gradient of hidden, which all
/// ranks' heads add to.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/loss_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/distributed/shard_blocks.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"
#include "free_transformer/detail/linear_head/gradients.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/detail/settings.hpp"
#include "free_transformer/detail/vocabulary_parallel.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The loss of all ranks, and what this one's gradient is made of.
struct ShardLoss {
  LossAndSums result;
  ShardGradient gradient;
};

template <typename Call>
ShardLoss loss_of_ranks(const Call& call, const ShardAttempt& attempt) {
  const RowsOfRanks of = rows_of_ranks(call, attempt);
  const at::NoGradGuard no_grad;
  const ShardProblem& problem = *attempt.problem;
  const CrossEntropySettings& settings = problem.settings;
  ShardLoss loss;
  loss.gradient =
      shard_gradient(problem.rows, of.vocabulary, of.rows, settings, of.positions, problem.shard.vocab_size);
  loss.result.sums = plain::reconstruction_sums(of.rows, settings, of.positions);
  loss.result.loss = problem.normalization.reduction == ReductionKind::none
                         ? losses_of_rows(of.rows, settings, of.positions)
                               .reshape(shape_of_positions(positioned(call.own.logits())))
                               .to(problem.type)
                         : reduced_loss(loss.result.sums, of.positions.scales, settings.z_loss > 0, problem.type);
  return loss;
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

  /// Of the columns of a block of logits, which `gradient` may be.
  void write_gradient(const at::Tensor& block, int64_t first, const at::Tensor& upstream,
                      const at::Tensor& gradient) const {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, block.size(0)); };
    write_shard_gradient(block, ShardTargets(part(settings_.targets), shard_), part_of(loss_.gradient, part), settings_,
                         part(upstream), gradient);
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
      write_gradient(block, first, upstream, rows.narrow(0, first, block.size(0)).narrow(1, 0, shard_.classes));
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
      write_gradient(logits, first, upstream, logits);
      const at::Tensor hidden_gradient =
          wanted.hidden.defined() ? wanted.hidden.narrow(0, first, block.size(0)) : at::Tensor();
      add_to_gradients(classes, block, logits, hidden_gradient, wanted, /*is_first_block=*/first == 0);
    });
    return finished(wanted, inputs);
  }

  Tensors finished(LinearGradients& sums, const LinearInputs& inputs) const {
    const auto padded = [&](const at::Tensor& gradient, const at::Tensor& like) {
      if (shard_.classes == shard_.columns) return gradient.to(like.scalar_type());
      at::Tensor all = at::zeros(like.sizes(), like.options());
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

inline LossAndSums run_shard(const at::Tensor& logits, const RankGroup&, const ShardProblem& problem, ShardLoss loss) {
  return run(c10::make_intrusive<ShardLogitsPass>(problem, std::move(loss)), {logits});
}

template <typename Head>
LossAndSums run_shard(const Head& head, const RankGroup& ranks, const ShardProblem& problem, ShardLoss loss) {
  return run(c10::make_intrusive<ShardHeadPass>(problem, std::move(loss), ranks, head.block_bytes()),
             {head.hidden, head.weight, head.bias});
}

/// `own` as in `ShardCall`.
template <typename Own, typename Options>
LossAndSums vocabulary_parallel_loss(const char* function, const Own& own, const at::Tensor& targets,
                                     const Options& options) {
  const WantedOfRows wanted{/*sums=*/true, /*each=*/false, /*prediction=*/options.accuracy()};
  const ShardCall<Own, Options> call{function, own, targets, options, wanted};
  const ShardAttempt attempt = attempted_problem(call);
  ShardLoss loss = loss_of_ranks(call, attempt);
  return run_shard(own.logits(), own.ranks(), *attempt.problem, std::move(loss));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
