/// What is refused, and in what words: "function: argument must ..., got ...". Everything is checked before the first
/// write. Values are looked at on the CPU only: on any other device that would stall its stream.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline void check_not_negative(const char* function, const char* argument, double value) {
  TORCH_CHECK(is_finite(value) && value >= 0, function, ": ", argument, " must be finite and >= 0, got ", value);
}

inline void check_defined(const char* function, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(tensor.defined(), function, ": ", argument, " must be a defined tensor, got an undefined one");
  TORCH_CHECK(tensor.layout() == at::kStrided, function, ": ", argument,
              " must be a dense (strided) tensor, got layout ", tensor.layout());
}

inline void check_floating(const char* function, const char* argument, const at::Tensor& tensor) {
  check_defined(function, argument, tensor);
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, function, ": ",
              argument, " must be of type float64, float32, float16 or bfloat16, got ", type);
}

inline void check_device(const char* function, const char* argument, const at::Tensor& tensor,
                         const char* other_argument, const at::Device& device) {
  TORCH_CHECK(tensor.device() == device, function, ": ", argument, " must be on the device of ", other_argument, ", ",
              device, ", got ", tensor.device());
}

/// The tensor with its values in its own memory: LibTorch has tensors that stand for a negated or a zero one.
inline at::Tensor readable(const at::Tensor& tensor) {
  return tensor.is_neg() || tensor._is_zerotensor() ? tensor.clone() : tensor;
}

/// Weights, priors and class probabilities are constants here: a gradient that silently never came would be a wrong
/// number.
inline void check_constant(const char* function, const char* argument, const at::Tensor& tensor) {
  TORCH_CHECK(!tensor.requires_grad(), function, ": ", argument,
              " must not require grad (it gets none; detach it), got ", "requires_grad = true");
}

/// Logits with the classes or the bits in the last dimension.
inline void check_logits(const char* function, const char* argument, const at::Tensor& logits) {
  check_floating(function, argument, logits);
  TORCH_CHECK(logits.dim() >= 1 && logits.size(-1) >= 1, function, ": ", argument,
              " must have at least one dimension, and a last one of at least 1, got shape ", logits.sizes());
  check_no_transform(function, argument, logits);
}

/// `type` is what a loss computes in: weights may have any scale that float32 can multiply.
inline void check_weight_values(const char* function, const char* argument, const at::Tensor& weight,
                                at::ScalarType type) {
  if (!weight.device().is_cpu()) return;
  double largest = 0;
  const at::Tensor values = weight.to(at::kDouble).contiguous();
  const double* data = values.data_ptr<double>();
  for (int64_t index = 0; index < values.numel(); ++index) {
    TORCH_CHECK(is_finite(data[index]) && data[index] >= 0, function, ": ", argument, " must be finite and >= 0, got ",
                data[index], " at index ", index);
    largest = std::max(largest, data[index]);
  }
  TORCH_CHECK(type == at::kDouble || is_zero(largest) || (largest >= 1e-15 && largest <= 1e15), function, ": ",
              argument, " must be 0 everywhere or have its largest value in [1e-15, 1e15], got ", largest);
}

/// The weight of each position as [N] of the given type; undefined if there is none. positions is the shape of the
/// targets.
inline at::Tensor checked_token_weight(const char* function, const at::Tensor& token_weight, at::IntArrayRef positions,
                                       const at::Device& device, at::ScalarType type) {
  if (!token_weight.defined()) return {};
  check_defined(function, "token_weight", token_weight);
  TORCH_CHECK(token_weight.is_floating_point() || token_weight.scalar_type() == at::kBool, function,
              ": token_weight must be bool or floating, got ", token_weight.scalar_type());
  TORCH_CHECK(token_weight.sizes() == positions, function,
              ": token_weight must have one value for each position, shape ", positions, ", got ",
              token_weight.sizes());
  check_device(function, "token_weight", token_weight, "the logits", device);
  check_constant(function, "token_weight", token_weight);
  check_no_transform(function, "token_weight", token_weight);
  const at::Tensor values = readable(token_weight);
  check_weight_values(function, "token_weight", values, type);
  return values.to(type).reshape({-1}).contiguous();
}

/// The weight of each class as [V] of the given type; undefined if there is none.
inline at::Tensor checked_class_weight(const char* function, const at::Tensor& weight, int64_t classes,
                                       const at::Device& device, at::ScalarType type) {
  if (!weight.defined()) return {};
  check_floating(function, "weight", weight);
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == classes, function, ": weight must have the shape [vocab_size] = [",
              classes, "], got ", weight.sizes());
  check_device(function, "weight", weight, "the logits", device);
  check_constant(function, "weight", weight);
  check_no_transform(function, "weight", weight);
  const at::Tensor values = readable(weight);
  check_weight_values(function, "weight", values, type);
  return values.to(type).contiguous();
}

inline void check_target_values(const char* function, const at::Tensor& targets, int64_t classes,
                                int64_t ignore_index) {
  if (!targets.device().is_cpu()) return;
  const int64_t* data = targets.data_ptr<int64_t>();
  for (int64_t position = 0; position < targets.numel(); ++position) {
    const int64_t target = data[position];
    TORCH_CHECK((target >= 0 && target < classes) || target == ignore_index, function, ": targets must lie in [0, ",
                classes, ") or be ignore_index = ", ignore_index, ", got ", target, " at position ", position);
  }
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
