/// `synthetic`: the paper's section 4.1. A model for each of four budgets of free bits, and what its Z carries.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint.hpp"
#include "evaluation.hpp"
#include "generation.hpp"
#include "latent_agreement.hpp"
#include "plot.hpp"
#include "settings.hpp"
#include "synthetic_text.hpp"
#include "train_command.hpp"

namespace example {

struct SyntheticSettings {
  std::filesystem::path output_folder = "synthetic_output";
  int64_t lines = 20000;
  int64_t width = 64;
  int64_t steps = 3000;
  double minutes = 2.5;
  int64_t latents = 12;
  int64_t samples = 8;
  uint64_t seed = 1;
  int threads = 1;
};

inline void add_synthetic_options(CLI::App& app, SyntheticSettings& settings) {
  app.add_option("--output-folder", settings.output_folder, "Where text, trainings, table and picture go");
  app.add_option("--lines", settings.lines, "Lines of text, a tenth of them held out")
      ->check(CLI::Range(100, 10000000));
  app.add_option("--width", settings.width, "Width of the residual stream")->check(CLI::PositiveNumber);
  app.add_option("--steps", settings.steps, "Steps for each budget")->check(CLI::PositiveNumber);
  app.add_option("--minutes", settings.minutes, "Train no longer than this for each budget; 0 sets no limit")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--latents", settings.latents, "Draws of Z that are compared")->check(CLI::Range(2, 1000));
  app.add_option("--samples", settings.samples, "Samples with each of them")->check(CLI::Range(2, 1000));
  app.add_option("--seed", settings.seed, "Of text, trainings and samples");
  app.add_option("--threads", settings.threads, "Threads that compute")->check(CLI::PositiveNumber);
}

namespace detail {

constexpr char synthetic_letter = 'K';

/// Texts after the prompt, in rows of those that have one Z; without it each sample's own.
inline std::vector<std::vector<std::string>> sample_synthetic(FreeTransformer& model, int64_t latents,
                                                              int64_t samples) {
  const auto prompt = tokens_of_prompt(model, std::string{synthetic_letter, '>'});
  const auto codes = draw_codes(model, prompt, int64_t{SyntheticTask::characters}, latents);
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

}  // namespace detail

inline Settings settings_of_budget(const SyntheticSettings& synthetic, double free_bits, const std::string& name) {
  Settings settings;
  settings.text = {synthetic.output_folder / "text"};
  settings.window_step = SyntheticTask::line;
  settings.output_folder = synthetic.output_folder / name;
  settings.model.context = SyntheticTask::context;
  settings.model.width = synthetic.width;
  settings.model.latent_dim = 10;  // more than the largest budget of 8 bits
  settings.free_bits = free_bits;
  settings.batch_size = 16;
  settings.steps = synthetic.steps;
  settings.minutes = synthetic.minutes;
  settings.evaluation_batches = 8;
  settings.prompt = std::string{detail::synthetic_letter, '>'};
  settings.sample_bytes = int64_t{SyntheticTask::characters};
  settings.seed = synthetic.seed;
  settings.threads = synthetic.threads;
  settings.checkpoint_every = settings.steps;
  return settings;
}

inline void run_synthetic(const SyntheticSettings& synthetic) {
  write_synthetic_text(synthetic.output_folder / "text", synthetic.lines / 10, synthetic.seed);
  const auto table_file = synthetic.output_folder / "table.csv";
  std::ofstream table(table_file);
  table
      << "free_bits,bound_bits,kl_bits,position_one_z,position_other_z,noise_one_z,noise_other_z,well_formed,carried\n";
  const std::vector<std::pair<std::string, double>> budgets{
      {"kappa_1_64", 1.0 / 64.0}, {"kappa_1_8", 1.0 / 8.0}, {"kappa_1", 1.0}, {"kappa_8", 8.0}};
  std::string report;
  for (const auto& [name, free_bits] : budgets) {
    std::printf("\n%s: %g bits a character\n", name.c_str(), free_bits);
    const auto settings = settings_of_budget(synthetic, free_bits, name);
    train(settings);

    auto model = load_model(last_checkpoint(settings.output_folder));
    torch::manual_seed(synthetic.seed);
    const Text held_out(find_text_files(settings.text).held_out, settings.model.context, settings.window_step);
    const auto evaluation = evaluate(model, held_out, settings.batch_size, settings.evaluation_batches, /*samples=*/1);
    const auto rows = detail::sample_synthetic(model, synthetic.latents, synthetic.samples);
    const auto agreement = measure_agreement(rows, detail::synthetic_letter);
    detail::write_matrix(settings.output_folder / "one_latent.dat", rows[0]);
    std::vector<std::string> fresh;
    for (const auto& row : rows) fresh.push_back(row[0]);
    fresh.resize(std::min<size_t>(fresh.size(), rows[0].size()));
    detail::write_matrix(settings.output_folder / "own_latents.dat", fresh);

    const auto bound = evaluation.lower_bound.bits_per_token();
    const auto kl = evaluation.metrics.at("latent/kl_bits");
    const auto& one = agreement.one_latent;
    const auto& other = agreement.other_latents;
    table << free_bits << ',' << bound << ',' << kl << ',' << one.position << ',' << other.position << ',' << one.noise
          << ',' << other.noise << ',' << agreement.well_formed << ',' << carried(agreement) << std::endl;
    char line[200];
    std::snprintf(line, sizeof line, "%9g %9.4f %9.4f   %8.2f %8.2f   %8.2f %8.2f   %8.2f   %s\n", free_bits, bound, kl,
                  one.position, other.position, one.noise, other.noise, agreement.well_formed,
                  carried(agreement).c_str());
    report += line;
  }
  std::printf("\n%9s %9s %9s   %17s   %17s   %8s\n", "", "bound", "KL", "position", "noise", "well");
  std::printf("%9s %9s %9s   %8s %8s   %8s %8s   %8s   %s\n%s", "free bits", "bits", "bits", "one Z", "other Z",
              "one Z", "other Z", "formed", "Z carries", report.c_str());
  const auto picture = synthetic.output_folder / "samples.svg";
  const bool drawn = draw_with_gnuplot("plot_synthetic.gp", {synthetic.output_folder, picture});
  std::printf("\ntable: %s; %s\n", table_file.c_str(),
              drawn ? ("samples: " + picture.string()).c_str() : "no picture, as gnuplot is missing or failed");
}

}  // namespace example
