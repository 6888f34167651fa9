/// What the reconstruction term refuses.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The settings alone, which a module can refuse before it has seen a tensor.
template <typename Options>
void check_reconstruction_options(const char* function, const Options& options) {
  check_not_negative(function, "z_loss", options.z_loss());
  check_not_negative(function, "softcap", options.softcap());
  TORCH_CHECK(is_zero(options.softcap()) || (options.softcap() >= 1e-30 && options.softcap() <= 1e30), function,
              ": softcap must be 0 or in [1e-30, 1e30], got ", options.softcap());
  TORCH_CHECK(is_finite(options.label_smoothing()) && options.label_smoothing() >= 0 && options.label_smoothing() <= 1,
              function, ": label_smoothing must be in [0, 1], got ", options.label_smoothing());
}

/// True if targets fit logits [batch, classes, positions...], LibTorch's own order, of which this is the shape.
inline bool is_channels_first(at::IntArrayRef shape, at::IntArrayRef targets) {
  if (shape.size() < 3 || targets.size() + 1 != shape.size() || targets[0] != shape[0]) return false;
  return targets.slice(1) == shape.slice(2);
}

/// The targets as [N] int64, or [N, V] class probabilities, for logits of this shape.
inline at::Tensor checked_targets(const char* function, const at::Tensor& targets, at::IntArrayRef shape,
                                  const at::Device& device, int64_t ignore_index) {
  const at::IntArrayRef positions = shape.slice(0, shape.size() - 1);
  const int64_t classes = shape.back();
  check_defined(function, "targets", targets);
  check_device(function, "targets", targets, "the logits", device);
  check_no_transform(function, "targets", targets);
  if (targets.is_floating_point()) {
    check_floating(function, "targets", targets);
    TORCH_CHECK(targets.sizes() == shape, function,
                ": targets that are class probabilities must have the shape of the logits, ", shape, ", got ",
                targets.sizes());
    TORCH_CHECK(ignore_index == -100, function,
                ": ignore_index must be left at its default with class probabilities, got ", ignore_index);
    check_constant(function, "targets", targets);
    return readable(targets).reshape({-1, classes}).contiguous();
  }
  TORCH_CHECK(at::isIntegralType(targets.scalar_type(), /*includeBool=*/false), function,
              ": targets must be class indices (an integer type) or class probabilities (floating), got ",
              targets.scalar_type());
  TORCH_CHECK(targets.sizes() == positions, function,
              ": targets must have the shape of the logits without their last size, ", positions, ", got ",
              targets.sizes(),
              is_channels_first(shape, targets.sizes())
                  ? ": the classes come last here, pass logits.movedim(1, -1) instead of [batch, classes, ...]"
                  : "");
  at::Tensor indices = readable(targets).to(at::kLong).reshape({-1}).contiguous();
  check_target_values(function, indices, classes, ignore_index);
  return indices;
}

/// The settings of logits of this shape, [positions..., classes], in what the losses compute with.
template <typename Options>
CrossEntropySettings checked_cross_entropy_settings(const char* function, const at::Tensor& targets,
                                                    const Options& options, at::IntArrayRef shape,
                                                    const at::Device& device, at::ScalarType logits_type) {
  check_not_traced(function);
  check_reconstruction_options(function, options);
  const at::IntArrayRef positions = shape.slice(0, shape.size() - 1);
  const auto type = arithmetic_type(logits_type);
  CrossEntropySettings settings;
  settings.targets = checked_targets(function, targets, shape, device, options.ignore_index());
  settings.token_weight = checked_token_weight(function, options.token_weight(), positions, device, type);
  settings.class_weight = checked_class_weight(function, options.weight(), shape.back(), device, type);
  settings.ignore_index = options.ignore_index();
  settings.label_smoothing = options.label_smoothing();
  settings.z_loss = options.z_loss();
  settings.softcap = options.softcap();
  return settings;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
