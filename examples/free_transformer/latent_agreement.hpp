/// What Z carries, measured as what samples with one Z have in common.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "synthetic_text.hpp"

namespace example {

/// Over pairs of samples. Where one Z and another Z agree alike, Z carries nothing of it.
///     position  share of the pairs whose targets begin at the same place
///     distance  characters from one target to the other, on average
///     noise     share of one sample's '!' that are '!' in the other, too
struct Agreement {
  double position = 0.0;
  double distance = 0.0;
  double noise = 0.0;
};

struct LatentAgreement {
  Agreement one_latent, other_latents;
  double well_formed = 0.0;  // share of the samples
};

/// samples[z] are the texts after the prompt that were written with one Z, a different one for each z.
inline LatentAgreement measure_agreement(const std::vector<std::vector<std::string>>& samples, char letter) {
  struct Counts {
    int64_t pairs = 0, same_position = 0, distance = 0, noise = 0, same_noise = 0;

    void add(const std::string& left, const std::string& right, char target_letter) {
      ++pairs;
      const auto difference = target_position(left, target_letter) - target_position(right, target_letter);
      same_position += difference == 0;
      distance += std::abs(difference);
      for (size_t index = 0; index < left.size() && index < right.size(); ++index) {
        noise += left[index] == '!';
        same_noise += left[index] == '!' && right[index] == '!';
      }
    }

    Agreement agreement() const {
      return {share(same_position, pairs), share(distance, pairs), share(same_noise, noise)};
    }

    static double share(int64_t part, int64_t whole) {
      return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
    }
  };

  Counts one, other;
  int64_t count = 0, well_formed = 0;
  for (size_t z = 0; z < samples.size(); ++z) {
    for (size_t index = 0; index < samples[z].size(); ++index) {
      ++count;
      well_formed += is_well_formed(samples[z][index], letter);
      for (size_t second_z = 0; second_z < samples.size(); ++second_z) {
        for (size_t second = 0; second < samples[second_z].size(); ++second) {
          if (z == second_z && index == second) continue;
          (z == second_z ? one : other).add(samples[z][index], samples[second_z][second], letter);
        }
      }
    }
  }
  return {one.agreement(), other.agreement(), Counts::share(well_formed, count)};
}

/// In words: position, if targets with one Z lie less than half as far apart as others; noise, if samples with one Z
/// share more than half of the noise that others do not.
inline std::string carried(const LatentAgreement& agreement) {
  const auto& one = agreement.one_latent;
  const auto& other = agreement.other_latents;
  const bool position = one.distance < other.distance / 2.0;
  const bool noise = one.noise - other.noise > (1.0 - other.noise) / 2.0;
  if (position && noise) return "position and noise";
  return position ? "position" : noise ? "noise" : "nothing";
}

}  // namespace example
