/// What is shown while the model trains.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>

#include <free_transformer/loss_metrics.hpp>

namespace example {

/// Where the training stands. done is in [0, 1].
struct Progress {
  int64_t step;
  int64_t steps;
  int64_t tokens;
  double seconds;
  double done;
};

class Stopwatch {
 public:
  /// Goes on from the seconds of an earlier run.
  explicit Stopwatch(double seconds) : earlier_(seconds) {}

  double seconds() const {
    return earlier_ + std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  double earlier_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Loss and reconstruction in nats, KL in bits, tokens a second, time left.
/// A line that is rewritten in place on a terminal; elsewhere, as in a CI log, one line for several reports.
class ProgressLine {
 public:
  void show(const Progress& progress, const free_transformer::LossMetrics& metrics) {
    constexpr int reports_a_line = 5;
    const bool last = progress.done >= 1.0;
    if (!terminal_ && reports_++ % reports_a_line != 0 && !last) {
      return;
    }
    const auto seconds_left = static_cast<int64_t>(progress.seconds * (1.0 - progress.done) / progress.done + 0.5);
    // Fewer than 80 characters, as a line that wraps cannot be rewritten.
    std::printf("%s%lld/%lld loss %.3f reconstruction %.3f KL %.2f bits %.0f tokens/s %lld:%02lld left%s",
                terminal_ ? "\r" : "", static_cast<long long>(progress.step), static_cast<long long>(progress.steps),
                metrics.at("loss/total"), metrics.at("loss/reconstruction"), metrics.at("latent/kl_bits"),
                static_cast<double>(progress.tokens) / progress.seconds, static_cast<long long>(seconds_left / 60),
                static_cast<long long>(seconds_left % 60), terminal_ && !last ? "\033[K" : "\n");
    std::fflush(stdout);
  }

 private:
  bool terminal_ = isatty(STDOUT_FILENO) != 0;
  int reports_ = 0;
};

}  // namespace example
