/// The sums of `LossMetrics` on their way through one all-reduce, or two if they are many.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// What metrics must have in common to be added up, and what they show.
struct MetricsShape {
  int64_t sums = 0;  ///< how many; 0 for metrics of no call
  bool hinge_on_batch_mean = false, has_accuracy = false, has_z_loss = false, has_kl_of_each_bit = false;
};

/// In front of the sums. All are 0 for metrics of no call, which agree with any other.
enum MetricsField : int64_t {
  callers_field,  ///< 1
  size_field,     ///< how many sums there are
  size_square_field,
  hinge_field,
  accuracy_field,
  z_loss_field,
  each_bit_field,
  metrics_field_count
};

/// Ranks may differ in their sums, or have none; a message whose size they did not agree on would be the end of their
/// processes, not an error. So the first has a fixed size, and the sums without room in it follow once the shape is
/// known.
constexpr int64_t first_message_size = 64, first_sums_count = first_message_size - metrics_field_count;

/// The shape that all callers have in common.
inline MetricsShape common_shape(const char* function, const at::Tensor& message) {
  const double* field = message.data_ptr<double>();
  const double callers = field[callers_field];
  if (is_zero(callers)) return {};
  const auto is_all_or_none = [&](MetricsField index) {
    return is_zero(field[index]) || is_zero(field[index] - callers);
  };
  // Of n equal sizes the squares add up to the square of their sum over n; of others, to more. All are whole numbers.
  const double excess = field[size_square_field] * callers - field[size_field] * field[size_field];
  TORCH_CHECK(is_zero(excess) && is_all_or_none(hinge_field) && is_all_or_none(accuracy_field), function,
              ": metrics must have one latent_dim, place of the hinge (BatchMean or not) and choice of accuracy on all "
              "ranks, got of ",
              callers, " ranks with metrics ", field[size_field] / callers, " sums on average, ", field[hinge_field],
              " with the hinge on the batch mean, ", field[accuracy_field], " with accuracy");
  return {std::lround(field[size_field] / callers), !is_zero(field[hinge_field]), !is_zero(field[accuracy_field]),
          !is_zero(field[z_loss_field]), !is_zero(field[each_bit_field])};
}

/// The sums of all ranks, and their shape. On another device than the CPU the message is not looked at: `own` is then
/// taken to be every rank's shape.
inline std::pair<at::Tensor, MetricsShape> sum_metrics(const char* function, const RankGroup& ranks,
                                                       const at::Tensor& sums, const MetricsShape& own) {
  const auto options = sums.defined() ? sums.options() : at::TensorOptions(at::kDouble);
  const at::Tensor message = at::zeros({first_message_size}, options);
  const at::Tensor first_sums = message.narrow(0, metrics_field_count, first_sums_count);
  const auto copy_sums = [&](const at::Tensor& to, int64_t first) {
    const int64_t count = std::min(to.size(0), own.sums - first);
    if (count > 0) to.narrow(0, 0, count).copy_(sums.narrow(0, first, count));
  };
  if (sums.defined()) {
    const auto as_number = [](bool value) { return value ? 1.0 : 0.0; };
    const auto size = static_cast<double>(own.sums);
    const double fields[metrics_field_count] = {1,
                                                size,
                                                size * size,
                                                as_number(own.hinge_on_batch_mean),
                                                as_number(own.has_accuracy),
                                                as_number(own.has_z_loss),
                                                as_number(own.has_kl_of_each_bit)};
    message.narrow(0, 0, metrics_field_count)
        .copy_(at::from_blob(const_cast<double*>(fields), {metrics_field_count}, at::kDouble));
  }
  copy_sums(first_sums, 0);
  ranks.sum(function, message);
  const MetricsShape common = message.device().is_cpu() ? common_shape(function, message) : own;
  if (common.sums <= first_sums_count) return {first_sums.narrow(0, 0, common.sums).clone(), common};
  const at::Tensor others = at::zeros({common.sums - first_sums_count}, options);
  copy_sums(others, first_sums_count);
  ranks.sum(function, others);
  return {at::cat({first_sums, others}), common};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
