/// `evaluate`: the bounds of a trained model on held-out files.
#pragma once

#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <vector>

#include "checkpoint.hpp"
#include "evaluation.hpp"
#include "settings.hpp"
#include "text.hpp"
#include "text_files.hpp"

namespace example {

struct EvaluateSettings {
  std::vector<std::filesystem::path> text;
  std::filesystem::path checkpoint = last_checkpoint(default_output_folder());
  int64_t samples = 16;
  int64_t batches = 16;
  int64_t batch_size = 8;
  uint64_t seed = 1;
  int threads = 1;
};

inline void add_evaluate_options(CLI::App& app, EvaluateSettings& settings) {
  add_text(app, settings.text, "The files and folders of the training; those that it held out are read");
  app.add_option("--checkpoint", settings.checkpoint, "A checkpoint of the training")->check(CLI::ExistingFile);
  app.add_option("--samples", settings.samples, "Samples of Z for each window: K of the importance-weighted bound")
      ->check(CLI::PositiveNumber);
  app.add_option("--batches", settings.batches, "Held-out batches")->check(CLI::PositiveNumber);
  app.add_option("--batch-size", settings.batch_size, "Windows a batch")->check(CLI::PositiveNumber);
  app.add_option("--seed", settings.seed, "Same seed and threads: same numbers");
  app.add_option("--threads", settings.threads, "Threads that compute")->check(CLI::PositiveNumber);
}

inline void evaluate(const EvaluateSettings& settings) {
  at::set_num_threads(settings.threads);
  auto model = load_model(settings.checkpoint);
  torch::manual_seed(settings.seed);
  const Text text(find_text_files(settings.text).held_out, model->options().context);
  const auto samples = model->options().baseline ? 1 : settings.samples;  // all alike without Z
  std::printf("%lld held-out windows of %lld bytes, %lld samples of Z for each\n\n",
              static_cast<long long>(settings.batches * settings.batch_size),
              static_cast<long long>(model->options().context), static_cast<long long>(samples));
  print(evaluate(model, text, settings.batch_size, settings.batches, samples), samples);
}

}  // namespace example
