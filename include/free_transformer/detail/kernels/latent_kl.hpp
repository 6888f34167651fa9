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

#include "free_transformer/detail/kernels/elementary.hpp"
#include "free_transformer/detail/kernels/instruction_set.hpp"
#include "free_transformer/detail/kernels/lanes.hpp"
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/parallel_rows.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"

namespace free_transformer::detail::kernels {

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)) and its derivative l sigmoid(l) sigmoid(-l). With x = |l|, s = exp(-x):
///     x < 2       x^2/8 + x^4 q(x^2): the product that decides the last digit is exact
///     2 <= x < 4  a polynomial in x - 3, where the others would cancel
///     4 <= x      log 2 - (x s/(1+s) + log(1+s)), the bracket by its series in s
/// The coefficients are fitted to the equation in 50 digits by tests/reference/fit_bernoulli_kl.py, relative error
/// below 1e-8. x is held at 110: KL is log 2 to the last digit, and the derivative has faded through the subnormal
/// numbers to 0. Until then its digits are kept: s is a product of exp(r) and two powers of 2, the second of which
/// comes last.
template <int lanes>
[[gnu::always_inline]] inline void bernoulli_kl(const Lanes<float, lanes>& logits, Lanes<float, lanes>& kl,
                                                Lanes<float, lanes>& derivative) {
  using Values = typename Lanes<float, lanes>::Values;
  using Integers = typename Lanes<float, lanes>::Integers;
  const Values l = logits.values;
  const Values magnitude = l < 0 ? -l : l;
  const Values x = magnitude > 110.0f ? Values{} + 110.0f : magnitude;  // a NaN stays
  Lanes<float, lanes> power{-x};
  Integers exponent;
  split_exponential<lanes>(power, exponent);
  exponent -= 0x4b400000 + 127;  // the bits of 1.5 2^23 + 127: what is left is n
  Lanes<float, lanes> first, second;
  power_of_two<lanes>(exponent >> 1, first);
  power_of_two<lanes>(exponent - (exponent >> 1), second);
  const Values part = power.values * first.values;
  const Values s = part * second.values;

  const Values square = x * x;
  Values near = square * -5.041414207e-09f + 1.291855396e-07f;
  near = near * square - 1.771193983e-06f;
  near = near * square + 1.886445824e-05f;
  near = near * square - 1.841294005e-04f;
  near = near * square + 1.735960923e-03f;
  near = near * square - 1.562497666e-02f;
  near = square * square * near + square * 0.125f;

  const Values y = x - 3.0f;
  Values middle = y * 2.266455516e-06f - 8.309371289e-06f;
  middle = middle * y + 1.082851752e-06f;
  middle = middle * y + 1.322272300e-04f;
  middle = middle * y - 7.487957281e-04f;
  middle = middle * y + 1.775749646e-03f;
  middle = middle * y + 2.835010617e-03f;
  middle = middle * y - 3.874900686e-02f;
  middle = middle * y + 1.355299796e-01f;
  middle = middle * y + 5.022822090e-01f;

  const Values far = 0.693147182f - s * (x + 1.0f - s * (x + 0.5f - s * (x + 1.0f / 3 - s * (x + 0.25f))));
  const Values upper = x < 4.0f ? middle : far;
  kl.values = x < 2.0f ? near : upper;

  const Values signed_x = l < 0 ? -x : x;
  derivative.values = signed_x * part / (s * (2.0f + s) + 1.0f) * second.values;
}

enum class Hinge { per_position, per_bit, batch_mean };

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

/// Room for the elements of a group, and for a whole vector behind them.
inline int64_t elements_of_group(int64_t bits) { return positions_of_group * bits + 16; }

/// The logits of positions [begin, end) one behind the other as float32: where they lie, if they lie so.
template <int lanes, typename Element>
[[gnu::always_inline]] inline const float* gather(const LatentJob<Element>& job, int64_t begin, int64_t end,
                                                  float* room) {
  if constexpr (std::is_same_v<Element, float>) {
    if (job.z_rows->are_adjacent(job.bits)) return job.z_logits + begin * job.bits;
  }
  for (int64_t row = begin; row < end; ++row) {
    const Element* source = job.z_logits + (*job.z_rows)(row);
    float* target = room + (row - begin) * job.bits;
    Lanes<float, lanes> values;
    int64_t bit = 0;
    for (; bit + lanes <= job.bits; bit += lanes) {
      load<lanes>(source + bit, values);
      store<lanes>(values, target + bit);
    }
    if (bit == job.bits) continue;
    load_part<lanes>(source + bit, job.bits - bit, static_cast<Element>(0.0f), values);
    store_part<lanes>(values, job.bits - bit, target + bit);
  }
  return room;
}

/// KL and derivative of `count` logits; two vectors at a time hide the latency of the polynomials.
template <int lanes>
[[gnu::always_inline]] inline void bernoulli_kl(const float* logits, int64_t count, float* kl, float* derivatives) {
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
    load_part<lanes>(logits + index, std::min<int64_t>(lanes, count - index), 0.0f, values[0]);
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

/// Sum of some values, and the values times u added to those of other positions.
template <int lanes>
[[gnu::always_inline]] inline float sum_and_add(const float* values, int64_t count, float u, float* totals) {
  Lanes<float, lanes> sum = broadcast<float, lanes>(0.0f), part, total;
  int64_t index = 0;
  for (; index + lanes <= count; index += lanes) {
    load<lanes>(values + index, part);
    load<lanes>(totals + index, total);
    sum.values += part.values;
    total.values += part.values * u;
    store<lanes>(total, totals + index);
  }
  if (index < count) {
    load_part<lanes>(values + index, count - index, 0.0f, part);
    load_part<lanes>(totals + index, count - index, 0.0f, total);
    sum.values += part.values;
    total.values += part.values * u;
    store_part<lanes>(total, count - index, totals + index);
  }
  return sum_of_lanes(sum);
}

template <int lanes, typename Element>
[[gnu::always_inline]] inline void multiply(const float* values, int64_t count, float factor, Element* products) {
  Lanes<float, lanes> part;
  int64_t index = 0;
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
                                                    float* derivatives, LatentSums& sums, float* bit_totals) {
  const int64_t bits = job.bits;
  const double u = job.token_weight ? job.token_weight[row] : 1.0;
  Element* gradient = job.gradient ? job.gradient + row * bits : nullptr;
  if (u == 0) {
    if (gradient) std::memset(static_cast<void*>(gradient), 0, sizeof(Element) * static_cast<size_t>(bits));
    if (job.penalty) job.penalty[row] = 0;
    return;
  }
  const float kl = sum_and_add<lanes>(of_bits, bits, static_cast<float>(u), bit_totals);
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
  multiply<lanes>(derivatives, bits, static_cast<float>(factor), gradient);
}

template <int lanes, Hinge hinge, typename Element>
[[gnu::always_inline]] inline void process_positions(const LatentJob<Element>& job, int64_t begin, int64_t end,
                                                     LatentSums& sums, double* bit_sums, float* scratch) {
  const int64_t bits = job.bits, room = elements_of_group(bits);
  float *kl = scratch, *derivatives = kl + room, *converted = derivatives + room, *bit_totals = converted + room;
  for (int64_t first = begin; first < end; first += positions_of_group) {
    const int64_t last = std::min(end, first + positions_of_group);
    bernoulli_kl<lanes>(gather<lanes>(job, first, last, converted), (last - first) * bits, kl, derivatives);
    std::memset(bit_totals, 0, sizeof(float) * static_cast<size_t>(bits));
    for (int64_t row = first; row < last; ++row) {
      const int64_t offset = (row - first) * bits;
      process_position<lanes, hinge>(job, row, kl + offset, derivatives + offset, sums, bit_totals);
    }
    for (int64_t bit = 0; bit < bits; ++bit) bit_sums[bit] += static_cast<double>(bit_totals[bit]);
  }
}

template <int lanes, typename Element>
[[gnu::always_inline]] inline void process_positions(Hinge hinge, const LatentJob<Element>& job, int64_t begin,
                                                     int64_t end, LatentSums& sums, double* bit_sums, float* scratch) {
  switch (hinge) {
    case Hinge::per_position:
      return process_positions<lanes, Hinge::per_position, Element>(job, begin, end, sums, bit_sums, scratch);
    case Hinge::per_bit:
      return process_positions<lanes, Hinge::per_bit, Element>(job, begin, end, sums, bit_sums, scratch);
    case Hinge::batch_mean:
      return process_positions<lanes, Hinge::batch_mean, Element>(job, begin, end, sums, bit_sums, scratch);
  }
}

template <typename Element>
void process_positions_baseline(Hinge hinge, const LatentJob<Element>& job, int64_t begin, int64_t end,
                                LatentSums& sums, double* bit_sums, float* scratch) {
  process_positions<4, Element>(hinge, job, begin, end, sums, bit_sums, scratch);
}

#if defined(__x86_64__)
template <typename Element>
__attribute__((target("avx2,fma"))) void process_positions_avx2(Hinge hinge, const LatentJob<Element>& job,
                                                                int64_t begin, int64_t end, LatentSums& sums,
                                                                double* bit_sums, float* scratch) {
  process_positions<8, Element>(hinge, job, begin, end, sums, bit_sums, scratch);
}

template <typename Element>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void process_positions_avx512(
    Hinge hinge, const LatentJob<Element>& job, int64_t begin, int64_t end, LatentSums& sums, double* bit_sums,
    float* scratch) {
  process_positions<16, Element>(hinge, job, begin, end, sums, bit_sums, scratch);
}
#endif

template <typename Element>
using ProcessPositions = void (*)(Hinge, const LatentJob<Element>&, int64_t, int64_t, LatentSums&, double*, float*);

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
    std::vector<float> scratch(static_cast<size_t>(4 * elements_of_group(job.bits)));
    for (int64_t block = first_block; block < last_block; ++block) {
      double* of_block = of_blocks.data() + static_cast<size_t>(block) * width;
      LatentSums block_sums;
      process(hinge, job, block * positions_of_block, std::min(rows, (block + 1) * positions_of_block), block_sums,
              of_block + 3, scratch.data());
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

}  // namespace free_transformer::detail::kernels
