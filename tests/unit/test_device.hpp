/// Which device the unit tests compute on: that of FREE_TRANSFORMER_TEST_DEVICE, such as cuda, or the CPU if it is not set.
/// Tests make tensors on the CPU and look at results there; on their way in and out of the library's functions they go
/// through copies, which autograd follows. What a test says of the CPU alone (addresses, instruction sets, memory, checks
/// of values, errors at once) has the tag [cpu].
#pragma once

#include <torch/torch.h>

#include <cstdlib>
#include <optional>
#include <type_traits>

#include "free_transformer/losses.hpp"

namespace numeric {

/// None for the CPU. The listener of test_device.cpp has tried it before the first test.
inline const std::optional<torch::Device>& test_device() {
  static const std::optional<torch::Device> device = [] {
    const char* const name = std::getenv("FREE_TRANSFORMER_TEST_DEVICE");
    return name == nullptr || *name == 0 ? std::nullopt : std::make_optional(torch::Device(name));
  }();
  return device;
}

/// How many of so many random cases are tried: on a device one of four, as each of its operations takes far longer.
inline unsigned random_cases(unsigned count) { return test_device() ? count / 4 : count; }

inline torch::Tensor on_test_device(const torch::Tensor& tensor) {
  return tensor.defined() ? tensor.to(*test_device()) : tensor;
}

inline free_transformer::LinearLogits on_test_device(const free_transformer::LinearLogits& logits) {
  free_transformer::LinearLogits there(on_test_device(logits.hidden), on_test_device(logits.weight),
                                       on_test_device(logits.bias));
  return there.block_bytes(logits.block_bytes());
}

/// A source of logits of a test's own makes them where it is.
template <typename Logits>
inline constexpr bool can_move =
    std::is_same_v<Logits, torch::Tensor> || std::is_same_v<Logits, free_transformer::LinearLogits>;

inline free_transformer::Normalizer on_test_device(const free_transformer::Normalizer& normalizer) {
  return normalizer.tensor() ? free_transformer::Normalizer(on_test_device(*normalizer.tensor())) : normalizer;
}

inline free_transformer::ReconstructionLossOptions on_test_device(free_transformer::ReconstructionLossOptions options) {
  options.token_weight(on_test_device(options.token_weight())).weight(on_test_device(options.weight()));
  return options.normalizer(on_test_device(options.normalizer()));
}

inline free_transformer::KLDivergenceOptions on_test_device(free_transformer::KLDivergenceOptions options) {
  options.token_weight(on_test_device(options.token_weight())).prior_logits(on_test_device(options.prior_logits()));
  return options.normalizer(on_test_device(options.normalizer()));
}

inline free_transformer::VAELossOptions on_test_device(free_transformer::VAELossOptions options) {
  return options.reconstruction(on_test_device(options.reconstruction())).kl(on_test_device(options.kl()));
}

}  // namespace numeric

namespace free_transformer {

template <typename Logits>
at::Tensor compute_reconstruction_loss_there(const Logits& logits, const at::Tensor& targets,
                                             const ReconstructionLossOptions& options) {
  if constexpr (numeric::can_move<Logits>) {
    if (numeric::test_device()) {
      return compute_reconstruction_loss(numeric::on_test_device(logits), numeric::on_test_device(targets),
                                         numeric::on_test_device(options))
          .cpu();
    }
  }
  return compute_reconstruction_loss(logits, targets, options);
}
template <typename Logits>
at::Tensor compute_reconstruction_loss_there(const Logits& logits, const at::Tensor& targets,
                                             int64_t ignore_index = -100) {
  if (numeric::test_device()) {
    return compute_reconstruction_loss_there(logits, targets, ReconstructionLossOptions().ignore_index(ignore_index));
  }
  return compute_reconstruction_loss(logits, targets, ignore_index);
}

template <typename FreeBits = PerPosition>
at::Tensor compute_kl_divergence_there(const at::Tensor& z_logits, const KLDivergenceOptions& options) {
  if (!numeric::test_device()) return compute_kl_divergence<FreeBits>(z_logits, options);
  return compute_kl_divergence<FreeBits>(numeric::on_test_device(z_logits), numeric::on_test_device(options)).cpu();
}
template <typename FreeBits = PerPosition>
at::Tensor compute_kl_divergence_there(const at::Tensor& z_logits, int64_t latent_dim = 16, double free_bits = 0.3466) {
  if (!numeric::test_device()) return compute_kl_divergence<FreeBits>(z_logits, latent_dim, free_bits);
  return compute_kl_divergence_there<FreeBits>(z_logits,
                                               KLDivergenceOptions().latent_dim(latent_dim).free_bits(free_bits));
}

template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss_there(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                                     const VAELossOptions& options) {
  if constexpr (numeric::can_move<Logits>) {
    if (numeric::test_device()) {
      auto output = compute_vae_loss<FreeBits>(numeric::on_test_device(logits), numeric::on_test_device(targets),
                                               numeric::on_test_device(z_logits), numeric::on_test_device(options));
      output.loss = output.loss.cpu();
      return output;
    }
  }
  return compute_vae_loss<FreeBits>(logits, targets, z_logits, options);
}
template <typename FreeBits = PerPosition, typename Logits>
VAELossOutput compute_vae_loss_there(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                                     int64_t latent_dim = 16, double beta_kl = 1.0, double free_bits = 0.3466,
                                     int64_t ignore_index = -100) {
  if (numeric::test_device()) {
    return compute_vae_loss_there<FreeBits>(
        logits, targets, z_logits,
        VAELossOptions().latent_dim(latent_dim).beta_kl(beta_kl).free_bits(free_bits).ignore_index(ignore_index));
  }
  return compute_vae_loss<FreeBits>(logits, targets, z_logits, latent_dim, beta_kl, free_bits, ignore_index);
}

template <typename Logits>
TokenStatistics compute_token_statistics_there(const Logits& logits, const at::Tensor& targets,
                                               const ReconstructionLossOptions& options = {}) {
  if constexpr (numeric::can_move<Logits>) {
    if (numeric::test_device()) {
      const auto of = compute_token_statistics(numeric::on_test_device(logits), numeric::on_test_device(targets),
                                               numeric::on_test_device(options));
      return {of.loss.cpu(),       of.log_sum_exp.cpu(), of.target_log_probability.cpu(),
              of.prediction.cpu(), of.hit.cpu(),         of.entropy.cpu()};
    }
  }
  return compute_token_statistics(logits, targets, options);
}

}  // namespace free_transformer

// The tests name the functions that users call. NOLINTBEGIN(readability-identifier-naming)
#define compute_reconstruction_loss compute_reconstruction_loss_there
#define compute_kl_divergence compute_kl_divergence_there
#define compute_vae_loss compute_vae_loss_there
#define compute_token_statistics compute_token_statistics_there
// NOLINTEND(readability-identifier-naming)
