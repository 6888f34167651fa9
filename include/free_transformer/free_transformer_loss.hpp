/// The loss as a module that holds its options.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/pimpl.h>

#include <cstdint>
#include <ostream>
#include <utility>

#include "free_transformer/vae_loss.hpp"

namespace free_transformer {

/// `compute_vae_loss` as a `torch::nn::Module`. It has no parameters; `options` may be changed between calls.
class FreeTransformerLossImpl : public torch::nn::Cloneable<FreeTransformerLossImpl> {
 public:
  explicit FreeTransformerLossImpl(int64_t latent_dim = 16, double beta_kl = 1.0, double free_bits = 0.3466,
                                   int64_t ignore_index = -100)
      : FreeTransformerLossImpl(
            VAELossOptions().latent_dim(latent_dim).beta_kl(beta_kl).free_bits(free_bits).ignore_index(ignore_index)) {}

  explicit FreeTransformerLossImpl(VAELossOptions options_) : options(std::move(options_)) {}

  void reset() override {}

  void pretty_print(std::ostream& stream) const override {
    stream << "free_transformer::FreeTransformerLoss(latent_dim=" << options.latent_dim()
           << ", beta_kl=" << options.beta_kl() << ", free_bits=" << options.free_bits()
           << ", ignore_index=" << options.ignore_index() << ")";
  }

  /// See `compute_vae_loss`. Another free-bits policy: `criterion->forward<PerBit>(logits, targets, z_logits)`.
  template <typename FreeBits = PerPosition, typename Logits>
  VAELossOutput forward(const Logits& logits, const torch::Tensor& targets, const torch::Tensor& z_logits) {
    return compute_vae_loss<FreeBits>(logits, targets, z_logits, options);
  }

  VAELossOptions options;
};

/// What `TORCH_MODULE` would define, with a call operator that takes any source of logits: LibTorch's own deduces its
/// result from a `forward` that is not a template.
class FreeTransformerLoss : public torch::nn::ModuleHolder<FreeTransformerLossImpl> {
 public:
  using torch::nn::ModuleHolder<FreeTransformerLossImpl>::ModuleHolder;
  using Impl = FreeTransformerLossImpl;

  template <typename Logits>
  VAELossOutput operator()(const Logits& logits, const torch::Tensor& targets, const torch::Tensor& z_logits) {
    return impl_->forward(logits, targets, z_logits);
  }
};

}  // namespace free_transformer
