#include "free_transformer/losses.hpp"

#include "../instruction_sets.hpp"
#include "../numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
namespace losses = free_transformer::detail;
namespace kernels = free_transformer::detail::kernels;
namespace plain = free_transformer::detail::plain;

/// float64 is left to LibTorch's operations.
constexpr torch::ScalarType kernel_types[] = {torch::kFloat, torch::kHalf, torch::kBFloat16};

struct Job {
  Tensor logits, targets, token_weight, class_weight;
  double label_smoothing = 0, z_loss = 0, softcap = 0;

  losses::CrossEntropySettings settings(torch::ScalarType type) const {
    const auto as = [&](const Tensor& tensor) { return tensor.defined() ? tensor.to(type) : tensor; };
    losses::CrossEntropySettings result;
    result.targets = targets;
    result.token_weight = as(token_weight);
    result.class_weight = as(class_weight);
    result.label_smoothing = label_smoothing;
    result.z_loss = z_loss;
    result.softcap = softcap;
    return result;
  }
};

struct KernelOutcome {
  Tensor loss, gradient;
};

constexpr losses::WantedOfRows each_row{/*sums=*/false, /*each=*/true};

/// What the operations say, and how large the parts are of which the sums of options are made, where they cancel: an
/// error is a share of the parts.
struct Expected : KernelOutcome {
  double loss_parts = 0, gradient_parts = 0;
};

/// Loss of each position and gradient of their mean, by the kernels; `gradient` is where the kernel is to write.
KernelOutcome by_kernel(const Job& job, const Tensor& gradient) {
  const auto type = arithmetic(job.logits.scalar_type());
  const auto settings = job.settings(type);
  REQUIRE(kernels::takes_cross_entropy(job.logits, settings));
  const auto positions = kernels::cross_entropy_positions(settings, job.logits.size(-1), type, {});
  const auto rows = kernels::cross_entropy_rows(job.logits, settings, positions, gradient, {}, each_row).rows;
  return {losses::losses_of_rows(rows, settings, positions), gradient};
}

/// The same in LibTorch operations in float64 on the same numbers.
Expected by_operations(const Job& job) {
  const Tensor logits = job.logits.to(torch::kDouble), gradient = torch::empty(logits.sizes(), torch::kDouble);
  const auto settings = job.settings(torch::kDouble);
  const auto positions = plain::cross_entropy_positions(settings, logits.size(-1), torch::kDouble, {});
  const auto rows = plain::cross_entropy_rows(logits, settings, positions, gradient, {}, each_row).rows;
  Expected expected{{losses::losses_of_rows(rows, settings, positions), gradient}};
  if (job.label_smoothing > 0 || job.z_loss > 0 || job.softcap > 0) {
    // Each capped logit is off by a share of the cap, twice in a difference. A log-sum-exp is the largest logit and the
    // rest, and where that logit is negative, the square of their sum is less than they are. The parts of a gradient
    // have a target's 1, a class's share of the smoothing, and the z-loss's 2 z lse.
    const Tensor x = job.softcap > 0 ? job.softcap * (logits / job.softcap).tanh() : logits;
    const Tensor largest = x.amax(-1), log_sum_exp = x.logsumexp(-1), u = positions.token_weight;
    const Tensor slope = 2 * job.z_loss * log_sum_exp.abs();
    const double class_weight = job.class_weight.defined() ? job.class_weight.max().item<double>() : 1;
    const Tensor cancelled = slope * torch::maximum(-largest, log_sum_exp - largest).masked_fill(largest >= 0, 0);
    expected.loss_parts = (u * (2 * job.softcap * class_weight + cancelled)).max().item<double>();
    expected.gradient_parts = (u * (class_weight * positions.scales[losses::scale_of_likelihood] +
                                    slope * positions.scales[losses::scale_of_z]))
                                  .max()
                                  .item<double>();
  }
  return expected;
}

/// A float32 row: 1.2 for exp, 4 for at most 16 additions in each of 4 x lanes sums and their tree, 1 for the largest
/// of the two parts of a loss; a gradient has 1 more for its factor and product.
constexpr double kernel_steps = 10;

void check_against_operations(const Job& job) {
  const auto type = job.logits.scalar_type();
  const auto expected = by_operations(job);
  const auto found = by_kernel(job, torch::empty_like(job.logits));
  const double relative = kernel_steps * epsilon(arithmetic(type));
  CHECK(difference(found.loss, expected.loss, relative, expected.loss_parts) == "");
  CHECK(difference(found.gradient, expected.gradient, relative, expected.gradient_parts) == "");
}

Tensor some_targets(int64_t rows, int64_t classes) { return torch::arange(rows) * 7919 % classes; }

}  // namespace

TEST_CASE("Every instruction set agrees with LibTorch's operations for every number of columns", "[kernels]") {
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : kernel_types) {
      // 1 to 2N + 1 around every vector width N up to 16 lanes, 4N in flight, blocks of 512
      std::vector<int64_t> columns{63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 2049};
      for (int64_t count = 1; count <= 33; ++count) columns.push_back(count);
      for (const int64_t count : columns) {
        INFO("set " << static_cast<int>(set) << ", " << type << ", " << count << " columns");
        Job job{eighths({5, count}, type), some_targets(5, count), {}, {}};
        job.targets[3] = -100;
        check_against_operations(job);
      }
    }
  }
}

TEST_CASE("A target keeps its part in the sum, wherever it stands and wherever the largest logit is", "[kernels]") {
  constexpr int64_t classes = 1300;  // three stretches, the last of them no whole vectors
  const Tensor stretch = torch::arange(classes).floor_divide(512), columns = torch::arange(classes);
  const Tensor targets =
      tensor(std::vector<int64_t>{0, 3, 15, 16, 255, 511, 512, 1023, 1024, 1280, 1295, 1296, 1299}, {13});
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : kernel_types) {
      for (const double rise : {-2.0, 0.0, 2.0}) {
        for (const double of_target : {-4.0, 0.0, 12.0}) {
          INFO("set " << static_cast<int>(set) << ", " << type << ", rise " << rise << ", target " << of_target);
          const Tensor is_target = columns == targets.unsqueeze(1);
          const Tensor logits = eighths({13, classes}) / 8 + rise * stretch + of_target * is_target;
          Job job{logits.to(type), targets, {}, {}};
          check_against_operations(job);
          job.z_loss = 0.25;
          check_against_operations(job);
        }
      }
    }
  }
}

TEST_CASE("Every instruction set computes every option", "[kernels]") {
  const Tensor token_weight = tensor(std::vector<double>{1, 0.5, 0, 2, 0.25, 1, 3}, {7});
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : kernel_types) {
      for (const int64_t classes : {1, 5, 16, 37, 600}) {
        for (int choice = 0; choice < 32; ++choice) {
          INFO("set " << static_cast<int>(set) << ", " << type << ", " << classes << " classes, options " << choice);
          Job job{eighths({7, classes}, type), some_targets(7, classes), {}, {}};
          job.targets[5] = -100;
          if (choice & 1) job.label_smoothing = 0.125;
          if (choice & 2) job.z_loss = 0.25;
          if (choice & 4) job.token_weight = token_weight;
          if (choice & 8) job.class_weight = eighths({classes}).abs();
          if (choice & 16) job.softcap = 5;
          check_against_operations(job);
        }
      }
    }
  }
}

TEST_CASE("A kernel reads and writes nothing beside its rows, wherever they start", "[kernels][memcheck]") {
  constexpr int64_t rows = 3, room = 80;
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : kernel_types) {
      for (int64_t start = 0; start < 17; ++start) {
        for (const int64_t columns : {1, 7, 16, 31, 33, 61}) {
          INFO("set " << static_cast<int>(set) << ", " << type << ", from " << start << ", " << columns << " columns");
          const Tensor logits = torch::full({rows, room}, not_a_number, type), gradient = logits.clone();
          const Tensor inside = logits.narrow(1, start, columns), gradient_inside = gradient.narrow(1, start, columns);
          inside.copy_(eighths({rows, columns}, type));
          const Job job{inside, some_targets(rows, columns), {}, {}};
          const auto expected = by_operations(job);
          const auto found = by_kernel(job, gradient_inside);
          CHECK(difference(found.loss, expected.loss, kernel_steps * epsilon(arithmetic(type))) == "");
          CHECK(difference(found.gradient, expected.gradient, kernel_steps * epsilon(arithmetic(type))) == "");
          CHECK(gradient.isnan().sum().item<int64_t>() == rows * (room - columns));
        }
      }
    }
  }
}

TEST_CASE("A kernel keeps special values as the equations have them", "[kernels]") {
  const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    const auto loss_of = [](const std::vector<float>& row, int64_t target) {
      const Tensor logits = leaf(torch::tensor(row).unsqueeze(0));
      const Tensor loss = compute_reconstruction_loss(logits, torch::tensor({target}));
      return std::make_pair(loss, gradient(loss, logits)[0]);
    };
    std::vector<float> row(40, 0.0f);
    row[3] = -inf, row[37] = -inf;
    auto [loss, of_logits] = loss_of(row, 5);
    CHECK(difference(loss, {std::log(38.0)}, epsilon(torch::kFloat)) == "");
    CHECK(of_logits[3].item<float>() == 0);
    const auto number = [&](const std::vector<float>& of, int64_t target) {
      return loss_of(of, target).first.item<float>();
    };
    CHECK(number(row, 3) == inf);
    CHECK(std::isnan(number(std::vector<float>(40, -inf), 0)));  // nothing is possible
    row[17] = nan;
    CHECK(std::isnan(number(row, 5)));
    CHECK(std::isnan(number(row, 17)));
    for (uint32_t payload : {0x7fc00001u, 0xffc00000u, 0x7f800001u, 0x7fffffffu}) {  // whatever kind of NaN it is
      std::memcpy(&row[17], &payload, sizeof(payload));
      CHECK(std::isnan(number(row, 5)));
    }
    std::vector<float> far(40, -200.0f);
    far[8] = 0;
    CHECK(number(far, 8) == 0);
    CHECK(number(far, 9) == 200);
  }
}

TEST_CASE("The most likely class is the lowest of those that tie", "[kernels][statistics]") {
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    Tensor logits = torch::zeros({1, 70});
    logits[0][41] = logits[0][13] = logits[0][69] = 2;
    const auto statistics = compute_token_statistics(logits, torch::tensor({int64_t{13}}));
    CHECK(statistics.prediction.item<int64_t>() == 13);
    CHECK(statistics.hit.item<bool>());
    CHECK_FALSE(compute_token_statistics(logits, torch::tensor({int64_t{41}})).hit.item<bool>());
  }
}

TEST_CASE("Half types are loaded exactly and stored to the nearest, as LibTorch rounds", "[kernels]") {
  const auto check_same_numbers = [](const Tensor& found, const Tensor& expected) {
    const auto numbers = [](const Tensor& x) { return x.masked_fill(x.isnan(), 0); };
    CHECK(torch::equal(numbers(found), numbers(expected)));
    CHECK(torch::equal(found.isnan(), expected.isnan()));
  };
  for (const auto type : {torch::kHalf, torch::kBFloat16}) {
    const Tensor all = torch::arange(65536, torch::kInt).to(torch::kShort).view(type), expected = all.to(torch::kFloat);
    // halfway cases, overflow and subnormal results among them
    const Tensor wide = torch::cat({expected, expected * 1.00048828125f, expected * 0.75f, expected * 1e-6f});
    const Tensor rounded = wide.to(type).to(torch::kFloat);
    for (const auto set : available_instruction_sets()) {
      const Forced forced(set);
      for (const int64_t odd : {0, 1, 3}) {  // and a rest that is no whole vector
        Tensor found = torch::empty_like(expected), stored = torch::empty(wide.sizes(), type);
        kernels::widened(all.data_ptr(), kernels::element_of(type), odd, 65536 - odd, found.data_ptr<float>());
        check_same_numbers(found.slice(0, 0, 65536 - odd), expected.slice(0, odd));
        kernels::store_products(wide.data_ptr<float>(), wide.numel() - odd, 1.0f, stored.data_ptr(),
                                kernels::element_of(type), odd);
        check_same_numbers(stored.to(torch::kFloat).slice(0, odd), rounded.slice(0, 0, wide.numel() - odd));
      }
    }
  }
}

TEST_CASE("Cross entropy of half types loses no more than eager does", "[kernels][half]") {
  namespace F = torch::nn::functional;
  torch::manual_seed(3);
  const Tensor targets = some_targets(16, 1000);
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : {torch::kHalf, torch::kBFloat16}) {
      for (const double spread : {0.5, 8.0}) {  // flat and peaked
        INFO("set " << static_cast<int>(set) << ", " << type << ", spread " << spread);
        const Tensor logits = leaf((torch::randn({16, 1000}) * spread).to(type)),
                     wide = leaf(logits.to(torch::kDouble));
        // LibTorch has no float16 on every CPU: there eager's numbers are those of float32, rounded.
        const Tensor eager_logits = leaf(logits.to(type == torch::kHalf ? torch::kFloat : type));
        const Tensor loss = compute_reconstruction_loss(logits, targets), exact = F::cross_entropy(wide, targets),
                     eager = F::cross_entropy(eager_logits, targets);
        CHECK(worse_than_eager(loss, eager, exact, type) == 0);
        CHECK(worse_than_eager(gradient(loss, logits), gradient(eager, eager_logits), gradient(exact, wide), type) ==
              0);
      }
    }
  }
}

TEST_CASE("Every policy's kernel agrees with its operations for every number of bits", "[kernels][kl]") {
  const auto check = [](auto policy, int64_t bits, torch::ScalarType type, double free_bits) {
    using FreeBits = decltype(policy);
    const Tensor z = eighths({9, bits}, type) / 4, wide = leaf(z.to(torch::kDouble)), narrow = leaf(z);
    const Tensor weight = tensor(std::vector<double>{1, 0.5, 0, 2, 0.25, 1, 3, 1, 1}, {9});
    const auto options = KLDivergenceOptions().latent_dim(bits).free_bits(free_bits).token_weight(weight);
    const Tensor exact = compute_kl_divergence<FreeBits>(wide, options);  // float64 takes the operations
    const Tensor found = compute_kl_divergence<FreeBits>(narrow, options);
    const double also = free_bits * static_cast<double>(bits);  // what the hinge takes away
    CHECK(difference(found, exact, kernel_steps * epsilon(torch::kFloat), also) == "");
    CHECK(difference(gradient(found, narrow), gradient(exact, wide), kernel_steps * epsilon(torch::kFloat)) == "");
  };
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
      for (int64_t bits = 1; bits <= 33; ++bits) {
        for (const double free_bits : {0.0, 0.07, 3.0}) {
          INFO("set " << static_cast<int>(set) << ", " << type << ", " << bits << " bits, budget " << free_bits);
          check(PerPosition{}, bits, type, free_bits);
          check(PerBit{}, bits, type, free_bits);
          check(BatchMean{}, bits, type, free_bits);
        }
      }
    }
  }
}

TEST_CASE("The kernels' bits do not depend on the number of threads", "[kernels][threads]") {
  const Tensor targets = some_targets(500, 3001), z = eighths({70000, 16}, torch::kFloat) / 4;
  for (const auto type : all_types) {
    const Tensor logits = eighths({500, 3001}, type);
    const auto run = [&](int threads) {
      return with_threads(threads, [&] {
        const Tensor x = leaf(logits), latent = leaf(z);
        const auto [loss, metrics] = compute_vae_loss(x, targets, latent);
        return std::vector<Tensor>{loss, gradient(loss, x), gradient(loss, latent),
                                   torch::tensor(metrics.at("bound/elbo"))};
      });
    };
    const auto one = run(1);
    for (const int threads : {2, 7}) {
      const auto many = run(threads);
      for (size_t index = 0; index < one.size(); ++index) CHECK(same_bits(one[index], many[index]));
    }
  }
}

TEST_CASE("Subnormal half numbers keep their value while the processor flushes float32's to zero", "[kernels][half]") {
  // every float16 below 2^-14, whose KL z^2/8 and its gradient z/4 are normal in float32
  const Tensor z = torch::arange(1, 1024, torch::kInt).to(torch::kShort).view(torch::kHalf).unsqueeze(1);
  const Tensor wide = z.to(torch::kDouble).squeeze(1);
  for (const auto set : available_instruction_sets()) {
    const Forced forced(set);
    REQUIRE(at::Context::setFlushDenormal(true));
    const Tensor input = leaf(z);
    const Tensor kl =
        compute_kl_divergence(input, KLDivergenceOptions().latent_dim(1).free_bits(0).reduction(torch::kNone));
    const Tensor slope = gradient((kl * 65536).sum(), input);
    const Tensor logits = torch::cat({z, torch::zeros_like(z)}, 1);
    const Tensor of_logits = compute_token_statistics(logits, torch::zeros({1023}, torch::kLong)).log_sum_exp;
    at::Context::setFlushDenormal(false);
    CHECK(difference(kl, wide.square() / 8, 4 * epsilon(torch::kFloat)) == "");
    CHECK(difference(slope.squeeze(1), wide / 4 * 65536, 4 * epsilon(torch::kFloat)) == "");
    CHECK(difference(of_logits - std::log(2.0), wide / 2, 4 * epsilon(torch::kFloat), 1) == "");
  }
}
