/// Times the losses beside eager LibTorch and a copy of the logits, and says which ratios that must be reached are.
#include <ATen/Parallel.h>

#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "comparison.hpp"
#include "environment.hpp"
#include "report.hpp"
#include "rows.hpp"

namespace benchmarks {

struct Settings {
  std::filesystem::path csv = "loss_benchmark.csv";
  int rounds = 9;
  std::vector<int> threads = {1, 2};
  std::string only;
  InstructionSet instructions = kernels::best_instruction_set();
};

void run(const Settings& settings) {
  TORCH_CHECK(settings.instructions <= kernels::best_instruction_set(), "loss_benchmark: instructions must be at most ",
              "the processor's ", instruction_set_name(kernels::best_instruction_set()), ", got ",
              instruction_set_name(settings.instructions));
  kernels::instruction_set() = settings.instructions;
  torch::manual_seed(1);
  Report report(settings.csv);
  for (const auto& comparison : all_rows()) {
    if (comparison.name.find(settings.only) == std::string::npos) continue;
    const Work work = comparison.prepare();
    for (const int threads : settings.threads) {
      at::set_num_threads(threads);
      const int rounds = comparison.is_slow ? 1 : settings.rounds;
      report.add(comparison, threads, time_in_turn(work, rounds, /*warms_up=*/!comparison.is_slow), work);
    }
  }
  report.print_summary();
}

}  // namespace benchmarks

int main(int argc, char** argv) {
  benchmarks::Settings settings;
  CLI::App app("Times the losses beside eager LibTorch and a copy of the logits.");
  app.add_option("--csv", settings.csv, "Where the results go");
  app.add_option("--rounds", settings.rounds, "How often each contestant is timed in turn")->check(CLI::PositiveNumber);
  app.add_option("--threads", settings.threads, "Numbers of threads")->check(CLI::PositiveNumber);
  app.add_option("--only", settings.only, "Only rows whose name contains this");
  app.add_option("--instructions", settings.instructions, "Of our kernels; LibTorch's follow ATEN_CPU_CAPABILITY")
      ->transform(CLI::CheckedTransformer(
          std::map<std::string, benchmarks::InstructionSet>{{"baseline", benchmarks::InstructionSet::baseline},
                                                            {"avx2", benchmarks::InstructionSet::avx2},
                                                            {"avx512", benchmarks::InstructionSet::avx512}}));
  CLI11_PARSE(app, argc, argv);

  try {
    benchmarks::run(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
