/// The bits of the latent, their codes, and the binary mapper.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include <free_transformer/latent_code.hpp>

#include "choices.hpp"
#include "expected.hpp"
#include "input.hpp"
#include "refusal.hpp"

namespace fuzz {

/// Bits drawn with these logits; sure ones are their own.
inline void fuzz_samples(Choices& choices) {
  const Input input = some_input(choices, some_positions(choices), 1 + choices.below(9));
  const Handed z_logits(input);
  const Memory memory({z_logits.tensor, z_logits.leaf});
  const bool is_missing = input.fault == Input::Fault::none && input.rows().isnan().any().item<bool>();
  at::Tensor bits;
  if (is_refused(choices.has_gone_wrong() || is_missing ? Refusal::required : Refusal::wrong, memory,
                 [&] { bits = free_transformer::sample_latent_bits(z_logits.tensor); })) {
    return;
  }
  if (bits.scalar_type() != at::kBool || bits.sizes() != z_logits.tensor.sizes()) fail("bits");
  const at::Tensor z = input.rows(), drawn = bits.reshape(z.sizes());
  if (!((z.abs() < 37) | (drawn == (z > 0))).all().item<bool>()) fail("a sure bit");
}

/// Codes of bits and back.
inline void fuzz_codes(Choices& choices) {
  const Shape positions = some_positions(choices);
  const auto latent_dim = choices.one_of<int64_t>({16, 1, 5, 33, 62}, {0, 63, -1});
  Sequence sequence(choices);
  at::Tensor bits = at::empty(with_last(positions, std::max<int64_t>(0, latent_dim)), at::kDouble);
  for (int64_t i = 0; i < bits.numel(); ++i) bits.data_ptr<double>()[i] = static_cast<double>(sequence.below(2));
  if (bits.numel() > 0 && choices.goes_wrong()) {
    bits.reshape({-1})[choices.large() % bits.numel()] = choices.one_of({2.0, -1.0, not_a_number, 0.5});
  } else {
    bits = bits.to(choices.one_of({at::kBool, at::kLong, at::kByte, at::kHalf, at::kDouble}));
  }
  const auto refusal = choices.has_gone_wrong() ? Refusal::required : Refusal::wrong;
  at::Tensor codes, unpacked;
  const Memory memory({bits});
  if (is_refused(refusal, memory, [&] {
        codes = free_transformer::pack_latent_bits(bits);
        unpacked = free_transformer::unpack_latent_codes(codes, latent_dim);
      })) {
    return;
  }
  at::Tensor code = at::zeros(positions, at::kLong);
  for (int64_t bit = 0; bit < latent_dim; ++bit) code = code + bits.select(-1, bit).to(at::kLong) * (int64_t{1} << bit);
  if (!codes.equal(code) || !unpacked.equal(bits.to(at::kBool))) fail("codes");
}

/// log q of bits, and their straight-through gradient, which is sigmoid'.
inline void fuzz_log_probability(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t latent_dim = 1 + choices.below(9);
  const Input input = some_input(choices, positions, latent_dim);
  const at::Tensor bits = some_weights(choices, some_shape(choices, with_last(positions, latent_dim))) > 0;
  const Handed z_logits(input);
  const Memory memory({z_logits.tensor, z_logits.leaf, bits});
  at::Tensor log_probability, straight_through;
  const auto refusal = choices.has_gone_wrong() ? Refusal::possible : Refusal::wrong;  // z_logits [H] stand for all
  if (is_refused(refusal, memory,
                 [&] {
                   log_probability = free_transformer::compute_latent_log_probability(z_logits.tensor, bits);
                   straight_through = free_transformer::straight_through_latent_bits(z_logits.tensor, bits);
                 }) ||
      choices.has_gone_wrong()) {
    return;
  }
  const at::Tensor z = input.rows(), is_one = bits.reshape(z.sizes()), signed_z = at::where(is_one, z, -z);
  const double step = arithmetic_step(input.type());
  // log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|))
  const at::Tensor terms = signed_z.clamp_max(0) - (-z.abs()).exp().log1p();
  const at::Tensor size = terms.nan_to_num(0, 0, 0).abs();
  check("log probability", log_probability,
        Expected(terms.sum(-1), (20 * step * size + smallest(at::kFloat)).sum(-1)).reshape(positions));
  check("straight-through bits", straight_through,
        Expected(at::where(z.isnan(), z, is_one.to(at::kDouble))).reshape(bits.sizes()));
  const at::Tensor away = (-signed_z).sigmoid(), slope = z.sigmoid() * (-z).sigmoid();
  Gradients gradients;
  gradients.add(
      "z_logits (log probability)", z_logits,
      {at::where(is_one, away, -away), 16 * step * away + 90 * smallest(at::kFloat), z.isnan().logical_not()});
  gradients.check_those_of(log_probability, at::ones_like(log_probability), 1);
  gradients = {};
  gradients.add("z_logits (straight through)", z_logits,
                {slope, 16 * step * slope + 90 * smallest(at::kFloat), z.isnan().logical_not()});
  gradients.check_those_of(straight_through, at::ones_like(straight_through), 1);
}

/// Rows of a codebook; d/dz_h = Σ_d (codebook_d g) G_d (bit_h(d) - sigmoid(z_h)), G_d the probability of code d.
inline void fuzz_binary_mapper(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t latent_dim = 1 + choices.below(6), count = int64_t{1} << latent_dim, width = 1 + choices.below(5);
  const Input input = some_input(choices, positions, latent_dim);
  Input book = some_input(choices, {choices.goes_wrong() ? count - 1 : count}, width);
  if ((book.type() == at::kDouble) != (input.type() == at::kDouble) && !choices.goes_wrong())
    book.numbers = book.numbers.to(input.type());
  const at::Tensor codes = some_class_indices(choices, positions, count, /*ignore_index=*/0);
  const Handed z_logits(input), codebook(book);
  const Memory memory({z_logits.tensor, z_logits.leaf, codebook.tensor, codebook.leaf, codes});
  at::Tensor rows;
  if (is_refused(choices.has_gone_wrong() ? Refusal::required : Refusal::wrong, memory,
                 [&] { rows = free_transformer::map_latent_codes(z_logits.tensor, codes, codebook.tensor); })) {
    return;
  }
  const at::Tensor z = input.rows(), values = book.rows(), index = codes.to(at::kLong).reshape({-1});
  check("rows", rows, Expected(values.index_select(0, index)).reshape(with_last(positions, width)), 0);
  const at::Tensor is_one =
      at::arange(count).unsqueeze(1).bitwise_right_shift(at::arange(latent_dim)).bitwise_and(1) == 1;
  const at::Tensor p = z.sigmoid().unsqueeze(1), q = (-z).sigmoid().unsqueeze(1);  // [N, 1, H]
  const at::Tensor probability = at::where(is_one, p, q).prod(-1);                 // [N, 2^H]
  const at::Tensor away = at::where(is_one, q, -p);
  const double step = arithmetic_step(input.type());
  const at::Tensor of_codes = values.sum(-1), size = values.abs().sum(-1);
  const at::Tensor gradient = ((of_codes * probability).unsqueeze(-1) * away).sum(1);
  const at::Tensor magnitude = ((size * probability).unsqueeze(-1) * away.abs()).sum(1);
  const at::Tensor is_known =
      (z.isfinite() & values.isfinite().all() & (size.sum() < 1e37)).all(-1, /*keepdim=*/true).expand_as(z);
  const double steps = static_cast<double>(64 + width + count) * step;
  Gradients gradients;
  gradients.add("z_logits", z_logits,
                {gradient, steps * magnitude + 4 * size.sum() * smallest(arithmetic(input.type())), is_known});
  gradients.add("codebook", codebook,
                Expected(at::zeros_like(values).index_add(0, index, at::ones({index.numel(), width}, at::kDouble))));
  gradients.check_those_of(rows, at::ones_like(rows), 1);
  memory.check_untouched("the mapper");
}

inline void fuzz_latent_code(Choices& choices) {
  switch (choices.below(4)) {
    case 0:
      return fuzz_binary_mapper(choices);
    case 1:
      return fuzz_log_probability(choices);
    case 2:
      return fuzz_codes(choices);
    default:
      return fuzz_samples(choices);
  }
}

}  // namespace fuzz
