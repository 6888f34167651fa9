/// `generate`: samples of a trained model, each with a latent of its own or all with one.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

#include "checkpoint.hpp"
#include "generation.hpp"
#include "settings.hpp"

namespace example {

struct GenerateSettings {
  std::filesystem::path checkpoint = last_checkpoint(default_output_folder());
  std::string prompt = default_prompt();
  int64_t samples = 4;
  int64_t sample_bytes = 300;
  bool one_latent = false;
  bool show_latent = false;
  double temperature = 1.0;
  uint64_t seed = 1;
  int threads = 1;
};

inline void add_generate_options(CLI::App& app, GenerateSettings& settings) {
  app.add_option("--checkpoint", settings.checkpoint, "A checkpoint of the training")->check(CLI::ExistingFile);
  app.add_option("--prompt", settings.prompt, "Start of each sample, not empty")->check(not_empty);
  app.add_option("--samples", settings.samples, "How many")->check(CLI::PositiveNumber);
  app.add_option("--sample-bytes", settings.sample_bytes, "Length of each")->check(CLI::PositiveNumber);
  app.add_flag("--one-latent", settings.one_latent, "Draw Z once and hold it for all samples; else anew for each");
  app.add_flag("--show-latent", settings.show_latent, "Print Z, too: the code of each byte, of the prompt's first");
  app.add_option("--temperature", settings.temperature, "Of the bytes; below 1 the likelier ones")
      ->check(CLI::PositiveNumber);
  app.add_option("--seed", settings.seed, "Same seed and threads: same samples");
  app.add_option("--threads", settings.threads, "Threads that compute")->check(CLI::PositiveNumber);
}

/// Codes [positions], each behind a space.
inline std::string in_words(const torch::Tensor& codes) {
  std::string words;
  for (int64_t index = 0; index < codes.size(0); ++index) {
    words += ' ' + std::to_string(codes[index].item<int64_t>());
  }
  return words;
}

inline void generate(const GenerateSettings& settings) {
  at::set_num_threads(settings.threads);
  auto model = load_model(settings.checkpoint);
  torch::manual_seed(settings.seed);
  const auto prompt = tokens_of_prompt(model, settings.prompt);
  const auto codes = draw_codes(model, prompt, settings.sample_bytes, settings.one_latent ? 1 : settings.samples)
                         .expand({settings.samples, -1});
  const auto texts = continue_text(model, prompt, codes, settings.temperature);
  const auto* latent = model->options().baseline ? "without Z" : settings.one_latent ? "the same Z" : "a Z of its own";
  for (size_t index = 0; index < texts.size(); ++index) {
    std::printf("--- sample %zu, %s\n", index + 1, latent);
    if (settings.show_latent) std::printf("Z%s\n", in_words(codes[static_cast<int64_t>(index)]).c_str());
    std::printf("%s%s\n", settings.prompt.c_str(), without_control_characters(texts[index]).c_str());
  }
}

}  // namespace example
