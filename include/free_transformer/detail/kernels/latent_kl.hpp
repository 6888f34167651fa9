/// The free-bits KL of many positions on the CPU with its gradient, in one pass of vector code.
///
/// An element costs one exp, one division and two polynomials; each is read once and its gradient written once. The KL
/// is within 2 ulp over every float32 (tests/benchmark/every_float.cpp measures it), its gradient within 4.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/elementary.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/kernels/instruction_set.hpp"
#include "free_transformer/detail/kernels/lanes.hpp"
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/parallel_rows.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)) and its derivative l sigmoid(l) sigmoid(-l). With x = |l|, s = exp(-x):
///     x < 2       x^2/8 + x^4 q(x^2): the product that decides the last digit is exact
///     2 <= x < 4  a polynomial in x - 3, where the others would cancel
///     4 <= x      log 2 - (x s/(1+s) + log(1+s)), the bracket by its series in s
/// The coefficients are fitted by tests/reference/fit_polynomials.py, relative errors 1e-8 and 5e-8. x is held at 110:
/// KL is log 2 to the last digit, and the derivative has faded through the subnormal numbers to 0. Until then its
/// digits are kept, as it is computed 2^64 times as large.
template <int lanes>
[[gnu::always_inline]] inline void bernoulli_kl(const Lanes<float, lanes>& logits, Lanes<float, lanes>& kl,
                                                Lanes<float, lanes>& derivative) {
  using Values = typename Lanes<float, lanes>::Values;
  using Integers = typename Lanes<float, lanes>::Integers;
  Integers sign;
  std::memcpy(&sign, &logits.values, sizeof(sign));
  Integers bits = sign & 0x7fffffff;
  sign ^= bits;
  Values x;
  std::memcpy(&x, &bits, sizeof(x));
  const Values largest = Values{} + 110.0f;
  x = largest < x ? largest : x;  // a NaN stays
  Lanes<float, lanes> power{-x}, scale;
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

template <typename Element>
struct LatentJob {
  const Element* z_logits;
  const RowOffsets* z_rows;
  int64_t bits;
  double free_bits;
  const double* token_weight;  ///< [rows], or null for 1
  Element* gradient;           ///< [rows, bits] contiguous, or null; of batch_mean as if the mean were above the budget
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
template <typename Element>
struct LatentGroup {
  explicit LatentGroup(int64_t bits)
      : logits(static_cast<size_t>(positions_of_group * bits + 16)), kl(logits.size()), derivatives(logits.size()) {}

  std::vector<Element> logits;  ///< unless they lie one behind the other anyway
  std::vector<float> kl, derivatives;
};

/// The logits of positions [begin, end) one behind the other.
template <typename Element>
[[gnu::always_inline]] inline const Element* adjacent_logits(const LatentJob<Element>& job, int64_t begin, int64_t end,
                                                             Element* room) {
  if (job.z_rows->are_adjacent(job.bits)) return job.z_logits + begin * job.bits;
  for (int64_t row = begin; row < end; ++row) {
    std::memcpy(static_cast<void*>(room + (row - begin) * job.bits), job.z_logits + (*job.z_rows)(row),
                sizeof(Element) * static_cast<size_t>(job.bits));
  }
  return room;
}

/// KL and derivative of `count` logits; two vectors at a time hide the latency of the polynomials.
template <int lanes, typename Element>
[[gnu::always_inline]] inline void bernoulli_kl(const Element* logits, int64_t count, float* kl, float* derivatives) {
  Lanes<float, lanes> values[2], results[2], slopes[2];
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
    load_part<lanes>(logits + index, std::min<int64_t>(lanes, count - index), static_cast<Element>(0.0f), values[0]);
    bernoulli_kl<lanes>(values[0], results[0], slopes[0]);
    store<lanes>(results[0], kl + index);
    store<lanes>(slopes[0], derivatives + index);
  }
}

/// Sum over the bits of one position of max(0, KL - budget), whose derivative is 0 below the budget.
template <int lanes>
[[gnu::always_inline]] inline float hinge_each_bit(const float* kl, int64_t bits, float budget, float* derivatives) {
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
  Lanes<float, lanes> sum = broadcast<float, lanes>(0.0f), part;
  int64_t index = 0;
  for (; index + lanes <= count; index += lanes) {
    load<lanes>(values + index, part);
    sum.values += part.values;
  }
  if (index < count) {
    load_part<lanes>(values + index, count - index, 0.0f, part);
    sum.values += part.values;
  }
  return sum_of_lanes(sum);
}

/// Adds the KL of each bit over positions [begin, end), times their weights.
template <int lanes, typename Element>
[[gnu::always_inline]] inline void add_bits(const LatentJob<Element>& job, int64_t begin, int64_t end, const float* kl,
                                            double* bit_sums) {
  for (int64_t bit = 0; bit < job.bits; bit += lanes) {
    Lanes<float, lanes> sum = broadcast<float, lanes>(0.0f), part;
    for (int64_t row = begin; row < end; ++row) {
      const float u = job.token_weight ? static_cast<float>(job.token_weight[row]) : 1.0f;
      if (!(u > 0)) continue;
      load<lanes>(kl + (row - begin) * job.bits + bit, part);  // with what lies behind the last bit, which is left out
      sum.values += part.values * u;
    }
    float sums[size_t{lanes}];
    store<lanes>(sum, sums);
    const int64_t count = std::min<int64_t>(lanes, job.bits - bit);
    for (int64_t lane = 0; lane < count; ++lane) bit_sums[bit + lane] += static_cast<double>(sums[lane]);
  }
}

template <int lanes, typename Element>
[[gnu::always_inline]] inline void multiply(const float* values, int64_t count, float factor, Element* products) {
  Lanes<float, lanes> pair[2], part;
  int64_t index = 0;
  for (; index + 2 * lanes <= count; index += 2 * lanes) {
    for (int k = 0; k < 2; ++k) {
      load<lanes>(values + index + k * lanes, pair[k]);
      pair[k].values *= factor;
    }
    store_pair<lanes>(pair, products + index);
  }
  for (; index + lanes <= count; index += lanes) {
    load<lanes>(values + index, part);
    part.values *= factor;
    store<lanes>(part, products + index);
  }
  if (index == count) return;
  load_part<lanes>(values + index, count - index, 0.0f, part);
  part.values *= factor;
  store_part<lanes>(part, count - index, products + index);
}

template <int lanes, Hinge hinge, typename Element>
[[gnu::always_inline]] inline void process_position(const LatentJob<Element>& job, int64_t row, const float* of_bits,
                                                    float* derivatives, LatentSums& sums) {
  const int64_t bits = job.bits;
  const double u = job.token_weight ? job.token_weight[row] : 1.0;
  Element* gradient = job.gradient ? job.gradient + row * bits : nullptr;
  if (!(u > 0)) {
    if (gradient) std::memset(static_cast<void*>(gradient), 0, sizeof(Element) * static_cast<size_t>(bits));
    if (job.penalty) job.penalty[row] = 0;
    return;
  }
  const float kl = sum_of<lanes>(of_bits, bits);
  const float excess = hinge == Hinge::per_bit
                           ? hinge_each_bit<lanes>(of_bits, bits, static_cast<float>(job.free_bits), derivatives)
                           : static_cast<float>(kl - job.free_bits);
  const bool passes = hinge != Hinge::per_position || !(excess < 0);  // so that a NaN stays visible
  const double penalty = passes ? u * static_cast<double>(excess) : 0.0;
  sums.penalty += penalty;
  sums.weight += u;
  sums.active += excess > 0 ? u : 0;
  if (job.penalty) job.penalty[row] = static_cast<float>(penalty);
  if (!gradient) return;
  const double factor = passes ? u * job.scale * (job.upstream ? job.upstream[row] : 1.0) : 0.0;
  multiply<lanes>(derivatives, bits, static_cast<float>(without_payload(factor)), gradient);
}

template <int lanes, Hinge hinge, typename Element>
[[gnu::always_inline]] inline void process_groups(const LatentJob<Element>& job, int64_t begin, int64_t end,
                                                  LatentSums& sums, double* bit_sums, LatentGroup<Element>& group) {
  float *kl = group.kl.data(), *derivatives = group.derivatives.data();
  Element* const room = group.logits.data();
  for (int64_t first = begin; first < end; first += positions_of_group) {
    const int64_t last = std::min(end, first + positions_of_group);
    bernoulli_kl<lanes>(adjacent_logits(job, first, last, room), (last - first) * job.bits, kl, derivatives);
    add_bits<lanes>(job, first, last, kl, bit_sums);
    for (int64_t row = first; row < last; ++row) {
      const int64_t offset = (row - first) * job.bits;
      process_position<lanes, hinge>(job, row, kl + offset, derivatives + offset, sums);
    }
  }
}

/// Works on copies of `job` and `sums`: a vector stored through a pointer might change those of the caller, for all
/// that the compiler knows, and they would be read again for each position. For the paper's number of bits the loops
/// over them are unrolled.
template <int lanes, Hinge hinge, typename Element>
[[gnu::always_inline]] inline void process_positions(const LatentJob<Element>& shared_job, int64_t begin, int64_t end,
                                                     LatentSums& all_sums, double* bit_sums,
                                                     LatentGroup<Element>& group) {
  constexpr int64_t usual_bits = 16;
  LatentJob<Element> job = shared_job;
  LatentSums sums = all_sums;
  if (job.bits == usual_bits) {
    job.bits = usual_bits;  // which the compiler now knows
    process_groups<lanes, hinge>(job, begin, end, sums, bit_sums, group);
  } else {
    process_groups<lanes, hinge>(job, begin, end, sums, bit_sums, group);
  }
  all_sums = sums;
}

template <int lanes, typename Element>
[[gnu::always_inline]] inline void process_positions(Hinge hinge, const LatentJob<Element>& job, int64_t begin,
                                                     int64_t end, LatentSums& sums, double* bit_sums,
                                                     LatentGroup<Element>& group) {
  switch (hinge) {
    case Hinge::per_position:
      return process_positions<lanes, Hinge::per_position, Element>(job, begin, end, sums, bit_sums, group);
    case Hinge::per_bit:
      return process_positions<lanes, Hinge::per_bit, Element>(job, begin, end, sums, bit_sums, group);
    case Hinge::batch_mean:
      return process_positions<lanes, Hinge::batch_mean, Element>(job, begin, end, sums, bit_sums, group);
  }
}

template <typename Element>
void process_positions_baseline(Hinge hinge, const LatentJob<Element>& job, int64_t begin, int64_t end,
                                LatentSums& sums, double* bit_sums, LatentGroup<Element>& group) {
  process_positions<4, Element>(hinge, job, begin, end, sums, bit_sums, group);
}

#if defined(__x86_64__)
template <typename Element>
__attribute__((target("avx2,fma"))) void process_positions_avx2(Hinge hinge, const LatentJob<Element>& job,
                                                                int64_t begin, int64_t end, LatentSums& sums,
                                                                double* bit_sums, LatentGroup<Element>& group) {
  process_positions<8, Element>(hinge, job, begin, end, sums, bit_sums, group);
}

template <typename Element>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void process_positions_avx512(
    Hinge hinge, const LatentJob<Element>& job, int64_t begin, int64_t end, LatentSums& sums, double* bit_sums,
    LatentGroup<Element>& group) {
  process_positions<16, Element>(hinge, job, begin, end, sums, bit_sums, group);
}
#endif

template <typename Element>
using ProcessPositions = void (*)(Hinge, const LatentJob<Element>&, int64_t, int64_t, LatentSums&, double*,
                                  LatentGroup<Element>&);

template <typename Element>
ProcessPositions<Element> process_positions_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return process_positions_avx512<Element>;
  if (set == InstructionSet::avx2) return process_positions_avx2<Element>;
#endif
  return process_positions_baseline<Element>;
}

/// All positions, on LibTorch's threads. Writes the penalty's, the weights' and the active sum, then those of each bit.
template <typename Element>
void latent_kl(Hinge hinge, const LatentJob<Element>& job, int64_t rows, double* sums) {
  const auto process = process_positions_of<Element>(instruction_set());
  const int64_t blocks = (rows + positions_of_block - 1) / positions_of_block;
  const auto width = static_cast<size_t>(3 + job.bits);
  std::vector<double> of_blocks(static_cast<size_t>(blocks) * width);
  const int64_t grain = std::max<int64_t>(1, 32768 / (positions_of_block * job.bits));
  parallel_rows(blocks, grain, [&](int64_t first_block, int64_t last_block) {
    LatentGroup<Element> group(job.bits);
    for (int64_t block = first_block; block < last_block; ++block) {
      double* of_block = of_blocks.data() + static_cast<size_t>(block) * width;
      LatentSums block_sums;
      process(hinge, job, block * positions_of_block, std::min(rows, (block + 1) * positions_of_block), block_sums,
              of_block + 3, group);
      of_block[0] = block_sums.penalty;
      of_block[1] = block_sums.weight;
      of_block[2] = block_sums.active;
    }
  });
  for (size_t column = 0; column < width; ++column) {
    sums[column] =
        pairwise_sum(0, blocks, [&](int64_t block) { return of_blocks[static_cast<size_t>(block) * width + column]; });
  }
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
