/// `train`: a training from start to end.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

#include <free_transformer/loss_metrics.hpp>

#include "checkpoint.hpp"
#include "generation.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "plot.hpp"
#include "ranks.hpp"
#include "settings.hpp"
#include "text.hpp"
#include "text_files.hpp"
#include "training.hpp"

namespace example {

inline void report_evaluation(const free_transformer::LossMetrics& metrics) {
  std::printf(
      "held-out files: bound/elbo %.4f nats a byte (%.4f bits), reconstruction %.4f nats, latent KL %.4f bits\n",
      metrics.at("bound/elbo"), metrics.at("bound/elbo_bits"), metrics.at("loss/reconstruction"),
      metrics.at("latent/kl_bits"));
}

inline void draw(const std::filesystem::path& folder) {
  const auto log = folder / "training_log.csv", picture = folder / "training.svg";
  if (draw_with_gnuplot("plot_training.gp", {log, picture, folder / "validation_log.csv"})) {
    std::printf("curves: %s, drawn from %s\n", picture.c_str(), log.c_str());
  } else {
    std::printf("no picture, as gnuplot is missing or failed; the curves are in %s\n", log.c_str());
  }
}

/// The text is known by its size and fingerprint.
inline std::string settings_text(const Settings& settings, const Text& training, const Text& held_out) {
  std::string text = settings_of_numbers(settings);
  for (const auto* part : {&training, &held_out}) {
    text +=
        "text of " + std::to_string(part->size()) + " bytes, fingerprint " + std::to_string(part->fingerprint()) + '\n';
  }
  return text;
}

/// Takes up the last checkpoint if that is asked for, or clears the folder for a new training. Only rank 0 writes there.
inline void begin_or_resume(const Settings& settings, Ranks& ranks, TrainingState& state, const std::string& text) {
  ranks.check_same("settings and text", fingerprint(text.data(), text.size()));
  if (ranks.is_first()) {
    std::filesystem::create_directories(settings.output_folder);
    if (!settings.resume) remove_checkpoints(settings.output_folder);
  }
  ranks.barrier();
  if (settings.resume && load_checkpoint(settings.output_folder, state, text)) {
    std::printf("going on after step %lld\n", static_cast<long long>(state.step));
  } else if (settings.resume) {
    std::printf("no checkpoint in %s: a new training\n", settings.output_folder.c_str());
  }
  check_same_model(ranks, state);
}

inline void announce_length(const Settings& settings) {
  std::printf("%lld steps", static_cast<long long>(settings.steps));
  if (settings.minutes > 0.0) {
    std::printf(", or as many as fit into %g minutes", settings.minutes);
  }
  std::printf("; the evaluation and a sample of %lld bytes follow\n", static_cast<long long>(settings.sample_bytes));
  std::fflush(stdout);
}

inline void check_batch(const Settings& settings, const Ranks& ranks) {
  if (settings.batch_size < ranks.size()) {
    throw std::runtime_error("--batch-size must give each rank a window, got " + std::to_string(settings.batch_size) +
                             " windows and " + std::to_string(ranks.size()) + " ranks");
  }
}

/// Only rank 0 speaks, and writes files; what follows the training is its work alone.
inline void train(const Settings& settings, Ranks& ranks) {
  check_batch(settings, ranks);
  if (!ranks.is_first() && std::freopen("/dev/null", "w", stdout) == nullptr) {
    throw std::runtime_error("cannot open /dev/null");
  }
  at::set_num_threads(settings.threads);
  torch::manual_seed(settings.seed);
  const auto files = find_text_files(settings.text);
  const Text training_text(files.training, settings.model.context, settings.window_step);
  const Text held_out_text(files.held_out, settings.model.context, settings.window_step);
  FreeTransformer model(settings.model);
  std::printf("%zu files to learn from, %lld bytes; %zu held out, %lld bytes; %lld parameters; %d threads\n",
              files.training.size(), static_cast<long long>(training_text.size()), files.held_out.size(),
              static_cast<long long>(held_out_text.size()), static_cast<long long>(parameter_count(*model)),
              at::get_num_threads());
  if (ranks.size() > 1)
    std::printf("%d ranks share each step's %lld windows\n", ranks.size(), static_cast<long long>(settings.batch_size));
  announce_length(settings);

  Optimizer optimizer(*model, settings.optimizer);
  TrainingState state{model, optimizer};
  const auto text = settings_text(settings, training_text, held_out_text);
  begin_or_resume(settings, ranks, state, text);
  Training(settings, ranks, training_text, held_out_text, state, text).run();
  if (!ranks.is_first()) return;

  auto criterion = make_criterion(settings);
  report_evaluation(validate(model, criterion, held_out_text, settings, settings.evaluation_batches));
  draw(settings.output_folder);
  const auto prompt = tokens_of_prompt(model, settings.prompt);
  const auto sample =
      continue_text(model, prompt, draw_codes(model, prompt, settings.sample_bytes, /*samples=*/1)).at(0);
  std::printf("\nA sample%s:\n%s\n", settings.model.baseline ? "" : ", its codes drawn from the prior",
              without_control_characters(settings.prompt + sample).c_str());
}

/// By this process alone.
inline void train(const Settings& settings) {
  Ranks alone;
  train(settings, alone);
}

}  // namespace example
