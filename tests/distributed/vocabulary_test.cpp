// A vocabulary that is split among ranks: the loss, the gradient and the figures of all columns together.
#include "../unit/numeric.hpp"
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
using ranks::relative;

constexpr double infinity = std::numeric_limits<double>::infinity();

/// Empty if a shard's loss and gradient are those of all columns.
std::string difference_from_dense(const Tensor& logits, const Tensor& shard, const Tensor& targets, int64_t classes,
                                  int64_t padded_size, const ReconstructionLossOptions& options,
                                  const ReconstructionLossOptions& shard_options, const Tensor& upstream = {},
                                  double bound = relative) {
  const Tensor all = leaf(logits), own = leaf(shard);
  const auto expected = reconstruct(all, targets, options);
  const auto found =
      reconstruct(VocabParallelLogits(own, group(), classes).padded_size(padded_size), targets, shard_options);
  if (found.loss.sizes() != expected.loss.sizes()) return "another shape of the loss";
  auto text = difference(found.loss, expected.loss, bound, largest_of(expected.loss.detach()));
  if (!text.empty()) return "loss: " + text;
  text = difference(found.sums, expected.sums, bound, 1);
  if (!text.empty()) return "sums: " + text;
  const Tensor whole = padded(gradient(expected.loss, all, upstream), padded_size, 0);
  text = difference(gradient(found.loss, own, upstream), Columns(padded_size).of(whole), bound, largest_of(whole));
  return text.empty() ? text : "gradient: " + text;
}

std::string difference_from_dense(const Tensor& logits, const Tensor& targets,
                                  const ReconstructionLossOptions& options = {}, double bound = relative) {
  const int64_t classes = logits.size(-1);
  auto of_shard = options;
  of_shard.weight(Columns(classes).of(options.weight()));
  return difference_from_dense(logits, Columns(classes).of(logits), targets, classes, classes, options, of_shard, {},
                               bound);
}

VocabParallelLogits<> shard_of(const Tensor& logits, const Tensor& leaf_of_shard = {}) {
  const Tensor own = leaf_of_shard.defined() ? leaf_of_shard : Columns(logits.size(-1)).of(logits);
  return {own, group(), logits.size(-1)};
}

}  // namespace

TEST_CASE("The loss and its gradient over a split vocabulary are those of all columns", "[vocabulary][gradient]") {
  for (uint64_t seed = 0; seed < 150; ++seed) {
    const Problem problem(seed);
    INFO("seed " << seed << ", logits " << problem.logits.sizes() << ", columns " << problem.padded_size << ", rank "
                 << ranks::rank());
    CHECK(difference_from_dense(problem.logits, problem.shard(), problem.targets, problem.classes, problem.padded_size,
                                problem.options, problem.shard_options(), problem.upstream) == "");
  }
}

TEST_CASE("Fewer classes than ranks leave some ranks without a column", "[vocabulary]") {
  const Tensor targets = tensor(std::vector<int64_t>{0, 1, 1}, {3});
  CHECK(difference_from_dense(eighths({3, 2}), targets, ReconstructionLossOptions().label_smoothing(0.1)) == "");
  CHECK(difference_from_dense(eighths({3, 1}), torch::zeros({3}, torch::kLong),
                              ReconstructionLossOptions().accuracy(true)) == "");
}

TEST_CASE("The number of ranks changes a float32 loss by its last digits alone", "[vocabulary]") {
  torch::manual_seed(2);
  constexpr int64_t positions = 257, classes = 1031;  // no number of ranks divides it
  const Tensor targets =
      torch::randint(classes, {positions}, torch::kLong).masked_fill(torch::rand({positions}) < 0.2, -100);
  const Tensor token_weight = torch::rand({positions}), class_weight = torch::rand({classes});
  const auto smoothed = ReconstructionLossOptions().label_smoothing(0.1).z_loss(1e-3);
  const std::vector<ReconstructionLossOptions> choices{
      ReconstructionLossOptions(),
      smoothed,
      ReconstructionLossOptions(smoothed).weight(class_weight).token_weight(token_weight),
      ReconstructionLossOptions().weight(class_weight),
      ReconstructionLossOptions().softcap(8),
      ReconstructionLossOptions().normalizer(1000).accuracy(true),
      ReconstructionLossOptions().reduction(torch::kSum).token_weight(token_weight),
      ReconstructionLossOptions(smoothed).reduction(torch::kNone).weight(class_weight),
      ReconstructionLossOptions().reduction(torch::kNone)};
  for (const double scale : {0.1, 3.0, 30.0}) {
    for (const int64_t columns : {classes, classes + 9}) {
      const Tensor logits = torch::randn({positions, classes}) * scale;
      const Tensor all = padded(logits, columns, not_a_number);
      for (size_t choice = 0; choice < choices.size(); ++choice) {
        INFO("scale " << scale << ", columns " << columns << ", options " << choice);
        auto options = choices[choice];
        const Tensor dense = compute_reconstruction_loss(logits, targets, options);
        const Tensor weight = padded(options.weight(), columns, 1);
        ranks::Alone alone;
        const Tensor of_one = compute_reconstruction_loss(
            VocabParallelLogits(all, &alone, classes).padded_size(columns), targets, options.weight(weight));
        const Columns own(columns);
        const Tensor found =
            compute_reconstruction_loss(VocabParallelLogits(own.of(all), group(), classes).padded_size(columns),
                                        targets, options.weight(own.of(weight)));
        REQUIRE(found.scalar_type() == torch::kFloat);
        const auto furthest = [&](const Tensor& other) {
          const Tensor exact = other.to(torch::kDouble), off = (found - exact).abs() / exact.abs();
          return off.masked_fill(exact == 0, 0).max().item<double>() +
                 (found - exact).masked_select(exact == 0).abs().sum().item<double>();
        };
        CHECK(furthest(of_one) <= 2e-6);
        CHECK(furthest(dense) <= 2e-6);
      }
    }
  }
}

TEST_CASE("Half types over a split vocabulary are computed in float32", "[vocabulary][gradient]") {
  torch::manual_seed(3);
  const Tensor targets = torch::randint(50, {20}, torch::kLong);
  for (const auto type : {torch::kHalf, torch::kBFloat16}) {
    const Tensor logits = (torch::randn({20, 50}, torch::kDouble) * 3).to(type);
    const Tensor exact = leaf(logits.to(torch::kDouble)), own = leaf(Columns(50).of(logits));
    const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), targets);
    CHECK(loss.scalar_type() == torch::kFloat);
    const Tensor expected = compute_reconstruction_loss(exact, targets);
    CHECK(difference(loss, expected, 1e-6) == "");
    const Tensor found = gradient(loss, own);
    CHECK(found.scalar_type() == type);
    CHECK(difference(found, Columns(50).of(gradient(expected, exact)), 1e-5) == "");
  }
}

TEST_CASE("A confident model keeps relative accuracy over a split vocabulary", "[vocabulary][gradient]") {
  constexpr int64_t classes = 12;
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    for (const double gap : {20.0, 60.0, 95.0}) {
      for (const double offset : {0.0, 1024.0}) {
        INFO(type << ", gap " << gap << ", offset " << offset);
        const Tensor targets = torch::arange(classes);
        const Tensor logits = (torch::eye(classes, torch::kDouble) * gap + offset).to(type),
                     own = leaf(Columns(classes).of(logits));
        const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), targets,
                                                        ReconstructionLossOptions().reduction(torch::kSum));
        const double odds = (classes - 1) * std::exp(-gap);
        // c is at most 1770 from a logit, whose difference is rounded by 2^-43; eight such roundings at most.
        const double bound = type == torch::kDouble ? 1e-12 : 4e-7;
        CHECK_THAT(loss.item<double>(), Catch::Matchers::WithinRel(classes * std::log1p(odds), bound));
        const Tensor found = gradient(loss, own),
                     whole = torch::full({classes, classes}, std::exp(-gap) / (1 + odds), torch::kDouble);
        whole.fill_diagonal_(-odds / (1 + odds));
        CHECK(difference(found, Columns(classes).of(whole), bound) == "");
      }
    }
  }
}

TEST_CASE("Extreme logits over a split vocabulary are those of all columns", "[vocabulary]") {
  const Tensor targets = tensor(std::vector<int64_t>{0, 5, 9, 11}, {4});
  const auto smoothed = ReconstructionLossOptions().z_loss(0.01).accuracy(true);
  for (const auto& options : {ReconstructionLossOptions(), smoothed}) {
    const Tensor far_apart =
        eighths({4, 12}) + tensor(std::vector<double>{-1e4, 0, 3e3, 1e4}, {4, 1});  // no reference fits them all
    // lse^2 of rows at 1e4 has a gradient of 2e4 z; both are rounded at 1e4, by 2e-12.
    CHECK(difference_from_dense(far_apart, targets, options, 1e-11) == "");
    for (const double low : {-infinity, -1e9, -700.0}) {
      INFO("low " << low);
      Tensor masked = eighths({4, 12});
      masked.narrow(1, 1, 4).fill_(low);
      CHECK(difference_from_dense(masked, targets, options) == "");
      masked = eighths({4, 12});
      masked.select(0, 1).narrow(0, 6, 6).fill_(low);  // a whole shard, for one row
      masked.select(0, 2).narrow(0, 0, 6).fill_(low);
      CHECK(difference_from_dense(masked, targets, options) == "");
    }
  }
}

TEST_CASE("A shard that is masked as a whole has no gradient, wherever the other logits lie",
          "[vocabulary][gradient]") {
  const auto smoothed = ReconstructionLossOptions().z_loss(0.01).softcap(500);
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const double offset : {-1e4, -100.0, 0.0, 100.0}) {
      for (const auto& options : {ReconstructionLossOptions(), smoothed}) {
        if (offset == -1e4 && options.softcap() > 0) continue;  // where a cap has no slope
        INFO(type << ", offset " << offset << ", softcap " << options.softcap());
        Tensor masked = (eighths({3, 12}) / 4 + offset).to(type);
        masked.narrow(1, 4, 8).fill_(-infinity);  // of two ranks the second, of three or four two
        masked[1][5] = offset;                    // in one row one of them has a class
        // To a coefficient's error come the roundings of an lse near the offset, in the type of arithmetic.
        const double bound = type == torch::kDouble ? 1e-10 : type == torch::kFloat ? 2e-5 : 2e-2;
        CHECK(difference_from_dense(masked, tensor(std::vector<int64_t>{0, 5, 3}, {3}), options, bound) == "");
      }
    }
  }
}

TEST_CASE("A bias that masks a shard of the head leaves the gradient of hidden", "[vocabulary][linear][gradient]") {
  const Tensor weight = eighths({12, 3}, torch::kFloat) / 16, targets = tensor(std::vector<int64_t>{0, 3}, {2});
  Tensor bias = torch::full({12}, -100.0F);
  bias.narrow(0, 4, 8).fill_(-infinity);
  const Tensor hidden = leaf(eighths({2, 3}, torch::kFloat, 2)), own = leaf(hidden);
  const Tensor expected = gradient(compute_reconstruction_loss(LinearLogits(hidden, weight, bias), targets), hidden);
  const Columns columns(12);
  const LinearLogits head(own, columns.of(weight, 0), columns.of(bias, 0));
  const Tensor loss = compute_reconstruction_loss(VocabParallelLogits(head, group(), 12), targets);
  CHECK(difference(gradient(loss, own), expected, 2e-5, largest_of(expected)) == "");
}

TEST_CASE("A number that all logits of a split vocabulary have in common changes no digit", "[vocabulary][gradient]") {
  const Tensor targets = tensor(std::vector<int64_t>{0, 5, 11}, {3});
  for (const double smoothing : {0.0, 0.1}) {
    const auto options = ReconstructionLossOptions().label_smoothing(smoothing);
    const Tensor logits = leaf(eighths({3, 12}));  // whole multiples of a step at 1e12, too
    const Tensor expected = compute_reconstruction_loss(logits, targets, options);
    const Tensor slope = Columns(12).of(gradient(expected, logits));
    for (const double offset : {1024.0, -1e9, 1e12}) {
      INFO("smoothing " << smoothing << ", offset " << offset);
      const Tensor own = leaf(Columns(12).of(logits.detach() + offset));
      const Tensor loss = compute_reconstruction_loss(VocabParallelLogits(own, group(), 12), targets, options);
      CHECK(difference(loss, expected, relative, 1) == "");
      CHECK(difference(gradient(loss, own), slope, relative, 1) == "");
    }
  }
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const Tensor own = leaf(Columns(12).of(torch::full({3, 12}, 1e30, type)));
    const Tensor loss = compute_reconstruction_loss(VocabParallelLogits(own, group(), 12), targets);
    const Tensor expected = torch::full({3, 12}, 1.0 / 36, torch::kDouble).scatter(1, targets.unsqueeze(1), -11.0 / 36);
    CHECK(difference(loss, {std::log(12.0)}, 8 * epsilon(type)) == "");
    CHECK(difference(gradient(loss, own), Columns(12).of(expected), 8 * epsilon(type)) == "");
  }
}

TEST_CASE("Losses over a split vocabulary may be changed in place", "[vocabulary][graph]") {
  const Tensor logits = eighths({2, 3, 12}), targets = torch::arange(6).reshape({2, 3});
  const auto options = ReconstructionLossOptions().reduction(torch::kNone);
  const Tensor own = leaf(Columns(12).of(logits));
  const Tensor expected = gradient(compute_reconstruction_loss(shard_of(logits, own), targets, options).sum(), own);
  const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), targets, options);
  loss.mul_(2);
  CHECK(same_bits(gradient(loss.sum(), own), expected * 2));
}

TEST_CASE("A shard that inplace has overwritten with a gradient is refused", "[vocabulary][errors]") {
  const Tensor logits = eighths({6, 12}, torch::kFloat), shard = leaf(Columns(12).of(logits)) * 1;
  compute_reconstruction_loss(shard, torch::zeros({6}, torch::kLong), ReconstructionLossOptions().inplace(true));
  const auto error = error_of([&] { compute_reconstruction_loss(shard_of(logits, shard.detach()), torch::arange(6)); });
  CHECK(error.find("logits must not be used again after inplace") != std::string::npos);
}

TEST_CASE("A NaN or an infinity over a split vocabulary shows in its row's loss alone", "[vocabulary]") {
  for (const double bad : {not_a_number, infinity}) {
    Tensor logits = eighths({3, 12});
    logits[1][7] = bad;
    const auto options = ReconstructionLossOptions().reduction(torch::kNone);
    const auto loss =
        values(compute_reconstruction_loss(shard_of(logits), tensor(std::vector<int64_t>{1, 2, 3}, {3}), options));
    CHECK_FALSE(std::isnan(loss[0]));
    CHECK(std::isnan(loss[1]));
    CHECK_FALSE(std::isnan(loss[2]));
  }
  const Tensor first = torch::zeros({1}, torch::kLong), ones = Columns(12).of(torch::ones({12})),
               none = torch::zeros_like(ones);
  for (const double smoothing : {0.0, 0.25, 1.0}) {
    for (const double bad : {-infinity, infinity, not_a_number}) {
      INFO("smoothing " << smoothing << ", all logits " << bad);
      const Tensor impossible = torch::full({1, 12}, bad, torch::kDouble);
      const auto loss = [&](const Tensor& weight) {
        const auto options =
            ReconstructionLossOptions().label_smoothing(smoothing).weight(weight).reduction(torch::kSum);
        return compute_reconstruction_loss(shard_of(impossible), first, options).item<double>();
      };
      CHECK(std::isnan(loss({})));
      CHECK(std::isnan(loss(ones)));
      CHECK(loss(none) == 0);
    }
  }
}

TEST_CASE("What does not count has no loss and no gradient on any rank", "[vocabulary]") {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    Tensor logits = eighths({3, 12}, type);
    logits[1].fill_(not_a_number);
    const Tensor own = leaf(Columns(12).of(logits));
    const Tensor targets = tensor(std::vector<int64_t>{1, 4, 3}, {3});
    const auto options = ReconstructionLossOptions().ignore_index(4).z_loss(0.1).label_smoothing(0.1).accuracy(true);
    const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), targets, options);
    CHECK_FALSE(std::isnan(loss.item<double>()));
    const Tensor found = gradient(loss, own);
    CHECK(torch::equal(found[1], torch::zeros_like(found[1])));
    CHECK_FALSE(found.isnan().any().item<bool>());

    const Tensor nothing = compute_reconstruction_loss(shard_of(logits, own), torch::full({3}, 4), options);
    CHECK(nothing.item<double>() == 0);
    CHECK(torch::equal(gradient(nothing, own), torch::zeros_like(own)));
  }
}

TEST_CASE("A shard of the fused head has the loss and the gradients of the whole head",
          "[vocabulary][linear][gradient]") {
  for (uint64_t seed = 500; seed < 580; ++seed) {
    const Problem problem(seed);
    const int64_t width = 1 + static_cast<int64_t>(seed % 9), classes = problem.classes;
    const int64_t columns = std::max<int64_t>(problem.padded_size, ranks::size());
    INFO("seed " << seed << ", logits " << problem.logits.sizes() << ", columns " << columns << ", rank "
                 << ranks::rank());
    auto shape = problem.positions;
    shape.push_back(width);
    const Tensor hidden = leaf(torch::rand(shape, torch::kDouble) * 2 - 1);
    const Tensor weight = leaf(torch::rand({classes, width}, torch::kDouble) - 0.5);
    const Tensor bias = seed % 2 ? leaf(torch::rand({classes}, torch::kDouble) - 0.5) : Tensor();
    std::vector<Tensor> inputs{hidden, weight};
    if (bias.defined()) inputs.push_back(bias);
    const Tensor expected =
        compute_reconstruction_loss(LinearLogits(hidden, weight, bias), problem.targets, problem.options);
    const auto whole = torch::autograd::grad({expected}, inputs, {problem.upstream});

    const Columns own(columns);
    const Tensor own_hidden = leaf(hidden);
    std::vector<Tensor> own_inputs{own_hidden, leaf(own.of(padded(weight.detach(), columns, not_a_number, 0), 0))};
    if (bias.defined()) own_inputs.push_back(leaf(own.of(padded(bias.detach(), columns, not_a_number, 0), 0)));
    LinearLogits head(own_hidden, own_inputs[1], bias.defined() ? own_inputs[2] : Tensor());
    head.block_bytes(static_cast<int64_t>(seed % 3) * 3 * 8 * columns / ranks::size());  // one block, or several
    auto options = problem.options;
    options.weight(own.of(padded(problem.options.weight(), columns, 1)));
    const Tensor found = compute_reconstruction_loss(VocabParallelLogits(head, group(), classes).padded_size(columns),
                                                     problem.targets, options);
    CHECK(difference(found, expected, 2 * relative, largest_of(expected.detach())) == "");
    const auto parts = torch::autograd::grad({found}, own_inputs, {problem.upstream});
    for (size_t index = 0; index < inputs.size(); ++index) {
      INFO("input " << index);
      const Tensor all = index == 0 ? whole[0] : own.of(padded(whole[index], columns, 0, 0), 0);
      // To linear_logits_test.cpp's bound of the products comes that of the rows.
      CHECK(difference(parts[index], all, 1e-11, largest_of(whole[index])) == "");
    }
  }
}

TEST_CASE("A half-type shard of the head has the gradients of float32, rounded", "[vocabulary][linear][gradient]") {
  torch::manual_seed(4);
  const Tensor targets = torch::randint(40, {9}, torch::kLong).index_fill_(0, torch::tensor({4}), -100);
  Tensor hidden = torch::randn({9, 6}).to(torch::kBFloat16), weight = torch::randn({40, 6}).to(torch::kBFloat16);
  hidden[4].fill_(not_a_number);  // not counted, so nobody's gradient
  Tensor exact_hidden = hidden.to(torch::kDouble).clone();
  exact_hidden[4].zero_();
  const Tensor wide_hidden = leaf(exact_hidden), wide_weight = leaf(weight.to(torch::kDouble));
  const Tensor expected = compute_reconstruction_loss(LinearLogits(wide_hidden, wide_weight), targets);
  const auto whole = torch::autograd::grad({expected}, {wide_hidden, wide_weight});
  const Columns own(44);
  const Tensor own_hidden = leaf(hidden), own_weight = leaf(own.of(padded(weight, 44, 0, 0), 0));
  const Tensor found = compute_reconstruction_loss(
      VocabParallelLogits(LinearLogits(own_hidden, own_weight), group(), 40).padded_size(44), targets);
  CHECK(difference(found, expected, 1e-6) == "");
  const auto parts = torch::autograd::grad({found}, {own_hidden, own_weight});
  CHECK(parts[1].scalar_type() == torch::kBFloat16);
  CHECK(difference(parts[0], whole[0], 1e-5, largest_of(whole[0])) == "");
  CHECK(difference(parts[1], own.of(padded(whole[1], 44, 0, 0), 0), 1e-5, largest_of(whole[1])) == "");
}

TEST_CASE("Two messages go forward and none goes backward", "[vocabulary][messages]") {
  constexpr int64_t positions = 10, classes = 30;
  constexpr size_t agreement = 37 * 8;
  const Tensor logits = eighths({positions, classes}), targets = torch::arange(positions);
  const Columns own(classes);
  const auto messages = [&](const ReconstructionLossOptions& options, const Tensor& all) {
    ranks::WatchedGroup watched;
    const Tensor shard = leaf(own.of(all));
    compute_reconstruction_loss(VocabParallelLogits(shard, &watched, classes), targets, options).backward();
    return watched;
  };
  const auto plain = messages({}, logits);
  CHECK(plain.bytes == std::vector<size_t>{agreement, 2 * 8 * positions});
  CHECK(plain.gathers == 0);
  auto options = ReconstructionLossOptions().z_loss(0.1).softcap(9).token_weight(torch::ones({positions}));
  CHECK(messages(options, logits).bytes == plain.bytes);
  options.label_smoothing(0.1);
  CHECK(messages(options, logits).bytes[1] == (3 * positions + 1) * 8);
  options.weight(torch::ones({own.end - own.begin}, torch::kDouble));
  CHECK(messages(options, logits).bytes[1] == (4 * positions + 1) * 8);
  options.accuracy(true);
  const auto with_accuracy = messages(options, logits);
  CHECK(with_accuracy.bytes == std::vector<size_t>{agreement, (6 * positions + 1) * 8});
  CHECK(with_accuracy.gathers == 1);
  const Tensor offset = torch::arange(positions, torch::kDouble).unsqueeze(1) * 100;
  const auto far_apart = messages({}, logits + offset);
  CHECK(far_apart.bytes == std::vector<size_t>{agreement, 3 * 8 * positions});
  CHECK(far_apart.gathers == 1);

  ranks::WatchedGroup watched;
  const Tensor hidden = leaf(eighths({positions, 4})), weight = leaf(own.of(eighths({classes, 4}), 0));
  const auto loss =
      compute_reconstruction_loss(VocabParallelLogits(LinearLogits(hidden, weight), &watched, classes), targets);
  CHECK(watched.bytes == plain.bytes);
  loss.backward();
  CHECK(watched.bytes == std::vector<size_t>{agreement, 2 * 8 * positions, 4 * 8 * positions});
}

TEST_CASE("The whole loss over a split vocabulary has the metrics of all columns", "[vocabulary][metrics]") {
  const Tensor logits = eighths({6, 12}), targets = torch::arange(6), z_logits = eighths({6, 4}, torch::kDouble, 2);
  const auto options = VAELossOptions().latent_dim(4).accuracy(true);
  const auto expected = compute_vae_loss(logits, targets, z_logits, options);
  const auto found = compute_vae_loss(shard_of(logits), targets, z_logits, options);
  CHECK(difference(found.loss, expected.loss, relative) == "");
  for (const auto& [name, value] : expected.metrics) {
    INFO(name);
    CHECK_THAT(found.metrics.at(name),
               Catch::Matchers::WithinRel(value, relative) || Catch::Matchers::WithinAbs(value, 1e-15));
  }
}

TEST_CASE("A second backward over a split vocabulary gives the same, a double backward is an error", "[vocabulary]") {
  const Tensor logits = eighths({6, 12}), own = leaf(Columns(12).of(logits));
  const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), torch::arange(6));
  CHECK(same_bits(gradient(loss, own), gradient(loss, own)));
  CHECK(error_of([&] { gradient(loss, own, {}, /*create_graph=*/true); }).find("must not be differentiated twice") !=
        std::string::npos);
}

TEST_CASE("Targets and weights that change after the call do not change the gradient", "[vocabulary]") {
  const Tensor logits = eighths({6, 12}), own = leaf(Columns(12).of(logits)), targets = torch::arange(6);
  const auto options = ReconstructionLossOptions()
                           .token_weight(torch::ones({6}))
                           .label_smoothing(0.1)
                           .weight(torch::ones({own.size(1)}, torch::kDouble));
  const Tensor expected = gradient(compute_reconstruction_loss(shard_of(logits, own), targets, options), own);
  const Tensor loss = compute_reconstruction_loss(shard_of(logits, own), targets, options);
  targets.zero_();
  options.token_weight().zero_();
  options.weight().zero_();
  CHECK(same_bits(gradient(loss, own), expected));
}
