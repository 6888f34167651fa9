/// What one forward pass says of each position, without a graph.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/linear_head/blocks.hpp"
#include "free_transformer/detail/linear_head/device_blocks.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// [N] each; the prediction is -1 where a position does not count.
struct CrossEntropyValues {
  at::Tensor loss, nll, log_sum_exp, entropy, prediction, hit;
};

inline constexpr WantedOfRows everything_of_rows{/*sums=*/false, /*each=*/true, /*prediction=*/true, /*entropy=*/true};

inline CrossEntropyValues values_of_rows(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                         const CrossEntropyPositions& positions) {
  const at::Tensor prediction =
      positions.left_out.defined() ? rows.prediction.masked_fill(positions.left_out, -1) : rows.prediction;
  return {losses_of_rows(rows, settings, positions), rows.nll, rows.log_sum_exp, rows.entropy, prediction,
          plain::hits(rows, settings, positions)};
}

inline CrossEntropyValues cross_entropy_values(const at::Tensor& logits, const CrossEntropySettings& settings) {
  const auto positions =
      plain::cross_entropy_positions(settings, logits.size(-1), arithmetic_type(logits.scalar_type()), Normalization());
  return values_of_rows(
      cross_entropy_rows(logits, settings, positions, /*gradient=*/{}, /*upstream=*/{}, everything_of_rows).rows,
      settings, positions);
}

inline CrossEntropyValues linear_cross_entropy_values(const LinearInputs& inputs,
                                                      const CrossEntropySettings& settings) {
  const auto positions = plain::cross_entropy_positions(settings, inputs.classes(),
                                                        arithmetic_type(inputs.hidden.scalar_type()), Normalization());
  const CrossEntropyRows rows =
      inputs.hidden.device().is_cpu()
          ? linear_rows(inputs, settings, positions, /*upstream=*/{}, {}, everything_of_rows).rows
          : device_linear_rows(inputs, settings, positions, /*upstream=*/{}, {}, everything_of_rows).rows;
  return values_of_rows(rows, settings, positions);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
