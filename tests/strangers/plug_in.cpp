// A plug-in, compiled with hidden visibility: its copy of the library is its own.
#include "plug_in.hpp"

#include <free_transformer/vae_loss.hpp>

extern "C" __attribute__((visibility("default"))) void compute_loss(const at::Tensor& logits, const at::Tensor& targets,
                                                                    const at::Tensor& z_logits, bool inplace,
                                                                    PlugInLoss& result) {
  auto options = free_transformer::VAELossOptions().latent_dim(z_logits.size(-1));
  options.reconstruction().inplace(inplace);
  const auto [loss, metrics] = free_transformer::compute_vae_loss(logits, targets, z_logits, options);
  result = {loss, metrics.at("bound/elbo")};
}
