#include <free_transformer/losses.hpp>

torch::Tensor call(const torch::Tensor& logits, const torch::Tensor& targets) {
  return free_transformer::compute_reconstruction_loss(logits, targets);
}
