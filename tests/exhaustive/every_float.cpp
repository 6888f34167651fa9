/// Tries what the kernels compute of one number on all 2^32 floats, with each instruction set of this machine: the KL of a
/// latent bit and its derivative, exp(x) for x <= 0, log(1 + x) for x >= 0. Prints the worst errors and where they are;
/// fails if one is above what its header says, or a NaN gets lost.
///
///   every_float [STRIDE [FIRST [THREADS]]]    each STRIDE-th float from the FIRST (counted from 0) on; default all
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <mutex>
#include <thread>
#include <vector>

#include <free_transformer/detail/kernels/latent_kl_positions.hpp>
#include <free_transformer/detail/kernels/vector/exponential.hpp>
#include <free_transformer/detail/kernels/vector/instruction_set.hpp>
#include <free_transformer/detail/kernels/vector/logarithm.hpp>

#include "exact.hpp"

namespace exhaustive {

using free_transformer::detail::kernels::InstructionSet;
namespace kernels = free_transformer::detail::kernels;

inline constexpr int block_size = 1 << 12;
using Numbers = std::array<float, block_size>;

enum Output : size_t {
  kl_of,
  kl_of_negative,
  derivative_of,
  derivative_of_negative,
  exponential_of,
  logarithm_of,
  count
};

/// Functions of the magnitude of a float: what comes of its negative is the same, with a sign before it or not.
struct Function {
  const char* name;
  size_t first_output, end_output;
  double permitted_ulp;
  float largest;  ///< to which the contract goes, beside infinity and NaN
  double (*in_float64)(double);
  long double (*in_long_double)(long double);
};

constexpr float no_limit = std::numeric_limits<float>::max();
constexpr Function functions[] = {
    {"KL", kl_of, derivative_of, 2.0, no_limit, kl<double>, kl<long double>},
    {"derivative", derivative_of, exponential_of, 4.0, no_limit, kl_derivative<double>, kl_derivative<long double>},
    {"exp(x), x <= 0", exponential_of, logarithm_of, 1.2, no_limit, exponential<double>, exponential<long double>},
    {"log(1 + x), x >= 0", logarithm_of, count, 2.0, 0x1p127f, logarithm_of_one_plus<double>,
     logarithm_of_one_plus<long double>},
};
constexpr size_t function_count = std::size(functions);

struct Block {
  Numbers magnitudes;
  std::array<Numbers, count> computed;
};

/// A derivative of a negative logit is stored without its sign.
struct Evaluation {
  Block& block;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    for (int i = 0; i < block_size; i += lanes) {
      kernels::Lanes<lanes> x, value, derivative;
      const auto put = [&](const kernels::Lanes<lanes>& numbers, Output output) __attribute__((always_inline)) {
        kernels::store<lanes>(numbers, block.computed[output].data() + i);
      };
      kernels::load<lanes>(block.magnitudes.data() + i, x);
      kernels::bernoulli_kl<lanes>(x, value, derivative);
      put(value, kl_of);
      put(derivative, derivative_of);
      kernels::Lanes<lanes> negative{-x.values};
      kernels::bernoulli_kl<lanes>(negative, value, derivative);
      put(value, kl_of_negative);
      put({-derivative.values}, derivative_of_negative);
      kernels::exponentiate<lanes>(negative);
      put(negative, exponential_of);
      kernels::logarithm_of_one_plus<lanes>(x);
      put(x, logarithm_of);
    }
  }
};

struct Worst {
  long double error = 0;  ///< in ulp
  float magnitude = 0;
};

struct Errors {
  std::array<Worst, function_count> of;
  int64_t lost_nans = 0, references_off = 0;

  void take(const Errors& other) {
    for (size_t function = 0; function < function_count; ++function) {
      if (!(other.of[function].error <= of[function].error)) of[function] = other.of[function];
    }
    lost_nans += other.lost_nans;
    references_off += other.references_off;
  }
};

/// A number, and how many steps of float32 there are in 1 where it lies.
template <typename Number>
struct Exact {
  Number value, steps;

  explicit Exact(Number value_)
      : value(value_),
        steps(steps_in_one(value, std::numeric_limits<float>::digits - 1,
                           std::numeric_limits<float>::min_exponent - 1)) {}

  Number error_in_ulp(float computed) const {
    if (std::isinf(value)) return computed == static_cast<float>(value) ? 0 : std::numeric_limits<Number>::infinity();
    return std::abs(Number{computed} - value) * steps;
  }
};

/// The errors of each instruction set, in rising order.
using AllErrors = std::vector<Errors>;

/// float64 says by how much a number is off, to a known share of an ulp: only what may be the worst is asked again.
void take(const Function& function, float magnitude, float computed, const Exact<double>& exact, Worst& worst) {
  if (exact.error_in_ulp(computed) + reference_error_in_ulp <= static_cast<double>(worst.error)) return;
  const Exact certain(function.in_long_double(static_cast<long double>(magnitude)));
  const long double error = certain.error_in_ulp(computed);
  if (!(error <= worst.error)) worst = {error, magnitude};
}

/// Whether float64 is as near to long double as `take` relies on.
bool is_near_enough(const Function& function, float magnitude, double exact) {
  const Exact certain(function.in_long_double(static_cast<long double>(magnitude)));
  return std::isinf(exact) ||
         std::abs(certain.value - static_cast<long double>(exact)) * certain.steps <= reference_error_in_ulp;
}

void try_function(size_t which, bool check_reference, const std::vector<Block>& of_sets, AllErrors& errors) {
  const Function& function = functions[which];
  for (size_t i = 0; i < size_t{block_size}; ++i) {
    const float magnitude = of_sets[0].magnitudes[i];
    if (magnitude > function.largest && std::isfinite(magnitude)) continue;
    const Exact exact(function.in_float64(double{magnitude}));
    for (size_t set = 0; set < errors.size(); ++set) {
      for (size_t output = function.first_output; output < function.end_output; ++output) {
        const float computed = of_sets[set].computed[output][i];
        if (std::isnan(magnitude)) {
          errors[set].lost_nans += !std::isnan(computed);
        } else {
          take(function, magnitude, computed, exact, errors[set].of[which]);
        }
      }
    }
    if (check_reference && i % 64 == 0 && !std::isnan(magnitude)) {
      errors[0].references_off += !is_near_enough(function, magnitude, exact.value);
    }
  }
}

/// Block `number` of the floats without a sign: each `stride`-th from `first` on.
void try_block(uint64_t number, uint64_t stride, uint64_t first, std::vector<Block>& of_sets, AllErrors& errors) {
  constexpr uint64_t last = (uint64_t{1} << 31) - 1;
  for (size_t i = 0; i < size_t{block_size}; ++i) {
    const auto bits = static_cast<uint32_t>(std::min(last, (number * block_size + i) * stride + first));
    std::memcpy(&of_sets[0].magnitudes[i], &bits, sizeof(bits));
  }
  for (size_t set = 0; set < errors.size(); ++set) {
    of_sets[set].magnitudes = of_sets[0].magnitudes;
    kernels::run_vectorized(Evaluation{of_sets[set]}, static_cast<InstructionSet>(set));
  }
  for (size_t which = 0; which < function_count; ++which) try_function(which, number % 16 == 0, of_sets, errors);
}

AllErrors try_every_float(size_t instruction_sets, uint64_t stride, uint64_t first, unsigned thread_count) {
  const uint64_t numbers = ((uint64_t{1} << 31) - 1 - first) / stride + 1;
  const uint64_t blocks = (numbers + block_size - 1) / block_size;
  AllErrors total(instruction_sets);
  std::atomic<uint64_t> next_block{0};
  std::mutex mutex;
  const auto work = [&] {
    AllErrors errors(instruction_sets);
    std::vector<Block> of_sets(instruction_sets);
    for (uint64_t block = next_block++; block < blocks; block = next_block++) {
      try_block(block, stride, first, of_sets, errors);
    }
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t set = 0; set < instruction_sets; ++set) total[set].take(errors[set]);
  };
  std::vector<std::thread> threads(thread_count);
  for (auto& thread : threads) thread = std::thread(work);
  for (auto& thread : threads) thread.join();
  return total;
}

/// Returns whether all is as promised.
bool report(const char* instruction_set, const Errors& errors) {
  bool is_good = errors.lost_nans == 0 && errors.references_off == 0;
  for (size_t which = 0; which < function_count; ++which) {
    const Worst& worst = errors.of[which];
    std::printf("%-8s  %-18s  %.4Lf ulp at |x| = %.9g, permitted %.1f\n", instruction_set, functions[which].name,
                worst.error, double{worst.magnitude}, functions[which].permitted_ulp);
    is_good = is_good && worst.error <= static_cast<long double>(functions[which].permitted_ulp);
  }
  if (errors.lost_nans != 0) std::printf("%lld NaNs are lost\n", static_cast<long long>(errors.lost_nans));
  if (errors.references_off != 0) {
    std::printf("float64 is too far from long double %lld times\n", static_cast<long long>(errors.references_off));
  }
  return is_good;
}

}  // namespace exhaustive

int main(int argument_count, char** arguments) {
  const auto argument = [&](int index, uint64_t otherwise) {
    return index < argument_count ? std::strtoull(arguments[index], nullptr, 10) : otherwise;
  };
  if (!exhaustive::equations_hold()) {
    std::puts("The reference is not what mpmath says.");
    return 1;
  }
  const auto best = static_cast<size_t>(exhaustive::kernels::best_instruction_set());
  const auto threads = static_cast<unsigned>(argument(3, std::max(1U, std::thread::hardware_concurrency())));
  const auto errors = exhaustive::try_every_float(best + 1, argument(1, 1), argument(2, 0), threads);
  constexpr const char* names[] = {"baseline", "AVX2", "AVX-512"};
  bool is_good = true;
  for (size_t set = 0; set < errors.size(); ++set) is_good = exhaustive::report(names[set], errors[set]) && is_good;
  return is_good ? 0 : 1;
}
