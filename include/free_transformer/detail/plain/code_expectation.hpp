/// The mean row of a codebook C when its code d is drawn bit by bit, sum_d G_d C_d, and the gradient of the bits' logits
/// through it, without a tensor of 2^H numbers a token.
///
/// G_d = prod_h p_h^bit_h(d) (1-p_h)^(1-bit_h(d)) is the product of a factor of d's low bits and one of its high bits. For
/// an upstream gradient g, s_d = C_d g, the mean is bilinear in the two: sum_ij high_i low_j s_ij. So a block of codes with
/// the same high bits needs one matrix product, for s, and two sums over it: one for each half of the bits. They give
///     A_h1 = sum_{d: bit_h(d)=1} G_d s_d,  A_h0 likewise,  and  d/dl_h = sum_d s_d G_d (bit_h(d)-p_h) = (1-p_h) A_h1 - p_h A_h0
/// whose terms both have the factor p_h (1-p_h): no digit is lost where a bit is nearly sure.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// Probabilities of bits being 1, and of their being 0 with all digits where 1 - p would have none: [n, bits] each.
struct BitProbabilities {
  explicit BitProbabilities(const at::Tensor& logits) : one(logistic(logits)), zero(logistic(-logits)) {}

  int64_t count() const { return one.size(1); }

  /// Of each code that the bits spell, the first one the lowest: [n, 2^bits].
  at::Tensor of_codes() const {
    at::Tensor product = at::ones({one.size(0), 1}, one.options());
    for (int64_t bit = 0; bit < count(); ++bit) {
      product = at::cat({product * zero.narrow(1, bit, 1), product * one.narrow(1, bit, 1)}, 1);
    }
    return product;
  }

  /// d/dl of each bit, [n, bits], from sums of G s for each code of the bits, [n, 2^bits].
  at::Tensor gradient(const at::Tensor& sums) const {
    const at::Tensor bits = at::arange(count(), sums.options().dtype(at::kLong));
    const at::Tensor codes = at::arange(sums.size(1), bits.options()).unsqueeze(1);
    const at::Tensor is_one = codes.bitwise_right_shift(bits).bitwise_and(1).to(sums.scalar_type());
    at::Tensor of_one = at::empty_like(one), of_zero = at::empty_like(zero);
    at::mm_out(of_one, sums, is_one);  // autocast, which would round mm to bfloat16, leaves it alone
    at::mm_out(of_zero, sums, 1 - is_one);
    return zero * of_one - one * of_zero;
  }

  at::Tensor one, zero;
};

/// Tokens [n, H], [n, D]; all in the type of arithmetic but the codebook.
inline at::Tensor code_expectation_gradient_of_block(const at::Tensor& z_logits, const at::Tensor& codebook,
                                                     const at::Tensor& upstream, int64_t low_bits) {
  const BitProbabilities low(z_logits.narrow(1, 0, low_bits));
  const BitProbabilities high(z_logits.narrow(1, low_bits, z_logits.size(1) - low_bits));
  const at::Tensor low_factor = low.of_codes(), high_factor = high.of_codes();
  const at::Tensor low_sums = at::zeros_like(low_factor), high_sums = at::empty_like(high_factor);
  at::Tensor products = at::empty_like(low_factor);
  const int64_t codes = low_factor.size(1);
  for (int64_t index = 0; index < high_factor.size(1); ++index) {
    const at::Tensor rows = codebook.narrow(0, index * codes, codes).to(upstream.scalar_type());
    at::mm_out(products, upstream, rows.t());
    products.mul_(low_factor);
    high_sums.select(1, index).copy_(products.sum(1));
    low_sums.addcmul_(products, high_factor.narrow(1, index, 1));
  }
  return at::cat({low.gradient(low_sums), high.gradient(high_sums.mul_(high_factor))}, 1);
}

/// Low bits, which make a block of codes: enough for the matrix product to be at its full speed, half of the bits where
/// that is more.
inline int64_t low_bits_of(int64_t latent_dim) {
  return std::max(std::min<int64_t>(latent_dim, 10), (latent_dim + 1) / 2);
}

/// Tokens of a block: with fewer than 512 the product waits for the codebook, which every block reads.
inline int64_t tokens_of_block(const at::Device& device, int64_t codes, int64_t width) {
  return std::max<int64_t>(512, block_elements(device) / std::max(codes, width));
}

/// The gradient of sum_t upstream_t sum_d G_td C_d by z_logits [N, H], in its shape and type; codebook [2^H, D], upstream
/// [N, D]. Costs one product of N x D by D x 2^H, and three tensors of a block of tokens and codes.
inline at::Tensor code_expectation_gradient(const at::Tensor& z_logits, const at::Tensor& codebook,
                                            const at::Tensor& upstream) {
  const auto type = arithmetic_type(codebook.scalar_type());
  const int64_t rows = z_logits.size(0), low_bits = low_bits_of(z_logits.size(1));
  const int64_t tokens = tokens_of_block(z_logits.device(), int64_t{1} << low_bits, codebook.size(1));
  at::Tensor gradient = at::empty_like(z_logits);
  for (int64_t first = 0; first < rows; first += tokens) {
    const auto part = [&](const at::Tensor& all) { return all.narrow(0, first, std::min(tokens, rows - first)); };
    part(gradient).copy_(
        code_expectation_gradient_of_block(part(z_logits).to(type), codebook, part(upstream).to(type), low_bits));
  }
  return gradient;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
