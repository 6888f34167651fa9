#include "free_transformer/evidence_bound.hpp"

#include "free_transformer/latent_code.hpp"
#include "free_transformer/token_statistics.hpp"
#include "free_transformer/vae_loss.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

constexpr int64_t tiny_tokens = 3, tiny_latent_dim = 2, tiny_assignments = 64,
                  tiny_classes = 4;  // 3 positions of 2 bits: 64 values of Z

/// Each value of Z, [64, 3, 2].
Tensor all_latents() {
  return unpack_latent_codes(torch::arange(tiny_assignments), tiny_tokens * tiny_latent_dim)
      .reshape({tiny_assignments, tiny_tokens, tiny_latent_dim});
}

/// A decoder of one sequence x whose evidence can be summed up: log p(x_t | x_<t, z_<=t) for each z given, [n, 3]. Every
/// latent matters to its own token and to all later ones.
Tensor decode(const Tensor& latents, const Tensor& x) {
  const Tensor z = latents.to(torch::kDouble) * 2 - 1;
  std::vector<Tensor> of_tokens;
  for (int64_t t = 0; t < tiny_tokens; ++t) {
    const Tensor seen = z.narrow(1, 0, t + 1).flatten(1);
    const Tensor logits = seen.matmul(eighths({seen.size(1), tiny_classes}, torch::kDouble, 11 + t) / 6);
    of_tokens.push_back(logits.log_softmax(-1).select(1, x[t].item<int64_t>()));
  }
  return torch::stack(of_tokens, 1);
}

struct Model {
  Tensor x = indices({2, 0, 3});
  Tensor z_logits = eighths({tiny_tokens, tiny_latent_dim}, torch::kDouble, 5) / 4;
  Tensor prior_logits = eighths({tiny_latent_dim}, torch::kDouble, 7) / 8;
  Tensor latents = all_latents();
  Tensor log_likelihood = decode(latents, x);

  Tensor log_prior() const { return compute_latent_log_probability(prior_logits, latents).sum(-1); }
  Tensor log_posterior() const { return compute_latent_log_probability(z_logits.expand_as(latents), latents).sum(-1); }
  /// log p(x, z) of each z, and -log p(x).
  Tensor log_joint() const { return log_likelihood.sum(-1) + log_prior(); }
  double evidence() const { return -log_joint().logsumexp(0).item<double>(); }
  EvidenceBoundOptions options() const { return EvidenceBoundOptions().prior_logits(prior_logits); }

  /// The importance-weighted bound of every K-tuple of values of Z, [64^K].
  Tensor bounds(int64_t samples) const {
    std::vector<Tensor> of_samples;
    const auto tuples = static_cast<int64_t>(std::pow(tiny_assignments, samples));
    for (int64_t sample = 0, divisor = 1; sample < samples; ++sample, divisor *= tiny_assignments) {
      of_samples.push_back(torch::arange(tuples).div(divisor, "floor").remainder(tiny_assignments));
    }
    const Tensor index = torch::stack(of_samples);  // [K, tuples]
    const Tensor of_tuples = z_logits.expand({tuples, tiny_tokens, tiny_latent_dim});
    return compute_importance_weighted_bound(log_likelihood.index({index}), of_tuples, latents.index({index}),
                                             options())
        .nats;
  }

  /// The probability of each K-tuple under q.
  Tensor probabilities(int64_t samples) const {
    const Tensor q = log_posterior().exp();
    Tensor product = torch::ones({1}, torch::kDouble);
    for (int64_t sample = 0; sample < samples; ++sample) product = torch::outer(q, product).flatten();
    return product;
  }

  double expected_bound(int64_t samples) const {
    return (bounds(samples) * probabilities(samples)).sum().item<double>();
  }
};

}  // namespace

TEST_CASE("Both bounds are the references'", "[evidence][reference]") {
  for (const auto& input : reference::evidence_bound_cases) {
    for (const auto type : all_types) {
      if (!holds(type, input.exact)) continue;
      INFO(input.name << ", " << type);
      const Tensor log_likelihood = tensor(input.log_likelihood, {input.samples, input.sequences, input.tokens}, type);
      const Tensor bits = tensor(input.bits, {input.samples, input.sequences, input.tokens, input.latent_dim});
      const Tensor z_logits = tensor(input.z_logits, {input.sequences, input.tokens, input.latent_dim}, type);
      EvidenceBoundOptions options;
      if (!input.prior_logits.empty()) options.prior_logits(tensor(input.prior_logits, {input.latent_dim}, type));
      const EvidenceBound elbo = compute_evidence_lower_bound(log_likelihood[0], z_logits, options);
      const EvidenceBound weighted = compute_importance_weighted_bound(log_likelihood, z_logits, bits, options);
      // A few dozen float64 terms of size 20.
      CHECK(difference(elbo.nats, input.negative_elbo, 1e-14, 20) == "");
      CHECK(difference(weighted.nats, input.importance_weighted, 1e-14, 20) == "");
      CHECK(elbo.nats.scalar_type() == torch::kDouble);
      CHECK(values(elbo.tokens) == std::vector<double>(size_t(input.sequences), double(input.tokens)));
      CHECK(same_bits(elbo.tokens, weighted.tokens));
    }
  }
}

TEST_CASE("The bounds bracket an evidence that is summed over all Z, closer with more samples", "[evidence]") {
  const Model model;
  const double evidence = model.evidence();
  const Tensor q = model.log_posterior().exp();
  CHECK_THAT(q.sum().item<double>(), Catch::Matchers::WithinRel(1.0, 1e-14));
  // E_q of the likelihood, the KL in closed form.
  const auto elbo =
      compute_evidence_lower_bound((q.unsqueeze(1) * model.log_likelihood).sum(0), model.z_logits, model.options())
          .nats.item<double>();
  const double of_one = model.expected_bound(1), of_two = model.expected_bound(2), of_three = model.expected_bound(3);
  CHECK_THAT(of_one, Catch::Matchers::WithinRel(elbo, 1e-13));
  CHECK(of_one > of_two);
  CHECK(of_two > of_three);
  CHECK(of_three > evidence);
  CHECK(of_three - evidence < (of_one - evidence) / 2);  // the gap falls about as 1/K
  // Samples of the true posterior, not of the encoder, bound from the other side: E_{p(z|x)} log p(x,z)/q(z) - log p(x) is
  // a KL.
  const Tensor of_posterior = (model.log_joint() + evidence).exp();
  CHECK((of_posterior * model.bounds(1)).sum().item<double>() < evidence);
}

TEST_CASE("A call of the importance-weighted bound is below the evidence by c nats in a share exp(-c) at most",
          "[evidence]") {
  const Model model;
  for (const int64_t samples : {1, 2}) {
    const Tensor bounds = model.bounds(samples), probabilities = model.probabilities(samples);
    for (const double c : {0.25, 0.5, 1.0, 2.0}) {
      const auto share = probabilities.masked_select(bounds <= model.evidence() - c).sum().item<double>();
      INFO(samples << " samples, " << c << " nats");
      CHECK(share <= std::exp(-c));
    }
    // exp(-bound) is unbiased.
    CHECK_THAT((probabilities * (-bounds).exp()).sum().item<double>(),
               Catch::Matchers::WithinRel(std::exp(-model.evidence()), 1e-13));
  }
}

TEST_CASE("Where q is the posterior, every sample gives the evidence", "[evidence]") {
  // p(x|z) = exp(a + c b) for one bit b: the posterior's logit is the prior's + c, p(x) = exp(a) ((1-r) + r exp(c)).
  const double a = -3, c = 1.75, prior = -0.5, r = 1 / (1 + std::exp(-prior));
  const Tensor bits = tensor(std::vector<int64_t>{0, 1, 1}, {3, 1, 1, 1});
  const Tensor log_likelihood = (a + c * bits.to(torch::kDouble)).reshape({3, 1, 1});
  const Tensor z_logits = torch::full({1, 1, 1}, prior + c, torch::kDouble);
  const auto options = EvidenceBoundOptions().prior_logits(torch::full({1}, prior, torch::kDouble));
  const double evidence = -a - std::log(1 - r + r * std::exp(c));
  for (int64_t sample = 0; sample < 3; ++sample) {
    const auto of_one = compute_importance_weighted_bound(log_likelihood.narrow(0, sample, 1), z_logits,
                                                          bits.narrow(0, sample, 1), options);
    CHECK_THAT(of_one.nats.item<double>(), Catch::Matchers::WithinRel(evidence, 1e-14));
  }
  const auto of_all = compute_importance_weighted_bound(log_likelihood, z_logits, bits, options);
  CHECK_THAT(of_all.nats.item<double>(), Catch::Matchers::WithinRel(evidence, 1e-14));
}

TEST_CASE("One sample is the single-sample bound, and the same sample K times no more", "[evidence]") {
  const Tensor z_logits = eighths({2, 5, 4}), bits = sample_latent_bits(z_logits),
               log_likelihood = -eighths({2, 5}).abs();
  const Tensor expected =
      compute_latent_log_probability(z_logits, bits).sum(-1) + 5 * 4 * std::log(2.0) - log_likelihood.sum(-1);
  for (const int64_t samples : {1, 7}) {
    const auto bound = compute_importance_weighted_bound(log_likelihood.expand({samples, 2, 5}), z_logits,
                                                         bits.expand({samples, 2, 5, 4}));
    CHECK(difference(bound.nats, expected, 1e-14, 50) == "");
  }
}

TEST_CASE("The importance-weighted bound does not overflow or underflow", "[evidence]") {
  const Tensor z_logits = torch::zeros({1, 1, 1}, torch::kDouble), bits = torch::zeros({3, 1, 1, 1}, torch::kBool);
  const auto bound = [&](const std::vector<double>& log_likelihood) {
    return compute_importance_weighted_bound(tensor(log_likelihood, {3, 1, 1}), z_logits, bits).nats.item<double>();
  };
  // Samples of the prior: -log of the mean likelihood.
  CHECK_THAT(bound({-5000, -5000, -5000}), Catch::Matchers::WithinRel(5000.0, 1e-15));
  CHECK_THAT(bound({-1e6, -100, -1e6}), Catch::Matchers::WithinRel(100 + std::log(3.0), 1e-15));
  CHECK_THAT(bound({-reference::inf, -100, -100}), Catch::Matchers::WithinRel(100 + std::log(1.5), 1e-15));
  CHECK(bound({-reference::inf, -reference::inf, -reference::inf}) == reference::inf);
  CHECK(std::isnan(bound({-100, NAN, -100})));
}

TEST_CASE("A sample that z_logits rule out has a bound of -inf, whatever else rules it out", "[evidence]") {
  const auto bound = [](double z_logit, double prior_logit, double log_likelihood) {
    const Tensor z_logits = tensor(std::vector<double>{0.5, z_logit}, {1, 2, 1});  // two positions of one bit
    const Tensor prior_logits = tensor(std::vector<double>{0.25, prior_logit}, {1, 2, 1});
    return compute_importance_weighted_bound(tensor(std::vector<double>{-1, log_likelihood, -1, -2}, {2, 1, 2}),
                                             z_logits, tensor(std::vector<int64_t>{1, 1, 0, 0}, {2, 1, 2, 1}),
                                             EvidenceBoundOptions().prior_logits(prior_logits))
        .nats.item<double>();
  };
  constexpr double infinity = reference::inf;
  for (const double prior : {0.0, infinity, -infinity}) {
    INFO("prior " << prior);
    CHECK(bound(-infinity, prior, -2) == -infinity);
    CHECK(bound(-infinity, prior, -infinity) == -infinity);
    CHECK(std::isnan(bound(-infinity, prior, NAN)));
    CHECK(std::isnan(bound(NAN, prior, -2)));
  }
  CHECK(std::isnan(bound(-infinity, NAN, -2)));
  // What the prior or the decoder alone rules out adds nothing to the mean: half of the other sample's weight is left.
  const double log_q = -std::log1p(std::exp(0.5)) - std::log(2.0), log_p = -std::log1p(std::exp(0.25));
  CHECK_THAT(bound(0, -infinity, -2), Catch::Matchers::WithinRel(-(-3 + log_p - log_q - std::log(2.0)), 1e-14));
  CHECK_THAT(bound(0, 0, -infinity),
             Catch::Matchers::WithinRel(-(-3 + log_p - std::log(2.0) - log_q - std::log(2.0)), 1e-14));
}

TEST_CASE("The bounds have their shapes on the meta device", "[evidence]") {
  const Tensor z_logits = torch::zeros({2, 3, 4}, torch::kMeta), log_likelihood = torch::zeros({5, 2, 3}, torch::kMeta);
  const Tensor bits = torch::zeros({5, 2, 3, 4}, z_logits.options().dtype(torch::kBool));
  for (const Tensor& prior : {Tensor(), z_logits[0][0], z_logits}) {
    const auto options = EvidenceBoundOptions().prior_logits(prior);
    CHECK(compute_evidence_lower_bound(log_likelihood[0], z_logits, options).nats.sizes() == torch::IntArrayRef{2});
    const auto weighted = compute_importance_weighted_bound(log_likelihood, z_logits, bits, options);
    CHECK(weighted.nats.sizes() == torch::IntArrayRef{2});
    CHECK(weighted.nats.scalar_type() == torch::kDouble);
    CHECK(weighted.tokens.sizes() == torch::IntArrayRef{2});
  }
}

TEST_CASE("Any number of threads gives the same bounds, of many sequences and of a long one",
          "[evidence][threads][cpu]") {
  for (const int64_t sequences : {int64_t{1}, int64_t{300007}}) {
    torch::manual_seed(5);
    const int64_t tokens = 300007 / sequences;
    const Tensor log_likelihood = -torch::rand({2, sequences, tokens}), z_logits = torch::randn({sequences, tokens, 3});
    const Tensor bits = sample_latent_bits(z_logits.expand({2, sequences, tokens, 3}));
    const auto bounds = [&] {
      const auto elbo = compute_evidence_lower_bound(log_likelihood[0], z_logits);
      const auto weighted = compute_importance_weighted_bound(log_likelihood, z_logits, bits);
      return torch::cat({elbo.nats, weighted.nats,
                         tensor(std::vector<double>{elbo.nats_per_token(), weighted.nats_per_token()}, {2})});
    };
    const Tensor of_one = with_threads(1, bounds);
    for (const int threads : {2, 3, 4}) {
      INFO(sequences << " sequences, " << threads << " threads");
      CHECK(same_bits(with_threads(threads, bounds), of_one));
    }
  }
}

TEST_CASE("The evidence lower bound is what the metrics say per token", "[evidence]") {
  const Tensor logits = eighths({2, 6, 9}), z_logits = eighths({2, 6, 4}) / 4, prior = eighths({4}) / 8;
  const Tensor targets = (torch::arange(12) * 5).remainder(9).reshape({2, 6});
  const auto metrics = compute_vae_loss(logits, targets, z_logits,
                                        VAELossOptions().kl(KLDivergenceOptions().latent_dim(4).prior_logits(prior)))
                           .metrics;
  const auto bound = compute_evidence_lower_bound(compute_token_statistics(logits, targets).target_log_probability,
                                                  z_logits, EvidenceBoundOptions().prior_logits(prior));
  CHECK_THAT(bound.nats_per_token(), Catch::Matchers::WithinRel(metrics.at("bound/elbo"), 1e-14));
  CHECK_THAT(bound.bits_per_token(), Catch::Matchers::WithinRel(metrics.at("bound/elbo_bits"), 1e-14));
  CHECK_THAT(bound.bits_per_byte(48), Catch::Matchers::WithinRel(metrics.at("bound/elbo_bits") / 4, 1e-14));
}

TEST_CASE("What a mask leaves out does not count, whatever it holds", "[evidence]") {
  const Tensor log_likelihood = -eighths({3, 2, 5}).abs(), z_logits = eighths({2, 5, 4}) / 2,
               prior = eighths({2, 5, 4}, torch::kDouble, 9) / 4;
  const Tensor bits = sample_latent_bits(z_logits.expand({3, 2, 5, 4}));
  const Tensor mask = torch::arange(5).expand({2, 5}) < indices({5, 3}).unsqueeze(1);
  const auto garbage = [&](const Tensor& values, const Tensor& where) { return values.masked_fill(where, NAN); };
  const Tensor left_out = mask == 0;
  const auto options =
      EvidenceBoundOptions().token_mask(mask).latent_mask(mask).prior_logits(garbage(prior, left_out.unsqueeze(-1)));
  const Tensor dirty_likelihood = garbage(log_likelihood, left_out),
               dirty_z = garbage(z_logits, left_out.unsqueeze(-1));
  const auto elbo = compute_evidence_lower_bound(dirty_likelihood[0], dirty_z, options);
  const auto weighted = compute_importance_weighted_bound(dirty_likelihood, dirty_z, bits, options);
  CHECK(values(elbo.tokens) == std::vector<double>{5, 3});
  for (int64_t sequence = 0; sequence < 2; ++sequence) {
    const int64_t length = sequence == 0 ? 5 : 3;
    const auto part = [&](const Tensor& all, int64_t dim) { return all.select(dim, sequence).narrow(dim, 0, length); };
    const auto of_part = EvidenceBoundOptions().prior_logits(part(prior, 0));
    const Tensor z = part(z_logits, 0);
    CHECK(difference(elbo.nats[sequence], compute_evidence_lower_bound(part(log_likelihood[0], 0), z, of_part).nats,
                     1e-14, 20, 2) == "");
    CHECK(difference(weighted.nats[sequence],
                     compute_importance_weighted_bound(part(log_likelihood, 1), z, part(bits, 1), of_part).nats, 1e-14,
                     20, 2) == "");
  }
  // Without the latents' mask those of the padding cost their KL: looser, and still a bound.
  const auto loose =
      compute_evidence_lower_bound(dirty_likelihood[0], z_logits, EvidenceBoundOptions().token_mask(mask));
  const auto tight = compute_evidence_lower_bound(dirty_likelihood[0], z_logits,
                                                  EvidenceBoundOptions().token_mask(mask).latent_mask(mask));
  CHECK(loose.nats[0].item<double>() == tight.nats[0].item<double>());
  CHECK(loose.nats[1].item<double>() > tight.nats[1].item<double>());
}

TEST_CASE("Bounds of batches join to that of all their sequences", "[evidence]") {
  const Tensor log_likelihood = -eighths({4, 5}).abs(), z_logits = eighths({4, 5, 3});
  const auto mask =
      EvidenceBoundOptions().token_mask(torch::arange(5).expand({4, 5}) < indices({5, 1, 3, 4}).unsqueeze(1));
  const auto whole = compute_evidence_lower_bound(log_likelihood, z_logits, mask);
  EvidenceBound joined;
  CHECK(joined.nats_per_token() == 0);
  for (int64_t first = 0; first < 4; first += 2) {
    joined += compute_evidence_lower_bound(log_likelihood.narrow(0, first, 2), z_logits.narrow(0, first, 2),
                                           EvidenceBoundOptions().token_mask(mask.token_mask().narrow(0, first, 2)));
  }
  CHECK(same_bits(joined.nats, whole.nats));
  CHECK(same_bits(joined.tokens, whole.tokens));
  CHECK(joined.nats_per_token() == whole.nats_per_token());
  CHECK_THAT(joined.nats_per_token(), Catch::Matchers::WithinRel(whole.nats.sum().item<double>() / 13, 1e-15));
  CHECK(same_bits((EvidenceBound() + joined).nats, joined.nats));
}

TEST_CASE("Bounds take one sequence, strided inputs and empty batches, and carry no graph", "[evidence]") {
  const Tensor z_logits = leaf(eighths({5, 3})), log_likelihood = leaf(-eighths({5}).abs());
  const auto one = compute_evidence_lower_bound(log_likelihood, z_logits);
  CHECK(one.nats.dim() == 0);
  CHECK_FALSE(one.nats.requires_grad());
  const auto again =
      compute_evidence_lower_bound(with_strided_rows(log_likelihood.detach()), with_strided_rows(z_logits.detach()));
  CHECK(same_bits(one.nats, again.nats));
  const Tensor bits = sample_latent_bits(z_logits).unsqueeze(0);
  CHECK_FALSE(compute_importance_weighted_bound(log_likelihood.unsqueeze(0), z_logits, bits).nats.requires_grad());

  const auto none = compute_evidence_lower_bound(torch::zeros({0, 5}), torch::zeros({0, 5, 3}));
  CHECK(none.nats.sizes() == torch::IntArrayRef{0});
  CHECK(none.nats_per_token() == 0);
  CHECK(none.bits_per_byte(1) == 0);
  const auto no_tokens = compute_importance_weighted_bound(torch::zeros({2, 1, 0}), torch::zeros({1, 0, 3}),
                                                           torch::zeros({2, 1, 0, 3}, torch::kBool));
  CHECK(values(no_tokens.nats) == std::vector<double>{0});
}

TEST_CASE("Bad input of the bounds is refused by name", "[evidence][errors]") {
  const Tensor z = torch::zeros({2, 5, 3}), likelihood = torch::zeros({2, 5}), bits = torch::zeros({4, 2, 5, 3});
  const auto elbo = [&](const Tensor& of_tokens, const Tensor& z_logits, const EvidenceBoundOptions& options = {}) {
    return after_name("compute_evidence_lower_bound",
                      error_of([&] { compute_evidence_lower_bound(of_tokens, z_logits, options); }));
  };
  CHECK(elbo({}, z) == "log_likelihood must be a defined tensor, got an undefined one");
  CHECK(elbo(likelihood.to(torch::kLong), z) ==
        "log_likelihood must be of type float64, float32, float16 or bfloat16, got Long");
  CHECK(elbo(likelihood, {}) == "z_logits must be a defined tensor, got an undefined one");
  CHECK(elbo(likelihood, torch::zeros({3})) == "z_logits must have the shape [..., positions, latent_dim], got [3]");
  CHECK(elbo(likelihood.t(), z) ==
        "log_likelihood must have the sequences of z_logits and their tokens, [2] and one more size, for each sample, "
        "got "
        "[5, 2]");
  CHECK(
      elbo(torch::zeros({}), torch::zeros({5, 3})) ==
      "log_likelihood must have the sequences of z_logits and their tokens, [] and one more size, for each sample, got "
      "[]");
  CHECK(elbo(likelihood.to(torch::kMeta), z) == "log_likelihood must be on the device of z_logits, cpu, got meta");
  CHECK(elbo(likelihood, z, EvidenceBoundOptions().token_mask(likelihood)) == "token_mask must be bool, got Float");
  CHECK(elbo(likelihood, z, EvidenceBoundOptions().latent_mask(torch::ones({2, 4}, torch::kBool))) ==
        "latent_mask must have the shape [2, 5], got [2, 4]");
  CHECK(elbo(likelihood, z, EvidenceBoundOptions().prior_logits(torch::zeros({4}))) ==
        "prior_logits must have the shape [latent_dim] or that of z_logits, [2, 5, 3], got [4]");

  const auto weighted = [&](const Tensor& of_tokens, const Tensor& of_bits) {
    return after_name("compute_importance_weighted_bound",
                      error_of([&] { compute_importance_weighted_bound(of_tokens, z, of_bits); }));
  };
  CHECK(weighted(torch::zeros({0, 2, 5}), bits) ==
        "log_likelihood must have the shape [K, ..., tokens] with K >= 1 samples, got [0, 2, 5]");
  CHECK(weighted(torch::zeros({}), bits) ==
        "log_likelihood must have the shape [K, ..., tokens] with K >= 1 samples, got []");
  CHECK(weighted(torch::zeros({3, 2, 5}), bits) ==
        "bits must have the shape of z_logits for each of the K samples, [3, 2, 5, 3], got [4, 2, 5, 3]");
  CHECK(weighted(torch::zeros({4, 2, 5}), bits + 0.5) == "bits must be 0 or 1, got 0.5 at index 0");
  CHECK(weighted(torch::zeros({4, 2, 5}), {}) == "bits must be a defined tensor, got an undefined one");
  CHECK(error_of([] { EvidenceBound().bits_per_byte(0); }) ==
        "EvidenceBound::bits_per_byte: bytes must be >= 1, got 0");
}
