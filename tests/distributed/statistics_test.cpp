// The statistics of every token over a vocabulary that is split among ranks: those of all columns, on every rank.
#include "free_transformer/distributed.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"
#include "problem.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
using ranks::Columns;
using ranks::group;
using ranks::largest_of;
using ranks::padded;
using ranks::Problem;

/// Empty if all are the same but for rounding: `bound` times the largest number of their kind, or 1. Where a class that
/// is not the target has nearly all of the probability, 1 is taken from a sum near 1, there and here.
std::string difference_of_statistics(const TokenStatistics& found, const TokenStatistics& expected, double bound) {
  const auto compare = [&](const char* name, const Tensor& actual, const Tensor& exact) {
    if (actual.sizes() != exact.sizes()) return std::string(name) + " has another shape";
    const auto text = difference(actual, exact, bound, std::max(1.0, largest_of(exact)));
    return text.empty() ? text : std::string(name) + ": " + text;
  };
  for (const auto& text :
       {compare("loss", found.loss, expected.loss), compare("log_sum_exp", found.log_sum_exp, expected.log_sum_exp),
        compare("target_log_probability", found.target_log_probability, expected.target_log_probability),
        compare("entropy", found.entropy, expected.entropy)}) {
    if (!text.empty()) return text;
  }
  if (!torch::equal(found.prediction, expected.prediction)) return "another prediction";
  return torch::equal(found.hit, expected.hit) ? "" : "another hit";
}

std::string difference_from_dense(const Tensor& logits, const Tensor& targets, double bound = ranks::relative) {
  const VocabParallelLogits<> shard(Columns(logits.size(-1)).of(logits), group(), logits.size(-1));
  return difference_of_statistics(compute_token_statistics(shard, targets),
                                  compute_token_statistics(logits.to(torch::kDouble), targets), bound);
}

}  // namespace

TEST_CASE("Statistics over a split vocabulary are those of all columns", "[statistics]") {
  for (uint64_t seed = 0; seed < 80; ++seed) {
    const Problem problem(seed);
    INFO("seed " << seed << ", logits " << problem.logits.sizes() << ", rank " << ranks::rank());
    const auto found = compute_token_statistics(
        VocabParallelLogits(problem.shard(), group(), problem.classes).padded_size(problem.padded_size),
        problem.targets, problem.shard_options());
    const auto expected = compute_token_statistics(problem.logits, problem.targets, problem.options);
    CHECK(difference_of_statistics(found, expected, ranks::relative) == "");
  }
}

TEST_CASE("Statistics of a shard of the head are those of the whole head", "[statistics][linear]") {
  torch::manual_seed(7);
  constexpr int64_t classes = 29, columns = 32;
  const Columns own(columns);
  const Tensor hidden = torch::randn({2, 5, 6}, torch::kDouble).requires_grad_(),
               weight = torch::randn({classes, 6}, torch::kDouble), bias = torch::randn({classes}, torch::kDouble);
  const Tensor targets = torch::randint(classes, {2, 5}, torch::kLong).index_fill_(1, torch::tensor({3}), -100);
  const LinearLogits shard(hidden, own.of(padded(weight, columns, not_a_number, 0), 0),
                           own.of(padded(bias, columns, not_a_number)));
  const auto found =
      compute_token_statistics(VocabParallelLogits(shard, group(), classes).padded_size(columns), targets);
  const auto expected = compute_token_statistics(LinearLogits(hidden, weight, bias), targets);
  CHECK(difference_of_statistics(found, expected, ranks::relative) == "");
  CHECK_FALSE(found.loss.requires_grad());
}

TEST_CASE("The prediction over a split vocabulary is the lowest of the most likely classes", "[statistics]") {
  const Tensor ties =
      torch::tensor({{1, 1, 1, 1, 1, 1}, {0, 2, 0, 2, 0, 2}, {0, 0, 0, 0, 3, 3}, {4, 0, 0, 0, 0, 4}}, torch::kDouble);
  const Tensor targets = torch::tensor({5, 3, 5, 0}, torch::kLong);
  const VocabParallelLogits<> shard(Columns(6).of(ties), group(), 6);
  const auto found = compute_token_statistics(shard, targets);
  CHECK(torch::equal(found.prediction, torch::tensor({0, 1, 4, 0}, torch::kLong)));
  CHECK(torch::equal(found.hit, torch::tensor({false, false, false, true})));
}

TEST_CASE("Statistics over a split vocabulary of peaked, masked and far logits are those of all columns",
          "[statistics]") {
  const Tensor targets = torch::tensor({0, 5, 9, 11}, torch::kLong);
  Tensor masked = eighths({4, 12});
  masked.narrow(1, 1, 4).fill_(-std::numeric_limits<double>::infinity());
  masked[2].narrow(0, 0, 6).fill_(-std::numeric_limits<double>::infinity());  // a whole shard
  CHECK(difference_from_dense(masked, targets) == "");
  CHECK(difference_from_dense(eighths({4, 12}) + tensor(std::vector<double>{-1e4, 0, 3e3, 1e4}, {4, 1}), targets,
                              1e-11) == "");  // lse itself is rounded at 1e4
  Tensor spoiled = eighths({4, 12});
  spoiled[1][7] = not_a_number;
  const auto found = compute_token_statistics(VocabParallelLogits(Columns(12).of(spoiled), group(), 12), targets);
  CHECK(found.loss.isnan().equal(torch::tensor({false, true, false, false})));
  CHECK(found.entropy.isnan().equal(torch::tensor({false, true, false, false})));

  // The entropy of a confident model: log(1 + n e^-g) + g n e^-g / (1 + n e^-g), for n classes below one by g.
  for (const double gap : {20.0, 60.0, 95.0}) {
    const double odds = 11 * std::exp(-gap), exact = std::log1p(odds) + gap * odds / (1 + odds);
    const Tensor confident = torch::eye(12, torch::kDouble) * gap + 1024;
    const auto own =
        compute_token_statistics(VocabParallelLogits(Columns(12).of(confident), group(), 12), torch::arange(12));
    CHECK(difference(own.entropy, torch::full({12}, exact, torch::kDouble), 1e-12) == "");
  }
}

TEST_CASE("Statistics over a split vocabulary come in the type of arithmetic", "[statistics]") {
  for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    const Tensor logits = eighths({5, 12}, type);
    const VocabParallelLogits<> shard(Columns(12).of(logits), group(), 12);
    CHECK(compute_token_statistics(shard, torch::arange(5)).entropy.scalar_type() == torch::kFloat);
    // Sums of at most twelve terms in float32, each off by eight roundings at most.
    CHECK(difference_from_dense(logits, torch::arange(5), 20 * epsilon(torch::kFloat)) == "");
  }
}

TEST_CASE("Statistics are two messages, and no gradient is asked for", "[statistics][messages]") {
  ranks::WatchedGroup watched;
  const Tensor shard = leaf(Columns(12).of(eighths({5, 12})));
  const auto statistics = compute_token_statistics(VocabParallelLogits(shard, &watched, 12), torch::arange(5));
  CHECK(watched.bytes == std::vector<size_t>{37 * 8, 5 * 5 * 8});
  CHECK(watched.gathers == 1);
  CHECK_FALSE(statistics.loss.requires_grad());
}

TEST_CASE("Statistics on one rank beside a loss on the others, and what one refuses, are errors on every rank",
          "[statistics][failure]") {
  if (ranks::size() == 1) return;
  const bool is_first = ranks::rank() == 0;
  const VocabParallelLogits<> shard(Columns(12).of(eighths({5, 12})), group(), 12);
  const auto other = error_of([&] {
    if (is_first) return static_cast<void>(compute_token_statistics(shard, torch::arange(5)));
    compute_reconstruction_loss(shard, torch::arange(5));
  });
  CHECK(other.find("accuracy (1, or 2 for statistics) must be the same on all ranks") != std::string::npos);
  const auto outside = error_of([&] { compute_token_statistics(shard, torch::full({5}, is_first ? 12 : 1)); });
  CHECK(outside.find("compute_token_statistics: ") == 0);
  CHECK(outside.find(is_first ? "targets must lie in [0, 12)" : "got a refusal from rank 0") != std::string::npos);
  CHECK(error_of([&] { compute_token_statistics(shard, torch::arange(5)); }) == "");  // all are in step
}
