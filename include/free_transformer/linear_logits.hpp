/// Logits that never exist as a whole: the head's matrix product and the loss, one block of tokens after another.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/autograd/linear_cross_entropy.hpp"
#include "free_transformer/detail/checks/linear_logits.hpp"
#include "free_transformer/detail/checks/normalization.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy_values.hpp"
#include "free_transformer/detail/positions.hpp"
#include "free_transformer/reconstruction_loss.hpp"
#include "free_transformer/token_statistics.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// x = hidden weight^T + bias, as `torch::nn::Linear` computes it, for every function that takes logits.
/// hidden  [..., D], weight [vocab_size, D], bias [vocab_size] or none; one device, any strides, any floating types below
///         float64, or float64 all: under autocast hidden may be bfloat16 and the head float32
/// The logits of a block of tokens are made in a buffer, turned into their gradient in place, and multiplied on into
/// the gradients of hidden, weight and bias, which the forward pass so finishes (with kNone, backward makes the logits
/// once more). On the CPU half types are multiplied in float32, and positions that do not count are left out. A frozen
/// input costs no product. A second backward computes anew; double backward is an error, and so is `inplace`: there are
/// no logits to write over.
/// On other devices all are multiplied in the type of weight, with sums in float32. Where LibTorch's `mm` makes no float32
/// of half types (CUDA's does in new LibTorches), the logits of a block are rounded to that type, as those of a half
/// `torch::nn::Linear` are; the loss is computed in float32 from there. The gradients of several blocks add up in
/// float32, and each is rounded once more, to its own type, in backward.
struct LinearLogits {
  LinearLogits(at::Tensor hidden_, at::Tensor weight_, at::Tensor bias_ = {})
      : hidden(std::move(hidden_)), weight(std::move(weight_)), bias(std::move(bias_)) {}

  /// Size of the buffer in bytes, at least one token's logits, in float32 (float64 for float64). The default, 0, is 60 MiB
  /// where that is 240 tokens or more, else 30 MiB, or 56 tokens if that is more, and half of that for half types: a block
  /// costs as much more than its arithmetic as 16 tokens take. On other devices, where it may be 800 tokens, it is 1 GiB,
  /// or 1024 tokens if that is more, and LibTorch's operations hold up to 2.5 such buffers.
  LinearLogits& block_bytes(int64_t bytes) { return block_bytes_ = bytes, *this; }
  int64_t block_bytes() const { return block_bytes_; }

  at::Tensor hidden, weight, bias;

 private:
  int64_t block_bytes_ = 0;
};

}  // namespace FREE_TRANSFORMER_TYPES

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// The fused head as a source of logits: see `compute_reconstruction_loss`.
inline ReconstructionResult reconstruct(const LinearLogits& logits, const at::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_reconstruction_loss";
  const auto inputs = detail::checked_linear_inputs(function, logits);
  const auto settings = detail::checked_linear_settings(function, inputs, targets, options);
  const auto normalization = detail::checked_normalization(function, options.reduction(), options.normalizer());
  auto result = detail::linear_cross_entropy(inputs, settings, normalization, options.accuracy());
  return {std::move(result.loss), std::move(result.sums)};
}

/// The fused head as a source of logits: see `compute_token_statistics`.
inline TokenStatistics token_statistics(const LinearLogits& logits, const at::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_token_statistics";
  const auto inputs = detail::checked_linear_inputs(function, logits);
  const auto settings = detail::checked_linear_settings(function, inputs, targets, options);
  return detail::shaped_statistics(detail::linear_cross_entropy_values(inputs, settings),
                                   detail::shape_of_positions(logits.hidden));
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
