#include "free_transformer/kl_divergence.hpp"

#include "instruction_sets.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

KLDivergenceOptions with(int64_t latent_dim, double free_bits, Reduction reduction = torch::kMean) {
  return KLDivergenceOptions().latent_dim(latent_dim).free_bits(free_bits).reduction(reduction);
}

/// In units of the type of arithmetic. Of one bit's KL in float64, u tanh u + log1p(-tanh^2 u)/2, worst at |l| = 2: 2
/// from tanh, 1 from the product, 1 from the square, 1.5 from log1p, a half from their sum; in float32 the kernels' 2.
/// Of a gradient l s/(1+s)^2 / T in float64: 1 from s = exp(-|l|), 1 from the square, a half each from the sum in it,
/// the quotient, 1/T and two products; in float32 the kernels' 4 and the last two. Each bit or position added is a half
/// more.
constexpr double kl_steps = 8;

template <typename FreeBits>
void check_reference(const reference::LatentCase& input, const reference::LatentExpectation& expected, double budget,
                     torch::ScalarType type) {
  const int64_t rows = static_cast<int64_t>(input.z_logits.size()) / input.latent_dim;
  // KL - kappa keeps the error of KL, so kappa is the budget that is added to the value it is relative to; PerBit
  // subtracts one for each bit.
  const double step = epsilon(arithmetic(type));
  const double relative = (kl_steps + static_cast<double>(input.latent_dim) / 2) * step;
  const Tensor z_logits = leaf(tensor(input.z_logits, {rows, input.latent_dim}, type));

  const Tensor mean = compute_kl_divergence<FreeBits>(z_logits, input.latent_dim, input.free_bits);
  const Tensor sum = compute_kl_divergence<FreeBits>(z_logits, with(input.latent_dim, input.free_bits, torch::kSum));
  const Tensor each = compute_kl_divergence<FreeBits>(z_logits, with(input.latent_dim, input.free_bits, torch::kNone));
  CHECK(mean.scalar_type() == arithmetic(type));
  CHECK(each.scalar_type() == arithmetic(type));
  CHECK(difference(mean, {expected.mean}, relative, budget) == "");
  CHECK(difference(sum, {expected.mean * static_cast<double>(rows)}, relative, budget * static_cast<double>(rows)) ==
        "");
  CHECK(difference(each, expected.penalties, relative, budget) == "");

  const Tensor of_z = gradient(mean, z_logits);
  CHECK(of_z.scalar_type() == type);
  CHECK(difference(of_z, expected.gradient, kl_steps * step) == "");
}

}  // namespace

namespace user {

/// A policy of one's own: the square of the KL, and no budget at all.
struct Square {
  static torch::Tensor penalty(const torch::Tensor& bit_kl, const torch::Tensor&, double) {
    return bit_kl.sum(-1).square();
  }
};

}  // namespace user

TEST_CASE("n bits are n log 2 nats", "[kl]") {
  CHECK(bits(0) == 0);
  CHECK(bits(1) == std::log(2.0));
  CHECK(bits(0.5) == std::log(2.0) / 2);
  CHECK(std::abs(bits(0.5) - KLDivergenceOptions().free_bits()) < 5e-5);
}

TEST_CASE("The latent KL has the value and the gradient of its equation for every policy", "[kl][reference]") {
  const Forced forced(GENERATE(from_range(available_instruction_sets())));
  for (const auto& input : reference::latent_cases) {
    for (const auto type : all_types) {
      if (!holds(type, input.exact)) continue;
      INFO(input.name << ", " << type);
      check_reference<PerPosition>(input, input.per_position, input.free_bits, type);
      check_reference<PerBit>(input, input.per_bit, input.free_bits * static_cast<double>(input.latent_dim), type);
      check_reference<BatchMean>(input, input.batch_mean, input.free_bits, type);
    }
  }
}

TEST_CASE("The KL of a bit is within 2 ulp over the floats, its gradient within 4", "[kl][accuracy]") {
  const Forced forced(GENERATE(from_range(available_instruction_sets())));
  // Every 4001st float from the smallest to infinity. The expected values: where |l| < 1/64 the series of KL in l,
  // whose next term is below 1e-14 of it; elsewhere its equation in long double, where cancellation leaves 1e-19/3e-5 =
  // 3e-15.
  std::vector<float> logits;
  for (uint32_t bits_of_float = 1; bits_of_float < 0x7f800000u; bits_of_float += 4001) {
    float value;
    std::memcpy(&value, &bits_of_float, sizeof value);
    logits.push_back(logits.size() % 2 ? value : -value);
  }
  const Tensor z_logits = leaf(torch::tensor(logits).unsqueeze(1));
  std::vector<double> expected, expected_gradient;
  for (const float logit : logits) {
    const long double l = std::abs(logit), s = std::exp(-l), p = 1 / (1 + s), q = s / (1 + s);
    const long double square = l * l;
    const long double series = square / 8 - square * square / 64 + square * square * square / 576;
    const long double equation = std::log(2.0L) + p * std::log(p) + (q > 0 ? q * (std::log(p) - l) : 0);
    expected.push_back(static_cast<double>(l < 1.0L / 64 ? series : equation));
    expected_gradient.push_back(static_cast<double>(q > 0 ? std::copysign(l * p * q, logit) : 0));
  }
  const Tensor kl = compute_kl_divergence(z_logits, with(1, 0, torch::kNone));
  CHECK(difference(kl, expected, 0, 0, /*roundings=*/2 * 2) == "");  // an ulp is two half steps
  CHECK(difference(gradient(kl, z_logits, torch::ones_like(kl)), expected_gradient, 0, 0, /*roundings=*/2 * 4) == "");
}

TEST_CASE("KL of a saturated bit is log 2 and has no gradient", "[kl][gradient]") {
  for (const auto type : all_types) {
    const Tensor z_logits = leaf(tensor(std::vector<double>{reference::inf, -reference::inf}, {2, 1}, type));
    const Tensor loss = compute_kl_divergence(z_logits, /*latent_dim=*/1, /*free_bits=*/0.0);
    CHECK(difference(loss, {std::log(2.0)}, epsilon(torch::kDouble)) == "");
    CHECK(values(gradient(loss, z_logits)) == std::vector<double>(2, 0.0));
    const Tensor first = gradient(loss, z_logits, {}, /*create_graph=*/true);
    CHECK(values(first) == std::vector<double>(2, 0.0));
    CHECK(values(gradient(first.sum(), z_logits)) == std::vector<double>(2, 0.0));
  }
}

TEMPLATE_TEST_CASE("Below its budget the KL has no gradient from an upstream that is infinite or NaN either",
                   "[kl][gradient][cpu]", PerPosition, PerBit, BatchMean) {
  for (const auto type : all_types) {
    for (const double factor : {reference::inf, not_a_number}) {
      INFO(type << ", upstream " << factor);
      const Tensor z_logits = leaf(eighths({4, 3}, type));
      const Tensor loss = compute_kl_divergence<TestType>(z_logits, with(3, 100, torch::kMean));
      CHECK(gradient(loss, z_logits, torch::full_like(loss, factor)).count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("An upstream of the KL that stands for a negated tensor is read as that", "[kl][gradient][cpu]") {
  for (const auto type : all_types) {
    const Tensor z_logits = leaf(eighths({4, 3}, type));
    const auto loss = [&] { return compute_kl_divergence(z_logits, 3, 0.0); };
    const Tensor one = torch::ones_like(loss());
    CHECK(same_bits(gradient(loss(), z_logits, torch::_neg_view(one)), -gradient(loss(), z_logits)));
  }
}

TEST_CASE("A NaN that counts is hidden by no policy, whatever the budget", "[kl]") {
  for (const auto type : all_types) {
    for (const double free_bits : {0.0, 0.3466, 100.0}) {
      INFO(type << ", free_bits " << free_bits);
      const Tensor z_logits = leaf(tensor(std::vector<double>{1, 2, not_a_number, 3, 4, 5}, {3, 2}, type));
      CHECK(std::isnan(compute_kl_divergence<PerPosition>(z_logits, 2, free_bits).item<double>()));
      CHECK(std::isnan(compute_kl_divergence<PerBit>(z_logits, 2, free_bits).item<double>()));
      CHECK(std::isnan(compute_kl_divergence<BatchMean>(z_logits, 2, free_bits).item<double>()));
      const Tensor each = compute_kl_divergence(z_logits, with(2, free_bits, torch::kNone));
      CHECK(values(each.isnan()) == std::vector<double>{0, 1, 0});
      const Tensor of_z = gradient(compute_kl_divergence(z_logits, 2, free_bits), z_logits);
      CHECK(std::isnan(of_z.select(0, 1).select(0, 0).item<double>()));
    }
  }
}

TEST_CASE("No position gives a KL of 0 with a graph", "[kl][gradient]") {
  for (const auto type : all_types) {
    for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
      const Tensor z_logits = leaf(torch::empty({0, 3}, type));
      for (const Tensor& loss : {compute_kl_divergence<PerPosition>(z_logits, with(3, 0.5, reduction)),
                                 compute_kl_divergence<PerBit>(z_logits, with(3, 0.5, reduction)),
                                 compute_kl_divergence<BatchMean>(z_logits, with(3, 0.5, reduction))}) {
        REQUIRE(loss.requires_grad());
        CHECK(loss.count_nonzero().item<int64_t>() == 0);
        CHECK(gradient(loss.sum(), z_logits).sizes() == torch::IntArrayRef({0, 3}));
        CHECK(gradient(loss.sum(), z_logits, {}, /*create_graph=*/true).sizes() == torch::IntArrayRef({0, 3}));
      }
    }
  }
}

TEST_CASE("A sum and unreduced penalties have the gradient of the mean times the number of positions",
          "[kl][gradient]") {
  const Tensor z_logits = leaf(eighths({4, 3}));
  const Tensor upstream = tensor(std::vector<double>{2, 3, -0.5, 0}, {4});
  const Tensor of_mean = gradient(compute_kl_divergence<PerBit>(z_logits, 3, 0.25), z_logits);
  const Tensor of_sum = gradient(compute_kl_divergence<PerBit>(z_logits, with(3, 0.25, torch::kSum)), z_logits);
  const Tensor each = compute_kl_divergence<PerBit>(z_logits, with(3, 0.25, torch::kNone));
  // On both sides at most four products, a half each.
  CHECK(difference(of_sum, of_mean * 4, 4 * epsilon(torch::kDouble)) == "");
  CHECK(difference(gradient(each, z_logits, upstream), of_mean * 4 * upstream.unsqueeze(1),
                   4 * epsilon(torch::kDouble)) == "");
  const Tensor loss = compute_kl_divergence<PerBit>(z_logits, 3, 0.25);
  CHECK(difference(gradient(loss * 3, z_logits), of_mean * 3, 4 * epsilon(torch::kDouble)) == "");
}

TEMPLATE_TEST_CASE("A latent penalty may be changed in place, with a graph and without", "[kl][graph]", PerPosition,
                   PerBit, BatchMean) {
  const auto factor = leaf(torch::full({}, 0.5));
  for (const auto type : all_types) {
    for (const std::vector<int64_t>& positions : {std::vector<int64_t>{}, {3}, {2, 3}, {0}}) {
      auto shape = positions;
      shape.push_back(4);
      const Tensor z_logits = leaf(eighths(shape, type));
      for (const auto& options : {with(4, 0.25, torch::kNone), with(4, 0.25, torch::kSum),
                                  with(4, 0.25, torch::kNone).prior_logits(eighths({4}, type, 2))}) {
        INFO(type << ", " << positions.size() << " dimensions");
        const Tensor expected = gradient(compute_kl_divergence<TestType>(z_logits, options).sum(), z_logits);
        const Tensor loss = compute_kl_divergence<TestType>(z_logits, options);
        const Tensor before = loss.detach().clone();
        loss.mul_(factor).add_(1);
        CHECK(same_bits(loss, before * 0.5 + 1));
        CHECK(difference(gradient(loss.sum(), z_logits), expected / 2, 0, 0, 2) == "");
        const Tensor frozen = compute_kl_divergence<TestType>(z_logits.detach(), options);
        frozen.mul_(factor);
        CHECK(frozen.requires_grad());
      }
    }
  }
}

TEMPLATE_TEST_CASE("The latent KL agrees with finite differences in both orders", "[kl][gradient]", PerPosition, PerBit,
                   BatchMean, user::Square) {
  // Positions and bits on both sides of the budget, none within 1/32 of it, where the hinge has no derivative.
  const Tensor at =
      tensor(std::vector<double>{0.25, -0.125, 0.5, 3, -2, 0.75, 0.125, 0, 0.25, -1.75, 5, -4}, {2, 2, 3});
  const Tensor weights = tensor(std::vector<double>{1, 5, -0.5, 2}, {2, 2});
  SECTION("of the mean") {
    check_gradients([&](const Tensor& z) { return compute_kl_divergence<TestType>(z, 3, 0.125); }, at);
  }
  SECTION("of the square of the mean, whose upstream gradient depends on the logits") {
    check_gradients([&](const Tensor& z) { return compute_kl_divergence<TestType>(z, 3, 0.125).square(); }, at);
  }
  SECTION("of the sum, through other operations on the same logits") {
    check_gradients(
        [&](const Tensor& z) {
          return compute_kl_divergence<TestType>(z * 1.25 - 0.0625, with(3, 0.125, torch::kSum)) + z.square().sum() / 8;
        },
        at);
  }
  if (std::is_same_v<TestType, BatchMean>) return;  // what one position adds depends on the others through a constant
  SECTION("of weighted squares of the penalties") {
    check_gradients(
        [&](const Tensor& z) {
          return (compute_kl_divergence<TestType>(z, with(3, 0.125, torch::kNone)).square() * weights).sum();
        },
        at);
  }
}

TEST_CASE("The second derivative of the KL reaches an upstream gradient", "[kl][gradient]") {
  const Tensor z_logits = leaf(eighths({3, 4}));
  const Tensor upstream = leaf(tensor(std::vector<double>{1, 2, -1}, {3}));
  const Tensor each = compute_kl_divergence(z_logits, with(4, 0.125, torch::kNone));
  const Tensor first = gradient(each, z_logits, upstream, /*create_graph=*/true);
  const Tensor plain = gradient(each, z_logits, torch::ones({3}, torch::kDouble));
  // Squares of gradients, a sum of four, two products: on both sides.
  CHECK(difference(gradient(first.square().sum(), upstream), 2 * upstream * plain.square().sum(1),
                   (4 * kl_steps + 6) * epsilon(torch::kDouble)) == "");
}

TEMPLATE_TEST_CASE("Without a budget the KL at zero has its second derivative, 1/4", "[kl][gradient]", PerPosition,
                   PerBit, BatchMean) {
  const Tensor z_logits = leaf(torch::zeros({1, 2}, torch::kDouble));
  const Tensor first = gradient(compute_kl_divergence<TestType>(z_logits, 2, 0.0), z_logits, {}, /*create_graph=*/true);
  CHECK(values(first) == std::vector<double>{0, 0});
  CHECK(values(gradient(first.sum(), z_logits)) == std::vector<double>{0.25, 0.25});
}

TEST_CASE("A policy of one's own gets the KL of each bit, and its gradient flows", "[kl]") {
  const Tensor z_logits = leaf(eighths({5, 3}, torch::kFloat));
  const Tensor squares = compute_kl_divergence<user::Square>(z_logits, with(3, 0, torch::kNone));
  const Tensor wide = leaf(z_logits.to(torch::kDouble));
  const Tensor kl = compute_kl_divergence(wide, with(3, 0, torch::kNone));
  CHECK(difference(squares, kl.square(), 4 * epsilon(torch::kDouble)) == "");
  CHECK(difference(gradient(squares.sum(), z_logits), gradient(kl.square().sum(), wide),
                   kl_steps * epsilon(torch::kDouble)) == "");
}

TEST_CASE("Every layout of the latent logits gives the numbers of contiguous ones", "[kl][layout]") {
  for (const auto type : all_types) {
    const Tensor base = eighths({3, 5, 7}, type);
    const std::vector<std::pair<const char*, Tensor>> layouts{
        {"shifted", base.slice(1, 0, 4)},
        {"every second bit", base.slice(2, 0, 7, 2)},
        {"permuted", base.permute({1, 0, 2})},
        {"bits first", base.permute({2, 1, 0})},
        {"bits in the middle", base.transpose(1, 2)},
        {"expanded positions", base.select(1, 2).unsqueeze(1).expand({3, 4, 7})},
        {"expanded bits", base.slice(2, 0, 1).expand({3, 5, 7})},
        {"four dimensions, permuted", eighths({2, 3, 2, 5}, type).permute({2, 1, 0, 3})},
        {"two dimensions, transposed", eighths({4, 6}, type).t()},
        {"one dimension", eighths({9}, type)},
        {"one dimension, strided", eighths({9}, type).slice(0, 0, 9, 2)},
    };
    for (const auto& [name, view] : layouts) {
      INFO(type << ", " << name);
      const Tensor strided = leaf(view), contiguous = leaf(view.contiguous());
      const auto options = with(view.size(-1), 0.75, torch::kNone);
      const Tensor each = compute_kl_divergence(strided, options);
      const Tensor expected = compute_kl_divergence(contiguous, options);
      CHECK(each.sizes() == view.sizes().slice(0, static_cast<size_t>(view.dim() - 1)));
      CHECK(difference(each, expected, 2 * kl_steps * epsilon(arithmetic(type)), 0.75, /*roundings=*/2) == "");
      const Tensor upstream = eighths(each.sizes(), arithmetic(type));
      const Tensor found = gradient(each, strided, upstream);
      CHECK(found.sizes() == view.sizes());
      // Both sides may be off, and be rounded to neighbours.
      const double relative = 2 * kl_steps * epsilon(arithmetic(type));
      CHECK(difference(found, gradient(expected, contiguous, upstream), relative, 0, /*roundings=*/2) == "");
    }
  }
}

TEST_CASE("The gradient of shifted latent logits is placed in what they were cut from", "[kl][layout][gradient]") {
  const Tensor z_logits = leaf(eighths({2, 5, 3}));
  const Tensor found = gradient(compute_kl_divergence(z_logits.slice(1, 0, 4), 3, 0.25), z_logits);
  const Tensor alone = leaf(z_logits.slice(1, 0, 4).contiguous());
  const Tensor expected = gradient(compute_kl_divergence(alone, 3, 0.25), alone);
  CHECK(difference(found.slice(1, 0, 4), expected, 2 * kl_steps * epsilon(torch::kDouble)) == "");
  CHECK(found.select(1, 4).count_nonzero().item<int64_t>() == 0);
}

TEST_CASE("Without gradients the KL has the same bits and no graph", "[kl]") {
  for (const auto type : all_types) {
    const Tensor z_logits = leaf(eighths({4, 6}, type));
    const Tensor expected = compute_kl_divergence<PerBit>(z_logits, 6, 0.25);
    CHECK(expected.requires_grad());
    {
      const torch::NoGradGuard no_grad;
      const Tensor loss = compute_kl_divergence<PerBit>(z_logits, 6, 0.25);
      CHECK(same_bits(loss, expected));
      CHECK_FALSE(loss.requires_grad());
    }
    {
      const c10::InferenceMode inference;
      const Tensor copy = z_logits.clone();
      CHECK(same_bits(compute_kl_divergence<PerBit>(z_logits, 6, 0.25), expected));
      CHECK(same_bits(compute_kl_divergence<PerBit>(copy, 6, 0.25), expected));
    }
    CHECK_FALSE(compute_kl_divergence<PerBit>(z_logits.detach(), 6, 0.25).requires_grad());
  }
}

TEST_CASE("A kept graph of the KL can be walked again, one that was not kept cannot", "[kl][graph]") {
  const Tensor z_logits = leaf(eighths({4, 6}));
  const Tensor loss = compute_kl_divergence(z_logits, 6, 0.25);
  loss.backward({}, /*retain_graph=*/true);
  const Tensor first = z_logits.grad().clone();
  loss.backward();
  CHECK(same_bits(z_logits.grad(), first * 2));
  CHECK_THAT(error_of([&] { loss.backward(); }),
             Catch::Matchers::StartsWith("Trying to backward through the graph a second time"));
}

TEST_CASE("Latent logits that were changed after the KL make backward an error", "[kl][graph][cpu]") {
  const Tensor z_logits = leaf(eighths({4, 6})) * 1;
  const Tensor loss = compute_kl_divergence(z_logits, 6, 0.25);
  z_logits.add_(1);
  CHECK_THAT(error_of([&] { loss.backward(); }),
             Catch::Matchers::StartsWith("one of the variables needed for gradient computation has been modified"));
}
