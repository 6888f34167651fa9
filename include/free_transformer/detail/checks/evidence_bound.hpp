/// What the bounds on the evidence refuse.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/latent.hpp"
#include "free_transformer/detail/checks/latent_code.hpp"
#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Of [..., positions, latent_dim] the first.
inline at::IntArrayRef shape_of_sequences(const at::Tensor& z_logits) {
  return z_logits.sizes().slice(0, static_cast<size_t>(z_logits.dim() - 2));
}

inline void check_mask(const char* function, const char* argument, const at::Tensor& mask, at::IntArrayRef shape,
                       const at::Device& device) {
  if (!mask.defined()) return;
  check_defined(function, argument, mask);
  TORCH_CHECK(mask.scalar_type() == at::kBool, function, ": ", argument, " must be bool, got ", mask.scalar_type());
  TORCH_CHECK(mask.sizes() == shape, function, ": ", argument, " must have the shape ", shape, ", got ", mask.sizes());
  check_device(function, argument, mask, "z_logits", device);
  check_no_transform(function, argument, mask);
}

/// tokens_of_sample is the log_likelihood of one sample, [..., tokens], or what has its shape.
template <typename Options>
void check_evidence(const char* function, const at::Tensor& tokens_of_sample, const at::Tensor& z_logits,
                    const Options& options) {
  check_z_logits(function, z_logits);
  TORCH_CHECK(z_logits.dim() >= 2, function, ": z_logits must have the shape [..., positions, latent_dim], got ",
              z_logits.sizes());
  check_device(function, "log_likelihood", tokens_of_sample, "z_logits", z_logits.device());
  check_no_transform(function, "log_likelihood", tokens_of_sample);
  const at::IntArrayRef shape = tokens_of_sample.sizes(), sequences = shape_of_sequences(z_logits);
  TORCH_CHECK(!shape.empty() && shape.slice(0, shape.size() - 1) == sequences, function,
              ": log_likelihood must have the sequences of z_logits and their tokens, ", sequences,
              " and one more size, for each sample, got ", shape);
  check_mask(function, "token_mask", options.token_mask(), shape, z_logits.device());
  check_mask(function, "latent_mask", options.latent_mask(), shape_of_positions(z_logits), z_logits.device());
  check_prior_logits(function, z_logits, options.prior_logits());
}

/// Bits of samples for z_logits, as bool.
inline at::Tensor checked_bits_of_samples(const char* function, const at::Tensor& bits, const at::Tensor& z_logits,
                                          int64_t samples) {
  check_defined(function, "bits", bits);
  check_device(function, "bits", bits, "z_logits", z_logits.device());
  auto shape = z_logits.sizes().vec();
  shape.insert(shape.begin(), samples);
  TORCH_CHECK(bits.sizes() == shape, function, ": bits must have the shape of z_logits for each of the K samples, ",
              at::IntArrayRef(shape), ", got ", bits.sizes());
  return checked_bits(function, bits);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
