/// How the losses of single positions become one number: the choices that both losses share.
#pragma once

#include <ATen/ATen.h>
#include <torch/enum.h>

#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// `torch::kMean`, `torch::kSum` or `torch::kNone`, as in LibTorch's own options.
using Reduction = std::variant<torch::enumtype::kMean, torch::enumtype::kSum, torch::enumtype::kNone>;

/// What `torch::kMean` divides the weighted sum of losses by, instead of the sum of the weights counted in this call:
/// one common number for all micro-batches or ranks makes their losses add up to the loss of the whole batch.
/// A number must be finite and > 0. A tensor of one element is used where it lies, and looked at on the CPU alone, where
/// it must be finite and >= 0. Its value may be 0 where nothing counts, and the loss is then 0; where something counts,
/// 0 makes the loss infinite (NaN if its sum is 0, too), so that a wrong count is seen.
class Normalizer {
 public:
  Normalizer() = default;

  template <typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
  Normalizer(Number number) : number_(static_cast<double>(number)) {}

  Normalizer(at::Tensor tensor) : tensor_(std::move(tensor)) {}

  const std::optional<double>& number() const noexcept { return number_; }
  const std::optional<at::Tensor>& tensor() const noexcept { return tensor_; }

 private:
  std::optional<double> number_;
  std::optional<at::Tensor> tensor_;
};

}  // namespace FREE_TRANSFORMER_TYPES

}  // namespace free_transformer
