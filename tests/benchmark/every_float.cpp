/// Tries the KL of a latent bit and its gradient on all 2^32 floats, with each instruction set of this machine, against
/// the equation in float64. Fails if a value is off by more than 2 ulp, its gradient by more than 4, or a NaN gets
/// lost.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include <free_transformer/detail/kernels/latent_kl_positions.hpp>
#include <free_transformer/detail/kernels/vector/instruction_set.hpp>

#include "environment.hpp"

namespace every_float {

using free_transformer::detail::kernels::InstructionSet;
namespace kernels = free_transformer::detail::kernels;

inline constexpr double permitted_ulp = 2.0, permitted_gradient_ulp = 4.0;
inline constexpr int block_size = 1 << 12;

struct Block {
  float logits[block_size], kl[block_size], gradient[block_size];
};

struct Evaluation {
  Block& block;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    for (int i = 0; i < block_size; i += lanes) {
      kernels::Lanes<lanes> logits, kl, gradient;
      kernels::load<lanes>(block.logits + i, logits);
      kernels::bernoulli_kl<lanes>(logits, kl, gradient);
      kernels::store<lanes>(kl, block.kl + i);
      kernels::store<lanes>(gradient, block.gradient + i);
    }
  }
};

void evaluate(InstructionSet set, Block& block) { kernels::run_vectorized(Evaluation{block}, set); }

/// KL for x >= 0. With u = x/2 it is u tanh u - log cosh u, in two forms that each lose at most a factor of 3 to
/// cancellation on its side of u = 1.
double exact_kl(double x) {
  const double u = x / 2;
  if (u < 1) {
    const double t = std::tanh(u);
    return u * t + std::log1p(-t * t) / 2;
  }
  const double s = std::exp(-x);
  const double entropy = s == 0 ? 0 : x * s / (1 + s) + std::log1p(s);
  return std::log(2.0) - entropy;
}

/// Its derivative x sigmoid(x) sigmoid(-x).
double exact_gradient(double x) {
  const double s = std::exp(-x);
  return s == 0 ? 0 : x * s / ((1 + s) * (1 + s));
}

/// A number, and how many steps of float32 there are in 1 where it lies.
struct Exact {
  double value, steps;

  Exact() = default;
  explicit Exact(double value_) : value(value_) {
    constexpr int fraction_bits = std::numeric_limits<float>::digits - 1;
    constexpr int smallest_exponent = std::numeric_limits<float>::min_exponent - 1;
    const int exponent = value == 0 ? smallest_exponent : std::max(std::ilogb(value), smallest_exponent);
    steps = std::ldexp(1.0, fraction_bits - exponent);
  }

  double error_in_ulp(float computed) const { return std::abs(double{computed} - value) * steps; }
};

struct Largest {
  double error = 0;
  float argument = 0;

  void take(double other_error, float other_argument) {
    if (!(other_error <= error)) *this = {other_error, other_argument};  // a NaN error counts as the largest
  }
};

struct Errors {
  Largest value, gradient;
  int64_t lost_nans = 0;

  void take(const Errors& other) {
    value.take(other.value.error, other.value.argument);
    gradient.take(other.gradient.error, other.gradient.argument);
    lost_nans += other.lost_nans;
  }
};

/// What the floats of a block and their negatives have in common: the KL, and the derivative up to its sign.
struct ExactBlock {
  Exact kl[block_size], gradient[block_size];
};

void compare(const Block& block, const ExactBlock& exact, float sign, Errors& errors) {
  for (int i = 0; i < block_size; ++i) {
    const float logit = block.logits[i], gradient = sign * block.gradient[i];
    if (std::isnan(logit)) {
      errors.lost_nans += !std::isnan(block.kl[i]) || !std::isnan(gradient);
      continue;
    }
    errors.value.take(exact.kl[i].error_in_ulp(block.kl[i]), logit);
    errors.gradient.take(exact.gradient[i].error_in_ulp(gradient), logit);
  }
}

/// The errors of each instruction set, in rising order.
using AllErrors = std::vector<Errors>;

/// The floats of a block of bit patterns without a sign, and then their negatives.
void try_block(uint32_t first_bits, AllErrors& errors) {
  Block block;
  ExactBlock exact;
  for (int i = 0; i < block_size; ++i) {
    const uint32_t bits = first_bits + static_cast<uint32_t>(i);
    std::memcpy(block.logits + i, &bits, sizeof(bits));
    exact.kl[i] = Exact(exact_kl(double{block.logits[i]}));
    exact.gradient[i] = Exact(exact_gradient(double{block.logits[i]}));
  }
  for (const float sign : {1.0f, -1.0f}) {
    if (sign < 0) std::transform(block.logits, block.logits + block_size, block.logits, std::negate<>());
    for (size_t set = 0; set < errors.size(); ++set) {
      evaluate(static_cast<InstructionSet>(set), block);
      compare(block, exact, sign, errors[set]);
    }
  }
}

AllErrors try_every_float(size_t instruction_sets) {
  constexpr uint32_t blocks = (uint32_t{1} << 31) / block_size;
  AllErrors total(instruction_sets);
  std::atomic<uint32_t> next_block{0};
  std::mutex mutex;
  const auto work = [&] {
    AllErrors errors(instruction_sets);
    for (uint32_t block = next_block++; block < blocks; block = next_block++) try_block(block * block_size, errors);
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t set = 0; set < instruction_sets; ++set) total[set].take(errors[set]);
  };
  std::vector<std::thread> threads(std::max(1U, std::thread::hardware_concurrency()));
  for (auto& thread : threads) thread = std::thread(work);
  for (auto& thread : threads) thread.join();
  return total;
}

/// Returns whether all is as promised.
bool report(const char* instruction_set, const Errors& errors) {
  std::printf("%-9s value: %.3f ulp at %.9g; gradient: %.3f ulp at %.9g; NaNs lost: %lld\n", instruction_set,
              errors.value.error, double{errors.value.argument}, errors.gradient.error,
              double{errors.gradient.argument}, static_cast<long long>(errors.lost_nans));
  return errors.value.error <= permitted_ulp && errors.gradient.error <= permitted_gradient_ulp &&
         errors.lost_nans == 0;
}

}  // namespace every_float

int main() {
  const auto best = every_float::kernels::best_instruction_set();
  const auto errors = every_float::try_every_float(static_cast<size_t>(best) + 1);
  bool is_good = true;
  for (size_t set = 0; set < errors.size(); ++set) {
    const auto name = benchmarks::instruction_set_name(static_cast<every_float::InstructionSet>(set));
    is_good = every_float::report(name, errors[set]) && is_good;
  }
  return is_good ? 0 : 1;
}
