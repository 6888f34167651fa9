#include <free_transformer/losses.hpp>

free_transformer::VAELossOutput call(const torch::Tensor& logits, const torch::Tensor& targets,
                                     const torch::Tensor& z_logits) {
  free_transformer::FreeTransformerLoss criterion;
  return criterion(logits, targets, z_logits);
}
