/// What came out of the synthetic task: a row for each seed and budget, and over the seeds mean and spread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "latent_agreement.hpp"

namespace example {

struct SyntheticResult {
  uint64_t seed = 0;
  double free_bits = 0.0;       // the budget, in bits a character, as all that follows
  double bound = 0.0;           // evidence lower bound of held-out lines
  double kl = 0.0;              // latent KL there
  std::vector<double> kl_bits;  // of it each latent bit's, the largest first
  LatentAgreement agreement;
};

namespace detail {

struct SyntheticColumn {
  const char* name;   // in the file
  const char* title;  // on the terminal
  int decimals;
  double (*value)(const SyntheticResult&);
};

inline const std::vector<SyntheticColumn>& synthetic_columns() {
  using Result = SyntheticResult;
  static const std::vector<SyntheticColumn> columns{
      {"bound_bits", "bound, bits", 3, [](const Result& result) { return result.bound; }},
      {"kl_bits", "latent KL, bits", 3, [](const Result& result) { return result.kl; }},
      {"largest_bit", "its share in the largest latent bit", 2,
       [](const Result& result) { return result.kl > 0.0 ? result.kl_bits[0] / result.kl : 0.0; }},
      {"position_one_z", "same position, one Z", 2,
       [](const Result& result) { return result.agreement.one_latent.position; }},
      {"position_other_z", "same position, different Z", 2,
       [](const Result& result) { return result.agreement.other_latents.position; }},
      {"distance_one_z", "distance of the targets, one Z", 1,
       [](const Result& result) { return result.agreement.one_latent.distance; }},
      {"distance_other_z", "distance of the targets, different Z", 1,
       [](const Result& result) { return result.agreement.other_latents.distance; }},
      {"noise_one_z", "shared noise, one Z", 2, [](const Result& result) { return result.agreement.one_latent.noise; }},
      {"noise_other_z", "shared noise, different Z", 2,
       [](const Result& result) { return result.agreement.other_latents.noise; }},
      {"well_formed", "well-formed samples", 2, [](const Result& result) { return result.agreement.well_formed; }}};
  return columns;
}

/// 1/64 for 0.015625.
inline std::string budget_text(double free_bits) {
  char text[40];
  std::snprintf(text, sizeof text, free_bits < 1.0 ? "1/%g" : "%g", free_bits < 1.0 ? 1.0 / free_bits : free_bits);
  return text;
}

/// The mean, and in brackets the lowest and the highest of several.
inline std::string mean_and_spread(const std::vector<double>& values, int decimals) {
  double sum = 0.0;
  for (const double value : values) sum += value;
  const auto [lowest, highest] = std::minmax_element(values.begin(), values.end());
  char text[100];
  std::snprintf(text, sizeof text, values.size() > 1 ? "%.*f (%.*f-%.*f)" : "%.*f", decimals,
                sum / static_cast<double>(values.size()), decimals, *lowest, decimals, *highest);
  return text;
}

inline std::vector<SyntheticResult> results_of_budget(const std::vector<SyntheticResult>& results, double free_bits) {
  std::vector<SyntheticResult> found;
  std::copy_if(results.begin(), results.end(), std::back_inserter(found),
               [&](const SyntheticResult& result) { return result.free_bits == free_bits; });
  return found;
}

}  // namespace detail

inline void write_table(const std::filesystem::path& file, const std::vector<SyntheticResult>& results) {
  std::ofstream table(file);
  table << "seed,free_bits";
  for (const auto& column : detail::synthetic_columns()) table << ',' << column.name;
  table << ",carried";
  for (size_t bit = 0; bit < results.front().kl_bits.size(); ++bit) table << ",kl_bit_" << bit + 1;
  for (const auto& result : results) {
    table << '\n' << result.seed << ',' << result.free_bits;
    for (const auto& column : detail::synthetic_columns()) table << ',' << column.value(result);
    table << ',' << carried(result.agreement);
    for (const double bits : result.kl_bits) table << ',' << bits;
  }
  table << '\n';
}

inline void print_tables(const std::vector<SyntheticResult>& results, const std::vector<double>& budgets) {
  std::printf("\nMean over the seeds (lowest-highest), bits a character\n%-38s", "free bits");
  for (const double budget : budgets) std::printf(" %-22s", detail::budget_text(budget).c_str());
  for (const auto& column : detail::synthetic_columns()) {
    std::printf("\n%-38s", column.title);
    for (const double budget : budgets) {
      std::vector<double> values;
      for (const auto& result : detail::results_of_budget(results, budget)) values.push_back(column.value(result));
      std::printf(" %-22s", detail::mean_and_spread(values, column.decimals).c_str());
    }
  }
  std::printf("\n\nZ carries, and the KL of each latent bit, the largest first\n");
  for (const auto& result : results) {
    std::printf("seed %llu, %4s free bits: %-18s ", static_cast<unsigned long long>(result.seed),
                detail::budget_text(result.free_bits).c_str(), carried(result.agreement).c_str());
    for (const double bits : result.kl_bits) std::printf(" %.4f", bits);
    std::printf("\n");
  }
}

}  // namespace example
