// The options of the reconstruction loss: against references, against LibTorch, in both orders of the gradient, and
// refused.
#include <numeric>

#include "free_transformer/kl_divergence.hpp"
#include "free_transformer/reconstruction_loss.hpp"
#include "instruction_sets.hpp"
#include "numeric.hpp"
#include "operations.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
namespace F = torch::nn::functional;

/// In units of the type of arithmetic: the 8 of the bare loss (reconstruction_loss_test.cpp), and a half each for
/// epsilon, 1 - epsilon, w, u, z, two products with them, and the sum of the parts. What cancels is in the conditions
/// of the references.
constexpr double reconstruction_option_steps = 12;

/// Like `difference`, with a condition for each value.
std::string difference_within(const Tensor& actual, const std::vector<double>& expected, double relative,
                              const std::vector<double>& conditions) {
  const Tensor flat = actual.detach().reshape({-1});
  for (int64_t index = 0; index < flat.numel(); ++index) {
    const auto at = static_cast<size_t>(index);
    const std::string text = difference(flat[index], {expected.at(at)}, relative, conditions.at(at));
    if (!text.empty()) return text + ", index " + std::to_string(index);
  }
  return {};
}

ReconstructionLossOptions options_of(const reference::OptionCase& input, torch::ScalarType type) {
  auto options = ReconstructionLossOptions()
                     .ignore_index(input.ignore_index)
                     .label_smoothing(input.label_smoothing)
                     .z_loss(input.z_loss)
                     .softcap(input.softcap);
  if (!input.token_weight.empty()) {
    options.token_weight(tensor(input.token_weight, {static_cast<int64_t>(input.token_weight.size())}, type));
  }
  if (!input.class_weight.empty()) options.weight(tensor(input.class_weight, {input.classes}, type));
  if (input.normalizer != 0) options.normalizer(input.normalizer);
  return options;
}

/// Four positions, one of them ignored and one of weight 0, five classes.
struct Example {
  Tensor logits = eighths({2, 2, 5}) / 4;
  Tensor targets = tensor(std::vector<int64_t>{3, -100, 0, 2}, {2, 2});
  Tensor probabilities =
      torch::cat({torch::tensor({0.5, 0.25, 0.25, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0}, torch::kDouble),
                  torch::tensor({0.2, 0.2, 0.2, 0.2, 0.2, 0.0, 0.125, 0.0, 0.0, 0.875}, torch::kDouble)})
          .reshape({2, 2, 5});
  Tensor token_weight = tensor(std::vector<double>{0.5, 1, 2, 0}, {2, 2});
  Tensor class_weight = tensor(std::vector<double>{1.5, 0.25, 2, 0, 1}, {5});

  /// One option for each bit of the number.
  ReconstructionLossOptions options(unsigned bits, torch::ScalarType type = torch::kDouble) const {
    ReconstructionLossOptions result;
    if (bits & 1) result.token_weight(token_weight.to(type));
    if (bits & 2) result.weight(class_weight.to(type));
    if (bits & 4) result.label_smoothing(0.25);
    if (bits & 8) result.z_loss(0.125);
    if (bits & 16) result.softcap(4);
    if (bits & 32) result.normalizer(3);
    return result;
  }
};

constexpr unsigned all_options = 31;

int64_t nonzeros(const Tensor& values) { return values.count_nonzero().item<int64_t>(); }

}  // namespace

TEST_CASE("Every option has the value and the gradient of its equation", "[reconstruction][options][reference]") {
  const Forced forced(GENERATE(from_range(available_instruction_sets())));
  for (const auto& expected : reference::option_cases) {
    for (const auto type : all_types) {
      if (!holds(type, expected.exact)) continue;
      const auto rows = static_cast<int64_t>(expected.losses.size());
      const Tensor dense = tensor(expected.logits, {rows, expected.classes}, type);
      const Tensor targets = expected.targets.empty() ? tensor(expected.probabilities, {rows, expected.classes}, type)
                                                      : tensor(expected.targets, {rows});
      const double relative = reconstruction_option_steps * epsilon(arithmetic(type));
      const double mean_in_sum = std::accumulate(expected.loss_conditions.begin(), expected.loss_conditions.end(), 0.0);
      for (const Tensor& layout : {dense, with_strided_rows(dense)}) {
        INFO(expected.name << ", " << type << ", strides " << layout.strides());
        const Tensor logits = leaf(layout);
        auto options = options_of(expected, type);
        const Tensor mean = compute_reconstruction_loss(logits, targets, options);
        const Tensor sum =
            compute_reconstruction_loss(logits, targets, ReconstructionLossOptions(options).reduction(torch::kSum));
        const Tensor losses =
            compute_reconstruction_loss(logits, targets, ReconstructionLossOptions(options).reduction(torch::kNone));
        CHECK(mean.scalar_type() == arithmetic(type));
        CHECK(losses.scalar_type() == arithmetic(type));
        CHECK(difference(mean, {expected.mean}, relative, expected.mean_condition) == "");
        CHECK(difference(sum, {expected.sum}, relative, mean_in_sum) == "");
        CHECK(difference_within(losses, expected.losses, relative, expected.loss_conditions) == "");

        const Tensor of_mean = gradient(mean, logits);
        CHECK(of_mean.scalar_type() == type);
        CHECK(difference_within(of_mean, expected.gradient, relative, expected.gradient_conditions) == "");
        if (expected.normalizer != 0) {
          options.normalizer(torch::tensor(expected.normalizer, torch::kDouble));
          const Tensor by_tensor = compute_reconstruction_loss(logits, targets, options);
          CHECK(difference(by_tensor, {expected.mean}, relative, expected.mean_condition) == "");
          CHECK(difference_within(gradient(by_tensor, logits), expected.gradient, relative,
                                  expected.gradient_conditions) == "");
        }
      }
    }
  }
}

TEST_CASE("Cross entropy is LibTorch's own for all options that it has", "[reconstruction][options][libtorch]") {
  // LibTorch takes x - max - log(sum): its loss of a position is off by steps of the largest difference of two logits,
  // 16, at most, and p by as much of itself. Weights are at most 2, and a sum has 12 positions.
  constexpr double also = 2 * 16;
  const Tensor whole = eighths({3, 9, 7});
  const Tensor targets = (torch::arange(12) * 5).remainder(7).reshape({3, 4});
  targets.select(0, 1).select(0, 2).fill_(4);
  const Tensor probabilities = (eighths({3, 4, 7}, torch::kDouble, 5) / 4).softmax(-1);
  const Tensor class_weight = tensor(std::vector<double>{1.5, 0.25, 2, 0, 1, 0.5, 1}, {7});
  const Tensor upstream = eighths({3, 4}, torch::kDouble, 2);

  const auto compare = [&](const Tensor& layout, const Tensor& target, const Reduction& reduction, bool weighted,
                           double smoothing, int64_t ignore_index, bool with_probabilities) {
    const auto type = layout.scalar_type();
    auto ours = ReconstructionLossOptions().reduction(reduction).label_smoothing(smoothing).ignore_index(ignore_index);
    auto theirs = F::CrossEntropyFuncOptions().label_smoothing(smoothing).ignore_index(ignore_index);
    if (weighted) ours.weight(class_weight.to(type)), theirs.weight(class_weight.to(type));
    std::visit([&](const auto& choice) { theirs.reduction(choice); }, reduction);
    const Tensor x = leaf(layout), other = leaf(layout.contiguous());
    const Tensor loss = compute_reconstruction_loss(x, target, ours);
    const Tensor flat = with_probabilities ? target.reshape({-1, 7}) : target.reshape({-1});
    const Tensor expected = F::cross_entropy(other.reshape({-1, 7}), flat, theirs);
    const Tensor seed = expected.dim() == 0 ? torch::ones_like(expected) : upstream.reshape({-1}).to(type);
    const double relative = reconstruction_option_steps * epsilon(type);
    CHECK(loss.dim() == (expected.dim() == 0 ? 0 : 2));
    CHECK(difference(loss.reshape(expected.sizes()), expected, relative, expected.dim() == 0 ? also * 12 : also) == "");
    CHECK(difference(gradient(loss, x, seed.reshape(loss.sizes())), gradient(expected, other, seed), relative,
                     expected.dim() == 0 ? also : also * 8) == "");
  };
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const std::vector<std::pair<const char*, Tensor>> layouts{
        {"contiguous", whole.slice(1, 0, 4).to(type).contiguous()},
        {"sliced", whole.to(type).slice(1, 2, 6)},
        {"every second position", whole.to(type).slice(1, 0, 8, 2)},
        {"positions transposed", eighths({4, 3, 7}, type).transpose(0, 1)},
        {"classes first", eighths({7, 3, 4}, type).permute({1, 2, 0})},
    };
    for (const auto& [name, layout] : layouts) {
      for (const bool weighted : {false, true}) {
        for (const double smoothing : {0.0, 0.1, 1.0}) {
          for (const auto& reduction : all_reductions) {
            for (const int64_t ignore_index : {-100, 4}) {
              INFO(type << ", " << name << ", weighted " << weighted << ", smoothing " << smoothing << ", reduction "
                        << reduction.index() << ", ignore_index " << ignore_index);
              compare(layout, targets, reduction, weighted, smoothing, ignore_index, false);
              if (ignore_index < 0) {
                compare(layout, targets.masked_fill(targets == 5, -100), reduction, weighted, smoothing, -100, false);
                compare(layout, probabilities.to(type), reduction, weighted, smoothing, -100, true);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("Every combination of options agrees with finite differences in both orders",
          "[reconstruction][options][gradient]") {
  const Example example;
  const Tensor upstream = tensor(std::vector<double>{1, 5, -0.5, 2}, {2, 2}) / 4;
  for (unsigned bits = 0; bits < 64; ++bits) {
    for (const Tensor& targets : {example.targets, example.probabilities}) {
      INFO("options " << bits << ", probabilities " << targets.is_floating_point());
      const auto options = example.options(bits);
      check_gradients([&](const Tensor& x) { return compute_reconstruction_loss(x, targets, options); },
                      example.logits);
      if (bits >= 32) continue;  // unreduced losses have no normalizer
      const auto each = ReconstructionLossOptions(options).reduction(torch::kNone);
      check_gradients([&](const Tensor& x) { return (compute_reconstruction_loss(x, targets, each) * upstream).sum(); },
                      example.logits);
    }
  }
}

TEST_CASE("With all options an upstream gradient may depend on the logits, and gets a gradient",
          "[reconstruction][options][gradient]") {
  const Example example;
  const auto each = example.options(all_options).reduction(torch::kNone);
  for (const Tensor& targets : {example.targets, example.probabilities}) {
    check_gradients([&](const Tensor& x) { return compute_reconstruction_loss(x, targets, each).square().sum() / 16; },
                    example.logits);
    check_gradients(
        [&](const Tensor& x) {
          return compute_reconstruction_loss(x, targets, example.options(all_options)).square() / 8;
        },
        example.logits);

    const Tensor x = leaf(example.logits), upstream = leaf(tensor(std::vector<double>{1, 2, -1, 0.5}, {2, 2}));
    const Tensor losses = compute_reconstruction_loss(x, targets, each);
    const Tensor alone = gradient(losses, x, torch::ones_like(losses));
    CHECK(difference(gradient(losses, x, upstream), alone * upstream.unsqueeze(-1), 4 * epsilon(torch::kDouble)) == "");
    const Tensor first = gradient(losses, x, upstream, /*create_graph=*/true);
    CHECK(difference(gradient(first.square().sum(), upstream), 2 * upstream * alone.square().sum(-1), 1e-14, 1) == "");
  }
}

TEST_CASE("Tokens that do not count have exactly no loss and no gradient, whatever their logits and the options",
          "[reconstruction][options][gradient]") {
  const Example example;  // positions 1 (ignored) and 3 (of weight 0) do not count
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const double garbage : {not_a_number, reference::inf, -reference::inf}) {
        for (const auto& reduction : all_reductions) {
          for (const Tensor& targets : {example.targets, example.probabilities.to(type)}) {
            for (const unsigned bits : {1u, all_options & ~16u, all_options}) {
              INFO(type << ", strided " << strided << ", " << garbage << ", reduction " << reduction.index()
                        << ", probabilities " << targets.is_floating_point() << ", options " << bits);
              const auto options = example.options(bits, type).reduction(reduction);
              Tensor clean = example.logits.to(type).clone(), dirty = clean.clone();
              const bool ignores = !targets.is_floating_point();
              if (ignores) dirty.select(0, 0).select(0, 1).fill_(garbage);
              dirty.select(0, 1).select(0, 1).fill_(garbage);
              if (strided) clean = with_strided_rows(clean), dirty = with_strided_rows(dirty);
              clean = leaf(clean), dirty = leaf(dirty);
              const Tensor loss = compute_reconstruction_loss(dirty, targets, options);
              const Tensor expected = compute_reconstruction_loss(clean, targets, options);
              CHECK(same_bits(loss, expected));
              const Tensor upstream = torch::ones_like(loss);
              const Tensor found = gradient(loss, dirty, upstream);
              CHECK(same_bits(found, gradient(expected, clean, upstream)));
              const Tensor again = gradient(loss, dirty, upstream, /*create_graph=*/true);
              CHECK(difference(again, found, 2 * epsilon(type)) == "");  // the divisor is rounded once more
              const Tensor second = gradient(again.to(torch::kDouble).square().sum(), dirty);
              CHECK(same_bits(
                  second,
                  gradient(gradient(expected, clean, upstream, true).to(torch::kDouble).square().sum(), clean)));
              for (const Tensor& values : {found, second}) {
                CHECK(values.isfinite().all().item<bool>());
                CHECK(nonzeros(values.select(0, 1).select(0, 1)) == 0);
                if (ignores) CHECK(nonzeros(values.select(0, 0).select(0, 1)) == 0);
              }
              if (loss.dim() == 2) {
                CHECK(loss[1][1].item<double>() == 0);
                if (ignores) CHECK(loss[0][1].item<double>() == 0);
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("A target of a class of weight 0 has no likelihood term; smoothing and z-loss still see it",
          "[reconstruction][options]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      INFO(type << ", strided " << strided);
      const auto layout = [&](const Tensor& x) { return leaf(strided ? with_strided_rows(x) : x.clone()); };
      const Tensor logits = layout(eighths({3, 5}, type));
      const Tensor targets = indices({4, 1, 1});
      const Tensor weight = tensor(std::vector<double>{1, 0, 1, 1, 2}, {5}, type);
      const auto each = ReconstructionLossOptions().weight(weight).reduction(torch::kNone);
      const Tensor losses = compute_reconstruction_loss(logits, targets, each);
      const Tensor found = gradient(losses, logits, torch::ones_like(losses));
      CHECK(values(losses.slice(0, 1)) == std::vector<double>{0, 0});
      CHECK(losses[0].item<double>() > 0);
      CHECK(nonzeros(found.slice(0, 1)) == 0);
      for (const auto& options :
           {ReconstructionLossOptions(each).label_smoothing(0.5), ReconstructionLossOptions(each).z_loss(0.5)}) {
        CHECK((compute_reconstruction_loss(logits, targets, options) > 0).all().item<bool>());
      }

      // A class of weight 0 that the mask forbids too: 0 inf is 0 here.
      Tensor masked = eighths({3, 5}, type);
      masked.select(1, 1).fill_(-reference::inf);
      masked = layout(masked);
      const Tensor of_masked = compute_reconstruction_loss(masked, targets, each);
      CHECK(values(of_masked.slice(0, 1)) == std::vector<double>{0, 0});
      CHECK(nonzeros(gradient(of_masked, masked, torch::ones_like(of_masked)).slice(0, 1)) == 0);

      // No weight at all is a mean over nothing.
      const Tensor nothing =
          compute_reconstruction_loss(logits, indices({1, 1, 1}), ReconstructionLossOptions().weight(weight));
      CHECK(nothing.item<double>() == 0);
      CHECK(nonzeros(gradient(nothing, logits)) == 0);
    }
  }
}

TEST_CASE("A target of a class of weight 0 has no gradient, whatever the logits of its row",
          "[reconstruction][options]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const int64_t classes : {5, 100}) {
        for (const double garbage : {reference::inf, not_a_number}) {
          INFO(type << ", strided " << strided << ", " << classes << " classes, " << garbage);
          Tensor logits = eighths({2, classes}, type);
          logits.select(0, 0).select(0, 1).fill_(garbage);
          logits = leaf(strided ? with_strided_rows(logits) : logits);
          const Tensor weight = torch::ones({classes}, type).index_fill(0, torch::tensor({1}), 0);
          const auto options = ReconstructionLossOptions().weight(weight);
          for (const bool create_graph : {false, true}) {
            const Tensor loss = compute_reconstruction_loss(logits, indices({1, 2}), options);
            const Tensor found = gradient(loss, logits, {}, create_graph);
            CHECK(std::isfinite(loss.item<double>()));
            CHECK(nonzeros(found[0]) == 0);
            CHECK(found[1].isfinite().all().item<bool>());
          }
        }
      }
    }
  }
}

TEST_CASE("A mean does not depend on the scale of its weights, and what float32 cannot multiply is refused",
          "[reconstruction][options][cpu]") {
  const auto type = GENERATE(torch::kDouble, torch::kFloat);
  const int64_t classes = GENERATE(5, 100);
  const bool strided = GENERATE(false, true);
  const Tensor dense = eighths({3, classes}, type), targets = indices({4, 1, 2}), z_logits = eighths({3, 2}, type);
  const Tensor logits = leaf(strided ? with_strided_rows(dense) : dense);
  const Tensor plain = compute_reconstruction_loss(logits, targets), expected = gradient(plain, logits);
  for (const double scale : {1e-50, 1e-16, 1e-15, 1e-8, 1e8, 1e15, 1e16, 1e39}) {
    INFO(type << ", " << classes << " classes, strided " << strided << ", weights " << scale);
    const Tensor token_weight = torch::full({3}, scale, torch::kDouble);
    const auto options =
        ReconstructionLossOptions().token_weight(token_weight).weight(torch::full({classes}, scale, torch::kDouble));
    const auto latent_options = KLDivergenceOptions().latent_dim(2).token_weight(token_weight);
    if (type == torch::kFloat && (scale < 1e-15 || scale > 1e15)) {
      const std::string refusal = "token_weight must be 0 everywhere or have its largest value in [1e-15, 1e15], got ";
      CHECK(error_of([&] { compute_reconstruction_loss(logits, targets, options); }).find(refusal) !=
            std::string::npos);
      CHECK(error_of([&] { compute_kl_divergence(z_logits, latent_options); }).find(refusal) != std::string::npos);
      continue;
    }
    const Tensor loss = compute_reconstruction_loss(logits, targets, options);
    CHECK(difference(loss, plain, reconstruction_option_steps * epsilon(type)) == "");
    CHECK(difference(gradient(loss, logits), expected, reconstruction_option_steps * epsilon(type)) == "");
    CHECK(difference(compute_kl_divergence(z_logits, latent_options), compute_kl_divergence(z_logits, 2),
                     reconstruction_option_steps * epsilon(type)) == "");
  }
}

TEST_CASE("A mean of nothing is 0 with the smallest normalizer, too", "[reconstruction][options]") {
  for (const auto type : all_types) {
    for (const Normalizer& normalizer : {Normalizer(1e-310), Normalizer(torch::tensor(1e-310, torch::kDouble))}) {
      const Tensor logits = leaf(eighths({2, 5}, type));
      const Tensor loss = compute_reconstruction_loss(logits, indices({-100, -100}),
                                                      ReconstructionLossOptions().normalizer(normalizer));
      CHECK(loss.item<double>() == 0);
      CHECK(nonzeros(gradient(loss, logits)) == 0);
    }
  }
}

TEST_CASE("Class probabilities of weight 0 do not matter to a second derivative, whatever they are",
          "[reconstruction][options]") {
  const Tensor logits = leaf(eighths({2, 4})), factor = leaf(torch::ones({}, torch::kDouble));
  Tensor probabilities = torch::full({2, 4}, 0.25, torch::kDouble);
  const auto options = ReconstructionLossOptions().token_weight(tensor(std::vector<double>{0, 1}, {2}));
  const auto second = [&] {
    const Tensor loss = compute_reconstruction_loss(logits, probabilities, options) * factor;
    return gradient(gradient(loss, logits, {}, /*create_graph=*/true).square().sum(), factor);
  };
  const Tensor expected = second();
  probabilities[0].fill_(not_a_number);
  CHECK(same_bits(second(), expected));
  CHECK(expected.item<double>() > 0);
}

TEST_CASE("With a label smoothing of 1 the target has no share of its own, however impossible it is",
          "[reconstruction][options]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      INFO(type << ", strided " << strided);
      Tensor logits = eighths({1, 5}, type);
      logits.select(1, 1).fill_(-reference::inf);
      logits = logits.expand({5, 5}).contiguous();
      if (strided) logits = with_strided_rows(logits);
      const Tensor weight = tensor(std::vector<double>{1, 0, 1, 1, 2}, {5}, type),
                   every_target = indices({0, 1, 2, 3, 4});
      const auto smoothed = ReconstructionLossOptions().label_smoothing(1).reduction(torch::kNone);
      CHECK(values(compute_reconstruction_loss(logits, every_target, smoothed)) ==
            std::vector<double>(5, reference::inf));
      const Tensor possible =
          compute_reconstruction_loss(logits, every_target, ReconstructionLossOptions(smoothed).weight(weight));
      CHECK(values(possible) == std::vector<double>(5, possible[0].item<double>()));
      CHECK(possible[0].item<double>() > 0);
      CHECK(std::isfinite(possible[0].item<double>()));
    }
  }
}

TEST_CASE("A sum and unreduced losses ignore the normalizer, a mean is the sum divided by it",
          "[reconstruction][options]") {
  const Example example;
  for (const auto type : {torch::kDouble, torch::kFloat, torch::kBFloat16}) {
    for (const Tensor& targets : {example.targets, example.probabilities.to(type)}) {
      const Tensor x = leaf(example.logits.to(type));
      const auto options = example.options(all_options, type);
      const auto loss = [&](Reduction reduction, const Normalizer& normalizer) {
        return compute_reconstruction_loss(
            x, targets, ReconstructionLossOptions(options).reduction(reduction).normalizer(normalizer));
      };
      const auto same = [&](const Tensor& a, const Tensor& b) {
        return same_bits(a, b) && same_bits(gradient(a, x, torch::ones_like(a)), gradient(b, x, torch::ones_like(b)));
      };
      const Tensor sum = loss(torch::kSum, {});
      for (const Normalizer& normalizer : {Normalizer(8), Normalizer(torch::tensor(8.0, torch::kDouble)),
                                           Normalizer(torch::tensor(8.0f)), Normalizer(torch::tensor(int64_t{8}))}) {
        CHECK(same(loss(torch::kSum, normalizer), sum));
        CHECK(same(loss(torch::kNone, normalizer), loss(torch::kNone, {})));
        CHECK(same_bits(loss(torch::kMean, normalizer), sum / 8));  // a power of two
        CHECK(same(loss(torch::kMean, normalizer), loss(torch::kMean, 8.0)));
      }
    }
  }
}

TEST_CASE("Weights of every type give the same loss", "[reconstruction][options]") {
  const Example example;
  const Tensor logits = example.logits.to(torch::kFloat);
  const auto expected =
      compute_reconstruction_loss(logits, example.targets, example.options(all_options, torch::kFloat));
  for (const auto type : all_types) {
    CHECK(
        same_bits(compute_reconstruction_loss(logits, example.targets, example.options(all_options, type)), expected));
  }
  auto strided = example.options(all_options, torch::kFloat);
  strided.token_weight(with_strided_rows(strided.token_weight())).weight(with_strided_rows(strided.weight()));
  CHECK(same_bits(compute_reconstruction_loss(logits, example.targets, strided), expected));
}

TEST_CASE("Weights that are changed after the loss do not change its gradient", "[reconstruction][options][graph]") {
  const Example example;
  for (const bool strided : {false, true}) {
    for (const Tensor& from : {example.targets, example.probabilities}) {
      const Tensor targets = from.clone(), token_weight = example.token_weight.clone(),
                   weight = example.class_weight.clone();
      const Tensor normalizer = torch::tensor(3.0, torch::kDouble);
      const Tensor x = leaf(strided ? with_strided_rows(example.logits) : example.logits);
      const auto options =
          ReconstructionLossOptions().token_weight(token_weight).weight(weight).normalizer(normalizer).z_loss(0.5);
      const Tensor loss = compute_reconstruction_loss(x, targets, options);
      const Tensor before = gradient(loss, x), second = gradient(loss, x, {}, /*create_graph=*/true);
      for (const Tensor& changed : {token_weight, weight, normalizer}) changed.fill_(7);
      INFO("strided " << strided << ", probabilities " << targets.is_floating_point());
      CHECK(same_bits(gradient(loss, x), before));
      CHECK(same_bits(gradient(loss, x, {}, /*create_graph=*/true), second));
    }
  }
}

TEST_CASE("A normalizer that is changed after the loss does not change its gradient", "[reconstruction][kl][graph]") {
  for (const auto type : all_types) {
    INFO(type);
    const Tensor logits = leaf(eighths({4, 5}, type)), targets = torch::arange(4);
    const Tensor normalizer = torch::tensor(3.0);
    for (const Tensor& loss :
         {compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().normalizer(normalizer)),
          compute_kl_divergence(logits, KLDivergenceOptions().latent_dim(5).normalizer(normalizer))}) {
      const Tensor before = gradient(loss / 2, logits);
      normalizer.fill_(6);
      CHECK(same_bits(gradient(loss / 2, logits), before));
      normalizer.fill_(3);
    }
  }
}

TEST_CASE("LibTorch operations read no value with any option, neither forward nor backward",
          "[reconstruction][options][device][cpu]") {
  const Example example;
  for (const Tensor& targets : {example.targets, example.probabilities}) {
    const auto options = example.options(all_options).normalizer(torch::tensor(3.0, torch::kDouble));
    const Tensor x = leaf(with_strided_rows(example.logits));
    const auto operations = operations_of([&] {
      gradient(compute_reconstruction_loss(x, targets, options), x);
      gradient(compute_reconstruction_loss(x, targets, options), x, {}, /*create_graph=*/true);
    });
    CHECK(operations.size() > 20);
    for (const auto& operation : operations) {
      INFO(operation);
      CHECK_FALSE(reads_a_value(operation));
    }
  }
}

TEST_CASE("Settings of the reconstruction loss that are out of range are refused",
          "[reconstruction][options][errors]") {
  const Tensor logits = eighths({2, 5}), targets = indices({0, 1});
  const auto error = [&](const ReconstructionLossOptions& options) {
    return after_name("compute_reconstruction_loss",
                      error_of([&] { compute_reconstruction_loss(logits, targets, options); }));
  };
  const auto with = [] { return ReconstructionLossOptions(); };
  for (const double value : {1e39, 1e-46}) {
    CHECK(error(with().softcap(value)).find("softcap must be 0 or in [1e-30, 1e30], got ") == 0);
  }
  CHECK(error(with().label_smoothing(-0.25)) == "label_smoothing must be in [0, 1], got -0.25");
  CHECK(error(with().label_smoothing(1.5)) == "label_smoothing must be in [0, 1], got 1.5");
  CHECK(error(with().label_smoothing(not_a_number)) == "label_smoothing must be in [0, 1], got nan");
  for (const auto& [value, text] :
       {std::pair<double, const char*>{-0.5, "-0.5"}, {reference::inf, "inf"}, {not_a_number, "nan"}}) {
    CHECK(error(with().z_loss(value)) == std::string("z_loss must be finite and >= 0, got ") + text);
    CHECK(error(with().softcap(value)) == std::string("softcap must be finite and >= 0, got ") + text);
    CHECK(error(with().normalizer(value)) == std::string("normalizer must be finite and > 0, got ") + text);
    CHECK(error(with().normalizer(value).reduction(torch::kSum)) ==
          std::string("normalizer must be finite and > 0, got ") + text);
  }
  CHECK(error(with().normalizer(0)) == "normalizer must be finite and > 0, got 0");
  CHECK(error(with().normalizer(torch::ones({2}))) ==
        "normalizer must be a number or a real tensor of one element, got shape [2] of type Float");
  CHECK(error(with().normalizer(torch::ones({}, torch::kComplexFloat))) ==
        "normalizer must be a number or a real tensor of one element, got shape [] of type ComplexFloat");
  CHECK(error(with().normalizer(Tensor())) == "normalizer must be a number or a defined tensor, got an undefined one");
  CHECK(error(with().normalizer(torch::ones({}).requires_grad_())) ==
        "normalizer must not require grad (it gets none; detach it), got requires_grad = true");
}

TEST_CASE("Weights of the reconstruction loss that do not fit are refused", "[reconstruction][options][errors][cpu]") {
  const Tensor logits = eighths({2, 5}), targets = indices({0, 1});
  const auto meta = torch::TensorOptions().device(torch::kMeta);
  const auto token = [&](const Tensor& weight) {
    return error_of(
        [&] { compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().token_weight(weight)); });
  };
  const std::string token_weight = "compute_reconstruction_loss: token_weight must ";
  CHECK(token(torch::tensor({1.0, -0.5})) == token_weight + "be finite and >= 0, got -0.5 at index 1");
  CHECK(token(torch::tensor({not_a_number, 1.0})) == token_weight + "be finite and >= 0, got nan at index 0");
  CHECK(token(torch::tensor({1.0, reference::inf})) == token_weight + "be finite and >= 0, got inf at index 1");
  CHECK(token(torch::ones({2}, torch::kLong)) == token_weight + "be bool or floating, got Long");
  CHECK(token(torch::ones({2, 1})) == token_weight + "have one value for each position, shape [2], got [2, 1]");
  CHECK(token(torch::ones({})) == token_weight + "have one value for each position, shape [2], got []");
  CHECK(token(torch::ones({2}, meta)) == token_weight + "be on the device of the logits, cpu, got meta");
  CHECK(token(torch::ones({2}).to_sparse()) == token_weight + "be a dense (strided) tensor, got layout Sparse");
  CHECK(token(torch::ones({2}).requires_grad_()) ==
        token_weight + "not require grad (it gets none; detach it), got requires_grad = true");

  const auto classes = [&](const Tensor& weight) {
    return error_of([&] { compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().weight(weight)); });
  };
  const std::string class_weight = "compute_reconstruction_loss: weight must ";
  CHECK(classes(torch::tensor({1.0, 1.0, -2.0, 1.0, 1.0})) == class_weight + "be finite and >= 0, got -2 at index 2");
  CHECK(classes(torch::tensor({1.0, 1.0, 1.0, 1.0, not_a_number})) ==
        class_weight + "be finite and >= 0, got nan at index 4");
  CHECK(classes(torch::ones({4})) == class_weight + "have the shape [vocab_size] = [5], got [4]");
  CHECK(classes(torch::ones({1, 5})) == class_weight + "have the shape [vocab_size] = [5], got [1, 5]");
  CHECK(classes(torch::ones({5}, torch::kInt)) ==
        class_weight + "be of type float64, float32, float16 or bfloat16, got Int");
  CHECK(classes(torch::ones({5}, meta)) == class_weight + "be on the device of the logits, cpu, got meta");
  CHECK(classes(torch::ones({5}).requires_grad_()) ==
        class_weight + "not require grad (it gets none; detach it), got requires_grad = true");
}

TEST_CASE("Class probabilities that do not fit are refused", "[reconstruction][options][errors][cpu]") {
  const Tensor logits = eighths({2, 5});
  const auto error = [&](const Tensor& probabilities, int64_t ignore_index = -100) {
    return error_of([&] { compute_reconstruction_loss(logits, probabilities, ignore_index); });
  };
  const std::string name = "compute_reconstruction_loss: ";
  CHECK(error(torch::ones({2})) ==
        name + "targets that are class probabilities must have the shape of the logits, [2, 5], got [2]");
  CHECK(error(torch::ones({2, 4})) ==
        name + "targets that are class probabilities must have the shape of the logits, [2, 5], got [2, 4]");
  CHECK(error(torch::ones({2, 5}), 3) ==
        name + "ignore_index must be left at its default with class probabilities, got 3");
  CHECK(error(torch::ones({2, 5}).requires_grad_()) ==
        name + "targets must not require grad (it gets none; detach it), got requires_grad = true");
}
