/// What can be set on the command line.
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <filesystem>
#include <sstream>
#include <string>
#include <vector>

#include <free_transformer/schedules.hpp>

#include "model.hpp"
#include "optimizer.hpp"
#include "schedule_option.hpp"

namespace example {

inline std::filesystem::path default_output_folder() { return "free_transformer_output"; }
inline std::string default_prompt() { return "#include <"; }

struct Settings {
  std::vector<std::filesystem::path> text;
  int64_t window_step = 1;  // windows start at its multiples
  std::filesystem::path output_folder = default_output_folder();
  ModelOptions model;

  free_transformer::Schedule beta = 1.0;
  free_transformer::Schedule free_bits = 0.25;  // of a byte, in bits
  bool kl_of_each_bit = false;

  bool fused_head = false;

  int64_t steps = 400;
  int64_t batch_size = 8;
  int64_t micro_batches = 1;
  OptimizerOptions optimizer;
  double minutes = 3.0;
  uint64_t seed = 1;
  // The operations of so small a model are over before threads have met. On two idle cores a second thread saves a quarter
  // of the time. With another program on one of them a step takes eight times as long as with one thread, as a thread that
  // waits keeps the core busy that the other one needs; where OMP_WAIT_POLICY=PASSIVE lets it sleep, two to five times.
  int threads = 1;
  int timeout = 300;  // seconds that one rank waits for another, also while rank 0 validates

  int64_t validate_every = 200;
  int64_t validation_batches = 8;
  int64_t checkpoint_every = 200;
  bool resume = false;

  int64_t evaluation_batches = 64;
  std::string prompt = default_prompt();
  int64_t sample_bytes = 500;
};

/// All that the numbers of a training depend on, but for the text and the threads; one line a setting.
inline std::string settings_of_numbers(const Settings& settings) {
  std::ostringstream text;
  text.precision(17);  // enough to tell any two numbers apart
  ModelOptions::for_each(settings.model, [&](const char* name, auto value) { text << name << ' ' << value << '\n'; });
  text << "window_step " << settings.window_step << "\nbeta " << settings.beta << "\nfree_bits " << settings.free_bits
       << "\nkl_of_each_bit " << settings.kl_of_each_bit << "\nfused_head " << settings.fused_head << "\nsteps "
       << settings.steps << "\nbatch_size " << settings.batch_size << "\nmicro_batches " << settings.micro_batches
       << "\nlearning_rate " << settings.optimizer.learning_rate << "\nwarm_up " << settings.optimizer.warm_up
       << "\nclip_norm " << settings.optimizer.largest_norm << "\nminutes " << settings.minutes << "\nseed "
       << settings.seed << "\nvalidate_every " << settings.validate_every << "\nvalidation_batches "
       << settings.validation_batches << "\ncheckpoint_every " << settings.checkpoint_every << '\n';
  return text.str();
}

inline std::string not_empty(const std::string& value) { return value.empty() ? "must not be empty" : ""; }

inline void add_text(CLI::App& app, std::vector<std::filesystem::path>& paths, const std::string& description) {
  auto* text = app.add_option("text", paths, description);
#ifdef FREE_TRANSFORMER_DEFAULT_TEXT_FOLDER
  paths = {FREE_TRANSFORMER_DEFAULT_TEXT_FOLDER};
#else
  text->required();
#endif
  text->check(CLI::ExistingPath);
}

inline void add_text_options(CLI::App& app, Settings& settings) {
  add_text(app, settings.text, "Files and folders to learn from; a tenth of the files is held out");
  app.add_option("--output-folder", settings.output_folder, "Where logs, checkpoints and the picture go");
  app.add_option("--prompt", settings.prompt, "Start of the sample, not empty")->check(not_empty);
  app.add_option("--sample-bytes", settings.sample_bytes, "Length of the sample")->check(CLI::NonNegativeNumber);
}

inline void add_model_options(CLI::App& app, ModelOptions& model) {
  app.add_option("--latent-dim", model.latent_dim, "Latent bits a token")->check(CLI::Range(1, 16));
  app.add_option("--width", model.width, "Width of the residual stream")->check(CLI::PositiveNumber);
  app.add_option("--blocks", model.blocks, "Blocks of the decoder")->check(CLI::Range(2, 1000));
  app.add_option("--heads", model.heads, "Attention heads")->check(CLI::PositiveNumber);
  app.add_flag("--baseline", model.baseline, "The same decoder without Z, to compare the bounds of");
  app.add_option("--context", model.context, "Bytes that the model sees at once")->check(CLI::PositiveNumber);
}

inline void add_training_options(CLI::App& app, Settings& settings) {
  add_schedule(app, "--beta,--beta-kl", settings.beta, "Weight of the latent KL: " + schedule_forms());
  add_schedule(app, "--free-bits", settings.free_bits, "Bits of KL a byte that cost nothing, in the same forms");
  app.add_flag("--kl-of-each-bit", settings.kl_of_each_bit, "Log the KL of each latent bit, too");
  app.add_flag("--fused-head", settings.fused_head, "Make the logits inside the loss, some tokens at a time");
  app.add_option("--steps", settings.steps, "Steps of the optimizer")->check(CLI::PositiveNumber);
  app.add_option("--batch-size", settings.batch_size, "Windows a step")->check(CLI::PositiveNumber);
  app.add_option("--micro-batches", settings.micro_batches,
                 "Parts that a step's windows are computed in: less memory, the same gradient")
      ->check(CLI::PositiveNumber);
  app.add_option("--learning-rate", settings.optimizer.learning_rate, "At its highest, after the warm-up")
      ->check(CLI::PositiveNumber);
  app.add_option("--warm-up", settings.optimizer.warm_up, "Share of the training in which the learning rate rises")
      ->check(CLI::Range(0.0, 0.99));
  app.add_option("--clip-norm", settings.optimizer.largest_norm, "Largest norm of the gradient; 0 sets no limit")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--minutes", settings.minutes, "Train no longer than this; 0 sets no limit")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--seed", settings.seed, "Same seed, threads and steps: same numbers");
  app.add_option("--threads", settings.threads, "Threads that compute; more than one need cores of their own")
      ->check(CLI::PositiveNumber);
  app.add_option("--timeout", settings.timeout, "Seconds that a rank of several waits for the others")
      ->check(CLI::PositiveNumber);
  app.add_option("--validate-every", settings.validate_every,
                 "Steps from one look at held-out text to the next; 0: none")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--validation-batches", settings.validation_batches, "Held-out batches of such a look")
      ->check(CLI::PositiveNumber);
  app.add_option("--checkpoint-every", settings.checkpoint_every, "Steps from one checkpoint to the next; 0: none")
      ->check(CLI::NonNegativeNumber);
  app.add_flag("--resume", settings.resume, "Go on from the last checkpoint in the output folder, if there is one");
  app.add_option("--evaluation-batches", settings.evaluation_batches, "Held-out batches")->check(CLI::PositiveNumber);
}

}  // namespace example
