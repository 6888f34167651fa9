/// A training on the disk, from which it goes on with the numbers of an unbroken one.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "durable_file.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "random_state.hpp"

namespace example {

/// What a training changes. Its place in the text is part of the generator's state, as the windows are drawn.
struct TrainingState {
  FreeTransformer& model;
  Optimizer& optimizer;
  int64_t step = 0;  // done so far
  double seconds = 0.0;
};

inline std::filesystem::path last_checkpoint(const std::filesystem::path& folder) { return folder / "checkpoint.pt"; }
inline std::filesystem::path previous_checkpoint(const std::filesystem::path& folder) {
  return folder / "checkpoint.previous.pt";
}

/// The checkpoint before it stays beside it. settings is the text that a training which goes on must have, too.
inline void save_checkpoint(const std::filesystem::path& folder, const TrainingState& state,
                            const std::string& settings) {
  torch::serialize::OutputArchive archive, model, optimizer;
  state.model->save(model);
  state.optimizer.save(optimizer);
  archive.write("model", model);
  archive.write("optimizer", optimizer);
  ModelOptions::for_each(state.model->options(),
                         [&](const char* name, int64_t value) { archive.write(name, c10::IValue(value)); });
  archive.write("generator", random_state());
  archive.write("step", c10::IValue(state.step));
  archive.write("seconds", c10::IValue(state.seconds));
  archive.write("settings", c10::IValue(settings));
  std::ostringstream contents;
  archive.save_to(contents);
  replace_file(last_checkpoint(folder), contents.str(), previous_checkpoint(folder));
}

inline void remove_checkpoints(const std::filesystem::path& folder) {
  std::filesystem::remove(last_checkpoint(folder));
  std::filesystem::remove(previous_checkpoint(folder));
}

/// The archive of the last complete checkpoint. A file that cannot be read is named and left aside.
inline std::optional<torch::serialize::InputArchive> find_checkpoint(const std::filesystem::path& folder) {
  for (const auto& file : {last_checkpoint(folder), previous_checkpoint(folder)}) {
    if (!std::filesystem::exists(file)) continue;
    try {
      torch::serialize::InputArchive archive;
      archive.load_from(file.string());
      return archive;
    } catch (const std::exception&) {
      std::fprintf(stderr, "%s is not complete, and left aside\n", file.c_str());
    }
  }
  return std::nullopt;
}

namespace detail {

inline c10::IValue read_value(torch::serialize::InputArchive& archive, const std::string& name) {
  c10::IValue value;
  archive.read(name, value);
  return value;
}

/// Throws unless both texts are equal; says which lines differ.
inline void check_same_settings(const std::string& saved, const std::string& asked) {
  std::istringstream saved_lines(saved), asked_lines(asked);
  std::string differences, saved_line, asked_line;
  while (std::getline(saved_lines, saved_line) && std::getline(asked_lines, asked_line)) {
    if (saved_line != asked_line) {
      differences += "\n  " + saved_line + " in the checkpoint, " + asked_line + " now";
    }
  }
  if (saved != asked) {
    throw std::runtime_error("a training goes on with the settings that it began with, got" + differences);
  }
}

}  // namespace detail

/// The model of a checkpoint, with the options that it has there.
inline FreeTransformer load_model(const std::filesystem::path& file) {
  torch::serialize::InputArchive archive, weights;
  try {
    archive.load_from(file.string());
  } catch (const std::exception&) {
    throw std::runtime_error(file.string() + " is no complete checkpoint; train writes them");
  }
  ModelOptions options;
  ModelOptions::for_each(options, [&](const char* name, auto& value) {
    value = static_cast<std::decay_t<decltype(value)>>(detail::read_value(archive, name).toInt());
  });
  FreeTransformer model(options);
  archive.read("model", weights);
  model->load(weights);
  return model;
}

/// Returns whether there was a checkpoint. Throws if it was made with other settings.
inline bool load_checkpoint(const std::filesystem::path& folder, TrainingState& state, const std::string& settings) {
  auto archive = find_checkpoint(folder);
  if (!archive) return false;
  detail::check_same_settings(detail::read_value(*archive, "settings").toStringRef(), settings);
  torch::serialize::InputArchive model, optimizer;
  archive->read("model", model);
  archive->read("optimizer", optimizer);
  state.model->load(model);
  state.optimizer.load(optimizer);
  state.step = detail::read_value(*archive, "step").toInt();
  state.seconds = detail::read_value(*archive, "seconds").toDouble();
  torch::Tensor generator;
  archive->read("generator", generator);
  set_random_state(generator);
  return true;
}

}  // namespace example
