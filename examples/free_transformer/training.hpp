/// The training loop.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <free_transformer/distributed.hpp>
#include <free_transformer/losses.hpp>

#include "checkpoint.hpp"
#include "fingerprint.hpp"
#include "gradient_sum.hpp"
#include "latent_warnings.hpp"
#include "metrics_log.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "progress.hpp"
#include "random_state.hpp"
#include "ranks.hpp"
#include "settings.hpp"
#include "text.hpp"

namespace example {

using free_transformer::FreeTransformerLoss;
using free_transformer::LossMetrics;

inline FreeTransformerLoss make_criterion(const Settings& settings) {
  return FreeTransformerLoss(
      free_transformer::VAELossOptions().latent_dim(settings.model.latent_dim).kl_of_each_bit(settings.kl_of_each_bit));
}

/// The weights that a step is trained with; free_bits is in bits a byte.
struct Balance {
  double beta;
  double free_bits;
};

/// Gives the loss what the schedules have for a step, 0 being the first.
inline Balance set_balance(FreeTransformerLoss& criterion, const Settings& settings, int64_t step) {
  const Balance balance{settings.beta(step), settings.free_bits(step)};
  criterion->options.beta_kl(balance.beta).free_bits(free_transformer::bits(balance.free_bits));
  return balance;
}

/// The head fused with the loss gives the numbers of dense logits, to rounding.
inline free_transformer::VAELossOutput loss_of(FreeTransformer& model, FreeTransformerLoss& criterion,
                                               const Batch& batch, bool fused_head) {
  const auto output = model(batch.tokens, batch.first, batch.whole);
  return fused_head ? criterion(model->fused_logits(output.hidden), batch.targets, output.z_logits)
                    : criterion(model->logits(output.hidden), batch.targets, output.z_logits);
}

/// The metrics on windows that lie evenly over a text. Training goes on with the numbers that it would have had.
inline LossMetrics validate(FreeTransformer& model, FreeTransformerLoss& criterion, const Text& text,
                            const Settings& settings, int64_t batches) {
  torch::NoGradGuard no_grad;
  const RandomStateGuard random(settings.seed);
  LossMetrics metrics;
  for (int64_t index = 0; index < batches; ++index) {
    const auto batch = text.even_batch(settings.batch_size, index, batches);
    metrics += loss_of(model, criterion, batch, settings.fused_head).metrics;
  }
  return metrics;
}

/// Part of the training that is done: of the steps, or of the minutes if they run out sooner.
inline double part_done(const Settings& settings, const TrainingState& state) {
  const auto of_steps = static_cast<double>(state.step) / static_cast<double>(settings.steps);
  const auto of_minutes = settings.minutes > 0.0 ? state.seconds / (60.0 * settings.minutes) : 0.0;
  return std::min(1.0, std::max(of_steps, of_minutes));
}

/// Throws on every rank unless all have the same step and the same weights, to the last bit.
inline void check_same_model(Ranks& ranks, const TrainingState& state) {
  if (ranks.size() == 1) return;
  auto value = static_cast<uint64_t>(state.step);
  for (const auto& parameter : state.model->parameters()) {
    value = value * 31 + fingerprint(parameter.data_ptr(), parameter.nbytes());
  }
  ranks.check_same("model after step " + std::to_string(state.step), value);
}

class Training {
 public:
  /// Goes on from the state's step. settings_text is what a checkpoint keeps to be compared. The ranks must have the same of all.
  Training(const Settings& settings, Ranks& ranks, const Text& text, const Text& held_out, TrainingState& state,
           std::string settings_text)
      : settings_(settings),
        ranks_(ranks),
        text_(text),
        held_out_(held_out),
        state_(state),
        settings_text_(std::move(settings_text)) {
    if (!ranks.is_first()) return;
    log_.emplace(settings.output_folder / "training_log.csv", state.step);
    validation_log_.emplace(settings.output_folder / "validation_log.csv", state.step);
  }

  void run() {
    constexpr int64_t steps_a_report = 10;
    const Stopwatch stopwatch(state_.seconds);
    double done = part_done(settings_, state_);
    while (done < 1.0) {
      balance_ = set_balance(criterion_, settings_, state_.step);
      take_step(done);
      state_.seconds = ranks_.from_first(stopwatch.seconds());
      done = part_done(settings_, state_);

      const bool saves = is_due(settings_.checkpoint_every, done);
      // A checkpoint has no half-filled report.
      if (saves || is_due(steps_a_report, done)) report(done);
      if (ranks_.is_first() && is_due(settings_.validate_every, done)) validate_now();
      if (saves) check_same_model(ranks_, state_);
      if (ranks_.is_first() && saves) save();
    }
  }

 private:
  bool is_due(int64_t every, double done) const { return every > 0 && (state_.step % every == 0 || done >= 1.0); }

  /// The gradient of the whole batch, part by part: each part's sums are divided by the tokens of all. Every rank draws all of
  /// the windows and latent bits from the same generator, and computes its share.
  void take_step(double done) {
    const auto batch = text_.random_batch(settings_.batch_size);
    const auto share = share_of(batch, ranks_.rank(), ranks_.size());
    const auto before_latents = random_state();
    const auto count = static_cast<double>(batch.targets.numel());
    criterion_->options.reconstruction().normalizer(count);
    criterion_->options.kl().normalizer(count);
    for (const auto& part : parts_of(share, settings_.micro_batches)) {
      set_random_state(before_latents);
      const auto [loss, metrics] = loss_of(state_.model, criterion_, part, settings_.fused_head);
      loss.backward();
      metrics_ += metrics;
    }
    sum_gradients(ranks_, state_.model->parameters());
    gradient_norm_ = state_.optimizer.step(done);
    ++state_.step;
  }

  /// The ranks' metrics as those of one batch.
  LossMetrics metrics_of_all() {
    if (ranks_.size() == 1) return metrics_;
    return ranks_.collective([&](const auto& group) { return free_transformer::sum_across_ranks(metrics_, group); });
  }

  void report(double done) {
    const auto metrics = metrics_of_all();
    metrics_ = LossMetrics();
    if (ranks_.is_first()) show(metrics, done);
  }

  void show(const LossMetrics& metrics, double done) {
    const auto tokens = state_.step * settings_.batch_size * settings_.model.context;
    const Progress progress{state_.step, settings_.steps, tokens, state_.seconds, done};
    log_->write(state_.step, metrics,
                {{"beta", balance_.beta},
                 {"free_bits", balance_.free_bits},
                 {"gradient_norm", gradient_norm_},
                 {"seconds", state_.seconds}});
    line_.show(progress, metrics);
    if (!settings_.model.baseline) watch_.look(metrics, balance_.free_bits, state_.step, done);
  }

  void validate_now() {
    validation_log_->write(state_.step,
                           validate(state_.model, criterion_, held_out_, settings_, settings_.validation_batches));
  }

  /// The logs first, so that they hold at least what the checkpoint says was done.
  void save() const {
    bring_to_disk(log_->file());
    bring_to_disk(validation_log_->file());
    save_checkpoint(settings_.output_folder, state_, settings_text_);
  }

  const Settings& settings_;
  Ranks& ranks_;
  const Text& text_;
  const Text& held_out_;
  TrainingState& state_;
  std::string settings_text_;
  FreeTransformerLoss criterion_ = make_criterion(settings_);
  Balance balance_{};
  LossMetrics metrics_;
  double gradient_norm_ = 0.0;                      // of the last step
  std::optional<MetricsLog> log_, validation_log_;  // rank 0's
  ProgressLine line_;
  LatentWatch watch_;
};

}  // namespace example
