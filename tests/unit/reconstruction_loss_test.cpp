#include "free_transformer/reconstruction_loss.hpp"

#include "instruction_sets.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

ReconstructionLossOptions with(Reduction reduction, int64_t ignore_index = -100) {
  return ReconstructionLossOptions().reduction(reduction).ignore_index(ignore_index);
}

/// In units of the type of arithmetic. Of a position's loss (m - x_y) + log1p(sum exp(x_j - m)): the differences are
/// exact for these inputs; 1 for exp, 4 for sums of at most 67 terms in 8 lanes (8 additions of a half each), 1 for
/// log1p, a half for the addition; both parts are >= 0. The sum over positions is taken in float64, its rounding is
/// `difference`'s half step. Of a gradient p_j / T: 1 for exp, 4 for the sum, a half each for 1 + sum, the quotient,
/// 1/T and the product, two more halves at the target, where p - 1 is no smaller than p or is taken as a sum over the
/// others.
constexpr double reconstruction_steps = 8;

/// Rows that have no softmax: of no possible class, with an infinite one beside the target 0 and at it; and one that has.
Tensor rows_without_softmax(int64_t classes, c10::ScalarType type) {
  Tensor logits = eighths({4, classes}, type);
  logits[0].fill_(-reference::inf);
  logits[1][1].fill_(reference::inf);
  logits[2][0].fill_(reference::inf);
  return logits;
}

}  // namespace

namespace user {

/// A source of logits of one's own, with a gradient to what it is made of.
struct TemperedLogits {
  torch::Tensor logits;
  double temperature;
};

free_transformer::ReconstructionResult reconstruct(const TemperedLogits& source, const torch::Tensor& targets,
                                                   const free_transformer::ReconstructionLossOptions& options) {
  return free_transformer::reconstruct(source.logits / source.temperature, targets, options);
}

}  // namespace user

TEST_CASE("Cross entropy has the value and the gradient of its equation", "[reconstruction][reference]") {
  const Forced forced(GENERATE(from_range(available_instruction_sets())));
  for (const auto& expected : reference::cross_entropy_cases) {
    for (const auto type : all_types) {
      if (!holds(type, expected.exact)) continue;
      INFO(expected.name << ", " << type);
      const auto rows = static_cast<int64_t>(expected.targets.size());
      const Tensor logits = leaf(tensor(expected.logits, {rows, expected.classes}, type));
      const Tensor targets = tensor(expected.targets, {rows});
      const double relative = reconstruction_steps * epsilon(arithmetic(type));

      const Tensor mean = compute_reconstruction_loss(logits, targets, expected.ignore_index);
      const Tensor sum = compute_reconstruction_loss(logits, targets, with(torch::kSum, expected.ignore_index));
      const Tensor losses = compute_reconstruction_loss(logits, targets, with(torch::kNone, expected.ignore_index));
      CHECK(mean.scalar_type() == arithmetic(type));
      CHECK(losses.scalar_type() == arithmetic(type));
      CHECK(difference(mean, {expected.mean}, relative) == "");
      CHECK(difference(sum, {expected.sum}, relative) == "");
      CHECK(difference(losses, expected.losses, relative) == "");

      const Tensor of_logits = gradient(mean, logits);
      CHECK(of_logits.scalar_type() == type);
      CHECK(difference(of_logits, expected.gradient, relative) == "");
    }
  }
}

TEST_CASE("A sum and unreduced losses have the gradient of the mean times the number of positions",
          "[reconstruction][gradient]") {
  const Tensor logits = leaf(eighths({4, 6}));
  const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, 2}, {4});
  const Tensor of_mean = gradient(compute_reconstruction_loss(logits, targets), logits);
  const Tensor upstream = tensor(std::vector<double>{2, 3, -0.5, 0}, {4});

  const Tensor of_sum = gradient(compute_reconstruction_loss(logits, targets, with(torch::kSum)), logits);
  const Tensor of_each = gradient(compute_reconstruction_loss(logits, targets, with(torch::kNone)), logits, upstream);
  // On both sides at most four products, a half each.
  CHECK(difference(of_sum, of_mean * 3, 4 * epsilon(torch::kDouble)) == "");
  CHECK(difference(of_each, of_mean * 3 * upstream.unsqueeze(1), 4 * epsilon(torch::kDouble)) == "");
}

TEST_CASE("A loss may be changed in place, with a graph and without", "[reconstruction][graph]") {
  const auto factor = leaf(torch::full({}, 0.5));
  for (const auto type : all_types) {
    for (const std::vector<int64_t>& positions : {std::vector<int64_t>{}, {3}, {2, 3}, {0}}) {
      auto shape = positions;
      shape.push_back(4);
      const Tensor logits = leaf(eighths(shape, type)), targets = torch::ones(positions, torch::kLong);
      const Tensor weight = leaf(eighths({5, 4}, type, 2) / 8);
      for (const auto& reduction : {Reduction(torch::kNone), Reduction(torch::kSum)}) {
        INFO(type << ", positions " << positions << ", " << positions.size());
        const auto check = [&](const auto& source, const Tensor& input, double rounding = 0) {
          const Tensor expected = gradient(compute_reconstruction_loss(source, targets, with(reduction)).sum(), input);
          const Tensor loss = compute_reconstruction_loss(source, targets, with(reduction));
          const Tensor before = loss.detach().clone();
          loss.mul_(factor).add_(1);
          CHECK(same_bits(loss, before * 0.5 + 1));
          // Half of them, exactly, but where a half type is short of exponents.
          CHECK(difference(gradient(loss.sum(), input), expected / 2, rounding, 1, 2) == "");
          CHECK(difference(gradient(loss.sum(), factor), before.sum(), 4 * epsilon(torch::kFloat)) == "");
        };
        check(logits, logits);
        check(LinearLogits(logits, weight), weight, test_device() ? epsilon(type) : 0);  // whose products are rounded
        const Tensor frozen = compute_reconstruction_loss(logits.detach(), targets, with(reduction));
        frozen.mul_(factor);
        CHECK(frozen.requires_grad());
      }
    }
  }
}

TEST_CASE("A scaled loss scales its gradient", "[reconstruction][gradient]") {
  const Tensor logits = leaf(eighths({4, 6}));
  const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, 2}, {4});
  const Tensor loss = compute_reconstruction_loss(logits, targets);
  CHECK(difference(gradient(loss * 3, logits), gradient(loss, logits) * 3, 4 * epsilon(torch::kDouble)) == "");
}

TEST_CASE("Cross entropy agrees with finite differences in both orders", "[reconstruction][gradient]") {
  const Tensor targets = tensor(std::vector<int64_t>{3, -100, 0, 3}, {2, 2});
  const Tensor weights = tensor(std::vector<double>{1, 5, -0.5, 2}, {2, 2});
  const Tensor at = eighths({2, 2, 5}) / 2;
  SECTION("of the mean") {
    check_gradients([&](const Tensor& x) { return compute_reconstruction_loss(x, targets); }, at);
  }
  SECTION("of the square of the mean, whose upstream gradient depends on the logits") {
    check_gradients([&](const Tensor& x) { return compute_reconstruction_loss(x, targets).square() / 4; }, at);
  }
  SECTION("of weighted losses") {
    check_gradients(
        [&](const Tensor& x) { return (compute_reconstruction_loss(x, targets, with(torch::kNone)) * weights).sum(); },
        at);
  }
  SECTION("of weighted squares of losses") {
    check_gradients(
        [&](const Tensor& x) {
          return (compute_reconstruction_loss(x, targets, with(torch::kNone)).square() * weights).sum() / 16;
        },
        at);
  }
  SECTION("of the sum, through other operations on the same logits") {
    check_gradients(
        [&](const Tensor& x) {
          return compute_reconstruction_loss(x.tanh() * 2, targets, with(torch::kSum)) + x.square().sum() / 8;
        },
        at);
  }
}

TEST_CASE("The second derivative reaches an upstream gradient", "[reconstruction][gradient]") {
  const Tensor logits = leaf(eighths({3, 4}));
  const Tensor targets = tensor(std::vector<int64_t>{1, 0, 3}, {3});
  const Tensor upstream = leaf(tensor(std::vector<double>{1, 2, -1}, {3}));
  const Tensor losses = compute_reconstruction_loss(logits, targets, with(torch::kNone));
  const Tensor first = gradient(losses, logits, upstream, /*create_graph=*/true);
  const Tensor each = gradient(losses, logits, torch::ones({3}, torch::kDouble));
  // Squares of gradients, a sum of four, two products: on both sides.
  CHECK(difference(gradient(first.square().sum(), upstream), 2 * upstream * each.square().sum(1),
                   (4 * reconstruction_steps + 6) * epsilon(torch::kDouble)) == "");
}

TEST_CASE("A masked vocabulary has second derivatives, too", "[reconstruction][gradient]") {
  Tensor at = eighths({3, 6});
  const Tensor masked = torch::zeros({3, 6}, torch::kBool);
  masked.select(1, 2).fill_(true);
  masked.select(1, 5).fill_(true);
  const Tensor targets = tensor(std::vector<int64_t>{1, 0, 3}, {3});
  const Tensor x = leaf(at);
  const auto second = [&](const Tensor& logits, const Tensor& direction) {
    const Tensor first = gradient(compute_reconstruction_loss(logits, targets), x, {}, /*create_graph=*/true);
    return gradient((first * direction).sum(), x);
  };
  const Tensor direction = eighths({3, 6}, torch::kDouble, 2);
  const Tensor kept = torch::tensor({0, 1, 3, 4});
  const Tensor small = leaf(at.index_select(1, kept));
  const Tensor small_targets = tensor(std::vector<int64_t>{1, 0, 2}, {3});
  const Tensor small_first =
      gradient(compute_reconstruction_loss(small, small_targets), small, {}, /*create_graph=*/true);
  const Tensor expected = gradient((small_first * direction.index_select(1, kept)).sum(), small);
  const Tensor found = second(x.masked_fill(masked, -INFINITY), direction);
  CHECK(difference(found.index_select(1, kept), expected, 1e-14) == "");
  CHECK(difference(found.masked_select(masked), std::vector<double>(6, 0.0), 0) == "");
}

TEST_CASE("Every layout of the logits gives the numbers of contiguous ones", "[reconstruction][layout]") {
  for (const auto type : all_types) {
    INFO(type);
    const Tensor base = eighths({3, 5, 7}, type);
    const std::vector<std::pair<const char*, Tensor>> layouts{
        {"shifted", base.slice(1, 0, 4)},
        {"shifted the other way", base.slice(1, 1)},
        {"every second class", base.slice(2, 0, 7, 2)},
        {"permuted", base.permute({1, 0, 2})},
        {"classes first", base.permute({2, 1, 0})},
        {"classes in the middle", base.transpose(1, 2)},
        {"expanded positions", base.select(1, 2).unsqueeze(1).expand({3, 4, 7})},
        {"expanded classes", base.slice(2, 0, 1).expand({3, 5, 7})},
        {"one position", base.slice(1, 0, 1)},
        {"four dimensions, permuted", eighths({2, 3, 2, 5}, type).permute({2, 1, 0, 3})},
        {"four dimensions, shifted", eighths({2, 3, 4, 5}, type).slice(2, 1)},
        {"two dimensions, transposed", eighths({4, 6}, type).t()},
        {"one dimension", eighths({9}, type)},
        {"one dimension, strided", eighths({9}, type).slice(0, 0, 9, 2)},
    };
    for (const auto& [name, view] : layouts) {
      INFO(name);
      const Tensor targets = (torch::arange(view.numel() / view.size(-1)) * 5)
                                 .remainder(view.size(-1))
                                 .reshape(view.sizes().slice(0, static_cast<size_t>(view.dim() - 1)));
      const Tensor strided = leaf(view), contiguous = leaf(view.contiguous());
      for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
        const Tensor loss = compute_reconstruction_loss(strided, targets, with(reduction));
        const Tensor expected = compute_reconstruction_loss(contiguous, targets, with(reduction));
        // The order of the sum over the classes follows their layout, so each side may be off by `steps`.
        const double relative = 2 * reconstruction_steps * epsilon(arithmetic(type));
        CHECK(difference(loss, expected, relative) == "");
        const Tensor upstream = eighths(loss.sizes(), arithmetic(type));
        const Tensor found = gradient(loss, strided, upstream);
        CHECK(found.sizes() == view.sizes());
        CHECK(difference(found, gradient(expected, contiguous, upstream), relative, 0, /*roundings=*/2) == "");
      }
    }
  }
}

TEST_CASE("Unreduced losses have the shape of the targets", "[reconstruction][layout]") {
  for (const std::vector<int64_t>& shape :
       {std::vector<int64_t>{7}, {3, 7}, {2, 3, 7}, {2, 3, 4, 7}, {0, 7}, {2, 0, 7}}) {
    const Tensor logits = eighths(shape);
    const std::vector<int64_t> positions(shape.begin(), shape.end() - 1);
    const Tensor losses =
        compute_reconstruction_loss(logits, torch::zeros(positions, torch::kLong), with(torch::kNone));
    CHECK(losses.sizes() == torch::IntArrayRef(positions));
  }
}

TEST_CASE("The gradient of shifted logits is placed in what they were cut from", "[reconstruction][layout][gradient]") {
  const Tensor logits = leaf(eighths({2, 5, 7}));
  const Tensor tokens = torch::arange(10).remainder(7).reshape({2, 5});
  const Tensor loss = compute_reconstruction_loss(logits.slice(1, 0, 4), tokens.slice(1, 1));
  const Tensor alone = leaf(logits.slice(1, 0, 4).contiguous());
  const Tensor expected = gradient(compute_reconstruction_loss(alone, tokens.slice(1, 1).contiguous()), alone);
  const Tensor found = gradient(loss, logits);
  CHECK(difference(found.slice(1, 0, 4), expected, 2 * reconstruction_steps * epsilon(torch::kDouble)) == "");
  CHECK(found.select(1, 4).count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("Targets of every integer type are accepted, in any layout", "[reconstruction][layout]") {
  const Tensor logits = eighths({3, 4, 120});
  const Tensor targets = (torch::arange(12) * 11).remainder(120).reshape({4, 3}).t();
  const Tensor expected = compute_reconstruction_loss(logits, targets.contiguous());
  std::vector<torch::ScalarType> types{torch::kByte, torch::kChar, torch::kShort, torch::kInt, torch::kLong};
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 3)
  types.insert(types.end(), {torch::kUInt16, torch::kUInt32, torch::kUInt64});
#endif
  for (const auto type : types) {
    INFO(type);
    CHECK(same_bits(compute_reconstruction_loss(logits, targets.to(type)), expected));
    CHECK(
        same_bits(compute_reconstruction_loss(logits, targets.to(type).contiguous(), /*ignore_index=*/255), expected));
  }
}

TEST_CASE("An ignore_index of 255 fits targets of eight bits", "[reconstruction]") {
  const Tensor logits = eighths({3, 5});
  const Tensor bytes = torch::tensor({1, 255, 4}, torch::kByte);
  const Tensor expected = compute_reconstruction_loss(logits, torch::tensor({1, -100, 4}, torch::kLong));
  CHECK(same_bits(compute_reconstruction_loss(logits, bytes, /*ignore_index=*/255), expected));
}

TEST_CASE("Ignored positions have no loss and exactly no gradient, whatever their logits",
          "[reconstruction][gradient]") {
  for (const auto type : all_types) {
    for (const double garbage : {not_a_number, reference::inf, -reference::inf}) {
      INFO(type << ", " << garbage);
      Tensor dirty = eighths({4, 6}, type);
      const Tensor clean = leaf(dirty.clone());
      dirty.select(0, 1).fill_(garbage);
      dirty.select(0, 3).select(0, 2).fill_(garbage);
      dirty.requires_grad_();
      const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, -100}, {4});
      for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
        const Tensor loss = compute_reconstruction_loss(dirty, targets, with(reduction));
        const Tensor expected = compute_reconstruction_loss(clean, targets, with(reduction));
        CHECK(same_bits(loss, expected));
        const Tensor upstream = torch::ones_like(loss);
        const Tensor found = gradient(loss, dirty, upstream);
        CHECK(same_bits(found, gradient(expected, clean, upstream)));
        CHECK(same_bits(found, gradient(loss, dirty, upstream, /*create_graph=*/true)));
        CHECK(found.select(0, 1).count_nonzero().item<int64_t>() == 0);
        CHECK(found.select(0, 3).count_nonzero().item<int64_t>() == 0);
      }
    }
  }
}

TEST_CASE("Nothing that counts gives a loss of 0 with a graph, and no gradient", "[reconstruction][gradient]") {
  for (const auto type : all_types) {
    for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
      for (const int64_t rows : {0, 3}) {
        INFO(type << ", " << rows << " rows");
        const Tensor logits = leaf(torch::full({rows, 6}, not_a_number, type));
        const Tensor loss =
            compute_reconstruction_loss(logits, torch::full({rows}, -100, torch::kLong), with(reduction));
        REQUIRE(loss.requires_grad());
        CHECK(loss.count_nonzero().item<int64_t>() == 0);
        loss.sum().backward();
        CHECK(same_bits(logits.grad(), torch::zeros({rows, 6}, type)));
      }
    }
  }
}

TEST_CASE("What does not count has no gradient from an upstream that is infinite or NaN either",
          "[reconstruction][gradient]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const double factor : {reference::inf, not_a_number}) {
        INFO(type << ", strided " << strided << ", upstream " << factor);
        const Tensor logits = leaf(strided ? with_strided_rows(eighths({2, 6}, type)) : eighths({2, 6}, type));
        for (const int64_t target : {-100, 1}) {
          const Tensor loss = compute_reconstruction_loss(logits, indices({-100, target}));
          const Tensor found = gradient(loss, logits, torch::full_like(loss, factor));
          CHECK(found[0].count_nonzero().item<int64_t>() == 0);
          CHECK((target < 0 ? found[1].count_nonzero().item<int64_t>() == 0 : !found[1].isfinite().any().item<bool>()));
        }
      }
    }
  }
}

TEST_CASE("An upstream that stands for a negated or a zero tensor is read as that", "[reconstruction][gradient][cpu]") {
  for (const auto type : all_types) {
    for (const Reduction& reduction : all_reductions) {
      const Tensor logits = leaf(eighths({3, 6}, type));
      const auto loss = [&] { return compute_reconstruction_loss(logits, indices({5, 1, 0}), with(reduction)); };
      const Tensor ones = torch::ones_like(loss());
      CHECK(same_bits(gradient(loss(), logits, torch::_neg_view(ones)), -gradient(loss(), logits, ones)));
      const Tensor zero = torch::_efficientzerotensor(ones.sizes(), ones.options());
      CHECK(gradient(loss(), logits, zero).count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("A NaN in a position that counts is not hidden", "[reconstruction]") {
  for (const auto type : all_types) {
    const Tensor logits = eighths({3, 6}, type);
    logits.select(0, 1).select(0, 4).fill_(not_a_number);
    const Tensor x = leaf(logits);
    const Tensor targets = tensor(std::vector<int64_t>{5, 1, 0}, {3});
    CHECK(std::isnan(compute_reconstruction_loss(x, targets).item<double>()));
    const Tensor losses = compute_reconstruction_loss(x, targets, with(torch::kNone));
    CHECK(values(losses.isnan()) == std::vector<double>{0, 1, 0});
    CHECK(gradient(losses, x, torch::ones_like(losses)).select(0, 1).isnan().all().item<bool>());
  }
}

TEST_CASE("A target that the mask forbids has an infinite loss", "[reconstruction]") {
  const Tensor logits = leaf(tensor(std::vector<double>{1, -reference::inf, 0}, {1, 3}));
  const Tensor loss = compute_reconstruction_loss(logits, torch::tensor({1}));
  CHECK(loss.item<double>() == INFINITY);
  const double p = 1 / (1 + std::exp(-1.0));
  CHECK(difference(gradient(loss, logits), {p, -1.0, 1 - p}, reconstruction_steps * epsilon(torch::kDouble)) == "");
}

TEST_CASE("A mean that float32 cannot hold is infinite, and its gradient is not", "[reconstruction][gradient]") {
  for (const auto& reduction : std::vector<Reduction>{torch::kMean, torch::kSum}) {
    const Tensor logits = leaf(tensor(std::vector<double>{2e38, -2e38}, {1, 2}, torch::kFloat));
    const Tensor loss = compute_reconstruction_loss(logits, torch::tensor({1}), with(reduction));
    CHECK(loss.item<double>() == INFINITY);
    CHECK(values(gradient(loss, logits)) == std::vector<double>{1, -1});
  }
}

TEST_CASE("A row in which every class is forbidden, or one is infinite, is NaN wherever it has a part in the loss",
          "[reconstruction]") {
  for (const auto type : all_types) {
    for (const int64_t classes : {2, 21, 600}) {
      const Tensor contiguous = rows_without_softmax(classes, type);
      const Tensor class_index = torch::zeros({4}, torch::kLong);
      const Tensor all_but_target = torch::ones({classes}), none = torch::zeros({classes});
      all_but_target[0].fill_(0);
      for (const Tensor& logits : {contiguous, with_strided_rows(contiguous)}) {
        for (const Tensor& targets : {class_index, torch::one_hot(class_index, classes).to(type)}) {
          for (const Tensor& weight : {Tensor(), all_but_target, none}) {
            for (const double smoothing : {0.0, 0.25, 1.0}) {
              for (const double z_loss : {0.0, 0.125}) {
                INFO(type << ' ' << classes << ' ' << logits.stride(-1) << ' ' << targets.dim() << " weight " << weight
                          << " smoothing " << smoothing << " z " << z_loss);
                auto options = with(torch::kNone).label_smoothing(smoothing).z_loss(z_loss);
                if (weight.defined()) options.weight(weight.to(type));
                const bool has_likelihood = !weight.defined() || (smoothing > 0 && weight.sum().item<double>() > 0);
                const double is_bad = has_likelihood || z_loss > 0 ? 1 : 0;
                const Tensor losses = compute_reconstruction_loss(logits, targets, options);
                CHECK(values(losses.isnan()) == std::vector<double>{is_bad, is_bad, is_bad, 0});
                if (is_bad <= 0) CHECK(values(losses) == std::vector<double>(4, 0));
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("Adding a number to all logits of a row changes nothing", "[reconstruction]") {
  const Tensor logits = leaf(eighths({4, 9}, torch::kFloat));
  const Tensor targets = tensor(std::vector<int64_t>{8, 0, 3, 3}, {4});
  const Tensor shifted = leaf(logits + tensor(std::vector<double>{16384, -16384, 1024, 0.125}, {4, 1}, torch::kFloat));
  const Tensor loss = compute_reconstruction_loss(logits, targets),
               other = compute_reconstruction_loss(shifted, targets);
  CHECK(same_bits(loss, other));
  CHECK(same_bits(gradient(loss, logits), gradient(other, shifted)));
}

TEST_CASE("Even the least likely of many equal classes keeps its relative accuracy", "[reconstruction][gradient]") {
  constexpr int64_t classes = 300001;  // 1 - p would round p to a multiple of 6e-8, a fiftieth of it
  const Tensor logits = leaf(torch::zeros({1, classes}, torch::kFloat));
  const Tensor loss = compute_reconstruction_loss(logits, torch::tensor({5}));
  CHECK(difference(loss, {std::log(static_cast<double>(classes))}, 4 * epsilon(torch::kFloat)) == "");
  std::vector<double> expected(classes, 1.0 / classes);
  expected[5] -= 1;
  CHECK(difference(gradient(loss, logits), expected, reconstruction_steps * epsilon(torch::kFloat)) == "");
}

TEST_CASE("Without gradients the loss has the same bits and no graph", "[reconstruction]") {
  for (const auto type : all_types) {
    const Tensor logits = leaf(eighths({4, 6}, type));
    const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, 2}, {4});
    const Tensor expected = compute_reconstruction_loss(logits, targets);
    CHECK(expected.requires_grad());
    {
      const torch::NoGradGuard no_grad;
      const Tensor loss = compute_reconstruction_loss(logits, targets);
      CHECK(same_bits(loss, expected));
      CHECK_FALSE(loss.requires_grad());
    }
    {
      const c10::InferenceMode inference;
      const Tensor copy = logits.clone();
      CHECK(same_bits(compute_reconstruction_loss(logits, targets), expected));
      CHECK(same_bits(compute_reconstruction_loss(copy, targets), expected));
    }
    CHECK_FALSE(compute_reconstruction_loss(logits.detach(), targets).requires_grad());
  }
}

TEST_CASE("A kept graph can be walked again, one that was not kept cannot", "[reconstruction][graph]") {
  const Tensor logits = leaf(eighths({4, 6}));
  const Tensor loss = compute_reconstruction_loss(logits, tensor(std::vector<int64_t>{5, -100, 0, 2}, {4}));
  loss.backward({}, /*retain_graph=*/true);
  const Tensor first = logits.grad().clone();
  loss.backward();
  CHECK(same_bits(logits.grad(), first * 2));
  CHECK_THAT(error_of([&] { loss.backward(); }),
             Catch::Matchers::StartsWith("Trying to backward through the graph a second time"));
}

TEST_CASE("Logits that were changed after the loss make backward an error", "[reconstruction][graph][cpu]") {
  const Tensor logits = leaf(eighths({4, 6})) * 1;
  const Tensor loss = compute_reconstruction_loss(logits, tensor(std::vector<int64_t>{5, -100, 0, 2}, {4}));
  logits.add_(1);
  CHECK_THAT(error_of([&] { loss.backward(); }),
             Catch::Matchers::StartsWith("one of the variables needed for gradient computation has been modified"));
}

TEST_CASE("Targets that are changed after the loss do not change its gradient", "[reconstruction][graph]") {
  const Tensor logits = leaf(eighths({4, 6}));
  const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, 2}, {4});
  const Tensor loss = compute_reconstruction_loss(logits, targets);
  const Tensor before = gradient(loss, logits), second_before = gradient(loss, logits, {}, /*create_graph=*/true);
  targets.fill_(1);
  CHECK(same_bits(gradient(loss, logits), before));
  CHECK(same_bits(gradient(loss, logits, {}, /*create_graph=*/true), second_before));
}

TEST_CASE("A source of logits of one's own is found in its namespace, and gets its gradient", "[reconstruction][cpu]") {
  const Tensor logits = leaf(eighths({4, 6}));
  const Tensor targets = tensor(std::vector<int64_t>{5, -100, 0, 2}, {4});
  const Tensor loss = compute_reconstruction_loss(user::TemperedLogits{logits, 2.0}, targets);
  const Tensor expected = compute_reconstruction_loss(logits / 2.0, targets);
  CHECK(same_bits(loss, expected));
  CHECK(same_bits(gradient(loss, logits), gradient(expected, logits)));
}

TEST_CASE("On a device whose values are not read, a target out of range makes the loss NaN", "[reconstruction]") {
  namespace detail_ = free_transformer::detail;
  const Tensor logits = eighths({3, 6}, torch::kDouble);  // computed in LibTorch operations, as on a device
  for (const int64_t wrong : {6, -1, -100}) {
    detail_::CrossEntropySettings settings;
    settings.targets = tensor(std::vector<int64_t>{5, wrong, 0}, {3});
    settings.ignore_index = 2;
    const auto positions = detail_::cross_entropy_positions(logits, settings, {});
    const Tensor gradient = torch::zeros_like(logits);
    const auto result = detail_::cross_entropy_forward(logits, settings, positions, detail_::ReductionKind::mean,
                                                       /*count_hits=*/false, gradient);
    CHECK(std::isnan(result.loss.item<double>()));
    CHECK(gradient.isnan().all().item<bool>());
    const auto each = detail_::cross_entropy_forward(logits, settings, positions, detail_::ReductionKind::none,
                                                     /*count_hits=*/false, /*gradient=*/{});
    CHECK(values(each.loss.isnan()) == std::vector<double>{0, 1, 0});
    const auto of = detail_::cross_entropy_rows(logits, settings, positions, {}, {}, {/*sums=*/false, /*each=*/true});
    CHECK(values(of.rows.nll.isnan()) == std::vector<double>{0, 1, 0});
  }
}
