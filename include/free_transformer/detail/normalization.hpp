/// What a sum of weighted losses is divided by.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace free_transformer::detail {

/// A 0-dim tensor of float32 or float64 on the CPU as a number.
inline double host_value(const at::Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.data_ptr<double>()
                                             : static_cast<double>(*scalar.data_ptr<float>());
}

enum class ReductionKind { mean, sum, none };

struct Normalization {
  ReductionKind reduction = ReductionKind::mean;
  std::optional<double> number;
  std::optional<at::Tensor> tensor;
};

/// The factor of every weighted loss, 0-dim and in the type of weight_sum: 1/normalizer or 1/weight_sum for a mean,
/// else 1. It is 0 if there is no weight at all, so that a mean over nothing is 0 and not NaN.
inline at::Tensor loss_scale(const Normalization& normalization, const at::Tensor& weight_sum) {
  if (normalization.reduction != ReductionKind::mean) return at::ones_like(weight_sum);
  if (normalization.number) return at::full_like(weight_sum, 1.0 / *normalization.number);
  if (normalization.tensor) {
    return normalization.tensor->detach().to(weight_sum.device(), weight_sum.scalar_type()).reciprocal();
  }
  return weight_sum.reciprocal().masked_fill_(weight_sum == 0, 0);
}

/// The same for a sum that is already on the host.
inline double loss_scale(const Normalization& normalization, double weight_sum) {
  if (normalization.reduction != ReductionKind::mean) return 1;
  if (normalization.number) return 1 / *normalization.number;
  if (normalization.tensor) return 1 / host_value(normalization.tensor->detach().to(at::kCPU, at::kDouble));
  return weight_sum == 0 ? 0 : 1 / weight_sum;
}

}  // namespace free_transformer::detail
