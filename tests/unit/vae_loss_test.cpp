#include "free_transformer/vae_loss.hpp"

#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

const Tensor four_targets = numeric::tensor(std::vector<int64_t>{4, -100, 2, 0}, {4});

VAELossOutput call(const reference::VAECase& input, const Tensor& logits, const Tensor& labels,
                   const Tensor& z_logits) {
  const auto with = [&](auto policy) {
    return compute_vae_loss<decltype(policy)>(logits, labels, z_logits, input.latent_dim, input.beta_kl,
                                              input.free_bits, input.ignore_index);
  };
  switch (input.policy) {
    case reference::Policy::per_bit:
      return with(PerBit());
    case reference::Policy::batch_mean:
      return with(BatchMean());
    default:
      return with(PerPosition());
  }
}

}  // namespace

namespace user {

/// A head of one's own: the product is left to the loss.
struct Head {
  torch::Tensor hidden, weight;
};

free_transformer::ReconstructionResult reconstruct(const Head& head, const torch::Tensor& labels,
                                                   const free_transformer::ReconstructionLossOptions& options) {
  return free_transformer::reconstruct(head.hidden.matmul(head.weight), labels, options);
}

/// A policy of one's own: no budget, but half the price for what is below it.
struct HalfPrice {
  static torch::Tensor penalty(const torch::Tensor& bit_kl, const torch::Tensor&, double free_bits) {
    const torch::Tensor kl = bit_kl.sum(-1);
    return kl - kl.clamp_max(free_bits) / 2;
  }
};

}  // namespace user

TEST_CASE("The whole loss, its metrics and its gradients have the values of their equations",
          "[vae][metrics][reference]") {
  for (const auto& expected : reference::vae_cases) {
    for (const auto type : all_types) {
      if (!holds(type, expected.exact)) continue;
      INFO(expected.name << ", " << type);
      const auto rows = static_cast<int64_t>(expected.targets.size());
      const Tensor logits = leaf(tensor(expected.logits, {rows, expected.classes}, type));
      const Tensor z_logits = leaf(tensor(expected.z_logits, {rows, expected.latent_dim}, type));
      const auto [loss, metrics] = call(expected, logits, tensor(expected.targets, {rows}), z_logits);

      // 8 steps of the arithmetic for each term, as in the tests of both, relative to the KL before the hinge (PerBit's
      // takes kappa from each bit). exp makes the absolute error of the likelihood a relative one.
      const double likelihood = expected.metrics[1];
      const double relative = 8 * epsilon(arithmetic(type)) * (1 + likelihood);
      const double budget = expected.free_bits * static_cast<double>(expected.latent_dim) * (1 + expected.beta_kl);
      CHECK(loss.scalar_type() == arithmetic(type));
      CHECK(difference(loss, {expected.metrics[0]}, relative, budget) == "");
      REQUIRE(metrics.size() == expected.metrics.size());
      size_t index = 0;
      for (const auto& [name, value] : metrics) {
        INFO(name);
        const double exact = expected.metrics[index++];
        CHECK(std::abs(value - exact) <= relative * (std::abs(exact) + budget));
      }
      CHECK(difference(gradient(loss, logits), expected.logits_gradient, 8 * epsilon(arithmetic(type))) == "");
      // Those of the KL's gradient, and half a step each for beta in the type of the loss and for its product.
      CHECK(difference(gradient(loss, z_logits), expected.z_gradient, (8 + 1) * epsilon(arithmetic(type))) == "");
    }
  }
}

TEST_CASE("The short form has the defaults of the options", "[vae]") {
  const Tensor logits = eighths({4, 5}), z_logits = eighths({4, 16});
  const VAELossOptions options;
  CHECK(options.latent_dim() == 16);
  CHECK(options.beta_kl() == 1.0);
  CHECK(options.free_bits() == 0.3466);
  CHECK(options.ignore_index() == -100);
  const auto short_form = compute_vae_loss(logits, four_targets, z_logits);
  CHECK(same_bits(short_form.loss, compute_vae_loss(logits, four_targets, z_logits, options).loss));
  CHECK(same_bits(short_form.loss, compute_vae_loss(logits, four_targets, z_logits, 16, 1.0, 0.3466, -100).loss));
}

TEST_CASE("The shortcuts of the options set those of the terms", "[vae]") {
  const auto options = VAELossOptions().latent_dim(3).beta_kl(0.5).free_bits(0.25).ignore_index(7);
  CHECK(options.kl().latent_dim() == 3);
  CHECK(options.kl().free_bits() == 0.25);
  CHECK(options.reconstruction().ignore_index() == 7);
  CHECK(VAELossOptions().kl(KLDivergenceOptions().latent_dim(5)).latent_dim() == 5);
  CHECK(VAELossOptions().reconstruction(ReconstructionLossOptions().ignore_index(3)).ignore_index() == 3);
}

TEST_CASE("The whole loss is the sum of its terms", "[vae]") {
  const Tensor logits = leaf(eighths({2, 2, 5})), z_logits = leaf(eighths({2, 2, 3}));
  const Tensor labels = four_targets.reshape({2, 2});
  for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
    const auto reconstruction = ReconstructionLossOptions().reduction(reduction);
    const auto kl = KLDivergenceOptions().latent_dim(3).reduction(reduction);
    const auto options = VAELossOptions().reconstruction(reconstruction).kl(kl).beta_kl(0.25);
    const Tensor loss = compute_vae_loss<PerBit>(logits, labels, z_logits, options).loss;
    const Tensor first = compute_reconstruction_loss(logits, labels, reconstruction);
    const Tensor second = compute_kl_divergence<PerBit>(z_logits, kl);
    CHECK(same_bits(loss, first + 0.25 * second));
    CHECK(same_bits(gradient(loss.sum(), logits), gradient(first.sum(), logits)));
    CHECK(same_bits(gradient(loss.sum(), z_logits), gradient(0.25 * second.sum(), z_logits)));
  }
}

TEST_CASE("The whole loss agrees with finite differences in both orders", "[vae][gradient]") {
  const Tensor at =
      tensor(std::vector<double>{1, -2, 0.5, 3, -1, 0, 2, 0.25, -0.5, 3, 0.5, 0.125, 0, -1.75, 1, 2}, {2, 8});
  const Tensor labels = tensor(std::vector<int64_t>{4, 1}, {2});
  check_gradients(
      [&](const Tensor& x) {  // five classes and three bits that share what they come from
        return compute_vae_loss(x.slice(1, 0, 5), labels, x.slice(1, 4, 7), 3, 0.5, 0.125).loss;
      },
      at);
  check_gradients(
      [&](const Tensor& x) {
        return compute_vae_loss<BatchMean>(x.slice(1, 0, 5), labels, x.slice(1, 4, 7), 3, 0.5, 0.125).loss.square() / 4;
      },
      at);
}

TEST_CASE("Each term may go without a gradient", "[vae][gradient]") {
  const Tensor logits = eighths({4, 5}), z_logits = eighths({4, 3});
  const Tensor of_logits = leaf(logits), of_z = leaf(z_logits);
  const Tensor both = compute_vae_loss(of_logits, four_targets, of_z, 3).loss;
  CHECK(same_bits(gradient(compute_vae_loss(of_logits, four_targets, z_logits, 3).loss, of_logits),
                  gradient(both, of_logits)));
  CHECK(same_bits(gradient(compute_vae_loss(logits, four_targets, of_z, 3).loss, of_z), gradient(both, of_z)));
  CHECK_FALSE(compute_vae_loss(logits, four_targets, z_logits, 3).loss.requires_grad());
}

TEST_CASE("Logits and latent logits may differ in type and in the number of positions", "[vae]") {
  const Tensor logits = leaf(eighths({4, 5}, torch::kBFloat16)), z_logits = leaf(eighths({3, 2, 3}, torch::kFloat));
  const Tensor loss = compute_vae_loss(logits, four_targets, z_logits, 3).loss;
  CHECK(loss.scalar_type() == torch::kFloat);
  CHECK(gradient(loss, logits).scalar_type() == torch::kBFloat16);
  CHECK(gradient(loss, z_logits).scalar_type() == torch::kFloat);
  CHECK(compute_vae_loss(logits, four_targets, z_logits.to(torch::kDouble), 3).loss.scalar_type() == torch::kDouble);
}

TEST_CASE("A head and a policy of one's own combine with the rest", "[vae]") {
  const Tensor hidden = leaf(eighths({4, 3})), weight = leaf(eighths({3, 5})), z_logits = leaf(eighths({4, 3}));
  const auto [loss, metrics] =
      compute_vae_loss<user::HalfPrice>(user::Head{hidden, weight}, four_targets, z_logits, 3, 0.5, 0.25);
  const Tensor kl =
      compute_kl_divergence(z_logits, KLDivergenceOptions().latent_dim(3).free_bits(0).reduction(torch::kNone));
  const Tensor expected =
      compute_reconstruction_loss(hidden.matmul(weight), four_targets) + 0.5 * (kl - kl.clamp_max(0.25) / 2).mean();
  // Both have the likelihood of the same logits. The KL of three bits and four positions is added up in two orders, and
  // half a dozen factors (the price, beta, the mean) are rounded for on each side.
  const double relative = (3 + 4 + 6) * epsilon(torch::kDouble);
  CHECK(difference(loss, expected, relative) == "");
  CHECK(std::abs(metrics.at("loss/total") - loss.item<double>()) <= relative * loss.item<double>());
  for (const Tensor& input : {hidden, weight, z_logits}) {
    CHECK(difference(gradient(loss, input), gradient(expected, input), relative, 1) == "");
  }
}

TEST_CASE("A NaN that counts shows in the loss and in the metrics of its term", "[vae][metrics]") {
  const Tensor logits = eighths({4, 5}), z_logits = eighths({4, 3});
  const Tensor bad_logits = logits.clone(), bad_z = z_logits.clone();
  bad_logits.select(0, 2).select(0, 3).fill_(not_a_number);
  bad_z.select(0, 1).select(0, 0).fill_(not_a_number);
  const auto of_logits = compute_vae_loss(bad_logits, four_targets, z_logits, 3);
  CHECK(std::isnan(of_logits.loss.item<double>()));
  CHECK(std::isnan(of_logits.metrics.at("loss/total")));
  CHECK(std::isnan(of_logits.metrics.at("metrics/perplexity")));
  CHECK(std::isnan(of_logits.metrics.at("bound/elbo")));
  CHECK(std::isfinite(of_logits.metrics.at("loss/kl")));
  for (const auto& of_z : {compute_vae_loss<PerPosition>(logits, four_targets, bad_z, 3, 1.0, 100.0),
                           compute_vae_loss<PerBit>(logits, four_targets, bad_z, 3, 1.0, 100.0),
                           compute_vae_loss<BatchMean>(logits, four_targets, bad_z, 3, 1.0, 100.0)}) {
    CHECK(std::isnan(of_z.loss.item<double>()));
    CHECK(std::isnan(of_z.metrics.at("loss/total")));
    CHECK(std::isnan(of_z.metrics.at("loss/kl")));
    CHECK(std::isnan(of_z.metrics.at("latent/kl_bits")));
    CHECK(std::isfinite(of_z.metrics.at("loss/reconstruction")));
  }
}

TEST_CASE("An empty batch has a loss of 0 with a graph", "[vae][gradient]") {
  const Tensor logits = leaf(torch::empty({0, 5})), z_logits = leaf(torch::empty({0, 16}));
  const auto [loss, metrics] = compute_vae_loss(logits, torch::empty({0}, torch::kLong), z_logits);
  CHECK(loss.item<double>() == 0);
  loss.backward();
  CHECK(logits.grad().sizes() == torch::IntArrayRef({0, 5}));
  CHECK(z_logits.grad().sizes() == torch::IntArrayRef({0, 16}));
  for (const auto& [name, value] : metrics) {
    INFO(name);
    CHECK(value == (name == "metrics/perplexity" ? 1 : 0));
  }
}

TEST_CASE("Logits given inplace are untouched whatever of the other term is refused", "[vae][inplace][errors][cpu]") {
  const Tensor values = eighths({3, 4, 9}, torch::kFloat), labels = torch::zeros({3, 4}, torch::kLong);
  const Tensor good = eighths({3, 4, 6}, torch::kFloat);
  using Change = std::function<void(VAELossOptions&, Tensor&)>;
  const std::vector<Change> bad{
      [](VAELossOptions&, Tensor& z) { z = Tensor(); },
      [](VAELossOptions&, Tensor& z) { z = z.to(torch::kLong); },
      [](VAELossOptions&, Tensor& z) { z = z.to_sparse(); },
      [](VAELossOptions&, Tensor& z) { z = z.to(torch::kMeta); },
      [](VAELossOptions&, Tensor& z) { z = z.slice(2, 0, 5); },
      [](VAELossOptions& options, Tensor& z) {
        options.mask_ignored_latents(true);
        z = z.slice(1, 0, 3);
      },
      [](VAELossOptions& options, Tensor& z) {
        options.reconstruction().reduction(torch::kNone);
        options.kl().reduction(torch::kNone);
        z = z.slice(1, 0, 3);
      },
      [](VAELossOptions& options, Tensor&) { options.kl().reduction(torch::kNone); },
      [](VAELossOptions& options, Tensor&) { options.beta_kl(-1); },
      [](VAELossOptions& options, Tensor&) { options.beta_kl(not_a_number); },
      [](VAELossOptions& options, Tensor&) { options.free_bits(-1); },
      [](VAELossOptions& options, Tensor&) { options.latent_dim(0); },
      [](VAELossOptions& options, Tensor&) { options.kl().token_weight(torch::ones({3})); },
      [](VAELossOptions& options, Tensor&) {
        options.kl().token_weight(torch::full({3, 4}, -1.0));
      },
      [](VAELossOptions& options, Tensor&) { options.kl().prior_logits(torch::zeros({5})); },
      [](VAELossOptions& options, Tensor&) { options.kl().normalizer(0.0); },
      [](VAELossOptions& options, Tensor&) { options.kl().normalizer(torch::full({}, -1.0)); },
      [](VAELossOptions& options, Tensor&) { options.kl().normalizer(torch::ones({1}).to_sparse()); },
      [](VAELossOptions& options, Tensor&) {
        options.kl().token_weight(torch::ones({3, 4}).to_sparse());
      },
      [](VAELossOptions& options, Tensor&) { options.kl().prior_logits(torch::zeros({6}).to_sparse()); },
  };
  for (size_t index = 0; index < bad.size(); ++index) {
    INFO("change " << index);
    auto options = VAELossOptions().latent_dim(6).reconstruction(ReconstructionLossOptions().inplace(true));
    Tensor z_logits = good;
    bad[index](options, z_logits);
    const Tensor logits = leaf(values) * 1;
    const auto error = error_of([&] { compute_vae_loss(logits, labels, z_logits, options); });
    const std::string term = error.substr(0, error.find(": "));  // the loss, or the term that it hands the option to
    CHECK((term == "compute_vae_loss" || term == "compute_kl_divergence"));
    CHECK(same_bits(logits, values));
  }
}

TEST_CASE("A mask compares targets of every integer type as the numbers that they are", "[vae][targets]") {
  const std::vector<torch::ScalarType> types{torch::kByte, torch::kChar, torch::kShort, torch::kInt, torch::kLong};
  const Tensor values = torch::arange(256), z = eighths({256, 4}) / 4;
  for (const auto type : types) {
    for (const int64_t ignore_index : {-100, 156, 255, -1, 300, -356}) {
      const Tensor exact = values.remainder(type == torch::kChar ? 128 : 256), labels = exact.to(type);
      INFO(type << ", ignore_index " << ignore_index);
      const Tensor logits = eighths({256, 256}), counts = exact != ignore_index;
      const auto options = VAELossOptions().latent_dim(4).free_bits(0).ignore_index(ignore_index);
      const auto [loss, metrics] =
          compute_vae_loss(logits, labels, z, VAELossOptions(options).mask_ignored_latents(true));
      const auto expected =
          compute_kl_divergence(z, KLDivergenceOptions(options.kl()).token_weight(counts)).item<double>();
      const double orders = (256 + 4) * epsilon(torch::kDouble);  // a sum of as many positions on each side
      CHECK_THAT(metrics.at("loss/kl"), Catch::Matchers::WithinRel(expected, orders));
      CHECK(same_bits(compute_reconstruction_loss(logits, labels, ignore_index),
                      compute_reconstruction_loss(logits, exact, ignore_index)));
    }
  }
}

TEST_CASE("A beta that float32 cannot hold is applied all the same", "[vae][inplace]") {
  const double betas[] = {3.4028234663852886e38, 3.4028235677973366e38, 1e39, 1e300};
  const Tensor labels = indices({1, 0, 3});
  for (const double beta : betas) {
    for (const auto type : all_types) {
      for (const auto z_type : {torch::kFloat, torch::kDouble}) {
        for (const double z_value : {0.0, 1e-18, 1e-4, 3.0}) {
          for (const bool unreduced : {false, true}) {
            INFO(beta << ", " << type << ", " << z_type << ", z = " << z_value);
            const Tensor z_logits = torch::full({3, 4}, z_value, z_type), logits = leaf(eighths({3, 5}, type)) * 1;
            auto options = VAELossOptions().latent_dim(4).free_bits(0).beta_kl(beta);
            if (unreduced) options.kl().reduction(torch::kNone), options.reconstruction().reduction(torch::kNone);
            const Tensor expected =
                compute_reconstruction_loss(logits, labels, options.reconstruction()).to(torch::kDouble) +
                beta * compute_kl_divergence(z_logits, options.kl()).to(torch::kDouble);
            options.reconstruction().inplace(true);
            const Tensor loss = compute_vae_loss(logits, labels, z_logits, options).loss;
            CHECK(loss.scalar_type() == torch::promote_types(arithmetic(type), z_type));
            // float32's add has rounded the product and the sum, each by half a step
            CHECK(difference(loss, expected.to(loss.scalar_type()), epsilon(loss.scalar_type())) == "");
            loss.sum().backward();
          }
        }
      }
    }
  }
}
