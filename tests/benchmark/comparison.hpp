/// A row of the benchmark: the same work done by the library, by a baseline and, for the scale, by a copy of the input.
#pragma once

#include <benchmark/benchmark.h>

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "../unit/peak_memory.hpp"

namespace benchmarks {

struct Work {
  std::function<void()> ours, baseline, copy;  ///< the latter two may be empty
  size_t logits_bytes = 0;                     ///< what peak memory is measured in
  size_t gradient_bytes = 0;                   ///< of gradients that are there anyway, and do not count as extra memory
};

enum class Ratio { baseline_to_ours, ours_to_baseline, ours_to_copy, memory_to_logits, baseline_memory_to_logits };

/// How a ratio reads in the table, and whether a large one is good.
inline const char* description(Ratio ratio) {
  switch (ratio) {
    case Ratio::baseline_to_ours:
      return "baseline / ours";
    case Ratio::ours_to_baseline:
      return "ours / baseline";
    case Ratio::ours_to_copy:
      return "ours / copy";
    case Ratio::memory_to_logits:
      return "extra memory / logits";
    case Ratio::baseline_memory_to_logits:
      return "baseline's extra memory / logits";
  }
  return "";
}

inline bool larger_is_better(Ratio ratio) { return ratio == Ratio::baseline_to_ours; }

struct Requirement {
  Ratio ratio;
  double limit = 0;  ///< 0: none, the ratio is only shown

  bool is_reached_by(double value) const { return larger_is_better(ratio) ? value >= limit : value <= limit; }
};

struct Comparison {
  std::string name, baseline, shape;
  c10::ScalarType type;
  std::vector<Requirement> requirements;
  std::function<Work()> prepare;  ///< makes the inputs, which are too large to keep those of all rows
  bool is_slow = false;           ///< many seconds a call: one round, not warmed up
};

/// Seconds of one call in each round.
struct Timings {
  std::vector<double> ours, baseline, copy;
};

/// The value below which this part of the sample lies, between neighbours if need be.
inline double quantile(std::vector<double> sample, double part) {
  if (sample.empty()) return std::nan("");
  std::sort(sample.begin(), sample.end());
  const double position = part * static_cast<double>(sample.size() - 1);
  const auto below = static_cast<size_t>(position), above = std::min(below + 1, sample.size() - 1);
  return sample[below] + (position - std::floor(position)) * (sample[above] - sample[below]);
}

inline double median(const std::vector<double>& sample) { return quantile(sample, 0.5); }

/// Receives what Google Benchmark has timed: one run of each contestant a round, told apart by its name.
class RoundReporter : public benchmark::BenchmarkReporter {
 public:
  explicit RoundReporter(Timings& timings) : timings_(timings) {}

  bool ReportContext(const Context& /*context*/) override { return true; }

  void ReportRuns(const std::vector<Run>& runs) override {
    for (const auto& run : runs) {
      const auto& name = run.run_name.function_name;
      auto& seconds = name == "ours" ? timings_.ours : name == "baseline" ? timings_.baseline : timings_.copy;
      seconds.push_back(run.real_accumulated_time / static_cast<double>(run.iterations));
    }
  }

 private:
  Timings& timings_;
};

inline void register_contestant(const char* name, const std::function<void()>& run) {
  constexpr double seconds_a_round = 0.03;
  if (!run) return;
  benchmark::RegisterBenchmark(name,
                               [&run](benchmark::State& state) {
                                 for (auto _ : state) run();
                               })
      ->UseRealTime()
      ->MinTime(seconds_a_round);
}

/// Each round times ours, the baseline and the copy in turn, right after each other.
inline Timings time_in_turn(const Work& work, int rounds, bool warms_up) {
  register_contestant("ours", work.ours);
  register_contestant("baseline", work.baseline);
  register_contestant("copy", work.copy);
  Timings timings, warm_up;
  RoundReporter reporter(timings), warm_up_reporter(warm_up);
  if (warms_up) benchmark::RunSpecifiedBenchmarks(&warm_up_reporter);
  for (int round = 0; round < rounds; ++round) benchmark::RunSpecifiedBenchmarks(&reporter);
  benchmark::ClearRegisteredBenchmarks();
  return timings;
}

/// The median of the rounds' ratios: a machine that others use too is slow for seconds at a time, and within a round
/// that hits both sides alike; the ratio of two medians could take one from a slow and the other from a fast second.
inline double median_ratio(const std::vector<double>& numerators, const std::vector<double>& denominators) {
  std::vector<double> ratios(numerators.size());
  std::transform(numerators.begin(), numerators.end(), denominators.begin(), ratios.begin(), std::divides<>());
  return median(ratios);
}

/// The most memory that LibTorch hands out for a call, beside the gradients that it leaves, in sizes of the logits.
inline double extra_memory(const std::function<void()>& run, const Work& work) {
  return (static_cast<double>(numeric::peak_of(run)) - static_cast<double>(work.gradient_bytes)) /
         static_cast<double>(work.logits_bytes);
}

inline double measured_ratio(Ratio ratio, const Timings& timings, const Work& work) {
  switch (ratio) {
    case Ratio::baseline_to_ours:
      return median_ratio(timings.baseline, timings.ours);
    case Ratio::ours_to_baseline:
      return median_ratio(timings.ours, timings.baseline);
    case Ratio::ours_to_copy:
      return median_ratio(timings.ours, timings.copy);
    case Ratio::memory_to_logits:
      return extra_memory(work.ours, work);
    case Ratio::baseline_memory_to_logits:
      return extra_memory(work.baseline, work);
  }
  return std::nan("");
}

}  // namespace benchmarks
