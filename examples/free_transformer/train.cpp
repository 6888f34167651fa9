/// A small Free Transformer on real text and on the paper's synthetic task: the program's commands.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <chrono>
#include <cstdio>
#include <exception>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "evaluate_command.hpp"
#include "generate_command.hpp"
#include "ranks.hpp"
#include "settings.hpp"
#include "synthetic_command.hpp"
#include "train_command.hpp"

namespace example {

/// What is given to the program, with `train` where no command is named, in the order that CLI11 takes them: the last first.
std::vector<std::string> arguments_with_command(int count, char** arguments) {
  std::vector<std::string> all(arguments + 1, arguments + count);
  const std::set<std::string> first{"train", "generate", "evaluate", "synthetic", "--help", "-h"};
  if (all.empty() || first.count(all.front()) == 0) {
    all.insert(all.begin(), "train");
  }
  return {all.rbegin(), all.rend()};
}

int run(int argument_count, char** arguments) {
  CLI::App app("A small Free Transformer on real text", "train_free_transformer");
  app.require_subcommand(1);
  app.footer("Where no command is named, train is meant. Settings: train_free_transformer train --help");
  app.option_defaults()->always_capture_default();
  Settings settings;
  auto* train_command = app.add_subcommand("train", "Train a model, evaluate it, let it write");
  add_text_options(*train_command, settings);
  add_model_options(*train_command, settings.model);
  add_training_options(*train_command, settings);
  GenerateSettings generate_settings;
  auto* generate_command = app.add_subcommand("generate", "Let a trained model write");
  add_generate_options(*generate_command, generate_settings);
  EvaluateSettings evaluate_settings;
  auto* evaluate_command = app.add_subcommand("evaluate", "Bound the evidence of held-out files under a trained model");
  add_evaluate_options(*evaluate_command, evaluate_settings);
  SyntheticSettings synthetic_settings;
  auto* synthetic_command = app.add_subcommand("synthetic", "The paper's section 4.1: what Z carries for four budgets");
  add_synthetic_options(*synthetic_command, synthetic_settings);
  try {
    app.parse(arguments_with_command(argument_count, arguments));
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  const auto rendezvous = rendezvous_of_environment();
  if (*train_command) {
    Ranks ranks(rendezvous, std::chrono::seconds(settings.timeout));
    train(settings, ranks);
  } else if (rendezvous.size > 1) {
    throw std::runtime_error("WORLD_SIZE must be 1 for all commands but train, got " + std::to_string(rendezvous.size));
  }
  if (*generate_command) generate(generate_settings);
  if (*evaluate_command) evaluate(evaluate_settings);
  if (*synthetic_command) run_synthetic(synthetic_settings);
  return 0;
}

}  // namespace example

int main(int argument_count, char** arguments) {
  try {
    return example::run(argument_count, arguments);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  return 1;
}
