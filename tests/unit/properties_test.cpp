// Identities that hold for any input, each over a few hundred random cases. A failure prints the seed of its case.
#include <numeric>
#include <random>

#include "free_transformer/losses.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

constexpr unsigned case_count = 300;

/// Where both sides compute the same terms, only the sums over positions and the final products differ: those are in
/// float64 or rounded once, and their terms are not negative.
constexpr double sum_steps = 4;

/// Where the terms are computed in another way, each side is off by the 12 steps of reconstruction_options_test.cpp.
constexpr double term_steps = 2 * 12;

/// A random call: positions, classes, latent bits, type, layout and options are all drawn from the seed.
class RandomCase {
 public:
  explicit RandomCase(unsigned seed) : generator_(seed) {
    type = chance(0.5) ? torch::kDouble : torch::kFloat;
    positions = integer(1, 24);
    classes = integer(2, 40);
    bits = integer(1, 9);
    // Multiples of 1/8 below 16: exact in float32, and so are their differences.
    logits = random({positions, classes}, -100, 100);
    if (chance(0.3)) logits = random({classes, positions}, -100, 100).t();
    z_logits = random({positions, bits}, -30, 30);
    targets = torch::empty({positions}, torch::kLong);
    for (int64_t t = 0; t < positions; ++t) targets[t] = integer(0, classes - 1);
    if (chance(0.5)) targets.masked_fill_(random({positions}, 0, 3) == 0, -100);
    if (chance(0.5)) token_weight = random({positions}, 0, 16);
    if (chance(0.5)) class_weight = random({classes}, 0, 16);
    if (chance(0.5)) label_smoothing = 0.1;
    if (chance(0.5)) z_loss = 0.01;
    if (chance(0.3)) softcap = 6;
    if (chance(0.5)) prior_logits = chance(0.5) ? random({bits}, -10, 10) : random({positions, bits}, -10, 10);
    free_bits = 0.125 * static_cast<double>(integer(0, 8));
  }

  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator_); }
  bool chance(double probability) { return std::bernoulli_distribution(probability)(generator_); }

  Tensor random(torch::IntArrayRef shape, int64_t low, int64_t high) {
    std::vector<double> eighths(static_cast<size_t>(c10::multiply_integers(shape)));
    for (double& value : eighths) value = static_cast<double>(integer(low, high)) / 8;
    return numeric::tensor(eighths, shape, type);
  }

  Tensor permutation() {
    std::vector<int64_t> order(static_cast<size_t>(positions));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator_);
    return numeric::tensor(order, {positions});
  }

  /// Random cuts into consecutive micro-batches, empty ones among them.
  std::vector<int64_t> cuts() {
    std::vector<int64_t> result{0, positions};
    for (int64_t count = integer(0, 5); count > 0; --count) result.push_back(integer(0, positions));
    std::sort(result.begin(), result.end());
    return result;
  }

  /// The case at these positions only, in a copy.
  RandomCase at(const Tensor& rows) const {
    RandomCase result = *this;
    result.positions = rows.numel();
    for (Tensor* all : {&result.logits, &result.targets, &result.z_logits, &result.token_weight}) {
      if (all->defined()) *all = all->index_select(0, rows);
    }
    if (prior_logits.defined() && prior_logits.dim() == 2) result.prior_logits = prior_logits.index_select(0, rows);
    return result;
  }

  /// The case at consecutive positions, where they lie.
  RandomCase part(int64_t first, int64_t last) const {
    RandomCase result = *this;
    result.positions = last - first;
    for (Tensor* all : {&result.logits, &result.targets, &result.z_logits, &result.token_weight}) {
      if (all->defined()) *all = all->slice(0, first, last);
    }
    if (prior_logits.defined() && prior_logits.dim() == 2) result.prior_logits = prior_logits.slice(0, first, last);
    return result;
  }

  ReconstructionLossOptions reconstruction() const {
    return ReconstructionLossOptions()
        .token_weight(token_weight)
        .weight(class_weight)
        .label_smoothing(label_smoothing)
        .z_loss(z_loss)
        .softcap(softcap);
  }

  KLDivergenceOptions kl() const {
    return KLDivergenceOptions()
        .latent_dim(bits)
        .free_bits(free_bits)
        .token_weight(token_weight)
        .prior_logits(prior_logits);
  }

  double relative(double steps_of_type) const { return steps_of_type * epsilon(type); }

  /// What the hinge takes from a KL, whose rounding stays. On a device that rounding depends on the order: LibTorch's
  /// operations round an element as it falls into their vectors.
  double taken_by_hinge() const { return test_device() ? free_bits * static_cast<double>(bits) : 0; }

  /// What smoothing takes from a probability, whose rounding stays: of a position's gradient at most epsilon/C times the
  /// largest class weight over the smallest. A device's kernel reads a row in vectors of where it lies, and rounds so.
  double taken_by_smoothing() const {  // NOLINT(readability-convert-member-functions-to-static): by a macro
#if FREE_TRANSFORMER_DEVICE_KERNELS
    if (free_transformer::detail::device::is_kernel_device(test_device().value_or(torch::kCPU))) {
      return label_smoothing / static_cast<double>(classes) * 16;
    }
#endif
    return 0;
  }

  torch::ScalarType type;
  int64_t positions, classes, bits;
  Tensor logits, targets, z_logits, token_weight, class_weight, prior_logits;
  double label_smoothing = 0, z_loss = 0, softcap = 0, free_bits;

 private:
  std::mt19937 generator_;
};

template <typename Check>
void for_random_cases(const Check& check) {
  for (unsigned seed = 1; seed <= random_cases(case_count); ++seed) {
    RandomCase input(seed);
    INFO("seed " << seed << ", " << input.type << ", " << input.positions << " positions, " << input.classes
                 << " classes, " << input.bits << " bits, token weight " << input.token_weight.defined()
                 << ", class weight " << input.class_weight.defined() << ", smoothing " << input.label_smoothing
                 << ", z-loss " << input.z_loss << ", softcap " << input.softcap << ", prior "
                 << input.prior_logits.defined() << ", free bits " << input.free_bits);
    check(input);
  }
}

/// A loss and its gradients to the logits of tokens or latents and to the prior, if there is one.
struct Outcome {
  Tensor loss, gradient, prior_gradient;
};

Outcome reconstruct_case(const RandomCase& input, const Normalizer& normalizer = {},
                         Reduction reduction = torch::kMean) {
  const Tensor x = leaf(input.logits);
  const Tensor loss =
      compute_reconstruction_loss(x, input.targets, input.reconstruction().normalizer(normalizer).reduction(reduction));
  return {loss.detach(), gradient(loss, x, torch::ones_like(loss)), {}};
}

template <typename FreeBits>
Outcome latent_case(const RandomCase& input, const Normalizer& normalizer = {}) {
  const Tensor z = leaf(input.z_logits);
  auto options = input.kl().normalizer(normalizer);
  if (input.prior_logits.defined()) options.prior_logits(leaf(input.prior_logits));
  const Tensor loss = compute_kl_divergence<FreeBits>(z, options);
  Outcome outcome{loss.detach(), gradient(loss, z), {}};
  if (input.prior_logits.defined()) outcome.prior_gradient = gradient(loss, options.prior_logits());
  return outcome;
}

/// Adds up micro-batches: losses are summed, gradients joined, and those of a prior that all share summed.
template <typename Run>
Outcome split(RandomCase& input, const Run& run) {
  const auto cuts = input.cuts();
  Outcome total;
  std::vector<Tensor> gradients, prior_gradients;
  for (size_t index = 1; index < cuts.size(); ++index) {
    const Outcome part = run(input.part(cuts[index - 1], cuts[index]));
    total.loss = total.loss.defined() ? total.loss + part.loss.to(torch::kDouble) : part.loss.to(torch::kDouble);
    gradients.push_back(part.gradient);
    if (part.prior_gradient.defined()) prior_gradients.push_back(part.prior_gradient.to(torch::kDouble));
  }
  total.gradient = torch::cat(gradients);
  if (!prior_gradients.empty()) {
    total.prior_gradient =
        input.prior_logits.dim() == 1 ? torch::stack(prior_gradients).sum(0) : torch::cat(prior_gradients);
  }
  return total;
}

void check_same(const Outcome& found, const Outcome& expected, double relative, double also = 0) {
  CHECK(difference(found.loss, expected.loss, relative, also) == "");
  CHECK(difference(found.gradient, expected.gradient, relative, also) == "");
  if (expected.prior_gradient.defined()) {  // terms of both signs, of at most 2 for each of 24 positions
    CHECK(difference(found.prior_gradient, expected.prior_gradient, relative, 2 * 24) == "");
  }
}

template <typename Run>
void check_split(RandomCase& input, const Run& run, double also = 0) {
  // ATen's sum over the classes of transposed logits depends on how many rows there are.
  input.logits = input.logits.contiguous();
  const double count = static_cast<double>(input.integer(1, 50)) + 0.5;
  const auto with_tensor = Normalizer(torch::tensor(count, torch::kDouble));
  const Outcome whole = run(input, count);
  const double relative = input.relative(sum_steps);
  check_same(split(input, [&](const RandomCase& part) { return run(part, count); }), whole, relative, also);
  check_same(split(input, [&](const RandomCase& part) { return run(part, with_tensor); }), whole, relative, also);
}

}  // namespace

TEST_CASE("Micro-batches with a common normalizer add up to the reconstruction loss of the whole batch",
          "[properties]") {
  for_random_cases([](RandomCase& input) {
    check_split(
        input, [](const RandomCase& part, const Normalizer& normalizer) { return reconstruct_case(part, normalizer); });
  });
}

TEMPLATE_TEST_CASE("Micro-batches with a common normalizer add up to the latent loss of the whole batch",
                   "[properties]", PerPosition, PerBit) {
  for_random_cases([](RandomCase& input) {
    check_split(
        input,
        [](const RandomCase& part, const Normalizer& normalizer) { return latent_case<TestType>(part, normalizer); },
        input.taken_by_hinge());
  });
}

TEST_CASE("The order of the positions changes nothing", "[properties]") {
  for_random_cases([](RandomCase& input) {
    const Tensor order = input.permutation();
    const RandomCase shuffled = input.at(order);
    const auto compare = [&](const Outcome& found, Outcome expected, double also = 0) {
      expected.gradient = expected.gradient.index_select(0, order);
      if (expected.prior_gradient.defined() && expected.prior_gradient.dim() == 2) {
        expected.prior_gradient = expected.prior_gradient.index_select(0, order);
      }
      check_same(found, expected, input.relative(sum_steps), also);
    };
    // Rows are selected into a contiguous tensor: the other side is made contiguous, too.
    RandomCase contiguous = input;
    contiguous.logits = input.logits.contiguous();
    compare(reconstruct_case(shuffled), reconstruct_case(contiguous), input.taken_by_smoothing());
    compare(latent_case<PerPosition>(shuffled), latent_case<PerPosition>(contiguous), input.taken_by_hinge());
    compare(latent_case<PerBit>(shuffled), latent_case<PerBit>(contiguous), input.taken_by_hinge());
    compare(latent_case<BatchMean>(shuffled), latent_case<BatchMean>(contiguous), input.taken_by_hinge());
  });
}

TEST_CASE("A number added to the logits of a row changes nothing", "[properties]") {
  for_random_cases([](RandomCase& input) {
    input.softcap = input.z_loss = 0;
    RandomCase shifted = input;
    shifted.logits = input.logits + input.random({input.positions, 1}, -32768, 32768);  // sums are exact
    if (input.logits.is_contiguous()) shifted.logits = shifted.logits.contiguous();
    check_same(reconstruct_case(shifted), reconstruct_case(input), input.relative(term_steps));
  });
}

TEST_CASE("Ignored positions that are added change nothing", "[properties]") {
  for_random_cases([](RandomCase& input) {
    // Every position of the padded batch is one of the input or, at index -1, padding with a garbage row.
    std::vector<int64_t> from;
    for (int64_t t = 0; t < input.positions; ++t) {
      for (int64_t count = input.integer(0, 2); count > 0; --count) from.push_back(-1);
      from.push_back(t);
    }
    const Tensor source = numeric::tensor(from, {static_cast<int64_t>(from.size())});
    const Tensor is_padding = source < 0;
    const Tensor rows = (~is_padding).nonzero().squeeze(1);
    RandomCase padded = input.at(source.clamp_min(0));
    const double garbage = input.chance(0.5) ? not_a_number : 3.0;
    padded.logits = padded.logits.masked_fill(is_padding.unsqueeze(1), garbage);
    padded.targets = padded.targets.masked_fill(is_padding, -100);
    RandomCase contiguous = input;
    contiguous.logits = input.logits.contiguous();
    const auto restored = [&](const Outcome& outcome) {
      const Tensor padding = outcome.gradient.index_select(0, is_padding.nonzero().squeeze(1));
      CHECK(padding.count_nonzero().item<int64_t>() == 0);
      return Outcome{outcome.loss, outcome.gradient.index_select(0, rows), {}};
    };
    check_same(restored(reconstruct_case(padded)), reconstruct_case(contiguous), input.relative(sum_steps),
               input.taken_by_smoothing());
    check_same(restored(reconstruct_case(padded, 7)), reconstruct_case(contiguous, 7), input.relative(sum_steps),
               input.taken_by_smoothing());

    // The latent term, masked like the targets: against the positions whose targets count.
    const auto options = [](const RandomCase& of, bool mask) {
      return VAELossOptions().reconstruction(of.reconstruction()).kl(of.kl()).mask_ignored_latents(mask);
    };
    padded.z_logits = padded.z_logits.masked_fill(is_padding.unsqueeze(1), garbage);
    const Tensor counted = (input.targets != -100).nonzero().squeeze(1);
    const RandomCase kept = contiguous.at(counted);
    const Tensor z = leaf(padded.z_logits), expected_z = leaf(kept.z_logits);
    const Tensor loss = compute_vae_loss(padded.logits, padded.targets, z, options(padded, true)).loss;
    const Tensor expected = compute_vae_loss(kept.logits, kept.targets, expected_z, options(kept, false)).loss;
    CHECK(difference(loss, expected, input.relative(sum_steps)) == "");
    CHECK(difference(gradient(loss, z).index_select(0, rows).index_select(0, counted), gradient(expected, expected_z),
                     input.relative(sum_steps)) == "");
  });
}

TEST_CASE("A bool mask is a weight of 0 or 1", "[properties]") {
  for_random_cases([](RandomCase& input) {
    const Tensor mask = input.random({input.positions}, 0, 2) > 0;
    RandomCase masked = input, weighted = input;
    masked.token_weight = mask;
    weighted.token_weight = mask.to(input.type);
    for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
      const Outcome found = reconstruct_case(masked, {}, reduction),
                    expected = reconstruct_case(weighted, {}, reduction);
      CHECK(same_bits(found.loss, expected.loss));
      CHECK(same_bits(found.gradient, expected.gradient));
    }
    const Outcome found = latent_case<PerBit>(masked), expected = latent_case<PerBit>(weighted);
    CHECK(same_bits(found.loss, expected.loss));
    CHECK(same_bits(found.gradient, expected.gradient));
    // And without the masked positions at all, the same mean.
    RandomCase kept = input.at(mask.nonzero().squeeze(1));
    kept.token_weight = Tensor();
    RandomCase contiguous = masked;
    contiguous.logits = masked.logits.contiguous();
    CHECK(difference(reconstruct_case(contiguous).loss, reconstruct_case(kept).loss, input.relative(sum_steps)) == "");
    CHECK(difference(latent_case<PerPosition>(masked).loss, latent_case<PerPosition>(kept).loss,
                     input.relative(sum_steps)) == "");
  });
}

TEST_CASE("Probabilities of one class are its index", "[properties]") {
  for_random_cases([](RandomCase& input) {
    input.targets = input.targets.clamp_min(0);
    RandomCase one_hot = input;
    one_hot.targets = torch::one_hot(input.targets, input.classes).to(input.type);
    // A class weight is in the divisor of a mean over indices only. Both ways round lse and the cap by themselves: in a
    // z-loss of 0.01 lse^2 by 2 lse 0.01 |m| <= 3, beside a likelihood that each cap rounds by 2 x 6; a position weighs
    // up to 2 x 2.
    const double also = (input.z_loss > 0 ? 3 : 0) + (input.softcap > 0 ? 2 * 6 : 0) + 1;
    const double weight = 2 * 2;
    for (const Reduction& reduction : {Reduction(torch::kSum), Reduction(torch::kNone)}) {
      check_same(reconstruct_case(one_hot, {}, reduction), reconstruct_case(input, {}, reduction),
                 input.relative(term_steps), also * weight);
    }
    check_same(reconstruct_case(one_hot, 3), reconstruct_case(input, 3), input.relative(term_steps), also * weight);
    if (!input.class_weight.defined()) {
      check_same(reconstruct_case(one_hot), reconstruct_case(input), input.relative(term_steps), also * weight);
    }
  });
}

TEMPLATE_TEST_CASE("Metrics of micro-batches of any sizes join to those of the whole batch, with all options",
                   "[properties][metrics]", PerPosition, PerBit, BatchMean) {
  for_random_cases([](RandomCase& input) {
    // ATen's sum over the classes of transposed logits depends on how many rows there are.
    input.logits = input.logits.contiguous();
    const bool mask = input.chance(0.5);
    const auto metrics = [&](const RandomCase& of) {
      const auto options = VAELossOptions()
                               .reconstruction(of.reconstruction())
                               .kl(of.kl())
                               .beta_kl(0.5)
                               .accuracy(true)
                               .mask_ignored_latents(mask);
      return compute_vae_loss<TestType>(of.logits, of.targets, of.z_logits, options).metrics;
    };
    const LossMetrics whole = metrics(input);
    LossMetrics joined;
    const auto cuts = input.cuts();
    for (size_t index = 1; index < cuts.size(); ++index) joined += metrics(input.part(cuts[index - 1], cuts[index]));
    CHECK(whole.size() == joined.size());
    CHECK(joined.size() >= 11);
    // Sums of at most 24 positions and of 9 bits, none of them negative, a half for each addition on both sides, as for
    // each quotient. A batch's hinge takes free_bits away from such a sum, and exp makes an absolute error a relative
    // one. float32 has the 1e-6 that LossMetrics promises.
    const double relative = input.type == torch::kDouble ? (24 + 9 + 3) * epsilon(torch::kDouble) : 1e-6;
    for (const auto& [name, value] : whole) {
      INFO(name << " " << joined.at(name) << ", expected " << value);
      const double absolute = name == "metrics/perplexity" ? value * std::log(value) : input.free_bits;
      CHECK(std::abs(joined.at(name) - value) <= relative * (std::abs(value) + absolute));
    }
  });
}

TEST_CASE("A normalizer of 0 gives 0 where nothing counts, and is seen where something does", "[normalizer]") {
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const auto& shape : {std::vector<int64_t>{}, std::vector<int64_t>{1}, std::vector<int64_t>{1, 1}}) {
        for (const auto count_type : {torch::kLong, torch::kFloat, torch::kDouble}) {
          INFO(type << ", strided " << strided << ", normalizer " << torch::IntArrayRef(shape) << ' ' << count_type);
          const auto laid = [&](const Tensor& values) {
            return leaf(strided ? torch::stack({values, values}, -1).select(-1, 0) : values);
          };
          const Tensor logits = laid(eighths({3, 7}, type)), z = laid(eighths({3, 7}, type));
          const Tensor zero = torch::zeros(shape, count_type), none = torch::full({3}, -100, torch::kLong);
          const auto options = ReconstructionLossOptions().normalizer(zero).z_loss(0.5);
          const auto check_nothing = [&](const Tensor& loss, const Tensor& input) {
            CHECK(loss.item<double>() == 0);
            CHECK(gradient(loss, input).count_nonzero().item<int64_t>() == 0);
          };
          check_nothing(compute_reconstruction_loss(logits, none, options), logits);
          const Tensor weight = torch::ones({2, 7}, type);
          check_nothing(compute_reconstruction_loss(LinearLogits(logits, weight), none, options), logits);
          const auto latent = KLDivergenceOptions().latent_dim(7).normalizer(zero).free_bits(0);
          check_nothing(compute_kl_divergence(z, KLDivergenceOptions(latent).token_weight(torch::zeros({3}))), z);
          check_nothing(compute_vae_loss(logits, none, z,
                                         VAELossOptions().reconstruction(options).kl(latent).mask_ignored_latents(true))
                            .loss,
                        z);
          CHECK(std::isinf(compute_reconstruction_loss(logits, none.clamp_min(0), options).item<double>()));
          CHECK(std::isinf(compute_kl_divergence(z, latent).item<double>()));
          const Tensor three = torch::full(shape, 3, count_type);
          CHECK(same_bits(compute_reconstruction_loss(logits, none.clamp_min(0),
                                                      ReconstructionLossOptions(options).normalizer(three)),
                          compute_reconstruction_loss(logits, none.clamp_min(0),
                                                      ReconstructionLossOptions(options).normalizer(3))));
        }
      }
    }
  }
}

TEST_CASE("An input that is frozen after the forward pass gets no gradient, and no error", "[gradient]") {
  const Tensor targets = torch::zeros({4}, torch::kLong);
  const auto losses = std::vector<std::function<Tensor(const Tensor&)>>{
      [&](const Tensor& x) { return compute_reconstruction_loss(x, targets); },
      [&](const Tensor& x) { return compute_reconstruction_loss(x, x.detach().softmax(-1)); },
      [](const Tensor& x) { return compute_kl_divergence(x, 6); },
      [](const Tensor& x) { return compute_kl_divergence<PerBit>(x, 6); },
      [](const Tensor& x) {
        return compute_kl_divergence(torch::zeros({4, 6}, torch::kDouble),
                                     KLDivergenceOptions().latent_dim(6).prior_logits(x));
      }};
  for (size_t index = 0; index < losses.size(); ++index) {
    for (const auto type : {torch::kFloat, torch::kDouble}) {
      for (const bool create_graph : {false, true}) {
        INFO("loss " << index << ", " << type << ", create_graph " << create_graph);
        const Tensor x = leaf(eighths({4, 6}, type) / 4), other = leaf(torch::ones({}, type));
        const Tensor loss = losses[index](x) * other;
        x.requires_grad_(false);
        loss.backward({}, /*retain_graph=*/create_graph, create_graph);
        CHECK_FALSE(x.grad().defined());
        CHECK(other.grad().defined());
      }
    }
  }
}
