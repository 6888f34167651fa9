/// The paper's synthetic task (section 4.1): its lines, and what is found in them again.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <utility>

#include "durable_file.hpp"

namespace example {

/// A prompt, a letter and '>', then this many characters: underscores, of which a run is the letter (the target); at last
/// each is '!' with this probability. Reading stands on whole lines: prompt, characters, line feed.
struct SyntheticTask {
  static constexpr size_t characters = 64;
  static constexpr size_t target = 8;
  static constexpr size_t noise = 16;  // one in so many
  static constexpr int64_t context = 2 + int64_t{characters};
  static constexpr int64_t line = context + 1;
};

inline std::string synthetic_line(std::mt19937_64& random) {
  const auto letter = static_cast<char>('A' + random() % 26);
  std::string characters(SyntheticTask::characters, '_');
  const auto position = random() % (SyntheticTask::characters - SyntheticTask::target + 1);
  std::fill_n(characters.begin() + static_cast<std::ptrdiff_t>(position), SyntheticTask::target, letter);
  for (auto& character : characters) {
    if (random() % SyntheticTask::noise == 0) character = '!';
  }
  return std::string{letter, '>'} + characters + '\n';
}

/// Ten files, one of which a training holds out. Same seed: same bytes, with every compiler.
inline void write_synthetic_text(const std::filesystem::path& folder, int64_t lines_a_file, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::filesystem::create_directories(folder);
  for (int file = 0; file < 10; ++file) {
    std::string text;
    for (int64_t line = 0; line < lines_a_file; ++line) {
      text += synthetic_line(random);
    }
    replace_file(folder / (std::to_string(file) + ".txt"), text);
  }
}

/// Where the target is: the first of the stretches of its length that hold the letter most often, and of those the most
/// noise, which may hide a letter.
inline int64_t target_position(const std::string& characters, char letter) {
  std::pair<std::ptrdiff_t, std::ptrdiff_t> most{-1, -1};
  int64_t position = 0;
  for (size_t start = 0; start + SyntheticTask::target <= characters.size(); ++start) {
    const auto first = characters.begin() + static_cast<std::ptrdiff_t>(start);
    const auto last = first + SyntheticTask::target;
    const std::pair counts{std::count(first, last, letter), std::count(first, last, '!')};
    if (counts > most) {
      most = counts;
      position = static_cast<int64_t>(start);
    }
  }
  return position;
}

/// Whether it is one target in underscores, noise aside.
inline bool is_well_formed(const std::string& characters, char letter) {
  const auto position = target_position(characters, letter);
  for (size_t index = 0; index < characters.size(); ++index) {
    const auto offset = static_cast<int64_t>(index) - position;
    const bool in_target = offset >= 0 && offset < static_cast<int64_t>(SyntheticTask::target);
    if (characters[index] != '!' && characters[index] != (in_target ? letter : '_')) return false;
  }
  return true;
}

}  // namespace example
