// The statistics of single tokens, each against its definition, and the accuracy that LossMetrics makes of them.
#include "free_transformer/token_statistics.hpp"

#include "free_transformer/vae_loss.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

/// Both sides compute in the type of arithmetic: 8 steps each of logits of at most 8, from sums of at most 9 terms.
constexpr double statistics_steps = 16;
constexpr double statistics_also = 8;

/// Six positions; one is ignored, one has weight 0.
struct SixPositions {
  Tensor logits = eighths({2, 3, 9});
  Tensor targets = tensor(std::vector<int64_t>{3, -100, 0, 8, 2, 5}, {2, 3});
  Tensor probabilities = (eighths({2, 3, 9}, torch::kDouble, 4) / 4).softmax(-1);
  Tensor token_weight = tensor(std::vector<double>{0.5, 1, 2, 1, 0, 1.5}, {2, 3});
  Tensor class_weight = tensor(std::vector<double>{1.5, 0.25, 2, 1, 0.5, 1, 0.75, 1, 2}, {9});

  ReconstructionLossOptions options() const {
    return ReconstructionLossOptions()
        .token_weight(token_weight)
        .weight(class_weight)
        .label_smoothing(0.125)
        .z_loss(0.25);
  }
};

std::vector<Tensor> fields(const TokenStatistics& statistics) {
  return {statistics.loss,       statistics.log_sum_exp, statistics.target_log_probability,
          statistics.prediction, statistics.hit,         statistics.entropy};
}

}  // namespace

TEST_CASE("Every statistic of a token is what its definition says", "[statistics]") {
  const SixPositions example;
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const double softcap : {0.0, 3.0}) {
        for (const bool with_options : {false, true}) {
          for (const bool by_probabilities : {false, true}) {
            INFO(type << ", strided " << strided << ", softcap " << softcap << ", options " << with_options
                      << ", probabilities " << by_probabilities);
            const Tensor logits = strided ? with_strided_rows(example.logits.to(type)) : example.logits.to(type);
            const Tensor targets = by_probabilities ? example.probabilities.to(type) : example.targets;
            const auto options = (with_options ? example.options() : ReconstructionLossOptions()).softcap(softcap);
            const TokenStatistics found = compute_token_statistics(logits, targets, options);

            const Tensor exact = example.logits;
            const Tensor x = softcap > 0 ? softcap * (exact / softcap).tanh() : exact;
            Tensor counts = by_probabilities ? torch::ones({2, 3}, torch::kBool) : targets != -100;
            if (with_options) counts = counts & (example.token_weight != 0);
            const Tensor log_p = x.log_softmax(-1), index = example.targets.clamp_min(0);
            const Tensor of_target = by_probabilities ? (targets.to(torch::kDouble) * log_p).sum(-1)
                                                      : log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1);
            const Tensor wanted = by_probabilities ? targets.argmax(-1) : index;
            const double relative = statistics_steps * epsilon(arithmetic(type));
            const Tensor none = ~counts;
            const Tensor losses = compute_reconstruction_loss(
                logits, targets, ReconstructionLossOptions(options).reduction(torch::kNone));
            CHECK(same_bits(found.loss, losses));
            CHECK(difference(found.log_sum_exp, x.logsumexp(-1).masked_fill(none, 0), relative, statistics_also) == "");
            CHECK(difference(found.target_log_probability, of_target.masked_fill(none, 0), relative, statistics_also) ==
                  "");
            CHECK(same_bits(found.prediction, exact.argmax(-1).masked_fill(none, -1)));
            CHECK(difference(found.entropy, -(log_p.exp() * log_p).sum(-1).masked_fill(none, 0), relative,
                             statistics_also) == "");
            CHECK(found.entropy.scalar_type() == arithmetic(type));
            CHECK(same_bits(found.hit, (exact.argmax(-1) == wanted) & counts));
            CHECK(found.loss.scalar_type() == arithmetic(type));
            CHECK(found.log_sum_exp.scalar_type() == arithmetic(type));
            CHECK(found.target_log_probability.scalar_type() == arithmetic(type));
            for (const Tensor& field : fields(found)) {
              CHECK(field.sizes() == torch::IntArrayRef({2, 3}));
              const int64_t left_out = field.scalar_type() == torch::kLong ? -1 : 0;
              CHECK((field.masked_select(none) == left_out).all().item<bool>());
            }
          }
        }
      }
    }
  }
}

TEST_CASE("The lowest of equally likely classes is the prediction", "[statistics]") {
  // Rows longer than several vectors, so that the tie lies in one lane, in two, and in the remainder.
  const int64_t classes = 75;
  const std::vector<std::vector<int64_t>> ties{{0, 74},  {5, 6},      {1, 17, 33}, {16, 3},
                                               {70, 74}, {64, 8, 40}, {74},        {31, 32}};
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      const auto rows = static_cast<int64_t>(ties.size());
      Tensor logits = eighths({rows + 1, classes}, type) / 8;
      std::vector<int64_t> lowest;
      for (int64_t row = 0; row < rows; ++row) {
        const auto& classes_of_row = ties[static_cast<size_t>(row)];
        for (const int64_t c : classes_of_row) logits[row][c] = 2;
        lowest.push_back(*std::min_element(classes_of_row.begin(), classes_of_row.end()));
      }
      logits.select(0, rows).fill_(-1.5);  // all the same
      lowest.push_back(0);
      if (strided) logits = with_strided_rows(logits);
      INFO(type << ", strided " << strided);
      const Tensor targets = tensor(lowest, {rows + 1});
      for (const double softcap : {0.0, 1.0, 3.7, 30.0}) {
        INFO("softcap " << softcap);
        const auto options = ReconstructionLossOptions().softcap(softcap);
        const auto found = compute_token_statistics(logits, targets, options);
        CHECK(same_bits(found.prediction, targets));
        CHECK(found.hit.all().item<bool>());
        const auto others = compute_token_statistics(logits, (targets + 1).remainder(classes), options);
        CHECK(same_bits(others.prediction, targets));
        CHECK_FALSE(others.hit.any().item<bool>());
      }
    }
  }
}

TEST_CASE("A row whose loss is NaN is no hit", "[statistics][metrics]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const int64_t classes : {6, 100}) {
        for (const double garbage : {not_a_number, reference::inf, -reference::inf}) {
          INFO(type << ", strided " << strided << ", " << classes << " classes, " << garbage);
          Tensor logits = torch::full({3, classes}, garbage, type);
          logits.select(0, 1).fill_(0).select(0, 0).fill_(std::abs(garbage));
          logits.select(0, 2).fill_(0).select(0, 4).fill_(1);
          if (strided) logits = with_strided_rows(logits);
          const Tensor targets = indices({0, 0, 4});
          const auto found = compute_token_statistics(logits, targets);
          CHECK(values(found.hit) == std::vector<double>{0, 0, 1});
          CHECK(found.log_sum_exp[0].isnan().item<bool>());
          const auto weightless = ReconstructionLossOptions().weight(torch::zeros({classes}, type)).z_loss(0.25);
          const Tensor losses = compute_reconstruction_loss(
              logits, targets, ReconstructionLossOptions(weightless).reduction(torch::kNone));
          CHECK(values(losses.isnan()) == std::vector<double>{1, 1, 0});
          const auto options = VAELossOptions().latent_dim(2).accuracy(true);
          const auto metrics = compute_vae_loss(logits, targets, torch::zeros({3, 2}), options).metrics;
          CHECK(metrics.at("metrics/accuracy") == 1.0 / 3);
        }
      }
    }
  }
}

TEST_CASE("Tokens that do not count have no statistics, whatever their logits", "[statistics]") {
  const SixPositions example;
  for (const auto type : all_types) {
    for (const double garbage : {not_a_number, reference::inf}) {
      for (const bool strided : {false, true}) {
        for (const Tensor& targets : {example.targets, example.probabilities.to(type)}) {
          Tensor dirty = example.logits.to(type).clone();
          if (!targets.is_floating_point()) dirty.select(0, 0).select(0, 1).fill_(garbage);
          dirty.select(0, 1).select(0, 1).fill_(garbage);
          if (strided) dirty = with_strided_rows(dirty);
          const Tensor clean = strided ? with_strided_rows(example.logits.to(type)) : example.logits.to(type);
          const auto found = fields(compute_token_statistics(dirty, targets, example.options()));
          const auto expected = fields(compute_token_statistics(clean, targets, example.options()));
          for (size_t field = 0; field < found.size(); ++field) {
            INFO(type << ", " << garbage << ", strided " << strided << ", field " << field);
            CHECK(same_bits(found[field], expected[field]));
          }
        }
      }
    }
  }
}

TEST_CASE("Statistics have no graph and do not depend on reduction and normalizer", "[statistics]") {
  const SixPositions example;
  const Tensor logits = leaf(example.logits);
  const auto expected = fields(compute_token_statistics(logits, example.targets, example.options()));
  for (const Reduction& reduction : {Reduction(torch::kSum), Reduction(torch::kNone), Reduction(torch::kMean)}) {
    const auto found =
        fields(compute_token_statistics(logits, example.targets, example.options().reduction(reduction).normalizer(7)));
    for (size_t field = 0; field < found.size(); ++field) {
      CHECK(same_bits(found[field], expected[field]));
      CHECK_FALSE(found[field].requires_grad());
    }
  }
  const auto one = compute_token_statistics(example.logits[0][0], torch::tensor(3));
  for (const Tensor& field : fields(one)) CHECK(field.dim() == 0);
  for (const Tensor& field : fields(compute_token_statistics(torch::zeros({0, 5}), torch::zeros({0}, torch::kLong)))) {
    CHECK(field.sizes() == torch::IntArrayRef({0}));
  }
}

TEST_CASE("Statistics refuse what the loss refuses, under their own name", "[statistics][errors][cpu]") {
  const Tensor logits = eighths({2, 5});
  CHECK(error_of([&] {
          compute_token_statistics(logits, torch::tensor({0, 5}));
        }) == "compute_token_statistics: targets must lie in [0, 5) or be ignore_index = -100, got 5 at position 1");
  CHECK(error_of([&] {
          compute_token_statistics(torch::Tensor(), torch::tensor({0, 5}));
        }) == "compute_token_statistics: logits must be a defined tensor, got an undefined one");
  CHECK(error_of([&] {
          compute_token_statistics(logits, torch::tensor({0, 1}), ReconstructionLossOptions().softcap(-1));
        }) == "compute_token_statistics: softcap must be finite and >= 0, got -1");
}

TEST_CASE("metrics/accuracy is there only when asked for, and is the share of hits", "[statistics][metrics]") {
  const SixPositions example;
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const Tensor& targets : {example.targets, example.probabilities.to(type)}) {
        for (const bool with_options : {false, true}) {
          INFO(type << ", strided " << strided << ", probabilities " << targets.is_floating_point() << ", options "
                    << with_options);
          Tensor logits = example.logits.to(type).clone();
          logits[0][0][3] = 9;  // hits, and the others as they come
          logits[1][2][5] = 9;
          if (strided) logits = with_strided_rows(logits);
          const auto options = with_options ? example.options() : ReconstructionLossOptions();
          const auto metrics = [&](bool accuracy) {
            return compute_vae_loss(logits, targets, eighths({6, 16}, type),
                                    VAELossOptions().reconstruction(options).accuracy(accuracy))
                .metrics;
          };
          const LossMetrics without = metrics(false), with = metrics(true);
          CHECK(without.size() == (with_options ? 11 : 10));  // the options have a z-loss
          CHECK(with.size() == without.size() + 1);
          CHECK_THAT(error_of([&] { without.at("metrics/accuracy"); }),
                     Catch::Matchers::EndsWith("got metrics/accuracy"));
          for (const auto& [name, value] : without) CHECK(value == with.at(name));

          const Tensor hit = compute_token_statistics(logits, targets, options).hit.to(torch::kDouble);
          Tensor weight = with_options ? example.token_weight : torch::ones({2, 3}, torch::kDouble);
          if (!targets.is_floating_point()) weight = weight.masked_fill(targets == -100, 0);
          const auto expected = ((hit * weight).sum() / weight.sum()).item<double>();
          if (!targets.is_floating_point()) CHECK(expected > 0);
          CHECK(std::abs(with.at("metrics/accuracy") - expected) <= 4 * epsilon(torch::kDouble));
        }
      }
    }
  }
}

TEST_CASE("Metrics with and without accuracy are not joined", "[statistics][metrics][errors]") {
  const auto metrics = [](bool accuracy) {
    return compute_vae_loss(eighths({2, 5}), torch::tensor({0, 1}), eighths({2, 3}),
                            VAELossOptions().latent_dim(3).accuracy(accuracy))
        .metrics;
  };
  CHECK(error_of([&] { metrics(true) + metrics(false); }) ==
        "LossMetrics: += must join metrics of one latent_dim, place of the hinge (BatchMean or not) and choice of "
        "accuracy, got sums of "
        "[15] and "
        "[15], hinge on the batch mean 0 and 0, accuracy 1 and 0");
}

TEST_CASE("The entropy of a confident prediction keeps its digits, and impossible classes have none", "[statistics]") {
  // p = (1, s, s)/(1 + 2s) with s = exp(-40): entropy = log1p(2s) + 2s 40/(1 + 2s)
  const double s = std::exp(-40.0), confident = std::log1p(2 * s) + 80 * s / (1 + 2 * s);
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    for (const bool strided : {false, true}) {
      Tensor logits = torch::tensor({{40.0, 0.0, 0.0}, {0.0, -reference::inf, 0.0}, {not_a_number, 0.0, 0.0}}, type);
      if (strided) logits = with_strided_rows(logits);
      const Tensor found = compute_token_statistics(logits, torch::zeros({3}, torch::kLong)).entropy;
      const auto exact = std::vector<double>{confident, std::log(2.0)};
      CHECK(difference(found.slice(0, 0, 2), exact, statistics_steps * epsilon(type)) == "");
      CHECK(std::isnan(found[2].item<double>()));
    }
  }
}
