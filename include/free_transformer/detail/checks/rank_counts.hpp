/// What the ranks count together, and how a rank that refuses its arguments tells the others.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <exception>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/transforms.hpp"
#include "free_transformer/detail/checks/vae_loss.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/numbers.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/positions.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// sum of u w_y over this rank's positions, or of u for class probabilities: 0-dim, in the widest type.
template <typename Options>
at::Tensor checked_count(const char* function, const at::Tensor& targets, const Options& options) {
  check_not_traced(function);
  check_defined(function, "targets", targets);
  check_no_transform(function, "targets", targets);
  const bool has_probabilities = targets.is_floating_point();
  TORCH_CHECK(has_probabilities || at::isIntegralType(targets.scalar_type(), /*includeBool=*/false), function,
              ": targets must be class indices (an integer type) or class probabilities (floating), got ",
              targets.scalar_type());
  TORCH_CHECK(!has_probabilities || targets.dim() > 0, function,
              ": targets that are class probabilities must have a last size, got a single number");
  const at::Device device = targets.device();
  const auto wide = widest_type(device);
  const at::IntArrayRef positions = positions_of_targets(targets);
  const at::Tensor token_weight = checked_token_weight(function, options.token_weight(), positions, device, wide);
  const int64_t count = c10::multiply_integers(positions);
  at::Tensor weight = token_weight.defined() ? token_weight.clone() : at::ones({count}, targets.options().dtype(wide));
  if (has_probabilities) return ordered_sum(weight, wide);
  const at::Tensor indices = readable(targets).to(at::kLong).reshape({-1}).contiguous();
  if (options.weight().defined()) {
    const int64_t classes = options.weight().numel();
    const at::Tensor class_weight = checked_class_weight(function, options.weight(), classes, device, wide);
    check_target_values(function, indices, classes, options.ignore_index());
    TORCH_CHECK(classes > 0 || count == 0, function, ": weight must have a value for each class, got none");
    if (count > 0) weight.mul_(class_weight.gather(0, indices.clamp(0, classes - 1)));
  }
  weight.masked_fill_(left_out_positions(indices, options.ignore_index(), token_weight), 0);
  return ordered_sum(weight, wide);
}

/// The count of all ranks. A rank that refuses its arguments takes part with a NaN, so that no other waits for it: on
/// the CPU all see that, elsewhere the loss shows it.
template <typename Options>
at::Tensor count_of_ranks(const char* function, const at::Tensor& targets, const RankGroup& ranks,
                          const Options& options) {
  at::Tensor count;
  std::exception_ptr refusal;
  try {
    count = checked_count(function, targets, options);
  } catch (...) {
    refusal = std::current_exception();
    const at::Device device = targets.defined() ? targets.device() : at::Device(at::kCPU);
    count = at::zeros({}, at::device(device).dtype(widest_type(device)));
    count.div_(count);
  }
  ranks.sum(function, count);
  if (refusal) std::rethrow_exception(refusal);
  TORCH_CHECK(!count.device().is_cpu() || !is_nan(host_value(count)), function,
              ": targets and options must fit on every rank, got a refusal from another rank than ", ranks.rank());
  return count;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
