/// The free-bits KL of many positions with its gradient, in one pass of vector code.
///
/// An element costs one exp, one division and two polynomials; each is read once and its gradient written once. The KL
/// is within 2 ulp over every float32 (tests/exhaustive measures it), its gradient within 4.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/kernels/vector/elements.hpp"
#include "free_transformer/detail/kernels/vector/exponential.hpp"
#include "free_transformer/detail/kernels/vector/instruction_set.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)) and its derivative l sigmoid(l) sigmoid(-l). With x = |l|, s = exp(-x):
///     x < 2       x^2/8 + x^4 q(x^2): the product that decides the last digit is exact
///     2 <= x < 4  a polynomial in x - 3, where the others would cancel
///     4 <= x      log 2 - (x s/(1+s) + log(1+s)), the bracket by its series in s
/// The coefficients are fitted by tests/reference/fit_polynomials.py, relative errors 1e-8 and 5e-8. x is held at 110:
/// KL is log 2 to the last digit, and the derivative has faded through the subnormal numbers to 0. Until then its
/// digits are kept, as it is computed 2^64 times as large.
template <int lanes>
[[gnu::always_inline]] inline void bernoulli_kl(const Lanes<lanes>& logits, Lanes<lanes>& kl,
                                                Lanes<lanes>& derivative) {
  using Values = typename Lanes<lanes>::Values;
  using Integers = typename Lanes<lanes>::Integers;
  Integers sign;
  std::memcpy(&sign, &logits.values, sizeof(sign));
  Integers bits = sign & 0x7fffffff;
  sign ^= bits;
  Values x;
  std::memcpy(&x, &bits, sizeof(x));
  const Values largest = Values{} + 110.0f;
  x = largest < x ? largest : x;  // a NaN stays
  Lanes<lanes> large{-x};
  scaled_exponential<lanes, 64>(large);
  const Values s = large.values * 0x1p-64f;

  const Values square = x * x;
  Values near = square * -5.042490869e-09f + 1.292011973e-07f;
  near = near * square - 1.771283905e-06f;
  near = near * square + 1.886471546e-05f;
  near = near * square - 1.841297781e-04f;
  near = near * square + 1.735961181e-03f;
  near = near * square - 1.562497672e-02f;
  near = square * square * near + square * 0.125f;

  const Values y = x - 3.0f;
  Values middle = y * -8.706122571e-06f + 6.178730018e-06f;
  middle = middle * y + 1.330219238e-04f;
  middle = middle * y - 7.526140544e-04f;
  middle = middle * y + 1.775251934e-03f;
  middle = middle * y + 2.836070023e-03f;
  middle = middle * y - 3.874890879e-02f;
  middle = middle * y + 1.355299056e-01f;
  middle = middle * y + 5.022822022e-01f;

  const Values first = x + 1.0f - s * (x + 0.5f), second = x + 1.0f / 3 - s * (x + 0.25f);
  const Values far = 0.693147182f - s * (s * s * second + first);
  const Values upper = x < 4.0f ? middle : far;
  kl.values = x < 2.0f ? near : upper;

  std::memcpy(&bits, &x, sizeof(bits));
  bits |= sign;
  std::memcpy(&x, &bits, sizeof(x));
  derivative.values = x * large.values / (s * (2.0f + s) + 1.0f) * 0x1p-64f;
}

struct LatentJob {
  const void* z_logits;
  Element element;  ///< of z_logits and gradient
  const RowOffsets* z_rows;
  int64_t bits;  ///< latent bits of a position
  Hinge hinge;
  double free_bits;
  const double* token_weight;  ///< [rows], or null for 1
  void* gradient;              ///< [rows, bits] contiguous, or null; of batch_mean as if the mean were above the budget
  const double* upstream;      ///< [rows], multiplies the scale, or null for 1
  double scale;
  float* penalty;  ///< [rows], or null
};

struct LatentSums {
  double penalty = 0, weight = 0, active = 0;
};

/// Positions of one block are reduced by one thread in order, so that sums do not depend on the number of threads.
inline constexpr int64_t positions_of_block = 1024;

/// Positions whose KL and derivatives are kept in the first-level cache, to be computed without regard to where a
/// position ends. The KL of each bit is summed in float32 over so many positions, in float64 beyond.
inline constexpr int64_t positions_of_group = 32;

/// What a thread computes of a group, position by position, with room for two whole vectors behind it.
struct LatentGroup {
  explicit LatentGroup(int64_t bits)
      : logits(static_cast<size_t>(positions_of_group * bits + 2 * most_lanes)),
        kl(logits.size()),
        derivatives(logits.size()) {}

  std::vector<float> logits, kl, derivatives;
};

/// The logits of positions [begin, end) one behind the other, as float32.
inline const float* adjacent_logits(const LatentJob& job, int64_t begin, int64_t end, float* room) {
  if (job.z_rows->are_adjacent(job.bits)) {
    return widened(job.z_logits, job.element, begin * job.bits, (end - begin) * job.bits, room);
  }
  for (int64_t position = begin; position < end; ++position) {
    float* target = room + (position - begin) * job.bits;
    const float* source = widened(job.z_logits, job.element, (*job.z_rows)(position), job.bits, target);
    if (source != target) std::memcpy(target, source, sizeof(float) * static_cast<size_t>(job.bits));
  }
  return room;
}

/// KL and derivative of `count` logits; two vectors at a time hide the latency of the polynomials.
struct BernoulliKL {
  const float* logits;
  int64_t count;
  float* kl;
  float* derivatives;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    constexpr int together = 2 * lanes;
    float part[size_t{together}] = {};
    for (int64_t index = 0; index < count; index += together) {
      const float* from = logits + index;
      if (index + together > count) {
        std::memcpy(part, from, sizeof(float) * static_cast<size_t>(count - index));
        from = part;
      }
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {
        Lanes<lanes> values, result, derivative;
        load<lanes>(from + k * lanes, values);
        bernoulli_kl<lanes>(values, result, derivative);
        store<lanes>(result, kl + index + k * lanes);
        store<lanes>(derivative, derivatives + index + k * lanes);
      }
    }
  }
};

/// The paper's number of latent bits, for which loops over them are unrolled.
inline constexpr int64_t usual_bits = 16;

/// The KL of each position, and that of each bit times the positions' weights added to `bit_sums`.
struct SumKL {
  const float* kl;  ///< [positions, bits], and a vector more
  int64_t positions, bits;
  const float* weights;
  float* position_sums;
  double* bit_sums;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    bits == usual_bits ? sum<lanes>(usual_bits) : sum<lanes>(bits);
  }

 private:
  template <int lanes>
  [[gnu::always_inline]] void sum(int64_t width) const {
    for (int64_t position = 0; position < positions; ++position) {
      position_sums[position] = sum_of<lanes>(kl + position * width, width);
    }
    for (int64_t bit = 0; bit < width; bit += lanes) {
      Lanes<lanes> sum = broadcast<lanes>(0.0f), part;
      for (int64_t position = 0; position < positions; ++position) {
        load<lanes>(kl + position * width + bit, part);  // and what lies behind the last bit, left out below
        sum.values += part.values * weights[position];
      }
      float sums[size_t{lanes}];
      store<lanes>(sum, sums);
      const int64_t count = std::min<int64_t>(lanes, width - bit);
      for (int64_t lane = 0; lane < count; ++lane) bit_sums[bit + lane] += static_cast<double>(sums[lane]);
    }
  }

  template <int lanes>
  [[gnu::always_inline]] static float sum_of(const float* values, int64_t count) {
    Lanes<lanes> sum = broadcast<lanes>(0.0f), part;
    int64_t index = 0;
    for (; index + lanes <= count; index += lanes) {
      load<lanes>(values + index, part);
      sum.values += part.values;
    }
    if (index < count) {
      load_part<lanes>(values + index, count - index, 0.0f, part);
      sum.values += part.values;
    }
    return sum_of_lanes<lanes>(sum);
  }
};

/// The derivatives of each position times its factor.
struct StoreGradients {
  const float* derivatives;
  int64_t positions, bits;
  const float* factors;
  float* gradients;  ///< may be the derivatives

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    bits == usual_bits ? multiply<lanes>(usual_bits) : multiply<lanes>(bits);
  }

 private:
  template <int lanes>
  [[gnu::always_inline]] void multiply(int64_t width) const {
    for (int64_t position = 0; position < positions; ++position) {
      const float* const from = derivatives + position * width;
      float* const to = gradients + position * width;
      Lanes<lanes> values;
      int64_t bit = 0;
      for (; bit + lanes <= width; bit += lanes) {
        load<lanes>(from + bit, values);
        values.values *= factors[position];
        store<lanes>(values, to + bit);
      }
      for (; bit < width; ++bit) to[bit] = from[bit] * factors[position];
    }
  }
};

/// Sum over the bits of one position of max(0, KL - budget), whose derivative is 0 below the budget.
inline float hinge_each_bit(const float* kl, int64_t bits, float budget, float* derivatives) {
  double above = 0;
  for (int64_t bit = 0; bit < bits; ++bit) {
    const float excess = kl[bit] - budget;
    if (excess < 0) {
      derivatives[bit] = 0;
    } else {
      above += static_cast<double>(excess);
    }
  }
  return static_cast<float>(above);
}

/// Adds a position that counts to the sums, and returns the factor of its derivatives.
inline double hinge_position(const LatentJob& job, int64_t position, float excess, LatentSums& sums) {
  const double weight = job.token_weight ? job.token_weight[position] : 1.0;
  const bool passes = job.hinge != Hinge::per_position || !(excess < 0);  // so that a NaN stays visible
  const double penalty = passes ? weight * static_cast<double>(excess) : 0.0;
  sums.penalty += penalty;
  sums.weight += weight;
  sums.active += excess > 0 ? weight : 0;
  if (job.penalty) job.penalty[position] = static_cast<float>(penalty);
  return passes ? weight * job.scale * (job.upstream ? job.upstream[position] : 1.0) : 0.0;
}

/// Positions [begin, end), at most `positions_of_group`.
inline void process_group(const LatentJob& job, int64_t begin, int64_t end, LatentGroup& group, LatentSums& sums,
                          double* bit_sums) {
  const int64_t positions = end - begin, count = positions * job.bits;
  float *const kl = group.kl.data(), *const derivatives = group.derivatives.data();
  float weights[size_t{positions_of_group}], kl_of_positions[size_t{positions_of_group}],
      factors[size_t{positions_of_group}];
  run_vectorized(BernoulliKL{adjacent_logits(job, begin, end, group.logits.data()), count, kl, derivatives});
  for (int64_t position = 0; position < positions; ++position) {
    weights[position] = job.token_weight ? static_cast<float>(job.token_weight[begin + position]) : 1.0f;
    if (weights[position] > 0) continue;
    const size_t offset = static_cast<size_t>(position * job.bits), bytes = sizeof(float) * size_t(job.bits);
    std::memset(kl + offset, 0, bytes);  // whatever it was
    std::memset(derivatives + offset, 0, bytes);
  }
  run_vectorized(SumKL{kl, positions, job.bits, weights, kl_of_positions, bit_sums});
  for (int64_t position = 0; position < positions; ++position) {
    factors[position] = 0;
    if (job.penalty) job.penalty[begin + position] = 0;
    if (!(weights[position] > 0)) continue;
    const int64_t offset = position * job.bits;
    const float excess =
        job.hinge == Hinge::per_bit
            ? hinge_each_bit(kl + offset, job.bits, static_cast<float>(job.free_bits), derivatives + offset)
            : static_cast<float>(static_cast<double>(kl_of_positions[position]) - job.free_bits);
    factors[position] = static_cast<float>(without_payload(hinge_position(job, begin + position, excess, sums)));
    if (!is_finite(static_cast<double>(factors[position]))) {  // of a closed bit it would make NaN
      for (float* bit = derivatives + offset; bit < derivatives + offset + job.bits; ++bit) {
        if (!is_zero(static_cast<double>(*bit))) *bit *= factors[position];
      }
      factors[position] = 1;
    }
  }
  if (!job.gradient) return;
  const bool is_written_at_once = job.element == Element::float32;
  float* const gradients = is_written_at_once ? static_cast<float*>(job.gradient) + begin * job.bits : derivatives;
  run_vectorized(StoreGradients{derivatives, positions, job.bits, factors, gradients});
  if (!is_written_at_once) store_products(derivatives, count, 1.0f, job.gradient, job.element, begin * job.bits);
}

/// Positions [begin, end); adds the KL of each bit to `bit_sums`.
inline LatentSums process_block(const LatentJob& job, int64_t begin, int64_t end, LatentGroup& group,
                                double* bit_sums) {
  LatentSums sums;
  for (int64_t first = begin; first < end; first += positions_of_group) {
    process_group(job, first, std::min(end, first + positions_of_group), group, sums, bit_sums);
  }
  return sums;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
