// A linear head and latent bits, trained for a few steps with the loss of the Free Transformer.
#include <torch/torch.h>

#include <iostream>

#include <free_transformer/losses.hpp>

int main() {
  torch::manual_seed(1);
  auto hidden = torch::randn({4, 32, 64});                    // [batch, positions, width], as a decoder makes it
  auto targets = torch::randint(256, {4, 32}, torch::kLong);  // the next token at each position
  torch::nn::Linear head(64, 256), encoder(64, 16);           // to 256 tokens, and to 16 latent bits

  free_transformer::FreeTransformerLoss criterion(free_transformer::VAELossOptions().beta_kl(0.5));
  torch::optim::AdamW optimizer({{head->parameters()}, {encoder->parameters()}});

  for (int step = 1; step <= 20; ++step) {
    auto [loss, metrics] = criterion(head(hidden), targets, encoder(hidden));
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    std::cout << "step " << step << "  loss " << metrics.at("loss/total") << "  KL " << metrics.at("latent/kl_bits")
              << " bits a position\n";
  }
}
