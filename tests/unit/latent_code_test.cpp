#include "free_transformer/latent_code.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/InferenceMode.h>

#include "numeric.hpp"
#include "peak_memory.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

constexpr double infinity = reference::inf;

Tensor random(torch::IntArrayRef shape, uint64_t seed, torch::ScalarType type = torch::kDouble) {
  at::Generator generator = at::detail::createCPUGenerator(seed);
  return torch::randn(shape, generator, torch::TensorOptions(torch::kDouble)).to(type);
}

/// Bit h of each code, [2^latent_dim, latent_dim], counted up by hand.
Tensor bits_of_all_codes(int64_t latent_dim) {
  std::vector<double> bits;
  for (int64_t code = 0; code < int64_t{1} << latent_dim; ++code) {
    for (int64_t bit = 0; bit < latent_dim; ++bit) bits.push_back(static_cast<double>(code / (int64_t{1} << bit) % 2));
  }
  return tensor(bits, {int64_t{1} << latent_dim, latent_dim});
}

/// G of Eq. 8, [..., 2^latent_dim], as it is written there.
Tensor code_probabilities(const Tensor& z_logits) {
  const Tensor bits = bits_of_all_codes(z_logits.size(-1));
  const Tensor p = z_logits.sigmoid().unsqueeze(-2);
  return (bits * p + (1 - bits) * (1 - p)).prod(-1);
}

/// (Y + G - detach(G)) codebook.
Tensor plain_mapper(const Tensor& z_logits, const Tensor& codes, const Tensor& codebook) {
  const Tensor one_hot = torch::one_hot(codes, codebook.size(0)).to(torch::kDouble);
  const Tensor probabilities = code_probabilities(z_logits);
  return (one_hot + (probabilities - probabilities.detach())).matmul(codebook);
}

}  // namespace

TEST_CASE("Infinite logits and those of 40 give the right bit in every draw and type", "[latent_code]") {
  const auto logits = tensor(std::vector<double>{40, -40, infinity, -infinity, 1000, -1000}, {6});
  const auto expected = torch::tensor({1, 0, 1, 0, 1, 0}, torch::kBool);
  for (const auto type : all_types) {
    INFO(type);
    const Tensor bits = sample_latent_bits(logits.to(type).expand({200000, 6}));
    CHECK(bits.scalar_type() == torch::kBool);
    CHECK((bits == expected).all().item<bool>());
  }
}

TEST_CASE("No draw can turn a bit whose logit is 37 or more", "[latent_code]") {
  // 1 - u is a multiple of 2^-53 above 0, and a bit turns where that is below the less likely bit's probability.
  const Tensor z = tensor(std::vector<double>{37, -37, 40, -40, reference::inf, -reference::inf}, {6});
  CHECK((free_transformer::detail::plain::logistic(-z.abs()) <= std::ldexp(1.0, -53)).all().item<bool>());
}

TEST_CASE("Bits are drawn with the probability of their logit", "[latent_code]") {
  constexpr int64_t draws = 1 << 18;
  const std::vector<double> logits{0, 0.5, -0.5, 2, -2, 6, -6};
  at::Generator generator = at::detail::createCPUGenerator(7);
  for (const auto type : all_types) {
    const Tensor z_logits = tensor(logits, {7}, type);
    const Tensor share = sample_latent_bits(z_logits.expand({draws, 7}), generator).to(torch::kDouble).mean(0);
    for (size_t index = 0; index < logits.size(); ++index) {
      INFO(type << ", logit " << logits[index]);
      const double p = 1 / (1 + std::exp(-logits[index]));
      const double deviation = std::sqrt(p * (1 - p) / draws);  // five of them: missed once in two million times
      CHECK(std::abs(share[static_cast<int64_t>(index)].item<double>() - p) < 5 * deviation);
    }
  }
}

TEST_CASE("A generator of the caller's repeats its bits, and leaves the default one alone", "[latent_code]") {
  const Tensor z_logits = eighths({5, 3, 16}) / 4;
  torch::manual_seed(1);
  const Tensor next_of_default = torch::rand({4});
  torch::manual_seed(1);
  const Tensor first = sample_latent_bits(z_logits, at::detail::createCPUGenerator(3));
  CHECK(same_bits(torch::rand({4}), next_of_default));
  CHECK(same_bits(sample_latent_bits(z_logits, at::detail::createCPUGenerator(3)), first));
  CHECK_FALSE(same_bits(sample_latent_bits(z_logits, at::detail::createCPUGenerator(4)), first));
  CHECK(first.sizes() == z_logits.sizes());
  torch::manual_seed(5);
  const Tensor by_default = sample_latent_bits(z_logits);
  torch::manual_seed(5);
  CHECK(same_bits(sample_latent_bits(z_logits), by_default));
}

TEST_CASE("Bits of z_logits that require grad carry no graph", "[latent_code]") {
  CHECK_FALSE(sample_latent_bits(leaf(eighths({3, 4}))).requires_grad());
}

TEST_CASE("Codes count the bits from the lowest, and give them back", "[latent_code]") {
  const Tensor bits = bits_of_all_codes(5);
  for (const auto type : {torch::kBool, torch::kByte, torch::kChar, torch::kShort, torch::kInt, torch::kLong,
                          torch::kHalf, torch::kBFloat16, torch::kFloat, torch::kDouble}) {
    INFO(type);
    CHECK(same_bits(pack_latent_bits(bits.to(type)), torch::arange(32)));
  }
  for (const auto type : {torch::kByte, torch::kChar, torch::kShort, torch::kInt, torch::kLong}) {
    INFO(type);
    CHECK(same_bits(unpack_latent_codes(torch::arange(32).to(type), 5), bits.to(torch::kBool)));
  }
  CHECK(pack_latent_bits(bits.reshape({4, 8, 5})).sizes() == torch::IntArrayRef{4, 8});
  CHECK(unpack_latent_codes(torch::arange(6).reshape({2, 3}), 3).sizes() == torch::IntArrayRef{2, 3, 3});
  CHECK(pack_latent_bits(bits[19]).item<int64_t>() == 19);
}

TEST_CASE("Codes of 1 to 62 bits come back from their bits", "[latent_code]") {
  for (const int64_t latent_dim : {1, 2, 15, 16, 17, 31, 32, 33, 53, 54, 61, 62}) {
    INFO(latent_dim);
    const int64_t last = (int64_t{1} << latent_dim) - 1;
    const Tensor codes = torch::tensor({int64_t{0}, last, last / 3, last - last / 5}, torch::kLong);
    CHECK(same_bits(pack_latent_bits(unpack_latent_codes(codes, latent_dim)), codes));
    CHECK(unpack_latent_codes(codes, latent_dim)[1].all().item<bool>());
  }
}

TEST_CASE("log q is the reference's, and so is its gradient", "[latent_code][gradient]") {
  for (const auto& reference : reference::latent_log_probability_cases) {
    for (const auto type : all_types) {
      if (!holds(type, reference.exact)) continue;
      INFO(reference.name << ", " << type);
      const auto count = static_cast<int64_t>(reference.values.size());
      const Tensor z_logits = leaf(tensor(reference.z_logits, {count, reference.latent_dim}, type));
      const Tensor bits = tensor(reference.bits, {count, reference.latent_dim});
      const Tensor value = compute_latent_log_probability(z_logits, bits);
      CHECK(value.scalar_type() == arithmetic(type));
      // log1p, exp and a sum of one sign: each bit within 4 steps (an exponential's own error with its argument exact, log1p,
      // the difference), and half a step for each of the additions.
      const double relative = (4 + 0.5 * static_cast<double>(reference.latent_dim)) * epsilon(arithmetic(type));
      CHECK(difference(value, reference.values, relative) == "");
      CHECK(difference(gradient(value.sum(), z_logits), reference.gradient, 4 * epsilon(arithmetic(type))) == "");
    }
  }
}

TEST_CASE("log q sums to one over all codes, and agrees with finite differences to second order",
          "[latent_code][gradient]") {
  const Tensor z_logits = eighths({3, 5}) / 4;
  const Tensor bits = bits_of_all_codes(5).unsqueeze(1).expand({32, 3, 5});
  const Tensor q = compute_latent_log_probability(z_logits.expand({32, 3, 5}), bits).exp().sum(0);
  CHECK(difference(q, std::vector<double>(3, 1.0), 1e-14) == "");
  const Tensor one = bits.select(0, 11);
  check_gradients([&](const Tensor& z) { return (compute_latent_log_probability(z, one) * eighths({3})).sum(); },
                  z_logits);
}

TEST_CASE("One row of prior_logits serves all positions", "[latent_code][gradient]") {
  const Tensor prior_logits = leaf(eighths({5}) / 4), bits = bits_of_all_codes(5).reshape({4, 8, 5});
  const Tensor value = compute_latent_log_probability(prior_logits, bits);
  CHECK(same_bits(value, compute_latent_log_probability(prior_logits.detach().expand({4, 8, 5}).contiguous(), bits)));
  CHECK(value.sizes() == torch::IntArrayRef{4, 8});
  // Each bit is 1 in half of the patterns: 16 - 32 p.
  CHECK(difference(gradient(value.sum(), prior_logits), 16 - 32 * prior_logits.sigmoid(), 1e-14, 32) == "");
}

TEST_CASE("A prior of a half type for all positions gets its gradient rounded once", "[latent_code][gradient][half]") {
  constexpr int64_t positions = 4099, of_one = 2305;  // more terms than either half type can count
  const Tensor bits = (torch::arange(positions) < of_one).unsqueeze(1).expand({positions, 2});
  for (const auto type : all_types) {
    INFO(type);
    const Tensor prior_logits = leaf(tensor(std::vector<double>{0.25, -1.5}, {2}, type));
    std::vector<double> expected;  // of_one (1 - p) - (positions - of_one) p
    for (const double logit : {0.25, -1.5}) expected.push_back(of_one - positions / (1 + std::exp(-logit)));
    // Each term within 4 steps as above, and float32's pairwise sum of them, which cancel.
    CHECK(difference(gradient(compute_latent_log_probability(prior_logits, bits).sum(), prior_logits), expected,
                     12 * epsilon(arithmetic(type)), of_one) == "");
  }
}

TEST_CASE("log q of an impossible bit is -inf, of a sure one 0, and NaN stays NaN", "[latent_code]") {
  const Tensor z_logits = leaf(tensor(std::vector<double>{infinity, -infinity, infinity, -infinity, NAN}, {5, 1}));
  const Tensor bits = tensor(std::vector<int64_t>{1, 0, 0, 1, 1}, {5, 1});
  const Tensor value = compute_latent_log_probability(z_logits, bits);
  CHECK(values(value.narrow(0, 0, 4)) == std::vector<double>{0, 0, -infinity, -infinity});
  CHECK(std::isnan(value[4].item<double>()));
  const Tensor slope = gradient(value.sum(), z_logits);
  CHECK(values(slope.narrow(0, 0, 4)) == std::vector<double>{0, 0, -1, 1});
  CHECK(std::isnan(slope[4].item<double>()));
}

TEST_CASE("The mapper is the plain formula for 1 to 12 bits", "[latent_code][mapper][gradient]") {
  for (int64_t latent_dim = 1; latent_dim <= 12; ++latent_dim) {
    // From 11 bits on there are several blocks of codes, and 600 tokens are two blocks of tokens.
    const int64_t tokens = latent_dim == 11 ? 600 : 7, width = 5;
    INFO(latent_dim << " bits");
    const Tensor z_logits = leaf(2 * random({tokens, latent_dim}, 1)),
                 codebook = leaf(random({int64_t{1} << latent_dim, width}, 2));
    const Tensor codes = pack_latent_bits(sample_latent_bits(z_logits)), upstream = random({tokens, width}, 3);
    const Tensor expected = plain_mapper(z_logits, codes, codebook);
    const Tensor rows = map_latent_codes(z_logits, codes, codebook);
    CHECK(same_bits(rows, codebook.index_select(0, codes)));
    CHECK(difference(rows, expected, 1e-14, 1) == "");
    // Sums of at most 4096 products of 5 terms, of size below 20 in all.
    CHECK(difference(gradient(rows, z_logits, upstream), gradient(expected, z_logits, upstream), 1e-13, 20) == "");
    CHECK(difference(gradient(rows, codebook, upstream), gradient(expected, codebook, upstream), 1e-14, 1) == "");
  }
}

TEST_CASE("The mapper's gradient is that of the expectation, by finite differences",
          "[latent_code][mapper][gradient]") {
  const Tensor codebook = random({16, 3}, 2), upstream = random({4, 3}, 3), z_logits = random({4, 4}, 1);
  const auto expectation = [&](const Tensor& z) {
    return (code_probabilities(z).matmul(codebook) * upstream).sum().item<double>();
  };
  const Tensor z = leaf(z_logits);
  const Tensor rows = map_latent_codes(z, torch::tensor({3, 0, 15, 7}), codebook);
  CHECK(difference(gradient(rows, z, upstream), five_point_gradient(expectation, z_logits), 1e-9, 1) == "");
}

TEST_CASE("The mapper keeps its digits where bits are nearly sure, and is 0 where they are", "[latent_code][mapper]") {
  // One bit: d/dz = p (1-p) (s_1 - s_0).
  const std::vector<double> logits{40, -40, 15, -15, 80, -80, infinity, -infinity, 0};
  const Tensor codebook = tensor(std::vector<double>{1, 4}, {2, 1});
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const Tensor z_logits = leaf(tensor(logits, {9, 1}, type));
    const Tensor rows = map_latent_codes(z_logits, torch::zeros({9}, torch::kLong), codebook.to(type));
    std::vector<double> expected;
    for (const double z : logits) {
      const double s = std::exp(-std::abs(z));
      expected.push_back(3 * s / ((1 + s) * (1 + s)));
    }
    // p, 1-p, three products, a difference of 4 and 1 in 3.
    CHECK(difference(gradient(rows.sum(), z_logits), expected, 16 * epsilon(type)) == "");
  }
  const Tensor sure = leaf(torch::full({2, 12}, infinity));
  const Tensor rows = map_latent_codes(sure, torch::full({2}, 4095), random({4096, 3}, 1, torch::kFloat));
  CHECK(gradient(rows.sum(), sure).eq(0).all().item<bool>());
}

TEST_CASE("NaN logits make the mapper's gradient NaN for their token alone", "[latent_code][mapper]") {
  Tensor values_of_logits = random({3, 4}, 1);
  values_of_logits[1][2] = NAN;
  const Tensor z_logits = leaf(values_of_logits);
  const Tensor rows = map_latent_codes(z_logits, torch::zeros({3}, torch::kLong), random({16, 2}, 2));
  const Tensor slope = gradient(rows.sum(), z_logits);
  CHECK(slope[1].isnan().all().item<bool>());
  CHECK_FALSE(slope[0].isnan().any().item<bool>());
  CHECK_FALSE(slope[2].isnan().any().item<bool>());
}

TEST_CASE("Half and float32 gradients of the mapper are those of float64, rounded once", "[latent_code][mapper]") {
  constexpr int64_t latent_dim = 11, tokens = 20, width = 8;
  for (const auto codebook_type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    for (const auto z_type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      INFO(codebook_type << " codebook, " << z_type << " z_logits");
      const Tensor z_logits = leaf(random({tokens, latent_dim}, 1, z_type));
      const Tensor codebook = leaf(random({1 << latent_dim, width}, 2, codebook_type));
      const Tensor upstream = random({tokens, width}, 3, codebook_type);
      const Tensor codes = torch::arange(tokens).remainder(3);  // rows meet in three codes
      const Tensor rows = map_latent_codes(z_logits, codes, codebook);
      CHECK(rows.scalar_type() == codebook_type);
      const Tensor z64 = leaf(z_logits.to(torch::kDouble)), codebook64 = leaf(codebook.to(torch::kDouble));
      const Tensor rows64 = map_latent_codes(z64, codes, codebook64);
      const Tensor g64 = upstream.to(torch::kDouble);
      const Tensor of_z = gradient(rows, z_logits, upstream), of_codebook = gradient(rows, codebook, upstream);
      CHECK(of_z.scalar_type() == z_type);
      CHECK(of_codebook.scalar_type() == codebook_type);
      // s is a sum of 8 products of size 3, 2048 of them are averaged with factors of 11 multiplications each.
      CHECK(difference(of_z, gradient(rows64, z64, g64), 20 * epsilon(torch::kFloat), 3) == "");
      CHECK(difference(of_codebook, gradient(rows64, codebook64, g64), 8 * epsilon(torch::kFloat), 3) == "");
    }
  }
}

TEST_CASE("A step of the mapper works at 16 bits with shapes and strides as they come", "[latent_code][mapper]") {
  const Tensor wide = leaf(random({2, 16, 3}, 1, torch::kFloat));
  const Tensor codebook = leaf(random({4, 1 << 16}, 2, torch::kFloat));  // as a torch::nn::Linear holds it
  const Tensor z_logits = wide.movedim(1, -1), codes = pack_latent_bits(sample_latent_bits(z_logits));
  const Tensor rows = map_latent_codes(z_logits, codes.to(torch::kInt), codebook.t());
  CHECK(rows.sizes() == torch::IntArrayRef{2, 3, 4});
  rows.sum().backward();
  CHECK(wide.grad().sizes() == wide.sizes());
  CHECK(codebook.grad().sum().item<double>() == 24);
  // Low and high bits alike: the gradient of one token by the formula for sums over its codes.
  const Tensor z = z_logits[1][2].detach().to(torch::kDouble), s = codebook.detach().to(torch::kDouble).sum(0);
  const Tensor exact = leaf(z);
  const Tensor expected = gradient((code_probabilities(exact) * s).sum(), exact);
  CHECK(difference(wide.grad()[1].t()[2], expected, 30 * epsilon(torch::kFloat), 3) == "");
}

TEST_CASE("A frozen input of the mapper gets no gradient, and costs none", "[latent_code][mapper]") {
  const Tensor codes = torch::tensor({1, 2}), z = random({2, 3}, 1), codebook = random({8, 4}, 2);
  CHECK_FALSE(map_latent_codes(z, codes, codebook).requires_grad());
  const Tensor z_leaf = leaf(z), codebook_leaf = leaf(codebook);
  map_latent_codes(z_leaf, codes, codebook).sum().backward();
  CHECK(z_leaf.grad().defined());
  map_latent_codes(z, codes, codebook_leaf).sum().backward();
  CHECK(codebook_leaf.grad().defined());
  const torch::NoGradGuard no_grad;
  CHECK(same_bits(map_latent_codes(z_leaf, codes, codebook_leaf), codebook.index_select(0, codes)));
}

TEST_CASE("The mapper works in inference mode, and with tensors from there where there is no graph",
          "[latent_code][mapper]") {
  const Tensor z = random({2, 3}, 1), codebook = leaf(random({8, 4}, 2)), codes = torch::tensor({1, 7});
  const Tensor expected = codebook.detach().index_select(0, codes);
  Tensor z_there, codes_there, codebook_there;
  {
    const c10::InferenceMode inference;
    z_there = z.clone(), codes_there = codes.clone(), codebook_there = codebook.clone();
    CHECK(same_bits(map_latent_codes(z_there, codes_there, codebook_there), expected));
    CHECK(same_bits(map_latent_codes(z_there, codes_there, codebook), expected));
    CHECK(same_bits(map_latent_codes(leaf(z), codes, codebook_there), expected));
    CHECK(same_bits(pack_latent_bits(unpack_latent_codes(codes_there, 3)), codes));
  }
  CHECK(same_bits(map_latent_codes(z, codes_there, codebook.detach()), expected));
  CHECK(same_bits(map_latent_codes(z_there, codes, codebook_there), expected));
  const torch::NoGradGuard no_grad;
  CHECK(same_bits(map_latent_codes(z_there, codes_there, codebook), expected));
}

TEST_CASE("Rows of the mapper may be changed in place, with a graph and without", "[latent_code][mapper][graph]") {
  for (const std::vector<int64_t>& positions : {std::vector<int64_t>{}, {3}, {1, 3}, {3, 1}, {0}, {2, 3}}) {
    auto shape = positions;
    shape.push_back(4);
    const Tensor z = random(shape, 1), codes = torch::arange(z.numel() / 4).reshape(positions);
    const Tensor codebook = leaf(random({16, 5}, 2)), z_logits = leaf(z), bias = leaf(random({5}, 3));
    const Tensor of_z = gradient(map_latent_codes(z_logits, codes, codebook).sum(), z_logits);
    const Tensor rows = map_latent_codes(z_logits, codes, codebook);
    rows.mul_(2).add_(bias);
    CHECK(same_bits(rows, codebook.index({codes}) * 2 + bias));
    CHECK(same_bits(gradient(rows.sum(), z_logits), of_z * 2));
    CHECK(gradient(rows.sum(), codebook).sum().item<double>() == 2.0 * static_cast<double>(rows.numel()));
    CHECK(gradient(rows.sum(), bias).sum().item<double>() == static_cast<double>(rows.numel()));
    Tensor frozen = map_latent_codes(z, codes, codebook.detach());
    frozen += bias;
    CHECK(gradient(frozen.sum(), bias).sum().item<double>() == static_cast<double>(rows.numel()));
  }
}

TEST_CASE("The codebook's gradient is the sum of its rows, rounded once", "[latent_code][mapper][gradient]") {
  // Codes 1, 4 and 6 in turn, in several blocks of tokens, each with far more rows than a sum of their type could take.
  constexpr int64_t of_each = 1 << 16, tokens = 3 * of_each, width = 8;
  const Tensor codes = torch::tensor({4, 1, 6}).repeat({of_each}), z_logits = torch::zeros({tokens, 3});
  for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    INFO(type);
    const Tensor codebook = leaf(torch::zeros({8, width}, type));
    const Tensor upstream = torch::full({1, width}, 0.1, torch::kDouble).to(type);
    const Tensor found =
        gradient(map_latent_codes(z_logits, codes, codebook), codebook, upstream.expand({tokens, width}));
    const Tensor expected = torch::zeros({8, width}, torch::kDouble);
    expected.index_fill_(0, torch::tensor({1, 4, 6}), of_each * upstream[0][0].item<double>());
    CHECK(same_bits(found, expected.to(type)));
  }
  // Terms of 2^24 and 1, of which float32 keeps the former alone.
  const Tensor codebook = leaf(torch::zeros({2, 1})), upstream = torch::ones({1001, 1});
  upstream[0] = 16777216;
  upstream[1000] = -16777216;
  const Tensor rows = map_latent_codes(torch::zeros({1001, 1}), torch::ones({1001}, torch::kLong), codebook);
  CHECK(values(gradient(rows, codebook, upstream)) == std::vector<double>{0, 999});
}

TEST_CASE("Twice through a retained graph of the mapper gives the same, create_graph is refused",
          "[latent_code][mapper][errors]") {
  const Tensor z_logits = leaf(random({2, 3}, 1)), codebook = leaf(random({8, 4}, 2));
  const Tensor loss = map_latent_codes(z_logits, torch::tensor({1, 2}), codebook).sum();
  CHECK(same_bits(gradient(loss, z_logits), gradient(loss, z_logits)));
  CHECK(error_of([&] { gradient(loss, z_logits, {}, /*create_graph=*/true); }) ==
        "map_latent_codes: must not be differentiated twice (create_graph): its gradient has no graph");
}

TEST_CASE("An empty batch passes through all tools of the latent code", "[latent_code][mapper]") {
  const Tensor z_logits = leaf(torch::zeros({0, 3, 4})), codebook = leaf(random({16, 2}, 1, torch::kFloat));
  const Tensor bits = sample_latent_bits(z_logits), codes = pack_latent_bits(bits);
  CHECK(bits.sizes() == torch::IntArrayRef{0, 3, 4});
  CHECK(codes.sizes() == torch::IntArrayRef{0, 3});
  CHECK(unpack_latent_codes(codes, 4).sizes() == bits.sizes());
  CHECK(compute_latent_log_probability(z_logits, bits).sizes() == codes.sizes());
  const Tensor rows = map_latent_codes(z_logits, codes, codebook);
  CHECK(rows.sizes() == torch::IntArrayRef{0, 3, 2});
  (rows.sum() + straight_through_latent_bits(z_logits, bits).sum()).backward();
  CHECK(z_logits.grad().sizes() == z_logits.sizes());
  CHECK(codebook.grad().eq(0).all().item<bool>());
  const Tensor half = leaf(random({16, 2}, 1, torch::kHalf));
  map_latent_codes(z_logits.detach(), codes, half).sum().backward();
  CHECK(half.grad().eq(0).all().item<bool>());
}

TEST_CASE("The mapper's backward at 16 bits stays below a sixteenth of tokens x 2^16 floats", "[latent_code][memory]") {
  constexpr int64_t tokens = 1024, width = 64;
  const Tensor z_logits = leaf(random({tokens, 16}, 1, torch::kFloat));
  const Tensor codebook = leaf(random({1 << 16, width}, 2, torch::kFloat));
  const Tensor codes = pack_latent_bits(sample_latent_bits(z_logits)),
               upstream = random({tokens, width}, 3, torch::kFloat);
  const auto of_gradients = static_cast<int64_t>(codebook.nbytes() + z_logits.nbytes());
  const auto of_rows = static_cast<int64_t>(upstream.nbytes());
  const int64_t peak = peak_of([&] { map_latent_codes(z_logits, codes, codebook).backward(upstream); });
  INFO(peak - of_gradients << " bytes beside the gradients");
  CHECK(peak - of_gradients - of_rows <= tokens * (int64_t{1} << 16) * 4 / 16);
}

TEST_CASE("Straight-through bits have the value of the bits and the gradient of their probabilities",
          "[latent_code][gradient]") {
  const std::vector<double> logits{0, 0.5, -0.5, 3, -3, 15, -15, 40, -40, infinity, -infinity};
  const Tensor bits = tensor(std::vector<int64_t>{0, 1, 0, 1, 1, 1, 0, 0, 1, 1, 0}, {11});
  for (const auto type : all_types) {
    INFO(type);
    const Tensor z_logits = leaf(tensor(logits, {11}, type));
    const Tensor result = straight_through_latent_bits(z_logits, bits);
    CHECK(same_bits(result, bits.to(type)));
    std::vector<double> expected;
    for (const double z : logits) {
      const double s = std::exp(-std::abs(z));
      expected.push_back(s / ((1 + s) * (1 + s)));
    }
    CHECK(difference(gradient(result.sum(), z_logits), expected, 4 * epsilon(arithmetic(type))) == "");
  }
  const Tensor z = eighths({3, 4}) / 4, some = bits_of_all_codes(4).narrow(0, 5, 3);
  const Tensor x = leaf(z), weight = eighths({3, 4}, torch::kDouble, 5);
  const Tensor first = gradient((straight_through_latent_bits(x, some) * weight).sum(), x, {}, /*create_graph=*/true);
  const Tensor p = leaf(z);
  const Tensor expected = gradient((p.sigmoid() * weight).sum(), p, {}, /*create_graph=*/true);
  CHECK(difference(first, expected, 1e-15, 1) == "");
  CHECK(difference(gradient((first * weight).sum(), x), gradient((expected * weight).sum(), p), 1e-14, 10) == "");
}

TEST_CASE("Any number of threads gives the same bits of the latent code's tools", "[latent_code][threads][cpu]") {
  const Tensor z = 3 * random({100003, 3}, 1, torch::kFloat), upstream = random({100003, 3}, 2, torch::kFloat);
  const Tensor bits = sample_latent_bits(z), codes = pack_latent_bits(bits);
  const Tensor codebook = leaf(random({8, 5}, 3, torch::kFloat));
  const auto results = [&] {
    const Tensor z_logits = leaf(z);
    const Tensor log_q = compute_latent_log_probability(z_logits, bits);
    const Tensor rows = map_latent_codes(z_logits, codes, codebook);
    return std::vector<Tensor>{gradient(straight_through_latent_bits(z_logits, bits), z_logits, upstream), log_q,
                               gradient(log_q, z_logits, upstream.select(1, 0)),
                               gradient(rows.square().sum(), codebook),
                               sample_latent_bits(z, at::detail::createCPUGenerator(4))};
  };
  const auto of_one = with_threads(1, results);
  for (const int threads : {2, 3, 4}) {
    const auto of_several = with_threads(threads, results);
    for (size_t index = 0; index < of_one.size(); ++index) {
      INFO(threads << " threads, result " << index);
      CHECK(same_bits(of_several[index], of_one[index]));
    }
  }
}

TEST_CASE("NaN is never hidden by the latent code's tools", "[latent_code][errors]") {
  const Tensor z_logits = tensor(std::vector<double>{1, 2, NAN, 4}, {2, 2});
  CHECK(error_of([&] { sample_latent_bits(z_logits); }) ==
        "sample_latent_bits: z_logits must not be NaN, got nan at index 2");
  CHECK(straight_through_latent_bits(z_logits, torch::ones({2, 2}, torch::kBool)).isnan().sum().item<int64_t>() == 1);
  CHECK(error_of([&] { pack_latent_bits(z_logits); }) == "pack_latent_bits: bits must be 0 or 1, got 2 at index 1");
}

TEST_CASE("Bad input of the latent code's tools is refused by name", "[latent_code][errors]") {
  const Tensor z = torch::zeros({2, 3}), bits = torch::zeros({2, 3}, torch::kBool),
               codes = torch::zeros({2}, torch::kLong), codebook = torch::zeros({8, 4});
  const auto error = [](const std::string& name, const auto& function) { return after_name(name, error_of(function)); };

  CHECK(error("sample_latent_bits", [] { sample_latent_bits({}); }) ==
        "z_logits must be a defined tensor, got an undefined one");
  CHECK(error("sample_latent_bits", [&] { sample_latent_bits(codes); }) ==
        "z_logits must be of type float64, float32, float16 or bfloat16, got Long");
  CHECK(error("sample_latent_bits", [&] { sample_latent_bits(z.narrow(1, 0, 0)); }) ==
        "z_logits must have at least one dimension, and a last one of at least 1, got shape [2, 0]");

  CHECK(error("pack_latent_bits", [] { pack_latent_bits({}); }) ==
        "bits must be a defined tensor, got an undefined one");
  CHECK(error("pack_latent_bits", [] {
          pack_latent_bits(torch::tensor({0, 1, -1, 1}));
        }) == "bits must be 0 or 1, got -1 at index 2");
  CHECK(error("pack_latent_bits", [] { pack_latent_bits(torch::zeros({}, torch::kBool)); }) ==
        "bits must have at least one dimension, and a last one of at least 1, got shape []");
  CHECK(error("pack_latent_bits", [] { pack_latent_bits(torch::zeros({63}, torch::kBool)); }) ==
        "the last size of bits must lie in [1, 62], got 63");
  CHECK(error("pack_latent_bits", [] { pack_latent_bits(torch::zeros({3}, torch::kComplexFloat)); }) ==
        "bits must be bool, integer or floating, got ComplexFloat");
  CHECK(error("pack_latent_bits", [&] { pack_latent_bits(straight_through_latent_bits(leaf(z), bits)); }) ==
        "bits must not require grad (it gets none; detach it), got requires_grad = true");

  CHECK(error("unpack_latent_codes", [&] { unpack_latent_codes(codes, 0); }) ==
        "latent_dim must lie in [1, 62], got 0");
  CHECK(error("unpack_latent_codes", [&] { unpack_latent_codes(z, 3); }) ==
        "codes must be of an integer type, got Float");
  CHECK(error("unpack_latent_codes", [] {
          unpack_latent_codes(torch::tensor({7, 8}), 3);
        }) == "codes must lie in [0, 2^latent_dim), got 8 at index 1");
  CHECK(error("unpack_latent_codes", [] { unpack_latent_codes(torch::tensor({-1}), 62); }) ==
        "codes must lie in [0, 2^latent_dim), got -1 at index 0");

  CHECK(error("compute_latent_log_probability", [&] { compute_latent_log_probability(z, bits[0]); }) ==
        "bits must have the shape of z_logits, [2, 3], got [3]");
  CHECK(error("compute_latent_log_probability", [&] { compute_latent_log_probability(z[0].narrow(0, 0, 2), bits); }) ==
        "bits must have the shape of z_logits, [2], got [2, 3]");
  CHECK(error("compute_latent_log_probability", [&] { compute_latent_log_probability(z, bits.to(torch::kMeta)); }) ==
        "bits must be on the device of z_logits, cpu, got meta");
  CHECK(error("compute_latent_log_probability", [&] { compute_latent_log_probability(z, {}); }) ==
        "bits must be a defined tensor, got an undefined one");
  CHECK(error("straight_through_latent_bits", [&] { straight_through_latent_bits(z[0], bits); }) ==
        "bits must have the shape of z_logits, [3], got [2, 3]");

  const auto map = [&](const Tensor& z_logits, const Tensor& of_codes, const Tensor& of_codebook) {
    return error("map_latent_codes", [&] { map_latent_codes(z_logits, of_codes, of_codebook); });
  };
  CHECK(map(z, torch::tensor({0, 8}), codebook) == "codes must lie in [0, 2^latent_dim), got 8 at index 1");
  CHECK(map(z, codes.to(torch::kFloat), codebook) == "codes must be of an integer type, got Float");
  CHECK(map(z, codes.unsqueeze(1), codebook) ==
        "codes must have the shape of z_logits without its last size, [2], got [2, 1]");
  CHECK(map(z, codes.to(torch::kMeta), codebook) == "codes must be on the device of z_logits, cpu, got meta");
  CHECK(map(z, codes, {}) == "codebook must be a defined tensor, got an undefined one");
  CHECK(map(z, codes, codebook.t()) == "codebook must have the shape [2^latent_dim, D] with 2^3 = 8, got [4, 8]");
  CHECK(map(z, codes, codebook.to(torch::kDouble)) ==
        "codebook must be float64 if z_logits are and else not, got Double beside Float");
  CHECK(map(z, codes, codebook.to(torch::kLong)) ==
        "codebook must be of type float64, float32, float16 or bfloat16, got Long");
  CHECK(map(z, codes, codebook.to(torch::kMeta)) == "codebook must be on the device of z_logits, cpu, got meta");
  CHECK(map(torch::zeros({2, 63}), codes, codebook) == "the last size of z_logits must lie in [1, 62], got 63");
}

TEST_CASE("The latent code's tools work on the meta device, where there are no values", "[latent_code]") {
  const Tensor z_logits = torch::zeros({2, 3}, torch::kMeta);
  const Tensor bits = torch::zeros({2, 3}, z_logits.options().dtype(torch::kBool));
  CHECK(pack_latent_bits(bits).sizes() == torch::IntArrayRef{2});
  CHECK(unpack_latent_codes(pack_latent_bits(bits), 3).sizes() == bits.sizes());
  CHECK(straight_through_latent_bits(z_logits, bits).is_meta());
  CHECK(sample_latent_bits(z_logits).sizes() == bits.sizes());
  CHECK(sample_latent_bits(z_logits).scalar_type() == torch::kBool);
  CHECK(compute_latent_log_probability(z_logits, bits).sizes() == torch::IntArrayRef{2});
  CHECK(compute_latent_log_probability(z_logits.select(0, 0), bits).sizes() == torch::IntArrayRef{2});
  CHECK(compute_latent_log_probability(leaf(z_logits), bits).requires_grad());
  const Tensor rows = map_latent_codes(leaf(z_logits), pack_latent_bits(bits), torch::zeros({8, 4}, torch::kMeta));
  CHECK(rows.sizes() == torch::IntArrayRef{2, 4});
  CHECK(rows.requires_grad());
}
