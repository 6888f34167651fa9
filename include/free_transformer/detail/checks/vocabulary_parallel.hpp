/// What a split vocabulary refuses, and what its ranks must have in common.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/enum.h>

#include <cstdint>

#include "free_transformer/detail/checks/arguments.hpp"
#include "free_transformer/detail/checks/linear_logits.hpp"
#include "free_transformer/detail/checks/reconstruction.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/agreement.hpp"
#include "free_transformer/detail/distributed/vocabulary_shard.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline VocabularyShard checked_shard(const char* function, int64_t rank, int64_t ranks, int64_t vocab_size,
                                     int64_t padded_size) {
  TORCH_CHECK(vocab_size >= 1, function, ": vocab_size must be at least 1, got ", vocab_size);
  TORCH_CHECK(padded_size >= vocab_size, function, ": padded_size must be at least vocab_size = ", vocab_size, ", got ",
              padded_size);
  return VocabularyShard::of_rank(rank, ranks, vocab_size, padded_size);
}

inline void check_columns(const char* function, const char* argument, int64_t columns, const VocabularyShard& shard,
                          int64_t rank) {
  TORCH_CHECK(columns == shard.columns, function, ": ", argument, " must have the columns [", shard.first, ", ",
              shard.first + shard.columns, ") on rank ", rank, ", got ", columns, " columns");
}

inline void check_shard_logits(const char* function, const at::Tensor& logits, const VocabularyShard& shard,
                               int64_t rank) {
  check_floating(function, "logits", logits);
  TORCH_CHECK(logits.dim() >= 1, function, ": logits must have at least one dimension, got shape ", logits.sizes());
  check_no_transform(function, "logits", logits);
  check_columns(function, "logits", logits.size(-1), shard, rank);
}

/// The settings of a shard of logits, which have the positions, device and type of `positioned` (and another last
/// size): global targets, and the class weights of this rank's classes.
template <typename Options>
CrossEntropySettings checked_shard_settings(const char* function, const at::Tensor& targets, Options options,
                                            const at::Tensor& positioned, const VocabularyShard& shard) {
  const at::Device device = positioned.device();
  const at::ScalarType type = positioned.scalar_type();
  TORCH_CHECK(!options.inplace(), function, ": inplace must be false with VocabParallelLogits, got true");
  check_defined(function, "targets", targets);
  TORCH_CHECK(!targets.is_floating_point(), function,
              ": targets must be class indices with VocabParallelLogits, got class probabilities of type ",
              targets.scalar_type());
  const at::Tensor weight = options.weight();
  options.weight(at::Tensor());
  auto shape = positioned.sizes().vec();
  shape.back() = shard.vocab_size;
  auto settings = checked_cross_entropy_settings(function, targets, options, shape, device, type);
  if (weight.defined()) {
    TORCH_CHECK(weight.dim() == 1 && weight.size(0) == shard.columns, function,
                ": weight must have the part of this rank's columns, [", shard.columns, "], got ", weight.sizes());
    settings.class_weight = checked_class_weight(function, weight, shard.columns, device, arithmetic_type(type))
                                .narrow(0, 0, shard.classes);
  }
  return settings;
}

using ShardNumbers = CommonNumbers<17>;

/// What a loss with these settings has in common on all ranks. What is not on the CPU is not looked at.
inline ShardNumbers common_numbers(const CrossEntropySettings& settings, const Normalization& normalization,
                                   const WantedOfRows& wanted, bool wants_hidden, at::ScalarType type,
                                   int64_t vocab_size, int64_t padded_size) {
  const at::Tensor& divisor = normalization.tensor;
  const bool is_known = divisor.defined() && divisor.device().is_cpu();
  return {{{"vocab_size", static_cast<double>(vocab_size)},
           {"padded_size", static_cast<double>(padded_size)},
           {"the number of positions", static_cast<double>(settings.targets.size(0))},
           {"the type of the logits (its number in LibTorch)", static_cast<double>(type)},
           {"ignore_index", static_cast<double>(settings.ignore_index)},
           {"label_smoothing", settings.label_smoothing},
           {"z_loss", settings.z_loss},
           {"softcap", settings.softcap},
           {"reduction (kMean 0, kSum 1, kNone 2)", static_cast<double>(normalization.reduction)},
           {"normalizer (0 for none)", normalization.number ? *normalization.number : 0},
           {"normalizer (a tensor, 0 for none)", is_known ? host_value(divisor.to(at::kDouble)) : 0},
           {"accuracy (1, or 2 for statistics)", wanted.entropy      ? 2.0
                                                 : wanted.prediction ? 1.0
                                                                     : 0.0},
           {"weight (1 if there is one)", settings.class_weight.defined() ? 1.0 : 0.0},
           {"token_weight (1 if there is one)", settings.token_weight.defined() ? 1.0 : 0.0},
           {"token_weight (a checksum)", checksum(settings.token_weight)},
           {"targets (a checksum)", checksum(settings.targets)},
           {"hidden.requires_grad", wants_hidden ? 1.0 : 0.0}}};
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
