/// `synthetic`: the paper's section 4.1. A model for each seed and budget of free bits, and what its Z carries.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include <free_transformer/schedules.hpp>

#include "checkpoint.hpp"
#include "evaluation.hpp"
#include "generation.hpp"
#include "latent_agreement.hpp"
#include "plot.hpp"
#include "schedule_option.hpp"
#include "settings.hpp"
#include "synthetic_table.hpp"
#include "synthetic_text.hpp"
#include "train_command.hpp"

namespace example {

struct SyntheticSettings {
  std::filesystem::path output_folder = "synthetic_output";
  std::vector<uint64_t> seeds{1, 2, 3};
  std::vector<double> free_bits{1.0 / 64.0, 1.0 / 8.0, 1.0, 8.0};
  // With a small budget from the first step the decoder may have learnt to do without Z before Z says anything, and never
  // read it. So every budget begins with all that Z can hold.
  double first_free_bits = 8.0;
  int64_t annealing = 1500;
  int64_t lines = 20000;
  int64_t latents = 24;
  int64_t samples = 8;
  Settings training = default_training();

  static Settings default_training() {
    Settings training;
    training.model.width = 64;
    training.model.latent_dim = 8;  // what the largest budget fills
    training.batch_size = 8;
    training.optimizer.learning_rate = 2e-3;  // with 6e-3 what the decoder has read in Z is lost again
    training.steps = 3500;
    training.minutes = 0.0;
    return training;
  }
};

inline void add_synthetic_options(CLI::App& app, SyntheticSettings& settings) {
  auto& training = settings.training;
  app.add_option("--output-folder", settings.output_folder, "Where text, trainings, table and pictures go");
  app.add_option("--seed,--seeds", settings.seeds, "Of text, trainings and samples; everything is done for each");
  app.add_option("--free-bits", settings.free_bits, "Budgets, in bits a character")->check(CLI::PositiveNumber);
  app.add_option("--first-free-bits", settings.first_free_bits, "Where smaller budgets begin; 0: at their own value")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--annealing", settings.annealing, "Steps in which they fall to their own value, along a cosine")
      ->check(CLI::PositiveNumber);
  app.add_option("--lines", settings.lines, "Lines of text, a tenth of them held out")
      ->check(CLI::Range(100, 10000000));
  app.add_option("--latents", settings.latents, "Draws of Z that are compared")->check(CLI::Range(2, 1000));
  app.add_option("--samples", settings.samples, "Samples with each of them")->check(CLI::Range(2, 1000));
  app.add_option("--latent-dim", training.model.latent_dim, "Latent bits a character")->check(CLI::Range(1, 16));
  app.add_option("--width", training.model.width, "Width of the residual stream")->check(CLI::PositiveNumber);
  app.add_option("--blocks", training.model.blocks, "Blocks of the decoder")->check(CLI::Range(2, 1000));
  add_schedule(app, "--beta", training.beta, "Weight of the latent KL: " + schedule_forms());
  app.add_option("--steps", training.steps, "Steps for each budget")->check(CLI::PositiveNumber);
  app.add_option("--batch-size", training.batch_size, "Lines a step")->check(CLI::PositiveNumber);
  app.add_option("--learning-rate", training.optimizer.learning_rate, "At its highest, after the warm-up")
      ->check(CLI::PositiveNumber);
  app.add_option("--minutes", training.minutes, "Train no longer than this for each budget; 0 sets no limit")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--threads", training.threads, "Threads that compute")->check(CLI::PositiveNumber);
  app.add_flag("--resume", training.resume, "Go on with the trainings that are in the output folder");
}

namespace detail {

constexpr char synthetic_letter = 'K';

/// Texts after the prompt, in rows of those that have one Z. It is drawn from the prior at the prompt's places, too: the
/// prompt says nothing of what follows, and the encoder has never seen one alone.
inline std::vector<std::vector<std::string>> sample_synthetic(FreeTransformer& model, int64_t latents,
                                                              int64_t samples) {
  const auto prompt = tokens_of_prompt(model, std::string{synthetic_letter, '>'});
  const auto codes = model->sample_prior({latents, SyntheticTask::context});
  const auto texts = continue_text(model, prompt, codes.repeat_interleave(samples, 0));
  std::vector<std::vector<std::string>> rows;
  for (auto first = texts.begin(); first != texts.end(); first += samples) {
    rows.emplace_back(first, first + samples);
  }
  return rows;
}

/// For the picture: 0 an underscore, 1 the letter, 2 noise, 3 what does not belong there.
inline void write_matrix(const std::filesystem::path& file, const std::vector<std::string>& texts) {
  std::ofstream stream(file);
  for (const auto& text : texts) {
    for (const char character : text) {
      stream << (character == '_' ? 0 : character == synthetic_letter ? 1 : character == '!' ? 2 : 3) << ' ';
    }
    stream << '\n';
  }
}

/// For the picture: samples with a Z of their own, and as many with one.
inline void write_matrices(const std::filesystem::path& folder, const std::vector<std::vector<std::string>>& rows) {
  std::vector<std::string> fresh;
  for (const auto& row : rows) fresh.push_back(row[0]);
  fresh.resize(std::min(fresh.size(), rows[0].size()));
  write_matrix(folder / "own_latents.dat", fresh);
  write_matrix(folder / "one_latent.dat", rows[0]);
}

/// The KL of each latent bit in bits, the largest first.
inline std::vector<double> kl_of_bits(const free_transformer::LossMetrics& metrics) {
  std::vector<double> bits;
  for (const auto& [name, value] : metrics) {
    if (name.rfind("latent/kl_bits/", 0) == 0) bits.push_back(value);
  }
  std::sort(bits.rbegin(), bits.rend());
  return bits;
}

inline std::filesystem::path seed_folder(const SyntheticSettings& synthetic, uint64_t seed) {
  return synthetic.output_folder / ("seed_" + std::to_string(seed));
}

/// The budget at each step: it ends at free_bits.
inline free_transformer::Schedule schedule_of_budget(const SyntheticSettings& synthetic, double free_bits) {
  if (synthetic.first_free_bits <= free_bits) return free_bits;
  return free_transformer::Schedule::cosine(synthetic.first_free_bits, free_bits, synthetic.annealing);
}

inline Settings settings_of_budget(const SyntheticSettings& synthetic, uint64_t seed, double free_bits) {
  Settings settings = synthetic.training;
  const auto folder = seed_folder(synthetic, seed);
  char budget[40];
  std::snprintf(budget, sizeof budget, "kappa_%g", free_bits);
  settings.text = {folder / "text"};
  settings.output_folder = folder / budget;
  settings.window_step = SyntheticTask::line;
  settings.model.context = SyntheticTask::context;
  settings.free_bits = schedule_of_budget(synthetic, free_bits);
  settings.seed = seed;
  settings.evaluation_batches = 8;
  settings.prompt = std::string{synthetic_letter, '>'};
  settings.sample_bytes = int64_t{SyntheticTask::characters};
  return settings;
}

/// Trains a model with one budget, and sees what its Z carries.
inline SyntheticResult run_budget(const SyntheticSettings& synthetic, uint64_t seed, double free_bits) {
  std::printf("\nseed %llu, %s free bits a character\n", static_cast<unsigned long long>(seed),
              budget_text(free_bits).c_str());
  const auto settings = settings_of_budget(synthetic, seed, free_bits);
  train(settings);

  auto model = load_model(last_checkpoint(settings.output_folder));
  torch::manual_seed(seed);
  const Text held_out(find_text_files(settings.text).held_out, settings.model.context, settings.window_step);
  constexpr int64_t lines = 64, batches = 16;
  const auto evaluation = evaluate(model, held_out, lines, batches, /*samples=*/1);
  const auto rows = sample_synthetic(model, synthetic.latents, synthetic.samples);
  write_matrices(settings.output_folder, rows);
  return {seed,
          free_bits,
          evaluation.lower_bound.bits_per_token(),
          evaluation.metrics.at("latent/kl_bits"),
          kl_of_bits(evaluation.metrics),
          measure_agreement(rows, synthetic_letter)};
}

inline void draw_samples(const std::filesystem::path& folder, const std::vector<double>& budgets) {
  std::ostringstream words;
  for (const double budget : budgets) words << budget << ' ';
  if (draw_with_gnuplot("plot_synthetic.gp", {folder, folder / "samples.svg", words.str()})) {
    std::printf("\nsamples: %s\n", (folder / "samples.svg").c_str());
  } else {
    std::printf("\nno picture, as gnuplot is missing or failed\n");
  }
}

}  // namespace detail

inline void run_synthetic(const SyntheticSettings& synthetic) {
  std::vector<SyntheticResult> results;
  const auto table = synthetic.output_folder / "table.csv";
  for (const auto seed : synthetic.seeds) {
    const auto folder = detail::seed_folder(synthetic, seed);
    write_synthetic_text(folder / "text", synthetic.lines / 10, seed);
    for (const double free_bits : synthetic.free_bits) {
      results.push_back(detail::run_budget(synthetic, seed, free_bits));
      write_table(table, results);  // each time: an interrupted run keeps what is done
    }
    detail::draw_samples(folder, synthetic.free_bits);
  }
  print_tables(results, synthetic.free_bits);
  std::printf("\ntable: %s\n", table.c_str());
}

}  // namespace example
