/// The latent bits of a position as samples, as one number, as a row of a codebook: Fleuret 2025, Eq. 6 to 8.
///
///     bits = sample_latent_bits(z_logits);                 // [..., H]
///     codes = pack_latent_bits(bits);                      // [...]
///     rows = map_latent_codes(z_logits, codes, codebook);  // [..., D]
///
/// At generation, without an encoder, a row is looked up by `torch::embedding(codebook, codes)`.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/binary_mapper.hpp"
#include "free_transformer/detail/checks/latent_code.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/bernoulli_kl.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// Independent bits, P(B_h = 1) = sigmoid(z_h), Eq. 6. Drawn in float64 (MPS: float32), where a logit of +-37 or beyond
/// always gives its own bit.
/// z_logits   [..., H], floating
/// generator  of z_logits' device; the default one if it is not given
/// Returns    bool [..., H], without a graph
/// Throws     c10::Error for a type that is not floating, and for NaN (on CUDA a device-side assertion)
inline at::Tensor sample_latent_bits(const at::Tensor& z_logits, const at::Generator& generator = {});

/// The code d = sum_h 2^(h-1) B_h, Eq. 7: the first bit is the lowest.
/// bits     [..., H], H from 1 to 62; bool, or 0 and 1 of any integer or floating type
/// Returns  int64 [...]
/// Throws   c10::Error for values other than 0 and 1 (on CUDA a device-side assertion), and bits that require grad
inline at::Tensor pack_latent_bits(const at::Tensor& bits);

/// The bits of codes, what `pack_latent_bits` was given.
/// codes       [...], any integer type, in [0, 2^latent_dim)
/// latent_dim  H from 1 to 62
/// Returns     bool [..., H]
/// Throws      c10::Error for a code out of range (on CUDA a device-side assertion)
inline at::Tensor unpack_latent_codes(const at::Tensor& codes, int64_t latent_dim);

/// log q(bits | z_logits) = sum_h log sigmoid(z_h) or log sigmoid(-z_h), nats; with relative accuracy in the sum's terms, and
/// in their gradients sigmoid(-z_h) and -sigmoid(z_h), however sure a bit is. Of codes: `unpack_latent_codes` first.
/// z_logits  [..., H] as the bits, or [H] for all: log p(bits) of a prior is that of its prior_logits
/// bits      [..., H], as in `pack_latent_bits`
/// Returns   [...]; float32, or float64 for float64. -inf if a bit is impossible, NaN for a NaN. Saved: z_logits, bits
/// Throws    c10::Error if the shapes or devices differ, and as `pack_latent_bits` does
inline at::Tensor compute_latent_log_probability(const at::Tensor& z_logits, const at::Tensor& bits);

/// The binary mapper with the layer behind it: (Y + G - detach(G)) codebook, Eq. 8, where Y is the one-hot vector of the code
/// and G_d = prod_h P(B_h = bit h of d) the probability of code d. Forward looks a row up. Backward adds the gradient g of a
/// row to its place in the codebook's, and gives
///     d/dz_h = sum_d (codebook_d g) G_d (bit_h(d) - sigmoid(z_h))
/// by one matrix product [N, D] x [D, 2^H], a block of tokens and codes at a time.
/// z_logits  [..., H], float64 if the codebook is, else any floating type; H up to 62
/// codes     [...], any integer type, in [0, 2^H): `pack_latent_bits(sample_latent_bits(z_logits))`
/// codebook  [2^H, D], the layer's weight transposed; half types are multiplied in float32; rows are added up in float64
/// Returns   [..., D] in the codebook's type. Saved: z_logits, codes, codebook. A frozen input costs nothing
/// Throws    c10::Error if shapes, types or devices do not fit, or a code is out of range; in backward under create_graph
inline at::Tensor map_latent_codes(const at::Tensor& z_logits, const at::Tensor& codes, const at::Tensor& codebook);

/// The bits as numbers with the gradient of their probabilities, B + sigmoid(z) - detach(sigmoid(z)) (Bengio et al. 2013): a
/// cheaper and biased choice, for layers that take bits in place of a code.
/// z_logits  [..., H], floating
/// bits      [..., H], as in `pack_latent_bits`
/// Returns   0 and 1, [..., H] in the type of z_logits, NaN for a NaN. Saved: what sigmoid saves. Double backward works
/// Throws    c10::Error if the shapes or devices differ, and as `pack_latent_bits` does
inline at::Tensor straight_through_latent_bits(const at::Tensor& z_logits, const at::Tensor& bits);

inline at::Tensor sample_latent_bits(const at::Tensor& z_logits, const at::Generator& generator) {
  constexpr const char* function = "sample_latent_bits";
  detail::check_z_logits(function, z_logits);
  const at::NoGradGuard no_grad;
  const at::Tensor z = detail::readable(z_logits).to(detail::widest_type(z_logits.device()));
  detail::check_values(function, "z_logits", "not be NaN", z, z.eq(z));
  // The likelier bit, unless 1 - uniform in (0, 1] falls below the other one's probability: that keeps its digits, and none
  // of its draws is below 0.
  const at::Tensor uniform = at::empty(z.sizes(), z.options());
  generator.defined() ? uniform.uniform_(0, 1, generator) : uniform.uniform_();
  return (1 - uniform < detail::plain::logistic(-detail::plain::magnitude(z))) != (z > 0);
}

inline at::Tensor pack_latent_bits(const at::Tensor& bits) {
  constexpr const char* function = "pack_latent_bits";
  const at::Tensor values = detail::checked_bits(function, bits).to(at::kLong);
  detail::check_latent_dim(function, "the last size of bits", values.size(-1));
  return values.bitwise_left_shift(at::arange(values.size(-1), values.options())).sum(-1);
}

inline at::Tensor unpack_latent_codes(const at::Tensor& codes, int64_t latent_dim) {
  constexpr const char* function = "unpack_latent_codes";
  detail::check_latent_dim(function, "latent_dim", latent_dim);
  const at::Tensor values = detail::checked_codes(function, codes, latent_dim);
  const at::Tensor shifts = at::arange(latent_dim, values.options());
  return values.unsqueeze(-1).bitwise_right_shift(shifts).bitwise_and(1).to(at::kBool);
}

inline at::Tensor compute_latent_log_probability(const at::Tensor& z_logits, const at::Tensor& bits) {
  constexpr const char* function = "compute_latent_log_probability";
  detail::check_z_logits(function, z_logits);
  const bool is_one_for_all = z_logits.dim() == 1 && bits.defined() && bits.dim() >= 1;
  // Before the one row becomes many, or its gradient would be summed in a half type.
  const at::Tensor wide = z_logits.to(detail::arithmetic_type(z_logits.scalar_type()));
  const at::Tensor z = is_one_for_all && bits.size(-1) == z_logits.size(0) ? wide.expand(bits.sizes()) : wide;
  return detail::plain::log_probability_of_bits(z, detail::checked_bits_like(function, bits, z));
}

inline at::Tensor map_latent_codes(const at::Tensor& z_logits, const at::Tensor& codes, const at::Tensor& codebook) {
  constexpr const char* function = "map_latent_codes";
  detail::check_z_logits(function, z_logits);
  detail::check_latent_dim(function, "the last size of z_logits", z_logits.size(-1));
  detail::check_codebook(function, codebook, z_logits);
  const at::Tensor indices = detail::checked_codes_of(function, codes, z_logits);
  return detail::apply_in_graph(c10::make_intrusive<detail::BinaryMapper>(), {z_logits, indices, codebook})[0];
}

inline at::Tensor straight_through_latent_bits(const at::Tensor& z_logits, const at::Tensor& bits) {
  constexpr const char* function = "straight_through_latent_bits";
  detail::check_z_logits(function, z_logits);
  const at::Tensor is_one = detail::checked_bits_like(function, bits, z_logits);
  const at::Tensor z = z_logits.to(detail::arithmetic_type(z_logits.scalar_type()));
  // The likelier bit's probability, which differs from sigmoid(z) by its sign and a constant: with s = exp(-|z|) its
  // derivative s/(1+s)^2 has all its digits, in at::exp the same ones for any number of threads.
  const at::Tensor sign = at::ones_like(z).masked_fill_(z < 0, -1);
  const at::Tensor slope = sign * (1 + detail::plain::minus_abs(z).exp()).reciprocal();
  return (is_one.to(z.scalar_type()) + (slope - slope.detach())).to(z_logits.scalar_type());
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
