/// Tells when the latent carries nothing, or when its KL no longer costs anything.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include <free_transformer/loss_metrics.hpp>

namespace example {

/// What is wrong with the latent according to the metrics of some steps, or nothing. free_bits is the budget in bits.
///     collapsed  `latent/active_bits` is 0: no bit's mean KL is above 0.01 nats, so that Z tells the decoder nothing
///     saturated  `latent/active_fraction` is below 1 %: the KL of nearly every position is no higher than its budget, so that
///                it has no gradient, and beta no effect
inline std::string latent_warning(const free_transformer::LossMetrics& metrics, double free_bits) {
  if (metrics.at("latent/active_bits") < 0.5) {
    return "the latent has collapsed: no latent bit has more than 0.01 nats of KL. Raise --free-bits, warm --beta up, "
           "or try "
           "another --seed";
  }
  if (free_bits > 0.0 && metrics.at("latent/active_fraction") < 0.01) {
    return "the free bits are saturated: the KL of nearly every byte is within its budget and costs nothing, whatever "
           "--beta "
           "is. Lower --free-bits to have it weighed";
  }
  return "";
}

/// Warns once a state has lasted for five reports, and again only after another one. Saturation counts in the second half of the
/// training: Z carries little at first.
class LatentWatch {
 public:
  /// done is the part of the training that is done, in [0, 1].
  void look(const free_transformer::LossMetrics& metrics, double free_bits, int64_t step, double done) {
    constexpr int reports_that_last = 5;
    const auto warning = latent_warning(metrics, done > 0.5 ? free_bits : 0.0);
    reports_ = warning == current_ ? reports_ + 1 : 1;
    current_ = warning;
    if (reports_ == reports_that_last && warning != shown_) {
      if (!warning.empty()) {
        std::printf("\nwarning, step %lld: %s\n", static_cast<long long>(step), warning.c_str());
        std::fflush(stdout);
      }
      shown_ = warning;
    }
  }

 private:
  std::string current_, shown_;
  int reports_ = 0;
};

}  // namespace example
