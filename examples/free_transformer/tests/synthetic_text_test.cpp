// The synthetic lines are those of the paper's task, and what two texts share is found as it was put there.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "../latent_agreement.hpp"
#include "../synthetic_text.hpp"

namespace {

void check(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "does not hold: %s\n", what);
    std::exit(1);
  }
}

/// count out of n draws of probability p: within five standard deviations, which a right generator leaves once in two million.
bool is_likely(double count, double n, double p) {
  return std::abs(count - n * p) < 5.0 * std::sqrt(n * p * (1.0 - p));
}

void check_lines() {
  constexpr int lines = 20000;
  std::mt19937_64 random(7);
  std::array<int, 57> starts{};
  std::array<int, 26> letters{};
  std::ptrdiff_t noise = 0;
  int unhidden = 0;
  for (int index = 0; index < lines; ++index) {
    const auto line = example::synthetic_line(random);
    check(line.size() == 67 && line[0] >= 'A' && line[0] <= 'Z' && line[1] == '>' && line[66] == '\n',
          "a line's shape");
    const auto characters = line.substr(2, 64);
    check(example::is_well_formed(characters, line[0]), "one target in underscores");
    ++letters[static_cast<size_t>(line[0] - 'A')];
    noise += std::count(characters.begin(), characters.end(), '!');
    const auto start = characters.find(std::string(8, line[0]));
    if (start != std::string::npos) {
      ++starts[start];
      ++unhidden;
    }
  }
  check(is_likely(static_cast<double>(noise), lines * 64.0, 1.0 / 16.0), "a sixteenth is noise");
  check(is_likely(unhidden, lines, std::pow(15.0 / 16.0, 8.0)), "noise hides letters, too");
  for (const int count : starts) check(is_likely(count, unhidden, 1.0 / 57.0), "every position is as likely");
  for (const int count : letters) check(is_likely(count, lines, 1.0 / 26.0), "every letter is as likely");
}

/// Underscores with the target at a position and noise at a place.
std::string characters_with(size_t position, size_t noise) {
  std::string characters(64, '_');
  characters.replace(position, 8, 8, 'K');
  characters[noise] = '!';
  return characters;
}

void check_found_again() {
  check(example::target_position(characters_with(20, 3), 'K') == 20, "a target");
  check(example::target_position(characters_with(20, 20), 'K') == 20, "a target whose first letter is hidden");
  check(example::target_position(characters_with(20, 27), 'K') == 20, "a target whose last letter is hidden");
  check(example::is_well_formed(characters_with(20, 27), 'K'), "a hidden letter is well formed");
  auto broken = characters_with(20, 3);
  broken[50] = 'K';
  check(!example::is_well_formed(broken, 'K'), "a letter outside the target is not well formed");
  check(!example::is_well_formed(characters_with(20, 3), 'L'), "another letter's target is not well formed");
}

void check_agreement() {
  const auto both = example::measure_agreement(
      {{characters_with(3, 40), characters_with(3, 40)}, {characters_with(25, 50), characters_with(25, 50)}}, 'K');
  check(both.one_latent.position == 1.0 && both.one_latent.noise == 1.0, "all is shared with one Z");
  check(both.other_latents.position == 0.0 && both.other_latents.noise == 0.0, "nothing is shared with another");
  check(both.well_formed == 1.0 && carried(both) == "position and noise", "position and noise are carried");

  const auto position = example::measure_agreement(
      {{characters_with(3, 40), characters_with(3, 41)}, {characters_with(25, 50), characters_with(25, 51)}}, 'K');
  check(carried(position) == "position", "a position alone");
  check(position.one_latent.distance == 0.0 && position.other_latents.distance == 22.0, "targets are 22 places apart");

  const auto place = example::measure_agreement(
      {{characters_with(3, 40), characters_with(7, 41)}, {characters_with(25, 50), characters_with(29, 51)}}, 'K');
  check(place.one_latent.position == 0.0 && place.one_latent.distance == 4.0, "targets are 4 places apart");
  check(carried(place) == "position", "about the same place");

  const auto noise = example::measure_agreement(
      {{characters_with(3, 40), characters_with(30, 40)}, {characters_with(3, 50), characters_with(30, 50)}}, 'K');
  check(carried(noise) == "noise", "noise alone");

  const auto same = example::measure_agreement(
      {{characters_with(3, 40), characters_with(3, 40)}, {characters_with(3, 40), characters_with(3, 40)}}, 'K');
  check(carried(same) == "nothing", "what all samples share is not carried by Z");
}

std::string all_text(const std::filesystem::path& folder) {
  std::string text;
  for (int file = 0; file < 10; ++file) {
    std::ifstream stream(folder / (std::to_string(file) + ".txt"), std::ios::binary);
    text.append(std::istreambuf_iterator<char>(stream), {});
  }
  return text;
}

void check_files() {
  const std::filesystem::path folder = std::filesystem::temp_directory_path() / "free_transformer_synthetic_text";
  example::write_synthetic_text(folder, 5, 1);
  const auto text = all_text(folder);
  check(text.size() == 10 * 5 * 67, "ten files of whole lines");
  example::write_synthetic_text(folder, 5, 1);
  check(all_text(folder) == text, "the same seed gives the same text");
  example::write_synthetic_text(folder, 5, 2);
  check(all_text(folder) != text, "another seed gives another text");
  std::filesystem::remove_all(folder);
}

}  // namespace

int main() {
  check_lines();
  check_found_again();
  check_agreement();
  check_files();
}
