/// Logits that never exist as a whole: the head's matrix product and the loss, one block of tokens after another.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <utility>

#include "free_transformer/detail/autograd/linear_cross_entropy.hpp"
#include "free_transformer/detail/checks.hpp"
#include "free_transformer/reconstruction_loss.hpp"
#include "free_transformer/token_statistics.hpp"

namespace free_transformer {

/// x = hidden weight^T + bias, as `torch::nn::Linear` computes it, for every function that takes logits.
/// hidden  [..., D], weight [vocab_size, D], bias [vocab_size] or none; one floating type and device, any strides
/// The logits of a block of tokens are made in a buffer, turned into their gradient in place, and multiplied on into
/// the gradients of hidden, weight and bias, which the forward pass so finishes (with kNone, backward makes the logits
/// once more). Positions that do not count are left out of the products on the CPU. Half types are multiplied in
/// float32, and the weight's gradient is rounded once. A frozen input costs no product. A second backward computes
/// anew; double backward is an error.
struct LinearLogits {
  LinearLogits(torch::Tensor hidden_, torch::Tensor weight_, torch::Tensor bias_ = {})
      : hidden(std::move(hidden_)), weight(std::move(weight_)), bias(std::move(bias_)) {}

  /// Size of the buffer in bytes, at least one token's logits. The default, 0, is 15 MiB, or 56 tokens if fewer would fit,
  /// and half of both for half types: a block costs as much more than its arithmetic as 16 tokens take.
  LinearLogits& block_bytes(int64_t bytes) { return block_bytes_ = bytes, *this; }
  int64_t block_bytes() const { return block_bytes_; }

  torch::Tensor hidden, weight, bias;

 private:
  int64_t block_bytes_ = 0;
};

namespace detail {

inline LinearInputs checked_inputs(const char* function, const LinearLogits& logits) {
  check_logits(function, "hidden", logits.hidden);
  check_floating(function, "weight", logits.weight);
  TORCH_CHECK(logits.weight.dim() == 2 && logits.weight.size(0) >= 1 && logits.weight.size(1) == logits.hidden.size(-1),
              function, ": weight must have the shape [vocab_size, D] with D = ", logits.hidden.size(-1),
              ", the last size of hidden, got ", logits.weight.sizes());
  const auto check_like_hidden = [&](const char* argument, const torch::Tensor& tensor) {
    check_device(function, argument, tensor, "hidden", logits.hidden.device());
    TORCH_CHECK(tensor.scalar_type() == logits.hidden.scalar_type(), function, ": ", argument,
                " must have the type of hidden, ", logits.hidden.scalar_type(), ", got ", tensor.scalar_type());
  };
  check_like_hidden("weight", logits.weight);
  if (logits.bias.defined()) {
    check_floating(function, "bias", logits.bias);
    TORCH_CHECK(logits.bias.dim() == 1 && logits.bias.size(0) == logits.weight.size(0), function,
                ": bias must have the shape [vocab_size] = [", logits.weight.size(0), "], got ", logits.bias.sizes());
    check_like_hidden("bias", logits.bias);
  }
  TORCH_CHECK(logits.block_bytes() >= 0, function, ": block_bytes must be >= 0, got ", logits.block_bytes());
  return {logits.hidden, logits.weight, logits.bias, logits.block_bytes()};
}

inline CrossEntropyTerms checked_linear_terms(const char* function, const LinearLogits& logits,
                                              const torch::Tensor& targets, const ReconstructionLossOptions& options) {
  TORCH_CHECK(!options.inplace(), function,
              ": inplace must be false with LinearLogits, whose logits are no tensor, got true");
  return checked_terms(function, targets, options, shape_of_positions(logits.hidden), logits.weight.size(0),
                       logits.hidden.device(), logits.hidden.scalar_type());
}

}  // namespace detail

/// The fused head as a source of logits: see `compute_reconstruction_loss`.
inline ReconstructionResult reconstruct(const LinearLogits& logits, const torch::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_reconstruction_loss";
  const auto inputs = detail::checked_inputs(function, logits);
  const auto terms = detail::checked_linear_terms(function, logits, targets, options);
  const auto normalization = detail::checked_normalization(function, options.reduction(), options.normalizer());
  auto result = detail::linear_cross_entropy(inputs, terms, normalization, options.accuracy());
  return {std::move(result.loss), std::move(result.sums)};
}

/// The fused head as a source of logits: see `compute_token_statistics`.
inline TokenStatistics token_statistics(const LinearLogits& logits, const torch::Tensor& targets,
                                        const ReconstructionLossOptions& options) {
  constexpr const char* function = "compute_token_statistics";
  const auto inputs = detail::checked_inputs(function, logits);
  const auto terms = detail::checked_linear_terms(function, logits, targets, options);
  return detail::shaped_statistics(detail::linear_cross_entropy_values(inputs, terms),
                                   detail::shape_of_positions(logits.hidden));
}

}  // namespace free_transformer
