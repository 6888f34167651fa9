#include <free_transformer/extern_losses.hpp>

free_transformer::VAELossOutput call(const torch::Tensor& logits, const torch::Tensor& targets,
                                     const torch::Tensor& z_logits) {
  return free_transformer::compute_vae_loss(logits, targets, z_logits);
}
