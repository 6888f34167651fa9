/// The free-bits KL of many positions with its gradient, in one pass of vector code.
///
/// An element costs one exp, one division and two polynomials; each is read once and its gradient written once. The KL
/// is within 2 ulp over every float32 (tests/benchmark/every_float.cpp measures it), its gradient within 4.
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
  Lanes<lanes> power{-x}, scale;
  split_exponential<lanes, 64>(power, scale);
  const Values large = power.values * scale.values;  // 2^64 s
  const Values s = large * 0x1p-64f;

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
  derivative.values = x * large / (s * (2.0f + s) + 1.0f) * 0x1p-64f;
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

/// What a thread computes of a group, position by position, with room for a whole vector behind it.
struct LatentGroup {
  explicit LatentGroup(int64_t bits)
      : logits(static_cast<size_t>(positions_of_group * bits + 16)), kl(logits.size()), derivatives(logits.size()) {}

  std::vector<float> logits, kl, derivatives;
};

/// The logits of positions [begin, end) one behind the other, as float32.
template <int lanes>
[[gnu::always_inline]] inline const float* adjacent_logits(const LatentJob& job, int64_t begin, int64_t end,
                                                           float* room) {
  if (job.z_rows->are_adjacent(job.bits)) {
    return widened<lanes>(job.z_logits, job.element, begin * job.bits, (end - begin) * job.bits, room);
  }
  for (int64_t position = begin; position < end; ++position) {
    float* target = room + (position - begin) * job.bits;
    const float* source = widened<lanes>(job.z_logits, job.element, (*job.z_rows)(position), job.bits, target);
    if (source != target) std::memcpy(target, source, sizeof(float) * static_cast<size_t>(job.bits));
  }
  return room;
}

/// KL and derivative of `count` logits; two vectors at a time hide the latency of the polynomials.
template <int lanes>
[[gnu::always_inline]] inline void bernoulli_kl(const float* logits, int64_t count, float* kl, float* derivatives) {
  Lanes<lanes> values[2], results[2], slopes[2];
  int64_t index = 0;
  for (; index + 2 * lanes <= count; index += 2 * lanes) {
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) {
      load<lanes>(logits + index + k * lanes, values[k]);
      bernoulli_kl<lanes>(values[k], results[k], slopes[k]);
      store<lanes>(results[k], kl + index + k * lanes);
      store<lanes>(slopes[k], derivatives + index + k * lanes);
    }
  }
  for (; index < count; index += lanes) {
    load_part<lanes>(logits + index, std::min<int64_t>(lanes, count - index), 0.0f, values[0]);
    bernoulli_kl<lanes>(values[0], results[0], slopes[0]);
    store<lanes>(results[0], kl + index);
    store<lanes>(slopes[0], derivatives + index);
  }
}

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

template <int lanes>
[[gnu::always_inline]] inline float sum_of(const float* values, int64_t count) {
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

/// Adds the KL of each bit over positions [begin, end), times their weights.
template <int lanes>
[[gnu::always_inline]] inline void add_bits(const LatentJob& job, int64_t begin, int64_t end, const float* kl,
                                            double* bit_sums) {
  for (int64_t bit = 0; bit < job.bits; bit += lanes) {
    Lanes<lanes> sum = broadcast<lanes>(0.0f), part;
    for (int64_t position = begin; position < end; ++position) {
      const float weight = job.token_weight ? static_cast<float>(job.token_weight[position]) : 1.0f;
      if (!(weight > 0)) continue;
      load<lanes>(kl + (position - begin) * job.bits + bit, part);  // and what lies behind the last bit, left out below
      sum.values += part.values * weight;
    }
    float sums[size_t{lanes}];
    store<lanes>(sum, sums);
    const int64_t count = std::min<int64_t>(lanes, job.bits - bit);
    for (int64_t lane = 0; lane < count; ++lane) bit_sums[bit + lane] += static_cast<double>(sums[lane]);
  }
}

/// The sums of one position, and its derivatives made its gradient, which is left to be narrowed for half types.
template <int lanes>
[[gnu::always_inline]] inline void process_position(const LatentJob& job, int64_t position, const float* kl_of_bits,
                                                    float* derivatives, float* gradient, LatentSums& sums) {
  const double weight = job.token_weight ? job.token_weight[position] : 1.0;
  if (!(weight > 0)) {
    std::memset(gradient, 0, sizeof(float) * static_cast<size_t>(job.bits));
    if (job.penalty) job.penalty[position] = 0;
    return;
  }
  const float excess = job.hinge == Hinge::per_bit
                           ? hinge_each_bit(kl_of_bits, job.bits, static_cast<float>(job.free_bits), derivatives)
                           : static_cast<float>(sum_of<lanes>(kl_of_bits, job.bits) - job.free_bits);
  const bool passes = job.hinge != Hinge::per_position || !(excess < 0);  // so that a NaN stays visible
  const double penalty = passes ? weight * static_cast<double>(excess) : 0.0;
  sums.penalty += penalty;
  sums.weight += weight;
  sums.active += excess > 0 ? weight : 0;
  if (job.penalty) job.penalty[position] = static_cast<float>(penalty);
  if (!job.gradient) return;
  const double factor = passes ? weight * job.scale * (job.upstream ? job.upstream[position] : 1.0) : 0.0;
  store_products<lanes>(derivatives, job.bits, static_cast<float>(without_payload(factor)), gradient, Element::float32,
                        0);
}

/// Positions [begin, end) in one instruction set.
class LatentKernel {
 public:
  LatentKernel(const LatentJob& job, int64_t begin_, int64_t end_, LatentSums& sums, double* bit_sums_,
               LatentGroup& group_)
      : shared_job(job), begin(begin_), end(end_), block_sums(sums), bit_sums(bit_sums_), group(group_) {}

  /// Works on copies of the job and the sums: a vector stored through a pointer might change those of the caller, for all
  /// that the compiler knows, and they would be read again for each position. For the paper's number of bits the loops over
  /// them are unrolled.
  template <int lanes>
  [[gnu::always_inline]] void run() const {
    constexpr int64_t usual_bits = 16;
    LatentJob job = shared_job;
    LatentSums sums;
    if (job.bits == usual_bits) {
      job.bits = usual_bits;  // which the compiler now knows
      process<lanes>(job, sums);
    } else {
      process<lanes>(job, sums);
    }
    block_sums = sums;
  }

 private:
  const LatentJob& shared_job;
  const int64_t begin, end;
  LatentSums& block_sums;
  double* const bit_sums;
  LatentGroup& group;

  template <int lanes>
  [[gnu::always_inline]] void process(const LatentJob& job, LatentSums& sums) const {
    float *const kl = group.kl.data(), *const derivatives = group.derivatives.data();
    const bool is_written_at_once = job.gradient && job.element == Element::float32;
    for (int64_t first = begin; first < end; first += positions_of_group) {
      const int64_t last = std::min(end, first + positions_of_group), count = (last - first) * job.bits;
      bernoulli_kl<lanes>(adjacent_logits<lanes>(job, first, last, group.logits.data()), count, kl, derivatives);
      add_bits<lanes>(job, first, last, kl, bit_sums);
      float* const gradients = is_written_at_once ? static_cast<float*>(job.gradient) + first * job.bits : derivatives;
      for (int64_t position = first; position < last; ++position) {
        const int64_t offset = (position - first) * job.bits;
        process_position<lanes>(job, position, kl + offset, derivatives + offset, gradients + offset, sums);
      }
      if (job.gradient && !is_written_at_once) {
        store_products<lanes>(derivatives, count, 1.0f, job.gradient, job.element, first * job.bits);
      }
    }
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
