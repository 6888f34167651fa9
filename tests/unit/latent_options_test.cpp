// The options of the latent term and of the whole loss: against references, in both orders of the gradient, and
// refused.
#include "free_transformer/vae_loss.hpp"
#include "instruction_sets.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

/// The 8 of the bare KL (kl_divergence_test.cpp) and a half each for u, 1/normalizer, their products and the terms of
/// the prior. In units of float64 with a prior, else of the type of arithmetic. What cancels is in the conditions of
/// the references.
constexpr double latent_option_steps = 12;

KLDivergenceOptions options_of(const reference::LatentOptionCase& input, torch::ScalarType type) {
  auto options = KLDivergenceOptions().latent_dim(input.latent_dim).free_bits(input.free_bits);
  if (!input.token_weight.empty()) {
    options.token_weight(tensor(input.token_weight, {static_cast<int64_t>(input.token_weight.size())}, type));
  }
  if (input.normalizer != 0) options.normalizer(input.normalizer);
  return options;
}

template <typename FreeBits>
void check_reference(const reference::LatentOptionCase& input, const reference::LatentOptionExpectation& expected,
                     torch::ScalarType type) {
  const auto rows = static_cast<int64_t>(input.conditions.size());
  const double step = epsilon(input.prior_logits.empty() ? arithmetic(type) : torch::kDouble);
  const double relative = (latent_option_steps + static_cast<double>(input.latent_dim) / 2) * step;
  double condition = 0;
  for (const double of_position : input.conditions) condition += of_position;
  const Tensor dense = tensor(input.z_logits, {rows, input.latent_dim}, type);
  for (const Tensor& layout : {dense, with_strided_rows(dense)}) {
    INFO("strides " << layout.strides());
    const Tensor z_logits = leaf(layout);
    Tensor prior;
    auto options = options_of(input, type);
    if (!input.prior_logits.empty()) {
      const bool one_for_all = static_cast<int64_t>(input.prior_logits.size()) == input.latent_dim;
      prior = leaf(one_for_all ? tensor(input.prior_logits, {input.latent_dim}, type)
                               : with_strided_rows(tensor(input.prior_logits, {rows, input.latent_dim}, type)));
      options.prior_logits(prior);
    }
    const Tensor mean = compute_kl_divergence<FreeBits>(z_logits, options);
    const Tensor sum = compute_kl_divergence<FreeBits>(z_logits, KLDivergenceOptions(options).reduction(torch::kSum));
    const Tensor each = compute_kl_divergence<FreeBits>(z_logits, KLDivergenceOptions(options).reduction(torch::kNone));
    double expected_sum = 0;
    for (const double penalty : expected.penalties) expected_sum += penalty;
    const double divisor = expected.mean == 0 ? 1 : expected_sum / expected.mean;
    CHECK(mean.scalar_type() == arithmetic(type));
    CHECK(difference(mean, {expected.mean}, relative, condition / divisor) == "");
    CHECK(difference(sum, {expected_sum}, relative, condition) == "");
    for (int64_t t = 0; t < rows; ++t) {
      const auto at = static_cast<size_t>(t);
      CHECK(difference(each[t], {expected.penalties[at]}, relative, input.conditions[at]) == "");
    }

    const Tensor of_z = gradient(mean, z_logits);
    CHECK(of_z.scalar_type() == type);
    CHECK(difference(of_z, expected.z_gradient, relative) == "");
    if (input.normalizer != 0) {
      options.normalizer(torch::tensor(input.normalizer, torch::kDouble));
      const Tensor by_tensor = compute_kl_divergence<FreeBits>(z_logits, options);
      CHECK(difference(by_tensor, {expected.mean}, relative, condition / divisor) == "");
      CHECK(difference(gradient(by_tensor, z_logits), expected.z_gradient, relative) == "");
    }
    if (!prior.defined()) continue;
    // A difference of two probabilities, times u / normalizer <= 2 at each of 5 positions.
    const Tensor of_prior = gradient(mean, prior);
    CHECK(of_prior.scalar_type() == type);
    CHECK(difference(of_prior, expected.prior_gradient, relative, 2 * 5) == "");
    const auto both =
        torch::autograd::grad({mean}, {z_logits, prior}, {}, /*retain_graph=*/true, /*create_graph=*/true);
    CHECK(difference(both[0], expected.z_gradient, relative) == "");
    CHECK(difference(both[1], expected.prior_gradient, relative, 2 * 5) == "");
  }
}

/// Both orders of the gradients to z_logits and to the prior, also the mixed ones: they are parts of one input.
template <typename FreeBits>
void check_joint_gradients(const KLDivergenceOptions& options, const Tensor& z_logits, const Tensor& prior_logits,
                           const std::function<Tensor(const Tensor&)>& reduce) {
  const int64_t count = z_logits.numel();
  check_gradients(
      [&](const Tensor& x) {
        const Tensor z = x.slice(0, 0, count).reshape(z_logits.sizes());
        const Tensor prior = x.slice(0, count).reshape(prior_logits.sizes());
        return reduce(compute_kl_divergence<FreeBits>(z, KLDivergenceOptions(options).prior_logits(prior)));
      },
      torch::cat({z_logits.reshape({-1}), prior_logits.reshape({-1})}));
}

/// Logits whose KL stays away from the budget 1/4, for positions and for bits: the finite differences see no kink.
const std::vector<double> some_logits{0.25, -0.5, 2.5, 3, -2.75, 0.125, 0.375, 0.125, -0.25, 2, -3, -2.5};
const std::vector<double> some_priors{0.125, -0.25, -0.5, -0.125, 0.25, 0.5, 0.25, 0, 0.125, -0.375, 0.25, 0.5};

}  // namespace

TEST_CASE("Every option of the latent KL has the value and the gradients of its equation", "[kl][options][reference]") {
  const Forced forced(GENERATE(from_range(available_instruction_sets())));
  for (const auto& input : reference::latent_option_cases) {
    for (const auto type : all_types) {
      if (!holds(type, input.exact)) continue;
      INFO(input.name << ", " << type);
      check_reference<PerPosition>(input, input.per_position, type);
      check_reference<PerBit>(input, input.per_bit, type);
      check_reference<BatchMean>(input, input.batch_mean, type);
    }
  }
}

TEMPLATE_TEST_CASE(
    "Every combination of latent options agrees with finite differences in both orders, for the prior too",
    "[kl][options][gradient]", PerPosition, PerBit, BatchMean) {
  const Tensor z_logits = tensor(some_logits, {2, 2, 3}), priors = tensor(some_priors, {2, 2, 3});
  const Tensor one_prior = tensor(std::vector<double>{0.125, -0.25, 0.25}, {3});
  const Tensor upstream = tensor(std::vector<double>{1, 5, -0.5, 2}, {2, 2}) / 4;
  for (const double free_bits : {0.0, 0.25}) {
    for (unsigned bits = 0; bits < 4; ++bits) {
      INFO("free_bits " << free_bits << ", options " << bits);
      auto options = KLDivergenceOptions().latent_dim(3).free_bits(free_bits);
      if (bits & 1) options.token_weight(tensor(std::vector<double>{0.5, 0, 1, 2}, {2, 2}));
      if (bits & 2) options.normalizer(torch::tensor(3.0, torch::kDouble));
      const auto each = KLDivergenceOptions(options).reduction(torch::kNone);
      const auto weighted = [&](const Tensor& losses) { return (losses * upstream).sum(); };
      check_gradients([&](const Tensor& z) { return compute_kl_divergence<TestType>(z, options); }, z_logits);
      for (const Tensor& prior : {one_prior, priors}) {
        check_joint_gradients<TestType>(options, z_logits, prior, [](const Tensor& loss) { return loss * 2; });
        check_joint_gradients<TestType>(options, z_logits, prior, [](const Tensor& loss) { return loss.square() / 4; });
        // BatchMean's unreduced losses see the mean as a constant, and are smooth where the budget is not crossed.
        check_joint_gradients<TestType>(each, z_logits, prior, weighted);
      }
    }
  }
}

TEST_CASE("The prior alone may have a gradient, and so may z_logits beside a prior that has none",
          "[kl][options][gradient]") {
  const Tensor values_of_z = tensor(some_logits, {4, 3}), values_of_prior = tensor(some_priors, {4, 3});
  const auto loss = [](const Tensor& z, const Tensor& prior) {
    return compute_kl_divergence(z, KLDivergenceOptions().latent_dim(3).free_bits(0.25).prior_logits(prior));
  };
  const Tensor z = leaf(values_of_z), prior = leaf(values_of_prior);
  const Tensor both = loss(z, prior), of_prior = loss(values_of_z, prior), of_z = loss(z, values_of_prior);
  CHECK(same_bits(both, of_prior));
  CHECK(same_bits(both, of_z));
  CHECK(same_bits(gradient(both, prior), gradient(of_prior, prior)));
  CHECK(same_bits(gradient(both, z), gradient(of_z, z)));
  check_gradients([&](const Tensor& x) { return loss(values_of_z, x); }, values_of_prior);
  check_gradients([&](const Tensor& x) { return loss(x, values_of_prior); }, values_of_z);
  // A prior that is made of the posterior's logits: KL = 0 wherever they meet, and no gradient.
  const Tensor itself = compute_kl_divergence(z, KLDivergenceOptions().latent_dim(3).free_bits(0).prior_logits(z));
  CHECK(itself.item<double>() == 0);
  CHECK(values(gradient(itself, z)) == std::vector<double>(12, 0.0));
}

TEST_CASE("A prior of zeros is the uniform prior", "[kl][options]") {
  const Tensor base = tensor(some_logits, {4, 3});
  const auto options = KLDivergenceOptions().latent_dim(3).free_bits(0.25);
  for (const auto type : all_types) {
    const Tensor z = leaf(base.to(type));
    const Tensor expected = compute_kl_divergence(z, options);
    for (const Tensor& prior : {torch::zeros({3}, type), torch::zeros({4, 3}, type)}) {
      INFO(type << ", prior " << prior.sizes());
      const Tensor loss = compute_kl_divergence(z, KLDivergenceOptions(options).prior_logits(prior));
      const double relative = 2 * latent_option_steps * epsilon(arithmetic(type));
      CHECK(difference(loss, expected, relative, 1) == "");
      CHECK(difference(gradient(loss, z), gradient(expected, z), relative, 0, /*roundings=*/2) == "");
    }
  }
}

TEST_CASE("The KL of a bit from a prior close to it is within 2 ulp of float32", "[kl][options][accuracy]") {
  // With e = r - l and p = sigmoid(l), KL = p(1-p) e^2 (1/2 + (1-2p) e/6 + (1-6p(1-p)) e^2/24 + ...), for |e| < 1/400
  // to 1e-9 of it (the next factor of e^3 is below 1/60).
  std::vector<double> logits, priors, expected;
  for (const double l : {0.0, 1e-20, 1e-3, 0.25, -0.75, 1.0, -2.5, 6.0, -8.0}) {
    for (int exponent = -9; exponent >= -60; exponent -= 3) {
      for (const double sign : {1.0, -1.0}) {
        const double r = l + sign * std::ldexp(1.25, exponent), e = r - l;
        const double p = 1 / (1 + std::exp(-l)), variance = p / (1 + std::exp(l));
        logits.push_back(l), priors.push_back(r);
        expected.push_back(variance * e * e * (0.5 + (1 - 2 * p) * e / 6 + (1 - 6 * variance) * e * e / 24));
      }
    }
  }
  const auto count = static_cast<int64_t>(logits.size());
  const Tensor z = tensor(logits, {count, 1}), prior = tensor(priors, {count, 1});
  const Tensor kl = compute_kl_divergence(
      z, KLDivergenceOptions().latent_dim(1).free_bits(0).reduction(torch::kNone).prior_logits(prior));
  const auto found = values(kl);
  for (size_t index = 0; index < found.size(); ++index) {
    INFO("l " << logits[index] << ", r - l " << priors[index] - logits[index] << ", KL " << found[index]
              << ", expected " << expected[index]);
    CHECK(std::abs(found[index] - expected[index]) <= 4 * half_step(expected[index], torch::kFloat));
  }
}

TEST_CASE("A sure bit has no KL from a prior that is as sure, and an infinite one from the opposite", "[kl][options]") {
  const double inf = reference::inf;
  const Tensor z = leaf(tensor(std::vector<double>{inf, -inf, inf, -inf, inf, -inf, 0, 1}, {8, 1}));
  const Tensor prior = tensor(std::vector<double>{inf, -inf, -inf, inf, 0, 0, inf, -inf}, {8, 1});
  const Tensor kl = compute_kl_divergence(
      z, KLDivergenceOptions().latent_dim(1).free_bits(0).reduction(torch::kNone).prior_logits(prior));
  CHECK(difference(kl, {0, 0, inf, inf, std::log(2.0), std::log(2.0), inf, inf}, epsilon(torch::kDouble)) == "");
}

TEST_CASE("A KL that float32 cannot hold is infinite", "[kl][options]") {
  const Tensor z = torch::zeros({1, 4}), prior = torch::full({4}, 3e38);
  const Tensor kl = compute_kl_divergence(z, KLDivergenceOptions().latent_dim(4).free_bits(0).prior_logits(prior));
  CHECK(kl.item<double>() == INFINITY);
}

TEST_CASE("Positions of weight 0 have exactly no latent loss and no gradient, whatever their logits",
          "[kl][options][gradient]") {
  const Tensor weight = tensor(std::vector<double>{0.5, 0, 1, 2}, {4});
  for (const auto type : all_types) {
    for (const bool strided : {false, true}) {
      for (const double garbage : {not_a_number, reference::inf}) {
        for (const auto& reduction : all_reductions) {
          for (const int priors : {0, 1, 2}) {
            INFO(type << ", strided " << strided << ", " << garbage << ", reduction " << reduction.index() << ", prior "
                      << priors);
            const auto run = [&](double value) {
              Tensor z = tensor(some_logits, {4, 3}, type), prior;
              if (priors == 1) prior = leaf(tensor(std::vector<double>{0.125, -0.25, 0.25}, {3}, type));
              if (priors == 2) prior = tensor(some_priors, {4, 3}, type);
              z.select(0, 1).fill_(value);
              if (priors == 2) prior.select(0, 1).fill_(value), prior = leaf(prior);
              z = leaf(strided ? with_strided_rows(z) : z);
              const Tensor loss = compute_kl_divergence(z, KLDivergenceOptions()
                                                               .latent_dim(3)
                                                               .free_bits(0.25)
                                                               .token_weight(weight)
                                                               .prior_logits(prior)
                                                               .reduction(reduction));
              std::vector<Tensor> found{loss};
              std::vector<Tensor> inputs{z};
              if (prior.defined()) inputs.push_back(prior);
              for (const bool create_graph : {false, true}) {
                const auto gradients =
                    torch::autograd::grad({loss}, inputs, {torch::ones_like(loss)}, true, create_graph);
                found.insert(found.end(), gradients.begin(), gradients.end());
                if (!create_graph) continue;
                const auto second = torch::autograd::grad({gradients[0].to(torch::kDouble).square().sum()}, {z});
                found.push_back(second[0]);
              }
              return found;
            };
            const auto found = run(garbage), expected = run(1);
            for (size_t index = 0; index < found.size(); ++index) {
              INFO("result " << index);
              CHECK(same_bits(found[index], expected[index]));
              CHECK(found[index].isfinite().all().item<bool>());
              if (found[index].dim() == 2) CHECK(found[index].select(0, 1).count_nonzero().item<int64_t>() == 0);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("A latent sum and unreduced penalties ignore the normalizer, a mean is the sum divided by it",
          "[kl][options]") {
  for (const auto type : all_types) {
    const Tensor z = leaf(tensor(some_logits, {4, 3}, type));
    const auto loss = [&](Reduction reduction, const Normalizer& normalizer) {
      return compute_kl_divergence(
          z, KLDivergenceOptions().latent_dim(3).free_bits(0.25).reduction(reduction).normalizer(normalizer));
    };
    INFO(type);
    for (const Normalizer& normalizer :
         {Normalizer(8), Normalizer(torch::tensor(8.0f)), Normalizer(torch::tensor(int64_t{8}))}) {
      CHECK(same_bits(loss(torch::kSum, normalizer), loss(torch::kSum, {})));
      CHECK(same_bits(loss(torch::kNone, normalizer), loss(torch::kNone, {})));
      CHECK(same_bits(loss(torch::kMean, normalizer), loss(torch::kSum, {}) / 8));  // a power of two
      CHECK(same_bits(gradient(loss(torch::kMean, normalizer), z), gradient(loss(torch::kSum, {}) / 8, z)));
    }
  }
}

TEMPLATE_TEST_CASE("mask_ignored_latents leaves out the latents of tokens that do not count", "[vae][options]",
                   PerPosition, PerBit, BatchMean) {
  const Tensor logits = eighths({4, 5}), targets = indices({1, -100, 0, 4});
  const Tensor token_weight = tensor(std::vector<double>{1, 2, 0, 0.5}, {4});
  const Tensor latent_weight = tensor(std::vector<double>{2, 1, 1, 0.25}, {4});
  for (const auto type : all_types) {
    for (const bool weighted_tokens : {false, true}) {
      for (const bool weighted_latents : {false, true}) {
        INFO(type << ", token weights " << weighted_tokens << ", latent weights " << weighted_latents);
        auto masked = VAELossOptions().latent_dim(3).free_bits(0.25).mask_ignored_latents(true).beta_kl(0.5);
        if (weighted_tokens) masked.reconstruction(ReconstructionLossOptions().token_weight(token_weight));
        // What the mask is by definition: the latent weight, 0 where the target is ignored or of weight 0.
        Tensor mask = tensor(std::vector<double>{1, 0, weighted_tokens ? 0.0 : 1.0, 1}, {4});
        if (weighted_latents) mask = mask * latent_weight;
        auto by_hand = VAELossOptions(masked).mask_ignored_latents(false);
        by_hand.kl(KLDivergenceOptions(by_hand.kl()).token_weight(mask));
        if (weighted_latents) masked.kl(KLDivergenceOptions(masked.kl()).token_weight(latent_weight));

        Tensor dirty = tensor(some_logits, {4, 3}, type);
        const Tensor clean = leaf(dirty.clone());
        dirty.select(0, 1).fill_(not_a_number);
        dirty = leaf(dirty);
        const auto [loss, metrics] = compute_vae_loss<TestType>(logits, targets, dirty, masked);
        const auto [expected, expected_metrics] = compute_vae_loss<TestType>(logits, targets, clean, by_hand);
        CHECK(same_bits(loss, expected));
        CHECK(same_bits(gradient(loss, dirty), gradient(expected, clean)));
        CHECK(gradient(loss, dirty).select(0, 1).count_nonzero().template item<int64_t>() == 0);
        for (const auto& [name, value] : metrics) {
          INFO(name);
          CHECK(value == expected_metrics.at(name));
        }
      }
    }
  }
}

TEST_CASE("mask_ignored_latents with class probabilities follows the token weights", "[vae][options]") {
  const Tensor logits = eighths({4, 5}), probabilities = torch::full({4, 5}, 0.2, torch::kDouble);
  const Tensor weight = torch::tensor({true, false, true, true});
  const Tensor z = leaf(tensor(some_logits, {4, 3}));
  const auto options = VAELossOptions().latent_dim(3).free_bits(0.25).mask_ignored_latents(true).reconstruction(
      ReconstructionLossOptions().token_weight(weight));
  auto by_hand = VAELossOptions(options).mask_ignored_latents(false);
  by_hand.kl(KLDivergenceOptions(by_hand.kl()).token_weight(weight));
  const Tensor loss = compute_vae_loss(logits, probabilities, z, options).loss;
  const Tensor expected = compute_vae_loss(logits, probabilities, z, by_hand).loss;
  CHECK(same_bits(loss, expected));
  CHECK(same_bits(gradient(loss, z), gradient(expected, z)));
}

TEST_CASE("Without mask_ignored_latents every position of z_logits counts, of any number", "[vae][options]") {
  const Tensor z = tensor(some_logits, {4, 3});
  const auto options = VAELossOptions().latent_dim(3).free_bits(0);
  const auto output = compute_vae_loss(eighths({2, 5}), indices({-100, -100}), z, options);
  const Tensor alone = compute_kl_divergence(z, options.kl());
  CHECK(difference(output.loss, alone, epsilon(torch::kDouble)) == "");
}

TEST_CASE("The whole loss is the sum of both terms with their options", "[vae][options]") {
  const Tensor logits = leaf(eighths({4, 5})), z = leaf(tensor(some_logits, {4, 3}));
  const Tensor prior = leaf(tensor(some_priors, {4, 3}));
  const Tensor weight = tensor(std::vector<double>{1, 2, 0, 0.5}, {4});
  const Tensor targets = indices({1, -100, 0, 4});
  const auto options =
      VAELossOptions()
          .reconstruction(
              ReconstructionLossOptions().token_weight(weight).label_smoothing(0.1).z_loss(0.125).normalizer(7))
          .kl(KLDivergenceOptions().latent_dim(3).free_bits(0.25).token_weight(weight).prior_logits(prior).normalizer(
              5))
          .beta_kl(0.75);
  const Tensor loss = compute_vae_loss<PerBit>(logits, targets, z, options).loss;
  const Tensor reconstruction = compute_reconstruction_loss(logits, targets, options.reconstruction());
  const Tensor latent = compute_kl_divergence<PerBit>(z, options.kl());
  CHECK(difference(loss, reconstruction + 0.75 * latent, 2 * epsilon(torch::kDouble)) == "");
  CHECK(difference(gradient(loss, logits), gradient(reconstruction, logits), 2 * epsilon(torch::kDouble)) == "");
  CHECK(difference(gradient(loss, z), 0.75 * gradient(latent, z), 2 * epsilon(torch::kDouble)) == "");
  CHECK(difference(gradient(loss, prior), 0.75 * gradient(latent, prior), 2 * epsilon(torch::kDouble), 1) == "");
}

TEST_CASE("Options of the latent term that do not fit are refused", "[kl][options][errors][cpu]") {
  const Tensor z_logits = eighths({2, 3});
  const auto meta = torch::TensorOptions().device(torch::kMeta);
  const auto error = [&](const KLDivergenceOptions& options) {
    return after_name("compute_kl_divergence",
                      error_of([&] { compute_kl_divergence(z_logits, KLDivergenceOptions(options).latent_dim(3)); }));
  };
  const auto with = [] { return KLDivergenceOptions(); };
  for (const auto& [value, text] :
       {std::pair<double, const char*>{0, "0"}, {-2, "-2"}, {reference::inf, "inf"}, {not_a_number, "nan"}}) {
    CHECK(error(with().normalizer(value)) == std::string("normalizer must be finite and > 0, got ") + text);
  }
  CHECK(error(with().normalizer(torch::ones({2}))) ==
        "normalizer must be a number or a real tensor of one element, got shape [2] of type Float");
  CHECK(error(with().normalizer(torch::ones({}).requires_grad_())) ==
        "normalizer must not require grad (it gets none; detach it), got requires_grad = true");
  CHECK(error(with().token_weight(torch::tensor({1.0, -0.5}))) ==
        "token_weight must be finite and >= 0, got -0.5 at index 1");
  CHECK(error(with().token_weight(torch::tensor({not_a_number, 1.0}))) ==
        "token_weight must be finite and >= 0, got nan at index 0");
  CHECK(error(with().token_weight(torch::ones({3}))) ==
        "token_weight must have one value for each position, shape [2], got [3]");
  CHECK(error(with().token_weight(torch::ones({2}, torch::kInt))) == "token_weight must be bool or floating, got Int");
  CHECK(error(with().token_weight(torch::ones({2}).requires_grad_())) ==
        "token_weight must not require grad (it gets none; detach it), got requires_grad = true");
  const std::string shape = "prior_logits must have the shape [latent_dim] or that of z_logits, [2, 3], got ";
  CHECK(error(with().prior_logits(torch::zeros({2}))) == shape + "[2]");
  CHECK(error(with().prior_logits(torch::zeros({1, 3}))) == shape + "[1, 3]");
  CHECK(error(with().prior_logits(torch::zeros({3, 2}))) == shape + "[3, 2]");
  CHECK(error(with().prior_logits(torch::zeros({}))) == shape + "[]");
  CHECK(error(with().prior_logits(torch::zeros({3}, torch::kLong))) ==
        "prior_logits must be of type float64, float32, float16 or bfloat16, got Long");
  CHECK(error(with().prior_logits(torch::zeros({3}, meta))) ==
        "prior_logits must be on the device of z_logits, cpu, got meta");
  CHECK(error(with().prior_logits(torch::zeros({3}).to_sparse())) ==
        "prior_logits must be a dense (strided) tensor, got layout Sparse");
}

TEST_CASE("mask_ignored_latents refuses latents of other positions", "[vae][options][errors][cpu]") {
  const auto error = [](const Tensor& z_logits, const KLDivergenceOptions& kl = {}) {
    const auto options = VAELossOptions().kl(KLDivergenceOptions(kl).latent_dim(3)).mask_ignored_latents(true);
    return error_of([&] {
      compute_vae_loss(eighths({2, 2, 5}), torch::zeros({2, 2}, torch::kLong), z_logits, options);
    });
  };
  const std::string positions =
      "compute_vae_loss: z_logits must have the positions of the targets with mask_ignored_latents, ";
  CHECK(error(eighths({2, 3})) == positions + "[2, 2], got shape [2, 3]");
  CHECK(error(eighths({4, 3})) == positions + "[2, 2], got shape [4, 3]");
  CHECK(error(eighths({2, 1, 3})) == positions + "[2, 2], got shape [2, 1, 3]");
  CHECK(error(eighths({2, 2, 3}), KLDivergenceOptions().token_weight(torch::ones({2}))) ==
        "compute_kl_divergence: token_weight must have one value for each position, shape [2, 2], got [2]");
  CHECK(error(eighths({2, 2, 3}), KLDivergenceOptions().token_weight(torch::full({2, 2}, -1.0))) ==
        "compute_kl_divergence: token_weight must be finite and >= 0, got -1 at index 0");
}

TEST_CASE("Both terms are reduced, or neither", "[vae][options][errors]") {
  const Tensor logits = eighths({2, 3, 5}), targets = torch::ones({2, 3}, torch::kLong), z_logits = eighths({2, 3, 4});
  const auto error = [&](const Reduction& of_tokens, const Reduction& of_latents, const Tensor& z) {
    const auto options = VAELossOptions()
                             .reconstruction(ReconstructionLossOptions().reduction(of_tokens))
                             .kl(KLDivergenceOptions().latent_dim(4).reduction(of_latents));
    return error_of([&] { compute_vae_loss(logits, targets, z, options); });
  };
  const std::string alone =
      "compute_vae_loss: reduction must be kNone for both terms or for neither, got kNone for one alone";
  CHECK(error(torch::kNone, torch::kMean, z_logits) == alone);
  CHECK(error(torch::kSum, torch::kNone, z_logits) == alone);
  CHECK(error(torch::kSum, torch::kMean, z_logits) == "");
  CHECK(error(torch::kNone, torch::kNone, z_logits) == "");
  CHECK(error(torch::kNone, torch::kNone, z_logits.slice(0, 0, 1)) ==
        "compute_vae_loss: z_logits must have the positions of the targets with kNone, [2, 3], got shape [1, 3, 4]");
}
