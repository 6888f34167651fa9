/// What a head that computes its own logits refuses.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/reconstruction.hpp"
#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Autocast makes hidden a half type beside a head of float32: types below float64 mix, and are computed in float32.
/// float64 does not mix: what is asked for in float64 should not be rounded on the way.
inline void check_like_hidden(const char* function, const char* argument, const at::Tensor& tensor,
                              const at::Tensor& hidden) {
  check_floating(function, argument, tensor);
  check_device(function, argument, tensor, "hidden", hidden.device());
  TORCH_CHECK((tensor.scalar_type() == at::kDouble) == (hidden.scalar_type() == at::kDouble), function, ": ", argument,
              " must have the type of hidden, ", hidden.scalar_type(), ", got ", tensor.scalar_type());
  check_no_transform(function, argument, tensor);
}

template <typename Logits>
LinearInputs checked_linear_inputs(const char* function, const Logits& logits) {
  const at::Tensor &hidden = logits.hidden, &weight = logits.weight, &bias = logits.bias;
  check_logits(function, "hidden", hidden);
  check_floating(function, "weight", weight);
  const bool fits = weight.dim() == 2 && weight.size(0) >= 1 && weight.size(1) == hidden.size(-1);
  const bool is_channels_first = weight.dim() == 2 && hidden.dim() >= 3 && weight.size(1) == hidden.size(1);
  TORCH_CHECK(fits, function, ": weight must have the shape [vocab_size, D] with D = ", hidden.size(-1),
              ", the last size of hidden, got ", weight.sizes(),
              is_channels_first ? ": the width comes last here, pass hidden.movedim(1, -1)" : "");
  check_like_hidden(function, "weight", weight, hidden);
  if (bias.defined()) {
    check_like_hidden(function, "bias", bias, hidden);
    TORCH_CHECK(bias.dim() == 1 && bias.size(0) == weight.size(0), function,
                ": bias must have the shape [vocab_size] = [", weight.size(0), "], got ", bias.sizes());
  }
  TORCH_CHECK(logits.block_bytes() >= 0, function, ": block_bytes must be >= 0, got ", logits.block_bytes());
  return {hidden, weight, bias, logits.block_bytes()};
}

template <typename Options>
CrossEntropySettings checked_linear_settings(const char* function, const LinearInputs& inputs,
                                             const at::Tensor& targets, const Options& options) {
  TORCH_CHECK(!options.inplace(), function,
              ": inplace must be false with LinearLogits, whose logits are no tensor, got true");
  auto shape = inputs.hidden.sizes().vec();
  shape.back() = inputs.classes();
  return checked_cross_entropy_settings(function, targets, options, shape, inputs.hidden.device(),
                                        inputs.hidden.scalar_type());
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
