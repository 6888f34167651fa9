/// Time and memory of a loss step, head included, with dense logits and with the head fused into the loss. Linux only:
/// the peak of the memory is the process's own, from /proc.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <thread>

#include <free_transformer/losses.hpp>

#include "progress.hpp"

namespace example {

struct ComparisonSettings {
  int64_t tokens = 256;
  int64_t width = 256;
  int64_t vocabulary = 131072;
  int64_t repetitions = 5;
  int threads = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
};

/// A figure of /proc/self/status in MiB: VmRSS now, VmHWM at its peak.
double memory(const std::string& name) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    double kibibytes = 0.0;
    if (word == name + ":" && status >> kibibytes) {
      return kibibytes / 1024.0;
    }
  }
  throw std::runtime_error("/proc/self/status has no " + name);
}

void reset_peak_memory() {
  if (!(std::ofstream("/proc/self/clear_refs") << 5 << std::flush)) {
    throw std::runtime_error("/proc/self/clear_refs cannot be written");
  }
}

struct Cost {
  double seconds = std::numeric_limits<double>::infinity();
  double mebibytes = 0.0;
};

/// The fastest of the repetitions, and how far the largest went above the memory held before it. The first, which warms
/// up, counts for the memory alone.
Cost cost_of(const std::function<void()>& step, int64_t repetitions) {
  Cost cost;
  for (int64_t index = 0; index <= repetitions; ++index) {
    reset_peak_memory();
    const double before = memory("VmRSS");
    const Stopwatch stopwatch;
    step();
    if (index > 0) {
      cost.seconds = std::min(cost.seconds, stopwatch.seconds());
    }
    cost.mebibytes = std::max(cost.mebibytes, memory("VmHWM") - before);
  }
  return cost;
}

void compare_heads(const ComparisonSettings& settings) {
  at::set_num_threads(settings.threads);
  torch::manual_seed(1);
  const auto hidden = torch::randn({settings.tokens, settings.width}).requires_grad_();
  const auto weight = (torch::randn({settings.vocabulary, settings.width}) * 0.05).requires_grad_();
  const auto targets = torch::randint(settings.vocabulary, {settings.tokens}, torch::kInt64);

  const auto step_with = [&](const auto& make_logits) {
    return [&, make_logits] {
      free_transformer::compute_reconstruction_loss(make_logits(), targets).backward();
      hidden.mutable_grad() = torch::Tensor();
      weight.mutable_grad() = torch::Tensor();
    };
  };
  const auto eager = cost_of(
      [&] {
        torch::nn::functional::cross_entropy(torch::linear(hidden, weight), targets).backward();
        hidden.mutable_grad() = torch::Tensor();
        weight.mutable_grad() = torch::Tensor();
      },
      settings.repetitions);
  const auto dense = cost_of(step_with([&] { return torch::linear(hidden, weight); }), settings.repetitions);
  const auto fused =
      cost_of(step_with([&] { return free_transformer::LinearLogits(hidden, weight); }), settings.repetitions);

  const double mebibyte = 1024.0 * 1024.0;
  std::printf(
      "%lld tokens, width %lld, vocabulary %lld, float32, %d threads: the logits are %.1f MiB, the gradients %.1f "
      "MiB\n",
      static_cast<long long>(settings.tokens), static_cast<long long>(settings.width),
      static_cast<long long>(settings.vocabulary), at::get_num_threads(),
      4.0 * static_cast<double>(settings.tokens * settings.vocabulary) / mebibyte,
      4.0 * static_cast<double>(hidden.numel() + weight.numel()) / mebibyte);
  const auto print = [](const char* name, const Cost& cost) {
    std::printf("%-28s %8.0f ms %8.1f MiB\n", name, cost.seconds * 1e3, cost.mebibytes);
  };
  print("LibTorch's cross entropy", eager);
  print("our loss of dense logits", dense);
  print("our loss with a fused head", fused);
}

}  // namespace example

int main(int argument_count, char** arguments) {
  CLI::App app("Compares the loss of dense logits with the head fused into the loss: one step, forward and backward");
  app.option_defaults()->always_capture_default();
  example::ComparisonSettings settings;
  app.add_option("--tokens", settings.tokens, "Positions of a step")->check(CLI::PositiveNumber);
  app.add_option("--width", settings.width, "Width of the hidden states")->check(CLI::PositiveNumber);
  app.add_option("--vocabulary", settings.vocabulary, "Classes")->check(CLI::PositiveNumber);
  app.add_option("--repetitions", settings.repetitions, "Steps that are timed; the fastest counts")
      ->check(CLI::PositiveNumber);
  app.add_option("--threads", settings.threads, "Threads that compute")->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argument_count, arguments);
  try {
    example::compare_heads(settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
