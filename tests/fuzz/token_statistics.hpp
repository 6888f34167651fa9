/// compute_token_statistics of dense logits.
#pragma once

#include <ATen/ATen.h>

#include <free_transformer/token_statistics.hpp>

#include "choices.hpp"
#include "input.hpp"
#include "paths.hpp"
#include "reconstruction_loss.hpp"
#include "refusal.hpp"

namespace fuzz {

/// [N] each.
struct ExpectedStatistics {
  Expected loss, log_sum_exp, entropy;
  at::Tensor counts, is_sound;
  at::Tensor logits;  ///< [N, V], capped
  at::Tensor margin;  ///< how far a logit may be from the largest and yet be taken for it
};

inline ExpectedStatistics expected_statistics(const Input& input, TargetsAndOptions of) {
  of.options.reduction(torch::enumtype::kNone{});
  const at::Tensor rows = input.rows(), exact = at::zeros({rows.size(0), 1}, at::kDouble);
  const auto loss = expected_reconstruction(rows, exact, of, input.type());
  const at::Tensor counted = rows.masked_fill(loss.counts.logical_not().unsqueeze(1), 0);
  const Softmax soft = softmax(counted, exact, of.options.softcap(), input.type());
  const auto& p = soft.probability;
  const auto& surprise = soft.surprise;
  const double step = arithmetic_step(input.type());
  const at::Tensor possible = (p.value > 0) & surprise.value.isfinite();
  const at::Tensor parts = (p.value * surprise.value).masked_fill(possible.logical_not(), 0);
  const at::Tensor error =
      (p.tolerance * (1 + surprise.value) + p.value * surprise.tolerance).masked_fill(possible.logical_not(), 0);
  ExpectedStatistics expected;
  const auto known = [&](const Expected& value) { return value.known_where(soft.is_sound).only(loss.counts); };
  expected.loss = loss.losses;
  expected.log_sum_exp = known(soft.log_sum_exp);
  expected.entropy = known({parts.sum(-1), error.sum(-1) + 16 * step * parts.sum(-1)});
  expected.counts = loss.counts, expected.is_sound = soft.is_sound;
  expected.logits = soft.logits;
  expected.margin = 2 * soft.logits_error.squeeze(-1);
  return expected;
}

/// The most likely class, the lowest on a tie, and whether it is the target; -1 and false where a position does not count.
inline void check_predictions(const at::Tensor& prediction, const at::Tensor& hit, const at::Tensor& targets,
                              const ExpectedStatistics& expected) {
  const at::Tensor flat = prediction.reshape({-1}), left_out = expected.counts.logical_not();
  if (!(flat == -1).eq(left_out).all().item<bool>()) fail("prediction of a position that does not count");
  const at::Tensor judged = expected.counts & expected.is_sound, largest = expected.logits.amax(-1);
  const at::Tensor predicted = expected.logits.gather(1, flat.clamp_min(0).unsqueeze(1)).squeeze(1);
  const at::Tensor is_first = flat == expected.logits.argmax(-1);
  const at::Tensor is_right = at::where(expected.margin > 0, predicted >= largest - expected.margin, is_first);
  if (!(is_right | judged.logical_not()).all().item<bool>()) fail("prediction");
  if (targets.is_floating_point()) return;
  if (!(hit.reshape({-1}) == ((flat == targets.to(at::kLong).reshape({-1})) & judged)).all().item<bool>()) fail("hit");
}

inline void fuzz_token_statistics(Choices& choices) {
  const Shape positions = some_positions(choices);
  const int64_t classes = some_classes(choices);
  const Input input = some_input(choices, positions, classes);
  const auto of = some_targets_and_options(choices, positions, classes);
  ExpectedStatistics expected;
  const bool is_normalizer_judged = of.options.normalizer().number() || of.options.normalizer().tensor();
  const auto refusal = !choices.has_gone_wrong() ? Refusal::wrong
                       : is_normalizer_judged    ? Refusal::possible
                                                 : Refusal::required;
  if (!choices.has_gone_wrong()) expected = expected_statistics(input, of);
  on_each_path([&](bool is_strided) {
    const Handed logits(is_strided ? input.with_strided_rows() : input);
    const Memory memory(tensors_of(logits, of));
    free_transformer::TokenStatistics statistics;
    if (is_refused(
            refusal, memory,
            [&] { statistics = free_transformer::compute_token_statistics(logits.tensor, of.targets, of.options); }) ||
        choices.has_gone_wrong()) {
      return;
    }
    check("loss", statistics.loss, expected.loss.reshape(positions), 2);
    check("log_sum_exp", statistics.log_sum_exp, expected.log_sum_exp.reshape(positions));
    check("entropy", statistics.entropy, expected.entropy.reshape(positions));
    check_predictions(statistics.prediction, statistics.hit, of.targets, expected);
    memory.check_untouched("statistics");
  });
}

}  // namespace fuzz
