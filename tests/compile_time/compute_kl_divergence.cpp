#include <free_transformer/losses.hpp>

torch::Tensor call(const torch::Tensor& z_logits) { return free_transformer::compute_kl_divergence(z_logits); }
