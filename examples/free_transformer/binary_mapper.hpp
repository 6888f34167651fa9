/// From latent logits to one of 2^H codes, with a gradient for every logit (Fleuret 2025, Eq. 6 to 8).
#pragma once

#include <torch/torch.h>

#include <cstdint>

namespace example {

/// Samples H bits a position and returns the one-hot vector Y of the code that they spell.
///     P(B_h = 1) = σ(l_h),   d = Σ_h 2^(h−1)·B_h,   output = Y + G − detach(G)
/// G_d is the probability of code d, so the value is the sample's and the gradient that of the whole distribution.
/// z_logits   [..., latent_dim]
/// Returns    [..., 2^latent_dim]
class BinaryMapperImpl : public torch::nn::Module {
 public:
  explicit BinaryMapperImpl(int64_t latent_dim) {
    const auto codes = torch::arange(int64_t{1} << latent_dim);
    const auto positions = torch::arange(latent_dim);
    place_values_ = register_buffer("place_values", torch::pow(2, positions));
    bits_of_codes_ = register_buffer(
        "bits_of_codes", codes.bitwise_right_shift(positions.unsqueeze(1)).remainder(2).to(torch::kFloat32));
  }

  torch::Tensor forward(const torch::Tensor& z_logits) const {
    const auto sample = one_hot(sample_codes(z_logits));
    if (!z_logits.requires_grad()) {
      return sample;
    }
    const auto probabilities = code_probabilities(z_logits);
    // In this order the value is exactly Y: Y + G would round first.
    return sample + (probabilities - probabilities.detach());
  }

  /// Codes, int64 [...], drawn from the bits' probabilities.
  torch::Tensor sample_codes(const torch::Tensor& z_logits) const {
    const auto bits = torch::bernoulli(z_logits.detach().sigmoid());
    return (bits.to(torch::kInt64) * place_values_).sum(-1);
  }

  /// Codes as vectors with a single 1, [..., 2^latent_dim].
  torch::Tensor one_hot(const torch::Tensor& codes) const {
    auto shape = codes.sizes().vec();
    shape.push_back(code_count());
    return bits_of_codes_.new_zeros(shape).scatter_(-1, codes.unsqueeze(-1), 1.0);
  }

  int64_t code_count() const { return bits_of_codes_.size(1); }

 private:
  /// As log σ(l) = l + log σ(−l), log G_d = Σ_h bit_h(d)·l_h + Σ_h log σ(−l_h): one product for all codes.
  torch::Tensor code_probabilities(const torch::Tensor& z_logits) const {
    const auto all_bits_zero = torch::log_sigmoid(-z_logits).sum(-1, /*keepdim=*/true);
    return (torch::matmul(z_logits, bits_of_codes_) + all_bits_zero).exp();
  }

  torch::Tensor place_values_;   // [latent_dim], 2^(h−1)
  torch::Tensor bits_of_codes_;  // [latent_dim, 2^latent_dim]
};
TORCH_MODULE(BinaryMapper);

}  // namespace example
