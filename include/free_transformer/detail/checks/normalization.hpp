/// What is refused of a reduction and its normalizer.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/enum.h>

#include <variant>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

template <typename Normalizer>
void check_normalizer(const char* function, const Normalizer& normalizer) {
  if (const auto& number = normalizer.number()) {
    TORCH_CHECK(is_finite(*number) && *number > 0, function, ": normalizer must be finite and > 0, got ", *number);
  }
  if (const auto& tensor = normalizer.tensor()) {
    TORCH_CHECK(tensor->defined(), function, ": normalizer must be a number or a defined tensor, got an undefined one");
    check_defined(function, "normalizer", *tensor);
    TORCH_CHECK(tensor->numel() == 1 && !tensor->is_complex(), function,
                ": normalizer must be a number or a real tensor of one element, got shape ", tensor->sizes(),
                " of type ", tensor->scalar_type());
    check_constant(function, "normalizer", *tensor);
    check_no_transform(function, "normalizer", *tensor);
    if (!tensor->device().is_cpu()) return;
    const double value = host_value(readable(*tensor).to(at::kDouble));
    TORCH_CHECK(is_finite(value) && value >= 0, function,
                ": normalizer must be finite and >= 0 where it is a tensor, got ", value);
  }
}

template <typename Reduction, typename Normalizer>
Normalization checked_normalization(const char* function, const Reduction& reduction, const Normalizer& normalizer) {
  check_normalizer(function, normalizer);
  const ReductionKind kind = std::holds_alternative<torch::enumtype::kNone>(reduction)  ? ReductionKind::none
                             : std::holds_alternative<torch::enumtype::kSum>(reduction) ? ReductionKind::sum
                                                                                        : ReductionKind::mean;
  const auto& tensor = normalizer.tensor();
  return {kind, normalizer.number(), tensor ? readable(tensor->detach()).reshape({}) : at::Tensor()};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
