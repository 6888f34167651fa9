// What a user writes first. Without any preference among 32 classes the loss is log 32, and the latent bits are free.
#include <torch/torch.h>

#include <cmath>
#include <iostream>

#include <free_transformer/losses.hpp>

int main() {
  auto logits = torch::zeros({2, 8, 32}, torch::requires_grad());
  auto targets = torch::randint(32, {2, 8}, torch::kLong);
  auto z_logits = torch::zeros({2, 8, 16}, torch::requires_grad());

  free_transformer::FreeTransformerLoss criterion;
  auto [loss, metrics] = criterion(logits, targets, z_logits);
  loss.backward();

  double error = std::abs(metrics.at("loss/total") - std::log(32.0));
  double gradient = logits.grad().abs().sum().item<double>();
  std::cout << "loss " << loss.item<double>() << ", sum of the gradient's magnitudes " << gradient << '\n';
  return error < 1e-6 && std::abs(gradient - 2 * 31.0 / 32) < 1e-5 ? 0 : 1;
}
