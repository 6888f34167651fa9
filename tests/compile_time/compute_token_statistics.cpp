#include <free_transformer/losses.hpp>

free_transformer::TokenStatistics call(const torch::Tensor& logits, const torch::Tensor& targets) {
  return free_transformer::compute_token_statistics(logits, targets);
}
