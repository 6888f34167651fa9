#include <free_transformer/losses.hpp>

torch::Tensor call(const torch::Tensor& hidden, const torch::Tensor& weight, const torch::Tensor& targets) {
  return free_transformer::compute_reconstruction_loss(free_transformer::LinearLogits(hidden, weight), targets);
}
