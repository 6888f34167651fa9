/// How the losses of single positions become one number: the choices that both losses share.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/enum.h>

#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>

#include "free_transformer/detail/normalization.hpp"

namespace torch {
using at::Tensor;  // also declared by torch/types.h, which costs the includer several seconds
}

namespace free_transformer {

/// `torch::kMean`, `torch::kSum` or `torch::kNone`, as in LibTorch's own options.
using Reduction = std::variant<torch::enumtype::kMean, torch::enumtype::kSum, torch::enumtype::kNone>;

/// What `torch::kMean` divides the weighted sum of losses by, instead of the sum of the weights counted in this call:
/// one common number for all micro-batches or ranks makes their losses add up to the loss of the whole batch.
/// A number must be finite and > 0. A 0-dim tensor is used where it lies: its value is neither read nor checked.
class Normalizer {
 public:
  Normalizer() = default;

  template <typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
  Normalizer(Number number) : number_(static_cast<double>(number)) {}

  Normalizer(torch::Tensor tensor) : tensor_(std::move(tensor)) {}

  const std::optional<double>& number() const noexcept { return number_; }
  const std::optional<torch::Tensor>& tensor() const noexcept { return tensor_; }

 private:
  std::optional<double> number_;
  std::optional<torch::Tensor> tensor_;
};

namespace detail {

inline Normalization checked_normalization(const char* function, const Reduction& reduction,
                                           const Normalizer& normalizer) {
  if (const auto& number = normalizer.number()) {
    TORCH_CHECK(std::isfinite(*number) && *number > 0, function, ": normalizer must be finite and > 0, got ", *number);
  }
  if (const auto& tensor = normalizer.tensor()) {
    TORCH_CHECK(tensor->defined(), function, ": normalizer must be a number or a defined tensor, got an undefined one");
    TORCH_CHECK(tensor->dim() == 0 && !tensor->is_complex(), function,
                ": normalizer must be a number or a real 0-dim tensor, got shape ", tensor->sizes(), " of type ",
                tensor->scalar_type());
    TORCH_CHECK(!tensor->requires_grad(), function,
                ": normalizer must not require grad (it gets none; detach it), got requires_grad = true");
  }
  const ReductionKind kind = std::holds_alternative<torch::enumtype::kNone>(reduction)  ? ReductionKind::none
                             : std::holds_alternative<torch::enumtype::kSum>(reduction) ? ReductionKind::sum
                                                                                        : ReductionKind::mean;
  return {kind, normalizer.number(), normalizer.tensor()};
}

}  // namespace detail

}  // namespace free_transformer
