/// What the tools of the latent code refuse. Values are looked at on the CPU; on a device that would stall its stream, so
/// there the device asserts them when it comes to them.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/positions.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The most bits whose number of codes int64 holds.
inline constexpr int64_t most_latent_bits = 62;

/// is_right has the shape of values. MPS has no assertion in all versions of LibTorch: it is looked at.
inline void check_values(const char* function, const char* argument, const char* requirement, const at::Tensor& values,
                         const at::Tensor& is_right) {
  if (values.is_meta()) return;
  if (!values.device().is_cpu() && !values.is_mps()) return at::_assert_async(is_right.all());
  if (is_right.all().item<bool>()) return;
  const auto index = is_right.flatten().logical_not().nonzero()[0].item<int64_t>();
  TORCH_CHECK(false, function, ": ", argument, " must ", requirement, ", got ", values.flatten()[index].item(),
              " at index ", index);
}

inline void check_latent_dim(const char* function, const char* argument, int64_t latent_dim) {
  TORCH_CHECK(latent_dim >= 1 && latent_dim <= most_latent_bits, function, ": ", argument, " must lie in [1, ",
              most_latent_bits, "], got ", latent_dim);
}

/// Latent logits of any number of bits.
inline void check_z_logits(const char* function, const at::Tensor& z_logits) {
  check_not_traced(function);
  check_logits(function, "z_logits", z_logits);
}

/// Bits in the last dimension, as bool.
inline at::Tensor checked_bits(const char* function, const at::Tensor& bits) {
  check_not_traced(function);
  check_defined(function, "bits", bits);
  TORCH_CHECK(!bits.is_complex(), function, ": bits must be bool, integer or floating, got ", bits.scalar_type());
  TORCH_CHECK(bits.dim() >= 1 && bits.size(-1) >= 1, function,
              ": bits must have at least one dimension, and a last one of at least 1, got shape ", bits.sizes());
  check_no_transform(function, "bits", bits);
  check_constant(function, "bits", bits);
  at::Tensor values = readable(bits);
  if (values.scalar_type() == at::kBool) return values;
  at::Tensor is_one = values == 1;
  check_values(function, "bits", "be 0 or 1", values, is_one | (values == 0));
  return is_one;
}

/// Bits beside z_logits of their shape.
inline at::Tensor checked_bits_like(const char* function, const at::Tensor& bits, const at::Tensor& z_logits) {
  check_defined(function, "bits", bits);
  check_device(function, "bits", bits, "z_logits", z_logits.device());
  TORCH_CHECK(bits.sizes() == z_logits.sizes(), function, ": bits must have the shape of z_logits, ", z_logits.sizes(),
              ", got ", bits.sizes());
  return checked_bits(function, bits);
}

/// Codes of latent_dim bits, as int64.
inline at::Tensor checked_codes(const char* function, const at::Tensor& codes, int64_t latent_dim) {
  check_not_traced(function);
  check_defined(function, "codes", codes);
  TORCH_CHECK(at::isIntegralType(codes.scalar_type(), /*includeBool=*/false), function,
              ": codes must be of an integer type, got ", codes.scalar_type());
  check_no_transform(function, "codes", codes);
  at::Tensor values = readable(codes).to(at::kLong);
  check_values(function, "codes", "lie in [0, 2^latent_dim)", values,
               (values >= 0) & (values < (int64_t{1} << latent_dim)));
  return values;
}

inline void check_codebook(const char* function, const at::Tensor& codebook, const at::Tensor& z_logits) {
  check_floating(function, "codebook", codebook);
  check_device(function, "codebook", codebook, "z_logits", z_logits.device());
  const int64_t latent_dim = z_logits.size(-1), code_count = int64_t{1} << latent_dim;
  TORCH_CHECK(codebook.dim() == 2 && codebook.size(0) == code_count && codebook.size(1) >= 1, function,
              ": codebook must have the shape [2^latent_dim, D] with 2^", latent_dim, " = ", code_count, ", got ",
              codebook.sizes());
  TORCH_CHECK((codebook.scalar_type() == at::kDouble) == (z_logits.scalar_type() == at::kDouble), function,
              ": codebook must be float64 if z_logits are and else not, got ", codebook.scalar_type(), " beside ",
              z_logits.scalar_type());
  check_no_transform(function, "codebook", codebook);
}

/// Codes for a codebook, at the positions of z_logits.
inline at::Tensor checked_codes_of(const char* function, const at::Tensor& codes, const at::Tensor& z_logits) {
  check_defined(function, "codes", codes);
  check_device(function, "codes", codes, "z_logits", z_logits.device());
  TORCH_CHECK(codes.sizes() == shape_of_positions(z_logits), function,
              ": codes must have the shape of z_logits without its last size, ", shape_of_positions(z_logits), ", got ",
              codes.sizes());
  return checked_codes(function, codes, z_logits.size(-1));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
