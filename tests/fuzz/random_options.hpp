/// Options, targets and normalizers out of choices: right ones, and now and then one that must be refused.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <variant>

#include <free_transformer/kl_divergence.hpp>
#include <free_transformer/reconstruction_loss.hpp>

#include "choices.hpp"
#include "expected.hpp"
#include "tensors.hpp"

namespace fuzz {

using free_transformer::KLDivergenceOptions, free_transformer::ReconstructionLossOptions;
using free_transformer::Normalizer, free_transformer::Reduction;

/// Around the widths of vectors and of what the kernels call a stretch.
inline int64_t some_classes(Choices& choices) {
  if (!choices.seldom(3)) return 1 + choices.below(80);
  return choices.one_of<int64_t>({127, 128, 129, 511, 512, 513, 1000, 1025, 1537});
}

inline Reduction some_reduction(Choices& choices) {
  return choices.one_of<Reduction>({torch::enumtype::kMean{}, torch::enumtype::kSum{}, torch::enumtype::kNone{}});
}

inline bool is_none(const Reduction& reduction) { return std::holds_alternative<torch::enumtype::kNone>(reduction); }
inline bool is_mean(const Reduction& reduction) { return std::holds_alternative<torch::enumtype::kMean>(reduction); }

inline Normalizer some_normalizer(Choices& choices) {
  if (choices.seldom(2)) return choices.one_of({8.0, 3.0, 0.5}, {0.0, -1.0, not_a_number, infinity});
  const auto type = choices.one_of({at::kFloat, at::kDouble, at::kLong, at::kHalf});
  if (choices.goes_wrong()) {
    const at::Tensor two = at::ones({2}), graph = at::ones({}).requires_grad_(), nothing;
    return choices.one_of({nothing, two, graph, at::full({}, -1.0), at::full({}, not_a_number)});
  }
  return at::full(choices.one_of<Shape>({{}, {1}, {1, 1}}), choices.one_of({8.0, 3.0, 0.0}), type);
}

/// The factor from a sum to the final value; weight is that of a mean, counted that of all positions.
template <typename Options>
double scale_of(const Options& options, const at::Tensor& weight, const at::Tensor& counted) {
  if (!is_mean(options.reduction())) return 1;
  const auto sum = weight.sum().item<double>();
  const auto& normalizer = options.normalizer();
  if (normalizer.number()) return 1 / *normalizer.number();
  if (!normalizer.tensor()) return sum > 0 ? 1 / sum : 0;
  const auto divisor = normalizer.tensor()->template item<double>();
  return divisor > 0 || counted.sum().item<double>() > 0 ? 1 / divisor : 0;
}

/// The final value, of losses with their weights and that factor.
inline Expected reduced(const Expected& losses, const Reduction& reduction, const Shape& positions) {
  return is_none(reduction) ? losses.reshape(positions) : losses.sum();
}

/// The shape, or another one.
inline Shape some_shape(Choices& choices, const Shape& right) {
  if (!choices.goes_wrong()) return right;
  Shape wrong = right;
  if (wrong.empty() || choices.seldom(2)) return with_last(wrong, 3);
  wrong.back() += 1;
  return wrong;
}

inline at::Tensor some_token_weight(Choices& choices, const Shape& positions) {
  if (!choices.seldom(3)) return {};
  if (choices.goes_wrong())
    return choices.seldom(2) ? at::ones(positions, at::kLong) : at::ones(positions).requires_grad_();
  return some_weights(choices, some_shape(choices, positions));
}

inline at::Tensor some_class_weight(Choices& choices, int64_t classes) {
  if (!choices.seldom(4)) return {};
  const at::Tensor weight = some_weights(choices, some_shape(choices, {classes}));
  return weight.scalar_type() == at::kBool ? weight.to(at::kFloat) : weight;
}

inline at::Tensor some_probabilities(Choices& choices, const Shape& sizes) {
  Sequence sequence(choices);
  const at::Tensor q = at::empty(some_shape(choices, sizes), at::kDouble);
  for (int64_t i = 0; i < q.numel(); ++i) q.data_ptr<double>()[i] = static_cast<double>(sequence.below(4)) / 8;
  return q.to(some_type(choices));
}

inline at::Tensor some_class_indices(Choices& choices, const Shape& positions, int64_t classes, int64_t ignore_index) {
  const at::Tensor targets = at::empty(some_shape(choices, positions), at::kLong);
  auto* target = targets.data_ptr<int64_t>();
  const auto type =
      choices.one_of({at::kLong, at::kInt, at::kShort, at::kByte, at::kChar}, {at::kBool, at::kComplexFloat});
  const auto most = type == at::kByte ? 256 : type == at::kChar ? 128 : 32768;
  const bool holds_ignored = ignore_index < most && (type != at::kByte || ignore_index >= 0);
  const bool ignores_some = choices.seldom(2) && holds_ignored, ignores_all = ignores_some && choices.seldom(4);
  Sequence sequence(choices);
  for (int64_t i = 0; i < targets.numel(); ++i) {
    target[i] = ignores_all || (ignores_some && sequence.below(4) == 0)
                    ? ignore_index
                    : sequence.below(std::min<int64_t>(classes, most));
  }
  if (targets.numel() > 0 && type == at::kLong && choices.goes_wrong()) {
    target[choices.large() % targets.numel()] =
        choices.one_of<int64_t>({classes + 1, -7, INT64_MAX, INT64_MIN, -(int64_t{1} << 32)});
  }
  const at::Tensor result = targets.to(type);
  return choices.seldom(3) ? at::stack({result, result}, -1).select(-1, 1) : result;
}

struct TargetsAndOptions {
  at::Tensor targets;
  ReconstructionLossOptions options;
};

inline TargetsAndOptions some_targets_and_options(Choices& choices, const Shape& positions, int64_t classes) {
  TargetsAndOptions of;
  auto& options = of.options;
  if (choices.goes_wrong()) return of;  // no targets
  if (choices.seldom(6)) {
    of.targets = some_probabilities(choices, with_last(positions, classes));
    options.ignore_index(choices.one_of<int64_t>({-100}, {0, -1}));
  } else {
    const auto ignore_index = choices.one_of<int64_t>({-100, -1, 0, classes});
    of.targets = some_class_indices(choices, positions, classes, ignore_index);
    options.ignore_index(ignore_index);
  }
  options.reduction(some_reduction(choices));
  options.token_weight(some_token_weight(choices, positions));
  options.weight(some_class_weight(choices, classes));
  if (choices.seldom(4)) options.label_smoothing(choices.one_of({0.125, 0.1, 1.0}, {-0.1, 1.5, not_a_number}));
  if (choices.seldom(4)) options.z_loss(choices.one_of({0.25, 1e-4}, {-1.0, not_a_number, infinity}));
  if (choices.seldom(4)) options.softcap(choices.one_of({30.0, 1.0, 1e4, 0.01}, {-1.0, not_a_number, infinity}));
  if (choices.seldom(4)) options.normalizer(some_normalizer(choices));
  options.accuracy(choices.seldom(3));
  return of;
}

inline KLDivergenceOptions some_latent_options(Choices& choices, const Shape& positions, int64_t bits) {
  KLDivergenceOptions options;
  options.latent_dim(choices.one_of<int64_t>({bits}, {bits + 1, 0, -1}));
  options.free_bits(choices.one_of({0.3466, 0.0, 1.0, 0.01, 5.0}, {-1.0, not_a_number, infinity}));
  options.reduction(some_reduction(choices));
  options.token_weight(some_token_weight(choices, positions));
  if (choices.seldom(4)) options.normalizer(some_normalizer(choices));
  if (choices.seldom(4)) {
    const Shape sizes = choices.seldom(2) ? with_last(positions, bits) : Shape{bits};
    const at::Tensor prior = some_numbers(choices, some_shape(choices, sizes), some_type(choices));
    options.prior_logits(choices.goes_wrong() ? prior.to(at::kLong) : prior);
  }
  return options;
}

}  // namespace fuzz
