/// The figures that a training run logs, kept as sums on the device until somebody reads one.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"
#include "free_transformer/reduction.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// Named figures of one or more calls of `compute_vae_loss`, each a mean over the positions that counted.
///     loss/total               loss/reconstruction + loss/kl_weighted, in nats; loss/kl_weighted = beta_kl loss/kl
///     metrics/perplexity       exp of the mean negative log-likelihood given Z: the posterior's, not a language model's
///     latent/kl_bits           KL of a position before the hinge, in bits
///     latent/active_fraction   share of the positions above their budget
///     latent/active_bits       number of latent bits whose mean KL is above 0.01 nats
///     bound/elbo               negative log-likelihood + KL before the hinge, nats a token: comparable with a language
///                              model; bound/elbo_bits is the same in bits
///     metrics/accuracy         share of the positions whose most likely class is the target; only if options ask for it
///     loss/z_loss              the part of loss/reconstruction that is the z-loss; only if there is one
///     latent/kl_bits/0 ...     the share of each latent bit in latent/kl_bits, in the order of z_logits: which of them carry
///                              anything; only if options ask for it
/// They do not depend on `reduction` and `normalizer`: a += b gives what one call on both batches would have given.
/// Nothing is copied to the host before the first read; then everything is, once. Reading throws c10::Error for an
/// unknown name. Not safe to read from two threads at once.
class LossMetrics {
 public:
  using value_type = std::pair<std::string, double>;
  using const_iterator = std::vector<value_type>::const_iterator;

  /// No positions yet: a start for +=.
  LossMetrics() = default;

  /// The sums of both terms as `reconstruct` and the latent term return them.
  LossMetrics(const at::Tensor& reconstruction_sums, const at::Tensor& latent_sums, double beta_kl, double free_bits,
              bool hinge_on_batch_mean, bool has_accuracy, bool has_z_loss = false, bool has_kl_of_each_bit = false)
      : hinge_on_batch_mean_(hinge_on_batch_mean),
        has_accuracy_(has_accuracy),
        has_z_loss_(has_z_loss),
        has_kl_of_each_bit_(has_kl_of_each_bit) {
    TORCH_CHECK(reconstruction_sums.defined() && reconstruction_sums.dim() == 1 &&
                    reconstruction_sums.size(0) == detail::reconstruction_sum_count &&
                    reconstruction_sums.scalar_type() == latent_sums.scalar_type() &&
                    reconstruction_sums.device() == latent_sums.device(),
                "LossMetrics: reconstruction_sums must be the sums of compute_reconstruction_loss, ",
                int{detail::reconstruction_sum_count}, " numbers of ", latent_sums.scalar_type(), " on ",
                latent_sums.device());
    if (latent_sums.device().is_cpu()) {  // a small step feels every operation
      const auto count = static_cast<size_t>(latent_sums.numel());
      sums_ = at::empty({latent_begin + latent_sums.numel()}, latent_sums.options());
      const double* latent = latent_sums.data_ptr<double>();
      auto* sums = sums_.data_ptr<double>();
      const at::Tensor of_reconstruction = reconstruction_sums.contiguous();
      std::copy_n(of_reconstruction.data_ptr<double>(), size_t{detail::reconstruction_sum_count}, sums);
      sums[weighted_penalty_sum] = latent[detail::penalty_sum] * beta_kl;
      sums[beta_kl_sum] = latent[detail::latent_weight_sum] * beta_kl;
      sums[free_bits_sum] = latent[detail::latent_weight_sum] * free_bits;
      std::copy_n(latent, count, sums + latent_begin);
      return;
    }
    const at::Tensor weight = latent_sums[detail::latent_weight_sum];
    const at::Tensor settings =
        at::stack({latent_sums[detail::penalty_sum] * beta_kl, weight * beta_kl, weight * free_bits});
    sums_ = at::cat({reconstruction_sums, settings, latent_sums});
  }

  LossMetrics& operator+=(const LossMetrics& other) {
    if (!other.sums_.defined()) return *this;
    if (!sums_.defined()) return *this = other;
    TORCH_CHECK(sums_.sizes() == other.sums_.sizes() && hinge_on_batch_mean_ == other.hinge_on_batch_mean_ &&
                    has_accuracy_ == other.has_accuracy_,
                "LossMetrics: += must join metrics of one latent_dim, place of the hinge (BatchMean or not) and choice "
                "of accuracy, got sums of ",
                sums_.sizes(), " and ", other.sums_.sizes(), ", hinge on the batch mean ", hinge_on_batch_mean_,
                " and ", other.hinge_on_batch_mean_, ", accuracy ", has_accuracy_, " and ", other.has_accuracy_);
    sums_ = sums_ + other.sums_.to(sums_.device());
    has_z_loss_ = has_z_loss_ || other.has_z_loss_;
    has_kl_of_each_bit_ = has_kl_of_each_bit_ || other.has_kl_of_each_bit_;  // its sums are always there
    values_.clear();
    return *this;
  }

  friend LossMetrics operator+(LossMetrics left, const LossMetrics& right) { return left += right; }

  double at(const std::string& name) const {
    const auto found = std::find_if(begin(), end(), [&](const value_type& entry) { return entry.first == name; });
    if (found != end()) return found->second;
    std::string known;
    for (const auto& entry : *this) known += " " + entry.first;
    TORCH_CHECK(false, "LossMetrics::at: name must be one of", known, ", got ", name);
  }

  const_iterator begin() const { return values().begin(); }
  const_iterator end() const { return values().end(); }
  size_t size() const { return values().size(); }

  operator std::map<std::string, double>() const { return {begin(), end()}; }

 private:
  friend struct LossMetricsOfRanks;  // see distributed.hpp

  /// Sums between those of the two terms: what beta_kl and free_bits were, weighted, as they may change between calls.
  enum Setting : int64_t {
    weighted_penalty_sum = detail::reconstruction_sum_count,
    beta_kl_sum,
    free_bits_sum,
    latent_begin
  };

  const std::vector<value_type>& values() const {
    if (values_.empty()) values_ = read();
    return values_;
  }

  std::vector<value_type> read() const;

  at::Tensor sums_;
  bool hinge_on_batch_mean_ = false;
  bool has_accuracy_ = false;
  bool has_z_loss_ = false;
  bool has_kl_of_each_bit_ = false;
  mutable std::vector<value_type> values_;
};

inline std::vector<LossMetrics::value_type> LossMetrics::read() const {
  constexpr int64_t bits_begin = int64_t{latent_begin} + int64_t{detail::latent_sum_count};
  const at::Tensor sums = sums_.defined() ? sums_.to(at::kCPU, at::kDouble) : at::zeros({bits_begin}, at::kDouble);
  const double* data = sums.data_ptr<double>();
  const auto latent = [&](int64_t sum) { return data[latent_begin + sum]; };
  const auto ratio = [](double sum, double weight) { return detail::is_zero(weight) ? 0.0 : sum / weight; };
  const double positions = latent(detail::latent_weight_sum);

  const double z_loss = ratio(data[detail::z_loss_sum], data[detail::token_weight_sum]);
  const double reconstruction = ratio(data[detail::likelihood_loss_sum], data[detail::likelihood_weight_sum]) + z_loss;
  const double nll = ratio(data[detail::nll_sum], data[detail::token_weight_sum]);
  double raw_kl = 0, active_bits = 0;
  for (const double* bit = data + bits_begin; bit != data + sums.numel(); ++bit) {
    raw_kl += ratio(*bit, positions);
    active_bits += ratio(*bit, positions) > 0.01 ? 1 : 0;
  }
  double kl = ratio(latent(detail::penalty_sum), positions);
  double kl_weighted = ratio(data[weighted_penalty_sum], positions);
  if (hinge_on_batch_mean_) {  // not additive: the hinge belongs to the mean over all that was joined
    const double above = raw_kl - ratio(data[free_bits_sum], positions);
    kl = above <= 0 && !detail::is_nan(above) ? 0 : above;
    kl_weighted = kl * ratio(data[beta_kl_sum], positions);
  }
  std::vector<value_type> values{{"loss/total", reconstruction + kl_weighted},
                                 {"loss/reconstruction", reconstruction},
                                 {"loss/kl", kl},
                                 {"loss/kl_weighted", kl_weighted},
                                 {"metrics/perplexity", std::exp(nll)},
                                 {"latent/kl_bits", raw_kl / std::log(2.0)},
                                 {"latent/active_fraction", ratio(latent(detail::active_sum), positions)},
                                 {"latent/active_bits", active_bits},
                                 {"bound/elbo", nll + raw_kl},
                                 {"bound/elbo_bits", (nll + raw_kl) / std::log(2.0)}};
  if (has_accuracy_) {
    values.emplace_back("metrics/accuracy", ratio(data[detail::hit_sum], data[detail::token_weight_sum]));
  }
  if (has_z_loss_) values.emplace_back("loss/z_loss", z_loss);
  for (int64_t bit = 0; has_kl_of_each_bit_ && bit < sums.numel() - bits_begin; ++bit) {
    values.emplace_back("latent/kl_bits/" + std::to_string(bit),
                        ratio(data[bits_begin + bit], positions) / std::log(2.0));
  }
  return values;
}

}  // namespace FREE_TRANSFORMER_TYPES

}  // namespace free_transformer
