#include "free_transformer/loss_metrics.hpp"

#include "free_transformer/vae_loss.hpp"
#include "numeric.hpp"
#include "operations.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

const std::vector<std::string> metric_names{"loss/total",
                                            "loss/reconstruction",
                                            "loss/kl",
                                            "loss/kl_weighted",
                                            "metrics/perplexity",
                                            "latent/kl_bits",
                                            "latent/active_fraction",
                                            "latent/active_bits",
                                            "bound/elbo",
                                            "bound/elbo_bits"};

struct Batch {
  Tensor logits, targets, z_logits;

  explicit Batch(int64_t positions, torch::ScalarType type = torch::kDouble)
      : logits(eighths({positions, 11}, type, positions)),
        targets((torch::arange(positions) * 5).remainder(11)),
        z_logits(eighths({positions, 4}, type, positions + 1) / 4) {
    targets.masked_fill_(targets == 3, -100);
  }

  Batch part(int64_t first, int64_t last) const {
    Batch result = *this;
    for (Tensor* all : {&result.logits, &result.targets, &result.z_logits}) *all = all->slice(0, first, last);
    return result;
  }

  template <typename FreeBits>
  LossMetrics metrics(double beta_kl = 0.5, double free_bits = 0.5) const {
    return compute_vae_loss<FreeBits>(logits, targets, z_logits, 4, beta_kl, free_bits).metrics;
  }
};

/// Of a result that so many operations of float64 were rounded for.
double roundings(int64_t count) { return static_cast<double>(count) * epsilon(torch::kDouble) / 2; }

/// Between two orders of a sum over so many positions: all terms are positive, and each addition rounds once. A quotient, a
/// change of units and the four bits' sum follow.
double of_orders(int64_t positions) { return roundings(2 * (positions + 1 + 1 + 4)); }

/// exp makes the absolute error of the likelihood a relative one; the batch's hinge takes the budget from the KL and
/// leaves its error.
void check_same(const LossMetrics& left, const LossMetrics& right, double relative) {
  const double kl = bits(right.at("latent/kl_bits"));
  for (const auto& name : metric_names) {
    INFO(name);
    const double value = right.at(name), steps = name == "metrics/perplexity" ? 1 + std::log(value) : 1;
    CHECK(std::abs(left.at(name) - value) <= relative * (steps * std::abs(value) + kl));
  }
}

}  // namespace

TEST_CASE("The metrics have their names in order, by iteration, lookup and conversion", "[metrics]") {
  const LossMetrics metrics = Batch(9).metrics<PerPosition>();
  std::vector<std::string> found;
  for (const auto& [name, value] : metrics) {
    found.push_back(name);
    CHECK(value == metrics.at(name));
    CHECK(std::isfinite(value));
  }
  CHECK(found == metric_names);
  CHECK(metrics.size() == metric_names.size());
  const std::map<std::string, double> map = metrics;
  CHECK(map.size() == metric_names.size());
  for (const auto& name : metric_names) CHECK(map.at(name) == metrics.at(name));
}

TEST_CASE("The metrics keep to the relations between them", "[metrics]") {
  const LossMetrics metrics = Batch(9).metrics<PerBit>(/*beta_kl=*/0.25);
  CHECK(metrics.at("loss/kl_weighted") == 0.25 * metrics.at("loss/kl"));  // a power of two rounds nothing
  CHECK(metrics.at("loss/total") == metrics.at("loss/reconstruction") + metrics.at("loss/kl_weighted"));
  const auto close = [](double left, double right, int64_t count) {
    return std::abs(left - right) <= roundings(count) * std::abs(right);
  };
  const double likelihood = metrics.at("loss/reconstruction"), elbo = metrics.at("bound/elbo");
  CHECK(std::abs(std::log(metrics.at("metrics/perplexity")) - likelihood) <= roundings(4) * (1 + likelihood));
  CHECK(close(elbo, likelihood + bits(metrics.at("latent/kl_bits")), 4));  // to bits and back, and a sum on each side
  CHECK(close(bits(metrics.at("bound/elbo_bits")), elbo, 2));
}

TEMPLATE_TEST_CASE("Micro-batches of any sizes join to the metrics of the whole batch", "[metrics]", PerPosition,
                   PerBit, BatchMean) {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    // The sums are float64. A position's loss in float32 is rounded as it falls into vectors: eight steps at most.
    const double of_positions = type == torch::kFloat ? 8 * epsilon(type) : 0;
    const double relative = of_orders(97) + of_positions;
    const Batch whole(97, type);
    for (const double free_bits : {0.0, 0.25, 0.5, 20.0}) {
      INFO(type << ", free_bits " << free_bits);
      const LossMetrics expected = whole.metrics<TestType>(0.5, free_bits);
      for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{0, 1, 97}, {0, 50, 97}, {0, 3, 3, 20, 96, 97}}) {
        LossMetrics joined;
        LossMetrics from_the_end;
        for (size_t index = 1; index < cuts.size(); ++index) {
          joined += whole.part(cuts[index - 1], cuts[index]).metrics<TestType>(0.5, free_bits);
          from_the_end = whole.part(cuts[index - 1], cuts[index]).metrics<TestType>(0.5, free_bits) + from_the_end;
        }
        check_same(joined, expected, relative);
        check_same(from_the_end, expected, relative);
      }
    }
  }
}

TEST_CASE("Metrics that were read can be joined and read again", "[metrics]") {
  const Batch whole(20);
  LossMetrics joined = whole.part(0, 7).metrics<PerPosition>();
  const LossMetrics first = joined;
  const double before = first.at("loss/total");
  CHECK(joined.at("loss/total") == before);
  joined += whole.part(7, 20).metrics<PerPosition>();
  check_same(joined, whole.metrics<PerPosition>(), of_orders(20));
  CHECK(first.at("loss/total") == before);
}

TEST_CASE("Joined calls may differ in beta_kl and in free_bits", "[metrics]") {
  const Batch one(10), other(30);
  const LossMetrics a = one.metrics<PerPosition>(0.0, 0.5), b = other.metrics<PerPosition>(1.0, 0.25);
  const LossMetrics joined = a + b;
  const double kl = (a.at("loss/kl") + 3 * b.at("loss/kl")) / 4, kl_weighted = 0.75 * b.at("loss/kl");
  CHECK_THAT(joined.at("loss/kl"), Catch::Matchers::WithinRel(kl, roundings(2 + 4)));  // joined, and of the calls
  CHECK_THAT(joined.at("loss/kl_weighted"), Catch::Matchers::WithinRel(kl_weighted, roundings(1 + 2)));
}

TEST_CASE("Metrics without positions are zero, and neutral when joined", "[metrics]") {
  const LossMetrics none;
  for (const auto& name : metric_names) CHECK(none.at(name) == (name == "metrics/perplexity" ? 1 : 0));
  const LossMetrics some = Batch(9).metrics<BatchMean>();
  check_same(none + some, some, 0);
  check_same(some + none, some, 0);
  CHECK((none + none).size() == metric_names.size());
}

TEST_CASE("Metrics carry no graph, and what happens to the inputs later does not change them", "[metrics]") {
  Batch batch(9);
  batch.logits.requires_grad_();
  const double expected = batch.metrics<PerPosition>().at("loss/total");
  const auto [loss, metrics] = compute_vae_loss(batch.logits, batch.targets, batch.z_logits, 4, 0.5, 0.5);
  loss.backward();
  const torch::NoGradGuard no_grad;
  batch.logits.zero_();
  batch.z_logits.zero_();
  batch.targets.zero_();
  CHECK(metrics.at("loss/total") == expected);
}

TEST_CASE("Reductions do not change the metrics", "[metrics]") {
  const Batch batch(9);
  const LossMetrics expected = batch.metrics<PerPosition>();
  // A device takes a shorter way to a loss that is reduced, through a logarithm of its odds.
  const double relative = test_device() ? 16 * epsilon(torch::kDouble) : 0;
  for (const Reduction& reduction : {Reduction(torch::kSum), Reduction(torch::kNone)}) {
    const auto options = VAELossOptions()
                             .reconstruction(ReconstructionLossOptions().reduction(reduction))
                             .kl(KLDivergenceOptions().latent_dim(4).free_bits(0.5).reduction(reduction))
                             .beta_kl(0.5);
    check_same(compute_vae_loss(batch.logits, batch.targets, batch.z_logits, options).metrics, expected, relative);
  }
}

TEST_CASE("An active bit has a mean KL above 0.01 nats, an active position is above its budget", "[metrics]") {
  // KL(l) is near l^2/8: 0.0078 for a quarter, 0.0308 for a half.
  const Tensor z_logits = tensor(std::vector<double>{0.25, 0.5, 0, 0.25, 0.5, 3}, {2, 3});
  const auto metrics =
      compute_vae_loss(eighths({2, 5}), torch::zeros({2}, torch::kLong), z_logits, 3, 1.0, 0.125).metrics;
  CHECK(metrics.at("latent/active_bits") == 2);
  CHECK(metrics.at("latent/active_fraction") == 0.5);
}

TEST_CASE("An unknown metric and metrics that cannot be joined are refused", "[metrics][errors]") {
  CHECK(
      error_of([] { Batch(3).metrics<PerPosition>().at("loss/everything"); }) ==
      "LossMetrics::at: name must be one of loss/total loss/reconstruction loss/kl loss/kl_weighted metrics/perplexity "
      "latent/kl_bits latent/active_fraction latent/active_bits bound/elbo bound/elbo_bits, got loss/everything");
  const Batch batch(3);
  CHECK(error_of([&] { batch.metrics<PerPosition>() + batch.metrics<BatchMean>(); }) ==
        "LossMetrics: += must join metrics of one latent_dim, place of the hinge (BatchMean or not) and choice of "
        "accuracy, got sums of "
        "[16] and "
        "[16], hinge on the batch mean 0 and 1, accuracy 0 and 0");
  const auto sixteen = compute_vae_loss(eighths({2, 5}), torch::zeros({2}, torch::kLong), eighths({2, 16})).metrics;
  CHECK(error_of([&] { batch.metrics<PerPosition>() + sixteen; }) ==
        "LossMetrics: += must join metrics of one latent_dim, place of the hinge (BatchMean or not) and choice of "
        "accuracy, got sums of "
        "[16] and "
        "[28], hinge on the batch mean 0 and 0, accuracy 0 and 0");
}

TEST_CASE("Sums of a reconstruction of one's own are read in any layout, and refused in any other shape",
          "[metrics][errors]") {
  const auto of = [](const Tensor& reconstruction_sums) {
    const Tensor latent_sums = torch::ones({free_transformer::detail::latent_sum_count + 3}, torch::kDouble);
    return LossMetrics(reconstruction_sums, latent_sums, 1.0, 0.5, false, false);
  };
  const Tensor sums = torch::arange(1, 1 + int64_t{free_transformer::detail::reconstruction_sum_count}, torch::kDouble);
  CHECK(of(with_strided_rows(sums)).at("loss/reconstruction") == of(sums).at("loss/reconstruction"));
  for (const Tensor& other : {Tensor(), sums.slice(0, 1), sums.unsqueeze(0), sums.to(torch::kFloat)}) {
    CHECK(error_of([&] { of(other); }).find("LossMetrics: reconstruction_sums must be ") == 0);
  }
}

TEST_CASE("The z-loss is shown apart where there is one, and joins", "[metrics]") {
  const Batch batch(9);
  const auto metrics = [&](double z_loss) {
    return compute_vae_loss(batch.logits, batch.targets, batch.z_logits,
                            VAELossOptions().latent_dim(4).reconstruction(ReconstructionLossOptions().z_loss(z_loss)))
        .metrics;
  };
  CHECK(metrics(0).size() == metric_names.size());
  const Tensor lse = batch.logits.logsumexp(-1).masked_select(batch.targets != -100);
  const double expected = 0.25 * lse.square().mean().item<double>();
  // Each side adds 11 exponentials of about 8 half steps each, so its lse is off by as many of 1 + |lse|. A square doubles
  // that, and 9 squares are added up.
  const double size = (lse.abs() * (1 + lse.abs())).sum().item<double>() / lse.square().sum().item<double>();
  const double relative = roundings(2 * (2 * (11 + 8) + 9 + 3)) * size;
  const LossMetrics with = metrics(0.25);
  CHECK_THAT(with.at("loss/z_loss"), Catch::Matchers::WithinRel(expected, relative));
  CHECK_THAT(with.at("loss/reconstruction"),
             Catch::Matchers::WithinRel(metrics(0).at("loss/reconstruction") + expected, relative));
  CHECK_THAT((metrics(0) + with).at("loss/z_loss"), Catch::Matchers::WithinRel(expected / 2, relative));
}

TEST_CASE("The KL of each bit is shown where it is asked for, and joins", "[metrics]") {
  const Batch whole(97);
  const auto metrics = [](const Batch& batch, bool asked) {
    const auto options = VAELossOptions().latent_dim(4).free_bits(0.5).kl_of_each_bit(asked);
    return compute_vae_loss<BatchMean>(batch.logits, batch.targets, batch.z_logits, options).metrics;
  };
  const LossMetrics all = metrics(whole, true);
  CHECK(metrics(whole, false).size() == metric_names.size());
  CHECK(all.size() == metric_names.size() + 4);
  double sum = 0;
  for (int64_t bit = 0; bit < 4; ++bit) {
    const std::string name = "latent/kl_bits/" + std::to_string(bit);
    INFO(name);
    CHECK((all.begin() + static_cast<std::ptrdiff_t>(metric_names.size()) + bit)->first == name);
    const Tensor p = whole.z_logits.select(-1, bit).sigmoid();
    const Tensor kl = p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log();
    // Two products of at most log 2, whose factors are off by two half steps each; their difference may be near 0.
    CHECK(std::abs(all.at(name) - kl.mean().item<double>() / std::log(2.0)) < roundings(2 * (2 + 2 + 1)));
    const LossMetrics joined = metrics(whole.part(0, 30), true) + metrics(whole.part(30, 97), true);
    CHECK_THAT(joined.at(name), Catch::Matchers::WithinRel(all.at(name), of_orders(97)));
    const LossMetrics by_one_that_asked = metrics(whole.part(0, 30), false) + metrics(whole.part(30, 97), true);
    CHECK(by_one_that_asked.at(name) == joined.at(name));
    sum += all.at(name);
  }
  CHECK_THAT(sum, Catch::Matchers::WithinRel(all.at("latent/kl_bits"), of_orders(0)));
}

TEST_CASE("Asking for the KL of each bit calls no further operation", "[metrics]") {
  const Batch batch(9);
  const auto operations = [&](bool asked) {
    return operations_of([&] {
      compute_vae_loss(batch.logits, batch.targets, batch.z_logits,
                       VAELossOptions().latent_dim(4).kl_of_each_bit(asked));
    });
  };
  CHECK(operations(true) == operations(false));
}

TEST_CASE("The KL of each bit counts the positions that the mask leaves", "[metrics]") {
  const Tensor z_logits = tensor(std::vector<double>{3, 0, -3, 50}, {2, 2}), targets = indices({1, -100});
  const auto options = VAELossOptions().latent_dim(2).mask_ignored_latents(true).kl_of_each_bit(true);
  const auto metrics = compute_vae_loss(eighths({2, 5}), targets, z_logits, options).metrics;
  const double p = 1 / (1 + std::exp(-3.0));
  const double kl = std::log(2.0) + p * std::log(p) + (1 - p) * std::log(1 - p);
  // Three terms of at most log 2, of a half step or two each, make 0.5; the library's own is off by six at most.
  CHECK_THAT(metrics.at("latent/kl_bits/0"), Catch::Matchers::WithinRel(kl / std::log(2.0), roundings(2 * 3 * 2 + 6)));
  CHECK(metrics.at("latent/kl_bits/1") == 0);
}
