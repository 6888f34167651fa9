// The head fused with the loss: the numbers of dense logits in every block size, in a block of memory.
#include <random>

#include "free_transformer/losses.hpp"
#include "numeric.hpp"
#include "operations.hpp"
#include "peak_memory.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
namespace F = torch::nn::functional;

/// Float64 against dense logits. With D <= 33, |h| <= 1 and |w|, |b| <= 1/2 two orders of summation put a logit at most
///     2 D eps/2 (D/2 + 1) = 2^-52 33 17 = 1.3e-13
/// apart. A coefficient of a logit's gradient is at most
///     u w (1 + 2 z lse) scale <= 2 2 (1 + 0.2 22) 2 = 43
/// and moves by twice that, and a gradient adds up at most 50 of them: 6e-10 in the worst case for each unit of h or w.
/// These tests ask for a hundredth of it.
constexpr double head_relative = 6e-12;

/// A head, and what it is applied to.
struct Head {
  Tensor hidden, weight, bias;  ///< bias may be undefined

  LinearLogits fused(int64_t block_bytes = 0) const {
    return LinearLogits(hidden, weight, bias).block_bytes(block_bytes);
  }
  Tensor dense() const { return torch::linear(hidden, weight, bias); }
  int64_t positions() const { return hidden.numel() / hidden.size(-1); }
  int64_t classes() const { return weight.size(0); }

  std::vector<Tensor> inputs() const {
    std::vector<Tensor> all{hidden, weight};
    if (bias.defined()) all.push_back(bias);
    return all;
  }

  Head leaves(torch::ScalarType type) const {
    const auto as = [&](const Tensor& tensor) { return tensor.defined() ? leaf(tensor.to(type)) : tensor; };
    return {as(hidden), as(weight), as(bias)};
  }
};

Tensor uniform(torch::IntArrayRef shape, double bound, torch::ScalarType type = torch::kDouble) {
  return ((torch::rand(shape, torch::kDouble) * 2 - 1) * bound).to(type);
}

Head random_head(torch::IntArrayRef positions, int64_t width, int64_t classes, bool has_bias,
                 torch::ScalarType type = torch::kDouble) {
  auto shape = positions.vec();
  shape.push_back(width);
  return {leaf(uniform(shape, 1, type)), leaf(uniform({classes, width}, 0.5, type)),
          has_bias ? leaf(uniform({classes}, 0.5, type)) : Tensor()};
}

/// Each class in turn, here and there.
Tensor some_targets(torch::IntArrayRef positions, int64_t classes) {
  return (torch::arange(c10::multiply_integers(positions)) * 7919).remainder(classes).reshape(positions);
}

/// The bytes of so many tokens of float64 or float32 logits.
int64_t bytes_of(int64_t tokens, const Head& head) {
  return tokens * head.classes() * (head.hidden.scalar_type() == torch::kDouble ? 8 : 4);
}

/// The loss and the gradients of all inputs.
template <typename Logits>
std::vector<Tensor> loss_and_gradients(const Logits& logits, const Head& head, const Tensor& targets,
                                       const ReconstructionLossOptions& options = {}, const Tensor& upstream = {}) {
  const Tensor loss = compute_reconstruction_loss(logits, targets, options);
  auto results = torch::autograd::grad({loss}, head.inputs(), {upstream});
  results.insert(results.begin(), loss.detach());
  return results;
}

/// Empty if all results agree; scales with the largest expected value of each, to which all of its terms were added.
std::string difference_of_all(const std::vector<Tensor>& actual, const std::vector<Tensor>& expected, double bound) {
  static const char* const names[] = {"loss", "hidden", "weight", "bias"};
  if (actual.size() != expected.size()) return "another number of results";
  for (size_t index = 0; index < actual.size(); ++index) {
    if (actual[index].sizes() != expected[index].sizes()) return std::string(names[index]) + " has another shape";
    const double largest = expected[index].numel() == 0 ? 0 : expected[index].abs().max().item<double>();
    const auto text = difference(actual[index], expected[index], bound, largest);
    if (!text.empty()) return std::string(names[index]) + ": " + text;
  }
  return {};
}

/// A random problem: its shape, options and upstream gradient all follow from the seed.
struct Problem {
  Head head;
  Tensor targets, upstream;
  ReconstructionLossOptions options;

  explicit Problem(uint64_t seed) : engine(seed) {
    torch::manual_seed(seed);
    std::vector<int64_t> positions(static_cast<size_t>(below(4)));
    for (auto& size : positions) size = 1 + below(positions.size() == 1 ? 50 : positions.size() == 2 ? 7 : 3);
    const int64_t classes = 1 + below(70);
    head = random_head(positions, 1 + below(33), classes, maybe());
    if (maybe()) head.hidden = leaf(head.hidden * 0.01);
    targets = torch::randint(classes, positions, torch::kLong);
    if (maybe()) {
      options.ignore_index(maybe() ? -100 : below(classes));
      targets.masked_fill_(torch::rand(positions) < 0.3, options.ignore_index());
    } else if (maybe()) {
      auto shape = positions;
      shape.push_back(classes);
      targets = torch::rand(shape, torch::kDouble).softmax(-1);
    }
    if (maybe()) options.token_weight(torch::randint(3, positions, torch::kDouble));
    if (maybe()) options.weight(torch::randint(3, {classes}, torch::kDouble));
    if (maybe()) options.label_smoothing(0.125);
    if (maybe()) options.z_loss(0.1);
    if (maybe()) options.softcap(1.5);
    if (maybe()) options.normalizer(7.0);
    const int64_t kind = below(3);
    options.reduction(kind == 0   ? Reduction(torch::kMean)
                      : kind == 1 ? Reduction(torch::kSum)
                                  : Reduction(torch::kNone));
    if (kind == 2 || maybe()) upstream = uniform(kind == 2 ? positions : std::vector<int64_t>{}, 2);
  }

  int64_t below(int64_t bound) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(bound)); }
  bool maybe() { return below(2) == 0; }

  std::mt19937_64 engine;
};

/// How many matrix products the function calls for.
template <typename Function>
int64_t products_of(const Function& function) {
  const auto operations = operations_of(function);
  return std::count_if(operations.begin(), operations.end(), [](const std::string& operation) {
    return operation == "aten::mm" || operation == "aten::addmm" || operation == "aten::addmm_";
  });
}

std::string error(const LinearLogits& logits, const ReconstructionLossOptions& options = {}) {
  return after_name("compute_reconstruction_loss",
                    error_of([&] { compute_reconstruction_loss(logits, torch::zeros({2}, torch::kLong), options); }));
}

}  // namespace

TEST_CASE("A fused head has the loss and the gradients of dense logits, whatever the block", "[linear][gradient]") {
  for (unsigned seed = 0; seed < random_cases(300); ++seed) {
    const Problem problem(seed);
    const Head& head = problem.head;
    INFO("seed " << seed << ", hidden " << head.hidden.sizes() << ", weight " << head.weight.sizes() << ", bias "
                 << head.bias.defined());
    const auto expected = loss_and_gradients(head.dense(), head, problem.targets, problem.options, problem.upstream);
    const int64_t positions = head.positions();
    for (const int64_t tokens : {int64_t{0}, int64_t{1}, int64_t{3}, positions / 2 + 1, positions, 2 * positions + 5}) {
      INFO("tokens of a block: " << tokens);
      const auto found = loss_and_gradients(head.fused(bytes_of(tokens, head)), head, problem.targets, problem.options,
                                            problem.upstream);
      CHECK(difference_of_all(found, expected, head_relative) == "");
    }
    CHECK(difference_of_all(loss_and_gradients(head.fused(/*block_bytes=*/1), head, problem.targets, problem.options,
                                               problem.upstream),
                            expected, head_relative) == "");
  }
}

TEST_CASE("The token statistics and figures of a fused head are those of dense logits", "[linear][metrics]") {
  for (uint64_t seed = 1000; seed < 1060; ++seed) {
    Problem problem(seed);
    problem.options.accuracy(true);
    const Head& head = problem.head;
    INFO("seed " << seed << ", hidden " << head.hidden.sizes() << ", weight " << head.weight.sizes());
    const auto expected = compute_token_statistics(head.dense(), problem.targets, problem.options);
    const auto found = compute_token_statistics(head.fused(bytes_of(3, head)), problem.targets, problem.options);
    CHECK(difference(found.loss, expected.loss, head_relative, 1) == "");
    CHECK(difference(found.log_sum_exp, expected.log_sum_exp, head_relative, 1) == "");
    CHECK(difference(found.target_log_probability, expected.target_log_probability, head_relative, 1) == "");
    CHECK(torch::equal(found.prediction, expected.prediction));
    CHECK(torch::equal(found.hit, expected.hit));
    CHECK_FALSE(found.loss.requires_grad());

    const auto sums = reconstruct(head.fused(), problem.targets, problem.options).sums;
    CHECK(difference(sums, reconstruct(head.dense(), problem.targets, problem.options).sums, head_relative, 1) == "");
  }
}

TEST_CASE("The size of a block changes a float32 loss by its rounding at most", "[linear]") {
  torch::manual_seed(3);
  const Head head = random_head({103}, 96, 1031, /*has_bias=*/true, torch::kFloat);
  const Tensor targets = some_targets({103}, 1031);
  const auto loss = [&](int64_t tokens) {
    return compute_reconstruction_loss(head.fused(bytes_of(tokens, head)), targets).item<double>();
  };
  const double whole = loss(0);
  // The loss is rounded once on each side. A logit is a sum of 96 products whose partial sums are near 2: 10 halves, of
  // either sign, put it 1e-6 off in each of two orders, and a mean over 103 positions moves by a tenth of that. The
  // bound is seven times as much.
  const double rounding = 2 * half_step(whole, torch::kFloat) + 1e-6;
  for (const int64_t tokens : {1, 2, 17, 102, 103, 1000}) {
    INFO(tokens << " tokens");
    CHECK(std::abs(loss(tokens) - whole) <= rounding);
  }
}

TEST_CASE("The number of threads changes no bit where the products are exact", "[linear][threads][cpu]") {
  // Multiples of 1/8 below 8 and sums of few of them: every order of summation gives the same logits. Weight and bias
  // see rounded sums over tokens, whose order is the BLAS's own; with one token a block there is none.
  const bool is_frozen = GENERATE(true, false);
  const auto type = GENERATE(torch::kFloat, torch::kDouble);
  INFO(type << ", frozen head: " << is_frozen);
  const int64_t positions = is_frozen ? 301 : 37;
  Head head{leaf(eighths({positions, 5}, type)), eighths({2003, 5}, type, 2), eighths({2003}, type, 3)};
  if (!is_frozen) head = head.leaves(type);
  const Tensor targets = some_targets({positions}, 2003);
  const auto run = [&] {
    const Tensor loss = compute_reconstruction_loss(head.fused(bytes_of(is_frozen ? 64 : 1, head)), targets);
    loss.backward();
    std::vector<Tensor> results{loss.detach()};
    if (!is_frozen) results.insert(results.end(), {head.weight.grad().clone(), head.bias.grad().clone()});
    for (const Tensor& input : head.inputs()) input.mutable_grad() = Tensor();
    const auto statistics = compute_token_statistics(head.fused(), targets);
    results.insert(results.end(), {statistics.loss, statistics.log_sum_exp, statistics.prediction});
    return results;
  };
  const auto one = with_threads(1, run), two = with_threads(2, run);
  for (size_t index = 0; index < one.size(); ++index) {
    INFO("result " << index);
    CHECK(same_bits(one[index], two[index]));
  }
}

TEST_CASE("Unreduced losses of a fused head take any upstream gradient", "[linear][gradient]") {
  torch::manual_seed(5);
  const Head head = random_head({4, 6}, 7, 19, /*has_bias=*/true);
  const Tensor targets = some_targets({4, 6}, 19);
  const auto options = ReconstructionLossOptions().reduction(torch::kNone);
  const std::vector<std::pair<const char*, Tensor>> upstreams{
      {"different at each position", uniform({4, 6}, 2)},
      {"expanded", torch::full({}, 0.25, torch::kDouble).expand({4, 6})},
      {"transposed", uniform({6, 4}, 2).t()},
      {"one position only", torch::one_hot(torch::tensor(7), 24).to(torch::kDouble).reshape({4, 6})},
      {"nothing", torch::zeros({4, 6}, torch::kDouble)},
  };
  for (const auto& [which, upstream] : upstreams) {
    INFO(which);
    const auto expected = loss_and_gradients(head.dense(), head, targets, options, upstream);
    CHECK(difference_of_all(loss_and_gradients(head.fused(bytes_of(5, head)), head, targets, options, upstream),
                            expected, head_relative) == "");
  }
  // An upstream gradient that depends on the loss itself: what scaling after the fact gets wrong.
  const auto focal = [&](const auto& logits) {
    const Tensor losses = compute_reconstruction_loss(logits, targets, options);
    return torch::autograd::grad({(losses * (1 - losses.neg().exp()).square()).mean()}, head.inputs());
  };
  const auto expected = focal(head.dense()), found = focal(head.fused(bytes_of(5, head)));
  for (size_t index = 0; index < expected.size(); ++index)
    CHECK(difference(found[index], expected[index], head_relative, 1) == "");
}

TEST_CASE("A scaled loss scales the gradients of a fused head", "[linear][gradient]") {
  torch::manual_seed(6);
  const Head head = random_head({9}, 4, 11, /*has_bias=*/true);
  const Tensor targets = some_targets({9}, 11);
  const auto unscaled = loss_and_gradients(head.fused(), head, targets);
  const Tensor half = torch::full({}, 0.5, torch::kDouble);
  const auto scaled = loss_and_gradients(head.fused(), head, targets, {}, half);
  for (size_t index = 1; index < scaled.size(); ++index) CHECK(same_bits(scaled[index], unscaled[index] / 2));
}

TEST_CASE("A frozen input gets no gradient and costs no product", "[linear][gradient][cpu]") {
  torch::manual_seed(7);
  const bool has_hidden = GENERATE(true, false), has_weight = GENERATE(true, false);
  const bool for_each = GENERATE(true, false);
  INFO("hidden " << has_hidden << ", weight " << has_weight << ", kNone " << for_each);
  Head head = random_head({12}, 5, 9, /*has_bias=*/true);
  if (!has_hidden) head.hidden = head.hidden.detach();
  if (!has_weight) head.weight = head.weight.detach();
  ReconstructionLossOptions options;
  if (for_each) options.reduction(torch::kNone);
  const auto run = [&] {
    compute_reconstruction_loss(head.fused(bytes_of(4, head)), some_targets({12}, 9), options).sum().backward();
  };
  const int blocks = 3, logits = for_each ? 2 : 1;
  CHECK(products_of(run) == blocks * (logits + (has_hidden ? 1 : 0) + (has_weight ? 1 : 0)));
  CHECK(head.hidden.grad().defined() == has_hidden);
  CHECK(head.weight.grad().defined() == has_weight);
  CHECK(head.bias.grad().defined());
}

TEST_CASE("Without a gradient a fused head costs one product a block and makes no graph", "[linear][cpu]") {
  torch::manual_seed(8);
  Head head = random_head({12}, 5, 9, /*has_bias=*/false);
  const Tensor targets = some_targets({12}, 9);
  const auto expected = compute_reconstruction_loss(head.dense(), targets).item<double>();
  Tensor loss;
  const auto run = [&] { loss = compute_reconstruction_loss(head.fused(bytes_of(5, head)), targets); };
  const auto check = [&] {
    CHECK(products_of(run) == 3);
    CHECK_FALSE(loss.requires_grad());
    CHECK(difference(loss, std::vector<double>{expected}, head_relative) == "");
  };
  SECTION("in no_grad mode") {
    const torch::NoGradGuard no_grad;
    check();
  }
  SECTION("in inference mode") {
    const c10::InferenceMode inference;
    check();
  }
  SECTION("with frozen inputs") {
    head = {head.hidden.detach(), head.weight.detach(), {}};
    check();
  }
}

TEST_CASE("Positions that do not count are left out of the products of a fused head", "[linear][cpu]") {
  torch::manual_seed(9);
  const Tensor targets = torch::tensor({3, -100, 0, 2, -100, 8, 1});
  const auto reduction = GENERATE(Reduction(torch::kMean), Reduction(torch::kNone));
  const auto options = ReconstructionLossOptions().reduction(reduction).z_loss(0.1).token_weight(
      torch::tensor({1.0, 1.0, 0.0, 2.0, 0.0, 0.5, 0.25}, torch::kDouble));
  const Tensor index = torch::tensor({0, 3, 5, 6});
  Head head = random_head({7}, 5, 9, /*has_bias=*/true);
  const Head kept{leaf(head.hidden.index_select(0, index)), head.weight, head.bias};
  const bool for_each = reduction.index() == 2;
  const Tensor upstream = for_each ? uniform({7}, 2) : Tensor();
  const auto expected =
      loss_and_gradients(kept.dense(), kept, targets.index_select(0, index),
                         ReconstructionLossOptions(options).token_weight(options.token_weight().index_select(0, index)),
                         for_each ? upstream.index_select(0, index) : upstream);

  // A NaN times 0 would show in the weight's gradient.
  head.hidden = head.hidden.detach().index_fill(0, torch::tensor({1, 2, 4}), not_a_number).requires_grad_();
  std::vector<Tensor> found;
  const int64_t products =
      products_of([&] { found = loss_and_gradients(head.fused(bytes_of(2, head)), head, targets, options, upstream); });
  CHECK(products == (for_each ? 4 : 3) * 2);  // four positions make two blocks, seven would make four

  CHECK(difference(found[1].index_select(0, torch::tensor({1, 2, 4})), std::vector<double>(15, 0.0), 0) == "");
  found[1] = found[1].index_select(0, index);
  if (for_each) {
    CHECK(difference(found[0].index_select(0, torch::tensor({1, 2, 4})), std::vector<double>(3, 0.0), 0) == "");
    found[0] = found[0].index_select(0, index);
  }
  CHECK(difference_of_all(found, expected, head_relative) == "");
}

TEST_CASE("A fused head without a position that counts has a loss of 0 and gradients of 0", "[linear][gradient]") {
  const auto type = GENERATE(torch::kDouble, torch::kFloat, torch::kHalf, torch::kBFloat16);
  const int64_t positions = GENERATE(0, 3);
  INFO(type << ", " << positions << " positions");
  torch::manual_seed(10);
  const Head head = random_head({2, positions}, 4, 6, /*has_bias=*/true, type);
  const Tensor targets = torch::full({2, positions}, -100, torch::kLong);
  for (const auto& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
    const Tensor loss = compute_reconstruction_loss(head.fused(), targets,
                                                    ReconstructionLossOptions().reduction(reduction).z_loss(0.5));
    CHECK(loss.requires_grad());
    CHECK(loss.scalar_type() == arithmetic(type));
    CHECK(loss.sum().item<double>() == 0);
    const auto gradients = torch::autograd::grad({loss.sum()}, head.inputs());
    for (size_t index = 0; index < gradients.size(); ++index) {
      CHECK(same_bits(gradients[index], torch::zeros_like(head.inputs()[index])));
    }
  }
  CHECK(compute_token_statistics(head.fused(), targets).hit.sizes() == targets.sizes());
}

TEST_CASE("What does not count has no gradient in a fused head, whatever its logits and whatever comes from upstream",
          "[linear][gradient][cpu]") {
  for (const auto type : all_types) {
    INFO(type);
    const Tensor hidden = leaf(eighths({2, 3}, type)), weight = leaf(eighths({6, 3}, type, 2));
    const Tensor bias = torch::zeros({6}, type).index_fill_(0, torch::tensor({1}), reference::inf);
    const auto gradients = [&](const Tensor& targets, const ReconstructionLossOptions& options, double upstream) {
      const Tensor loss = compute_reconstruction_loss(LinearLogits(hidden, weight), targets, options) * upstream;
      return torch::autograd::grad({loss}, {hidden, weight});
    };
    for (const double factor : {reference::inf, not_a_number}) {
      for (const Tensor& found : gradients(indices({-100, -100}), {}, factor)) {
        CHECK(found.count_nonzero().item<int64_t>() == 0);
      }
      CHECK(gradients(indices({-100, 1}), {}, factor)[0][0].count_nonzero().item<int64_t>() == 0);
    }
    const Tensor class_weight = torch::ones({6}, type).index_fill_(0, torch::tensor({1}), 0);
    const Tensor loss = compute_reconstruction_loss(LinearLogits(hidden, weight, bias), indices({1, 1}),
                                                    ReconstructionLossOptions().weight(class_weight));
    CHECK(loss.item<double>() == 0);
    for (const Tensor& found : torch::autograd::grad({loss}, {hidden, weight})) {
      CHECK(found.count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("Every layout of hidden and weight gives the numbers of contiguous ones", "[linear][layout]") {
  const auto type = GENERATE(torch::kDouble, torch::kFloat, torch::kBFloat16);
  INFO(type);
  torch::manual_seed(11);
  const Tensor targets = some_targets({3, 4}, 7);
  const std::vector<std::pair<const char*, Tensor>> hiddens{
      {"contiguous", uniform({3, 4, 5}, 1, type)},
      {"permuted", uniform({5, 4, 3}, 1, type).permute({2, 1, 0})},
      {"shifted", uniform({3, 5, 5}, 1, type).slice(1, 1)},
      {"every second feature", uniform({3, 4, 10}, 1, type).slice(2, 0, 10, 2)},
      {"expanded", uniform({5}, 1, type).expand({3, 4, 5})},
  };
  const std::vector<std::pair<const char*, Tensor>> weights{
      {"contiguous", uniform({7, 5}, 0.5, type)},
      {"transposed", uniform({5, 7}, 0.5, type).t()},
      {"rows of a larger one", uniform({20, 5}, 0.5, type).slice(0, 6, 20, 2)},
      {"columns of a larger one", uniform({7, 9}, 0.5, type).slice(1, 2, 7)},
      {"every second column", uniform({7, 10}, 0.5, type).slice(1, 1, 10, 2)},
  };
  const Tensor bias = uniform({14}, 0.5, type).slice(0, 0, 14, 2);
  for (const auto& [hidden_layout, hidden] : hiddens) {
    for (const auto& [weight_layout, weight] : weights) {
      INFO("hidden " << hidden_layout << ", weight " << weight_layout);
      const Head head{leaf(hidden), leaf(weight), leaf(bias)};
      const Head copy{leaf(hidden.contiguous()), leaf(weight.contiguous()), leaf(bias.contiguous())};
      const auto expected = loss_and_gradients(copy.fused(bytes_of(5, copy)), copy, targets);
      const auto found = loss_and_gradients(head.fused(bytes_of(5, head)), head, targets);
      // Products of 5, 7 and 12 terms in another order, and the half step of a half type on each side.
      CHECK(difference_of_all(found, expected,
                              12 * epsilon(arithmetic(type)) + (type == torch::kBFloat16 ? epsilon(type) / 2 : 0)) ==
            "");
    }
  }
}

TEST_CASE("One position without a batch is a fused head, too", "[linear]") {
  torch::manual_seed(12);
  const Head head = random_head({}, 5, 7, /*has_bias=*/true);
  const Tensor target = torch::tensor(3);
  for (const auto& reduction : {Reduction(torch::kMean), Reduction(torch::kNone)}) {
    const auto options = ReconstructionLossOptions().reduction(reduction);
    const Tensor upstream = torch::full({}, 0.75, torch::kDouble);
    CHECK(difference_of_all(loss_and_gradients(head.fused(), head, target, options, upstream),
                            loss_and_gradients(head.dense(), head, target, options, upstream), head_relative) == "");
  }
}

TEST_CASE("The gradients of a weight tied with the embedding add up", "[linear][gradient]") {
  torch::manual_seed(13);
  const Tensor tokens = some_targets({2, 6}, 11), targets = tokens.roll(1, 1);
  const Tensor table = leaf(uniform({11, 4}, 0.5));
  const auto gradient_of = [&](const auto& make_logits) {
    const Tensor hidden = torch::embedding(table, tokens).tanh();
    return gradient(compute_reconstruction_loss(make_logits(hidden), targets), table);
  };
  const Tensor expected = gradient_of([&](const Tensor& hidden) { return torch::linear(hidden, table); });
  CHECK(difference(gradient_of([&](const Tensor& hidden) { return LinearLogits(hidden, table); }), expected,
                   head_relative, 1) == "");

  compute_reconstruction_loss(LinearLogits(torch::embedding(table, tokens).tanh(), table), targets).backward();
  compute_reconstruction_loss(LinearLogits(torch::embedding(table, tokens).tanh(), table), targets).backward();
  CHECK(difference(table.grad(), expected * 2, head_relative, 1) == "");
}

TEST_CASE("One tensor as hidden and weight gets both gradients", "[linear][gradient]") {
  torch::manual_seed(14);
  const Tensor both = leaf(uniform({6, 4}, 0.5)), targets = some_targets({6}, 6);
  const Tensor expected = gradient(compute_reconstruction_loss(torch::linear(both, both), targets), both);
  CHECK(difference(gradient(compute_reconstruction_loss(LinearLogits(both, both), targets), both), expected,
                   head_relative, 1) == "");
}

TEST_CASE("A fused head of half precision loses no more than eager does", "[linear][half][memcheck][cpu]") {
  // LibTorch has no float16 products on every CPU, so eager's are computed in float32 and rounded, as a GPU does it.
  const auto type = GENERATE(torch::kHalf, torch::kBFloat16);
  const double scale = GENERATE(1.0, 3.0);
  const bool has_bias = GENERATE(true, false);
  INFO(type << ", upstream gradient " << scale << ", bias " << has_bias);
  torch::manual_seed(15);
  const Head head = random_head({61}, 24, 211, has_bias, type);
  const Tensor targets = some_targets({61}, 211);

  const Head wide = head.leaves(torch::kDouble), single = head.leaves(torch::kFloat);
  const Tensor upstream = torch::full({}, scale, torch::kFloat);
  const auto exact = loss_and_gradients(wide.dense(), wide, targets, {}, upstream.to(torch::kDouble));
  const Tensor eager_loss = F::cross_entropy(single.dense().to(type).to(torch::kFloat), targets);
  auto eager = torch::autograd::grad({eager_loss}, single.inputs(), {upstream});
  eager.insert(eager.begin(), eager_loss.detach());
  const auto found = loss_and_gradients(head.fused(bytes_of(7, head)), head, targets, {}, upstream);
  for (size_t index = 0; index < found.size(); ++index) {
    INFO("result " << index);
    CHECK(found[index].scalar_type() == (index == 0 ? torch::kFloat : type));
    CHECK(worse_than_eager(found[index], eager[index], exact[index], type) == 0);
  }
}

TEST_CASE("A scaled loss keeps float16 gradients from underflow", "[linear][half][cpu]") {
  // The gradients of the unscaled loss are below float16's least number, 2^-24; a gradient scaler is there to save
  // them.
  torch::manual_seed(16);
  Head head = random_head({64}, 8, 5, /*has_bias=*/false, torch::kHalf);
  head.hidden = leaf(head.hidden / 256);
  head.weight = leaf(head.weight / 256);
  const Tensor targets = some_targets({64}, 5);
  const Tensor upstream = torch::full({}, 65536.0, torch::kFloat);
  const Head wide = head.leaves(torch::kDouble);
  const auto exact = loss_and_gradients(wide.dense(), wide, targets, {}, upstream.to(torch::kDouble));
  const auto found = loss_and_gradients(head.fused(), head, targets, {}, upstream);
  // Sums of 64 terms of float32 at most, then the one rounding to float16.
  for (size_t index = 1; index < found.size(); ++index) {
    CHECK(difference(found[index], exact[index], 64 * epsilon(torch::kFloat),
                     exact[index].abs().max().item<double>()) == "");
  }
}

TEST_CASE("A second backward through a retained graph of a fused head is right", "[linear][gradient]") {
  torch::manual_seed(17);
  const Head head = random_head({9}, 4, 11, /*has_bias=*/true);
  const Tensor targets = some_targets({9}, 11);
  for (const auto& reduction : {Reduction(torch::kMean), Reduction(torch::kNone)}) {
    const auto options = ReconstructionLossOptions().reduction(reduction).label_smoothing(0.1).z_loss(0.1);
    const Tensor loss = compute_reconstruction_loss(head.fused(bytes_of(2, head)), targets, options);
    const Tensor dense = compute_reconstruction_loss(head.dense(), targets, options);
    for (const double scale : {1.0, -3.0, 0.5}) {
      INFO("upstream " << scale);
      const Tensor upstream = torch::full_like(dense, scale);
      const auto expected = torch::autograd::grad({dense}, head.inputs(), {upstream}, /*retain_graph=*/true);
      const auto found = torch::autograd::grad({loss}, head.inputs(), {upstream}, /*retain_graph=*/true);
      for (size_t index = 0; index < found.size(); ++index) {
        CHECK(difference(found[index], expected[index], head_relative, 1) == "");
      }
    }
  }
}

TEST_CASE("Gradients that were handed out stay what they were", "[linear][gradient]") {
  torch::manual_seed(18);
  const Head head = random_head({9}, 4, 11, /*has_bias=*/true);
  const Tensor loss = compute_reconstruction_loss(head.fused(), some_targets({9}, 11));
  const auto first = torch::autograd::grad({loss}, head.inputs(), {}, /*retain_graph=*/true);
  std::vector<Tensor> copies;
  for (const Tensor& tensor : first) copies.push_back(tensor.clone());
  torch::autograd::grad({loss * 5}, head.inputs(), {}, /*retain_graph=*/true);
  loss.backward();
  for (size_t index = 0; index < first.size(); ++index) CHECK(same_bits(first[index], copies[index]));
}

TEST_CASE("Double backward through a fused head is refused", "[linear][errors]") {
  torch::manual_seed(19);
  const Head head = random_head({3}, 4, 5, /*has_bias=*/false);
  const Tensor loss = compute_reconstruction_loss(head.fused(), some_targets({3}, 5));
  CHECK(error_of([&] { gradient(loss, head.hidden, {}, /*create_graph=*/true); }) ==
        "compute_reconstruction_loss: LinearLogits must not be differentiated twice (create_graph); pass dense logits "
        "for that");
}

TEST_CASE("The whole loss and the module take a fused head", "[linear][vae][module][cpu]") {
  torch::manual_seed(20);
  const Head head = random_head({2, 5}, 6, 13, /*has_bias=*/true);
  const Tensor targets = some_targets({2, 5}, 13), z_logits = leaf(uniform({2, 5, 3}, 2));
  const auto options = VAELossOptions().latent_dim(3).beta_kl(0.5).free_bits(0.125).accuracy(true);
  FreeTransformerLoss criterion(options);
  const auto expected = compute_vae_loss(head.dense(), targets, z_logits, options);
  for (const auto& [loss, metrics] : {compute_vae_loss(head.fused(), targets, z_logits, options),
                                      criterion(head.fused(bytes_of(3, head)), targets, z_logits)}) {
    CHECK(difference(loss, expected.loss, head_relative) == "");
    for (const auto& [figure, value] : metrics) {
      INFO(figure);
      CHECK(std::abs(value - expected.metrics.at(figure)) <= head_relative * (1 + std::abs(value)));
    }
    CHECK(difference(gradient(loss, head.weight), gradient(expected.loss, head.weight), head_relative, 1) == "");
    CHECK(difference(gradient(loss, z_logits), gradient(expected.loss, z_logits), head_relative, 1) == "");
  }
  CHECK(compute_vae_loss<PerBit>(head.fused(), targets, z_logits, 3).loss.requires_grad());
}

TEST_CASE("A fused head is refused with what came", "[linear][errors][cpu]") {
  const Tensor hidden = eighths({2, 3}), weight = eighths({5, 3}), bias = eighths({5});
  const std::string undefined = " must be a defined tensor, got an undefined one";
  CHECK(error({{}, weight}) == "hidden" + undefined);
  CHECK(error({hidden, {}}) == "weight" + undefined);
  const std::string dense = " must be a dense (strided) tensor, got layout Sparse";
  CHECK(error({hidden.to_sparse(), weight}) == "hidden" + dense);
  CHECK(error({hidden, weight.to_sparse()}) == "weight" + dense);
  CHECK(error({hidden, weight, bias.to_sparse()}) == "bias" + dense);
  const std::string type = " must be of type float64, float32, float16 or bfloat16, got ";
  CHECK(error({hidden.to(torch::kLong), weight}) == "hidden" + type + "Long");
  CHECK(error({hidden, weight.to(torch::kInt)}) == "weight" + type + "Int");
  CHECK(error({hidden, weight, bias.to(torch::kBool)}) == "bias" + type + "Bool");
  CHECK(error({hidden, weight.to(torch::kFloat)}) == "weight must have the type of hidden, Double, got Float");
  CHECK(error({hidden, weight, bias.to(torch::kHalf)}) == "bias must have the type of hidden, Double, got Half");
  CHECK(error({torch::tensor(1.0), weight}) ==
        "hidden must have at least one dimension, and a last one of at least 1, got shape []");
  CHECK(error({torch::zeros({2, 0}), weight}) ==
        "hidden must have at least one dimension, and a last one of at least 1, got shape [2, 0]");
  const std::string shape = "weight must have the shape [vocab_size, D] with D = 3, the last size of hidden, got ";
  CHECK(error({hidden, eighths({3, 5})}) == shape + "[3, 5]");
  CHECK(error({hidden, eighths({3})}) == shape + "[3]");
  CHECK(error({hidden, torch::zeros({0, 3}, torch::kDouble)}) == shape + "[0, 3]");
  CHECK(error({hidden, weight, eighths({4})}) == "bias must have the shape [vocab_size] = [5], got [4]");
  CHECK(error({hidden, weight, eighths({1, 5})}) == "bias must have the shape [vocab_size] = [5], got [1, 5]");
  const auto meta = torch::TensorOptions(torch::kDouble).device(torch::kMeta);
  CHECK(error({hidden, torch::zeros({5, 3}, meta)}) == "weight must be on the device of hidden, cpu, got meta");
  CHECK(error({hidden, weight, torch::zeros({5}, meta)}) == "bias must be on the device of hidden, cpu, got meta");
  CHECK(error(LinearLogits(hidden, weight).block_bytes(-1)) == "block_bytes must be >= 0, got -1");
  CHECK(error({hidden, weight}, ReconstructionLossOptions().inplace(true)) ==
        "inplace must be false with LinearLogits, whose logits are no tensor, got true");
  CHECK(error({eighths({3, 3}), weight}) ==
        "targets must have the shape of the logits without their last size, [3], got [2]");
  const Tensor targets = torch::zeros({2}, torch::kLong);
  CHECK(error_of([&] {
          compute_token_statistics(LinearLogits(hidden, eighths({5, 2})), targets);
        }) == "compute_token_statistics: " + shape + "[5, 2]");
  CHECK(error_of([&] {
          compute_reconstruction_loss(LinearLogits(hidden, weight), torch::tensor({0, 5}));
        }) == "compute_reconstruction_loss: targets must lie in [0, 5) or be ignore_index = -100, got 5 at position 1");
}

TEST_CASE("A step of a fused head takes an eighth of the logits beside the gradients", "[linear][memory]") {
  constexpr int64_t positions = 1024, width = 64, classes = 32768;
  torch::manual_seed(21);
  const Tensor targets = some_targets({positions}, classes);
  const auto reduction = GENERATE(Reduction(torch::kMean), Reduction(torch::kNone));
  INFO("kNone: " << (reduction.index() == 2));
  const Head head{leaf(torch::randn({positions, width})), leaf(torch::randn({classes, width})), {}};
  const int64_t gradients = (positions + classes) * width * 4, logits = positions * classes * 4;
  const auto step = [&] {
    compute_reconstruction_loss(head.fused(), targets, ReconstructionLossOptions().reduction(reduction))
        .mean()
        .backward();
  };
  const int64_t peak = peak_of(step);
  CHECK(peak >= gradients);
  CHECK(peak - gradients <= std::max(logits / 8, int64_t{64} << 20));
}

TEST_CASE("A half weight is never held in float32 as a whole by a forward pass", "[linear][memory]") {
  constexpr int64_t positions = 64, width = 256, classes = 32768;
  const auto type = GENERATE(torch::kBFloat16, torch::kHalf);
  const Head head{torch::ones({positions, width}, type), torch::ones({classes, width}, type), {}};
  const int64_t block = bytes_of(8, head), part_of_weight = int64_t{1} << 21;  // 2^19 numbers at a time
  const int64_t peak =
      peak_of([&] { compute_reconstruction_loss(head.fused(block), some_targets({positions}, classes)); });
  CHECK(peak <= block + part_of_weight + 512 * positions + 4 * 8 * width);
  CHECK(peak < classes * width * 4);
}

TEST_CASE("A fused head without gradient holds one block", "[linear][memory]") {
  constexpr int64_t positions = 1000, width = 16, classes = 8192;
  const bool has_bias = GENERATE(true, false);
  const Head head = random_head({positions}, width, classes, has_bias, torch::kFloat);
  const Tensor targets = some_targets({positions}, classes);
  const int64_t block = bytes_of(32, head);
  // Beside the block: the numbers of each position, at most 64 of 8 bytes at one time.
  const torch::NoGradGuard no_grad;
  CHECK(peak_of([&] { compute_reconstruction_loss(head.fused(block), targets); }) <= block + positions * 512);
  CHECK(peak_of([&] { compute_token_statistics(head.fused(block), targets); }) <= block + positions * 512);
}

TEST_CASE("Inputs of different types below float64 mix, each with a gradient of its own type", "[linear][half][cpu]") {
  const std::vector<torch::ScalarType> types{torch::kFloat, torch::kBFloat16, torch::kHalf};
  constexpr int64_t positions = 24, width = 16, classes = 51;
  torch::manual_seed(5);
  const Head exact = random_head({positions}, width, classes, true, torch::kHalf);
  const Tensor targets = some_targets({positions}, classes);
  for (const auto of_hidden : types) {
    for (const auto of_weight : types) {
      for (const auto of_bias : types) {
        INFO(of_hidden << " x " << of_weight << " + " << of_bias);
        const Head mixed{leaf(exact.hidden.to(of_hidden)), leaf(exact.weight.to(of_weight)),
                         leaf(exact.bias.to(of_bias))};
        const Head wide = mixed.leaves(torch::kDouble);
        const Tensor loss = compute_reconstruction_loss(mixed.fused(bytes_of(7, mixed)), targets);
        const Tensor expected = compute_reconstruction_loss(wide.dense(), targets);
        loss.backward();
        expected.backward();
        CHECK(loss.scalar_type() == torch::kFloat);
        CHECK(difference(loss, expected, 20 * epsilon(torch::kFloat), 1) == "");
        for (size_t index = 0; index < 3; ++index) {
          const Tensor found = mixed.inputs()[index].grad(), right = wide.inputs()[index].grad();
          CHECK(found.scalar_type() == mixed.inputs()[index].scalar_type());
          // sums of at most 51 products of numbers below 1, each of half a step of float32
          CHECK(difference(found, right, 64 * epsilon(torch::kFloat), 0.05) == "");
        }
        const auto statistics = compute_token_statistics(mixed.fused(), targets);
        CHECK(difference(statistics.log_sum_exp, wide.dense().logsumexp(-1), 20 * epsilon(torch::kFloat), 1) == "");
      }
    }
  }
}

TEST_CASE("A float32 head beside a bfloat16 hidden is not copied", "[linear][memory]") {
  constexpr int64_t positions = 64, width = 256, classes = 32768;
  const Head head{torch::ones({positions, width}, torch::kBFloat16), torch::ones({classes, width}), {}};
  const int64_t block = bytes_of(8, head);
  const int64_t peak =
      peak_of([&] { compute_reconstruction_loss(head.fused(block), some_targets({positions}, classes)); });
  CHECK(peak <= block + 512 * positions + 4 * positions * width);
}
