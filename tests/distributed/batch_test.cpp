// A batch that is split among ranks: one count, one set of metrics, the gradients of one large batch.
#include "../unit/numeric.hpp"
#include "free_transformer/distributed.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
using ranks::group;

constexpr int64_t classes = 7, latent_dim = 5;

/// Both orders of adding up some dozens of numbers near 1 in float64.
constexpr double relative = 1e-13;

/// A batch, and this rank's part of it: 3 positions on rank 0, 0 on the next, then 1, 4, and all that is left on the
/// last.
struct Batch {
  Tensor logits, targets, z_logits, token_weight, class_weight;

  Batch() {
    torch::manual_seed(5);
    logits = torch::randn({12, classes}, torch::kDouble) * 3;
    targets = torch::randint(classes, {12}, torch::kLong);
    z_logits = torch::randn({12, latent_dim}, torch::kDouble) * 2;
    token_weight = torch::rand({12}, torch::kDouble);
    class_weight = torch::rand({classes}, torch::kDouble);
  }

  static Tensor own(const Tensor& whole) {
    const int64_t ends[] = {3, 3, 4, 12};
    const int64_t begin = ranks::rank() == 0 ? 0 : ends[ranks::rank() - 1];
    return whole.narrow(0, begin, (ranks::rank() == ranks::size() - 1 ? 12 : ends[ranks::rank()]) - begin);
  }
};

Tensor sum_of_ranks(const Tensor& own) {
  std::vector<Tensor> values{own.detach().clone()};
  group()->allreduce(values)->wait();
  return values[0];
}

/// The gradient of the whole batch's logits, each row from the rank that has it.
Tensor gradient_of_ranks(const Batch& batch, const ReconstructionLossOptions& own_options) {
  const Tensor leaf_of_all = leaf(batch.logits);
  const Tensor loss = compute_reconstruction_loss(Batch::own(leaf_of_all), Batch::own(batch.targets), own_options);
  return sum_of_ranks(gradient(loss, leaf_of_all));
}

/// With these options, whose token weight is that of the whole batch.
void check_batch(const Batch& batch, const ReconstructionLossOptions& options) {
  const Tensor whole = leaf(batch.logits);
  const Tensor expected = compute_reconstruction_loss(whole, batch.targets, options);
  auto own_options = options;
  if (options.token_weight().defined()) own_options.token_weight(Batch::own(options.token_weight()));
  own_options.normalizer(count_across_ranks(Batch::own(batch.targets), group(), own_options));
  const Tensor part = compute_reconstruction_loss(Batch::own(batch.logits), Batch::own(batch.targets), own_options);
  CHECK(difference(sum_of_ranks(part), expected, relative) == "");
  CHECK(difference(gradient_of_ranks(batch, own_options), gradient(expected, whole), relative, 1e-2) == "");
}

}  // namespace

TEST_CASE("Losses and gradients of ranks add up to those of the whole batch", "[batch][gradient]") {
  Batch batch;
  check_batch(batch, ReconstructionLossOptions());
  check_batch(batch, ReconstructionLossOptions().label_smoothing(0.1).z_loss(0.01).softcap(5));
  check_batch(batch, ReconstructionLossOptions().token_weight(batch.token_weight).z_loss(0.01));
  check_batch(batch, ReconstructionLossOptions().weight(batch.class_weight).label_smoothing(0.2));
  check_batch(batch, ReconstructionLossOptions().weight(batch.class_weight).token_weight(batch.token_weight));
  for (const int64_t ignored : {int64_t{-100}, int64_t{3}}) {
    Batch padded;
    padded.targets.masked_fill_(torch::arange(12) < 3, ignored);  // rank 0 has none that counts
    check_batch(padded, ReconstructionLossOptions().ignore_index(ignored));
    padded.targets.fill_(ignored);  // nobody has: the loss is 0
    check_batch(padded, ReconstructionLossOptions().ignore_index(ignored));
  }
}

TEST_CASE("The count is the weight of all positions that count on any rank", "[batch]") {
  const auto targets = tensor(std::vector<int64_t>{0, 2, -100, 1}, {2, 2});
  const double many = ranks::size();
  CHECK(count_across_ranks(targets, group()).item<double>() == 3 * many);
  CHECK(count_across_ranks(targets.to(torch::kInt), group(), ReconstructionLossOptions().ignore_index(2))
            .item<double>() == 3 * many);  // -100 is the loss's to refuse
  ReconstructionLossOptions options;
  options.token_weight(tensor(std::vector<double>{0.5, 2, 4, 0}, {2, 2}))
      .weight(tensor(std::vector<double>{1, 8, 0.25}, {3}));
  CHECK(count_across_ranks(targets, group(), options).item<double>() == (0.5 * 1 + 2 * 0.25) * many);
  CHECK(count_across_ranks(torch::full({2, 3}, 1 / 3.0), group()).item<double>() == 2 * many);  // class probabilities
  CHECK(count_across_ranks(torch::empty({0}, torch::kLong), group()).item<double>() == 0);

  const Tensor count = count_across_ranks(targets, group());
  CHECK(count.dim() == 0);
  CHECK(count.scalar_type() == torch::kDouble);
  CHECK_FALSE(count.requires_grad());
}

TEST_CASE("A count is one message of one number", "[batch]") {
  ranks::WatchedGroup watched;
  count_across_ranks(torch::zeros({100}, torch::kLong), &watched);
  CHECK(watched.bytes == std::vector<size_t>{8});
}

TEST_CASE("Metrics of ranks add up to those of the whole batch", "[batch][metrics]") {
  const Batch batch;
  auto options = VAELossOptions().latent_dim(latent_dim).beta_kl(0.5).free_bits(0.3).accuracy(true);
  options.kl_of_each_bit(true).reconstruction(
      ReconstructionLossOptions(options.reconstruction()).z_loss(0.01).label_smoothing(0.1));
  const auto whole = compute_vae_loss(batch.logits, batch.targets, batch.z_logits, options).metrics;
  const auto own =
      compute_vae_loss(Batch::own(batch.logits), Batch::own(batch.targets), Batch::own(batch.z_logits), options)
          .metrics;
  ranks::WatchedGroup watched;
  const auto sum = sum_across_ranks(own, &watched);
  CHECK(watched.bytes == std::vector<size_t>{64 * 8});
  REQUIRE(sum.size() == whole.size());
  for (const auto& [name, value] : whole) {
    INFO(name);
    CHECK_THAT(sum.at(name), Catch::Matchers::WithinRel(value, 1e-13) || Catch::Matchers::WithinAbs(value, 1e-15));
  }

  const auto hinged = VAELossOptions().latent_dim(latent_dim).free_bits(0.3);
  const auto mean_hinge = [&](const auto& select) {
    return compute_vae_loss<BatchMean>(select(batch.logits), select(batch.targets), select(batch.z_logits), hinged)
        .metrics;
  };
  const double expected = mean_hinge([](const Tensor& values) { return values; }).at("loss/kl");
  CHECK_THAT(sum_across_ranks(mean_hinge(Batch::own), group()).at("loss/kl"),
             Catch::Matchers::WithinRel(expected, 1e-13));
}

TEST_CASE("Ranks without metrics count as none", "[batch][metrics]") {
  const Batch batch;
  const auto options = VAELossOptions().latent_dim(latent_dim);
  const auto metrics = compute_vae_loss(batch.logits, batch.targets, batch.z_logits, options).metrics;
  const auto sum = sum_across_ranks(ranks::rank() == 0 ? metrics : LossMetrics(), group());
  for (const auto& [name, value] : metrics) CHECK_THAT(sum.at(name), Catch::Matchers::WithinRel(value, 1e-15));
  CHECK(sum_across_ranks(LossMetrics(), group()).at("loss/total") == 0);
}

TEST_CASE("Metrics of many latent bits take a second message", "[batch][metrics]") {
  const Batch batch;
  const auto metrics_of = [&](int64_t bits) {
    return compute_vae_loss(batch.logits, batch.targets, torch::ones({12, bits}, torch::kDouble),
                            VAELossOptions().latent_dim(bits))
        .metrics;
  };
  const auto messages_of = [&](const LossMetrics& own, LossMetrics& sum) {
    ranks::WatchedGroup watched;
    sum = sum_across_ranks(own, &watched);
    return watched.bytes;
  };
  LossMetrics sum;
  CHECK(messages_of(metrics_of(45), sum) == std::vector<size_t>{64 * 8});
  CHECK(messages_of(metrics_of(46), sum) == std::vector<size_t>{64 * 8, 8});
  const auto many = metrics_of(100);
  CHECK(messages_of(many, sum) == std::vector<size_t>{64 * 8, 55 * 8});
  CHECK_THAT(sum.at("latent/kl_bits"), Catch::Matchers::WithinRel(many.at("latent/kl_bits"), 1e-13));

  // A rank without metrics cannot know how many the others have.
  CHECK(messages_of(ranks::rank() == 0 ? many : LossMetrics(), sum).size() == 2);
  for (const auto& [name, value] : many) CHECK_THAT(sum.at(name), Catch::Matchers::WithinRel(value, 1e-13));
  if (ranks::size() == 1) return;
  const auto few = metrics_of(5);
  const auto error = error_of([&] { sum_across_ranks(ranks::rank() == 0 ? many : few, group()); });
  CHECK(error.find("sum_across_ranks: metrics must have one latent_dim") == 0);
}

TEST_CASE("What one rank refuses or has otherwise is an error on every rank", "[batch][failure]") {
  if (ranks::size() == 1) return;
  const bool is_first = ranks::rank() == 0;
  const Batch batch;
  const auto targets = is_first ? Tensor() : batch.targets;
  const auto count_error = error_of([&] { count_across_ranks(targets, group()); });
  CHECK(count_error.find(is_first ? "targets must be a defined tensor" : "got a refusal from another rank") !=
        std::string::npos);

  ReconstructionLossOptions weighted;
  weighted.weight(batch.class_weight);
  const auto outside = is_first ? torch::full({12}, classes) : batch.targets;
  const auto range_error = error_of([&] { count_across_ranks(outside, group(), weighted); });
  CHECK(range_error.find(is_first ? "targets must lie in [0, 7)" : "got a refusal from another rank") !=
        std::string::npos);

  const auto metrics_of = [&](int64_t bits, bool accuracy) {
    const auto options = VAELossOptions().latent_dim(bits).accuracy(accuracy);
    return compute_vae_loss(batch.logits, batch.targets, batch.z_logits.narrow(1, 0, bits), options).metrics;
  };
  for (const bool has_other_size : {true, false}) {
    const auto metrics = is_first ? metrics_of(has_other_size ? 4 : 5, !has_other_size) : metrics_of(5, false);
    CHECK(error_of([&] { sum_across_ranks(metrics, group()); }).find("sum_across_ranks: metrics must have one") == 0);
  }
  CHECK(count_across_ranks(batch.targets, group()).item<double>() == 12.0 * ranks::size());  // and the group goes on
}
