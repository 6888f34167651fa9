/// The factor from a sum of weighted losses to the final value.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <limits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// A 0-dim tensor of float32 or float64 on the CPU as a number.
inline double host_value(const at::Tensor& scalar) {
  return scalar.scalar_type() == at::kDouble ? *scalar.data_ptr<double>()
                                             : static_cast<double>(*scalar.data_ptr<float>());
}

/// A number that the host has computed as a 0-dim tensor; infinite where the type cannot hold it, for which LibTorch's own
/// scalar_tensor throws something that is not a c10::Error.
inline at::Tensor scalar_of_host(double value, const at::TensorOptions& options, at::ScalarType type) {
  if (std::abs(value) > std::numeric_limits<float>::max()) {
    return at::scalar_tensor(value, options.dtype(at::kDouble)).to(type);
  }
  return at::scalar_tensor(value, options.dtype(type));
}

/// True if it is known here that this 0-dim tensor multiplies nothing: a look at another device would stall it.
inline bool is_one_on_host(const at::Tensor& scalar) { return scalar.device().is_cpu() && is_one(host_value(scalar)); }

/// False if this 0-dim tensor is known to make NaN of the zeros of a finished gradient.
inline bool keeps_zeros(const at::Tensor& scalar) { return !scalar.device().is_cpu() || is_finite(host_value(scalar)); }

/// The factor of every weighted loss, 0-dim and in the type of weight_sum: 1/normalizer or 1/weight_sum for a mean,
/// else 1. weight_sum is what a mean divides by if no normalizer is given, `counted` the weight of all that counts. A mean of
/// nothing is 0 and not NaN; a normalizer of 0 for something that counts is a division by 0.
inline at::Tensor loss_scale(const Normalization& normalization, const at::Tensor& weight_sum,
                             const at::Tensor& counted) {
  if (normalization.reduction != ReductionKind::mean) return at::ones_like(weight_sum);
  if (normalization.number && is_finite(1 / *normalization.number)) {
    return at::full_like(weight_sum, 1 / *normalization.number);
  }
  if (!normalization.number && !normalization.tensor.defined()) {
    return weight_sum.reciprocal().masked_fill_(weight_sum == 0, 0);
  }
  const at::Tensor divisor = normalization.number
                                 ? at::full_like(weight_sum, *normalization.number)
                                 : normalization.tensor.to(weight_sum.device(), weight_sum.scalar_type());
  return divisor.reciprocal().masked_fill_(counted == 0, 0);
}

/// The same for sums that are already on the host.
inline double loss_scale(const Normalization& normalization, double weight_sum, double counted) {
  if (normalization.reduction != ReductionKind::mean) return 1;
  if (!normalization.number && !normalization.tensor.defined()) return is_zero(weight_sum) ? 0 : 1 / weight_sum;
  if (is_zero(counted)) return 0;
  return 1 /
         (normalization.number ? *normalization.number : host_value(normalization.tensor.to(at::kCPU, at::kDouble)));
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
