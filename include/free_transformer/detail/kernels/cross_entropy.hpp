/// Cross entropy of many rows on the CPU: the entry functions of each instruction set, and the threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "free_transformer/detail/kernels/cross_entropy_row.hpp"
#include "free_transformer/detail/kernels/instruction_set.hpp"
#include "free_transformer/detail/kernels/parallel_rows.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"

namespace free_transformer::detail::kernels {

/// float64 stays; the others are computed in float32.
template <typename Element>
using RealOf = std::conditional_t<std::is_same_v<Element, double>, double, float>;

/// What is to be computed, in numbers and pointers. Null pointers stand for weights of 1 and for results not wanted.
template <typename Element>
struct CrossEntropyJob {
  using Real = RealOf<Element>;

  const Element* logits;
  const RowOffsets* logit_rows;
  int64_t columns;
  const int64_t* targets;
  int64_t ignore_index;
  const Real* token_weight;   ///< [rows]
  const Real* class_weight;   ///< [columns]
  double class_weight_sum;    ///< columns without class weights
  double label_smoothing, z_loss, softcap;

  Element* gradient;          ///< may be the logits themselves
  const RowOffsets* gradient_rows;
  const Real* upstream;       ///< [rows], multiplies the scales
  double likelihood_scale, z_scale;

  Real* nll;                  ///< [rows] each, 0 where the position does not count
  Real* likelihood_loss;      ///< with class weights and smoothing, without the token weight
  Real* log_sum_exp;
  int64_t* prediction;        ///< the most likely class, the lowest on a tie
};

/// One row. `scratch` has room for two rows; it is used for half types and capped logits.
template <int lanes, typename Element>
[[gnu::always_inline]] inline void process_row(const CrossEntropyJob<Element>& job, int64_t row, RealOf<Element>* scratch) {
  using Real = RealOf<Element>;
  constexpr bool converts = !std::is_same_v<Element, Real>;
  const int64_t columns = job.columns, target = job.targets[row];
  const double u = job.token_weight ? static_cast<double>(job.token_weight[row]) : 1.0;
  const bool counts = target != job.ignore_index && u != 0;
  Element* gradient = job.gradient ? job.gradient + (*job.gradient_rows)(row) : nullptr;
  if (!counts) {
    job.nll[row] = job.likelihood_loss[row] = job.log_sum_exp[row] = 0;
    if (job.prediction) job.prediction[row] = 0;
    if (gradient) std::memset(static_cast<void*>(gradient), 0, sizeof(Element) * static_cast<size_t>(columns));
    return;
  }
  const Element* logits = job.logits + (*job.logit_rows)(row);

  // The logits as Real: themselves, or converted and capped.
  CrossEntropyRow<Real> result{};
  const Real* values;
  Real* slope = nullptr;
  if constexpr (std::is_same_v<Real, float>) {
    if (job.softcap > 0) {
      slope = scratch + columns;
      CapPass<lanes, Element> pass(logits, scratch, slope, static_cast<float>(job.softcap));
      walk<lanes>(pass, 0, columns);
      result.maximum = pass.result();
      values = scratch;
    } else {
      LargestPass<lanes, Element, Real, converts> pass(logits, scratch);
      walk<lanes>(pass, 0, columns);
      result.maximum = pass.result();
      if constexpr (converts) values = scratch; else values = logits;
    }
  } else {
    LargestPass<lanes, Element, Real, false> pass(logits, nullptr);
    walk<lanes>(pass, 0, columns);
    result.maximum = pass.result();
    values = logits;
  }
  result.at_target = values[target];
  if (job.prediction) job.prediction[row] = first_equal<lanes>(values, columns, result.maximum);
  if (job.label_smoothing > 0) {
    if (job.class_weight) {
      SurprisePass<lanes, Real, true> pass{values, job.class_weight, result.maximum};
      walk<lanes>(pass, 0, columns);
      result.surprise = pass.total;
    } else {
      SurprisePass<lanes, Real, false> pass{values, nullptr, result.maximum};
      walk<lanes>(pass, 0, columns);
      result.surprise = pass.total;
    }
  }

  // exp and its sum without the target, whose vector is summed apart
  Real* terms = scratch;
  if constexpr (!converts) {
    if (gradient && !slope) terms = gradient;
  }
  const int64_t target_begin = target / lanes * lanes;
  const int64_t target_end = std::min<int64_t>(target_begin + lanes, columns);
  if (gradient) {
    ExponentialPass<lanes, Real, true> pass{values, terms, result.maximum};
    walk<lanes>(pass, 0, target_begin);
    result.target_exp = pass.except(target_begin, target_end - target_begin, target);
    walk<lanes>(pass, target_end, columns);
    result.others = pass.total;
  } else {
    ExponentialPass<lanes, Real, false> pass{values, nullptr, result.maximum};
    walk<lanes>(pass, 0, target_begin);
    result.target_exp = pass.except(target_begin, target_end - target_begin, target);
    walk<lanes>(pass, target_end, columns);
    result.others = pass.total;
  }

  const double log_sum = result.log_sum();
  const double nll = result.nll(), lse = result.log_sum_exp();
  const double target_weight = job.class_weight ? static_cast<double>(job.class_weight[target]) : 1.0;
  const double share = job.label_smoothing / static_cast<double>(columns);
  double likelihood_loss = target_weight == 0 ? 0 : (1 - job.label_smoothing) * target_weight * nll;
  if (job.label_smoothing > 0) likelihood_loss += share * (job.class_weight_sum * log_sum + result.surprise);
  job.nll[row] = static_cast<Real>(nll);
  job.likelihood_loss[row] = static_cast<Real>(likelihood_loss);
  job.log_sum_exp[row] = static_cast<Real>(lse);
  if (!gradient) return;

  const double upstream = u * (job.upstream ? static_cast<double>(job.upstream[row]) : 1.0);
  const double at_target = upstream * job.likelihood_scale * (1 - job.label_smoothing) * target_weight;
  const double spread = upstream * job.likelihood_scale * share;
  const double beside = spread * job.class_weight_sum + 2 * upstream * job.z_scale * job.z_loss * lse;
  const double sum = result.others + result.target_exp;
  const Real factor = static_cast<Real>((at_target + beside) / sum);
  // (at_target + beside) p_y - at_target - spread w_y, without the cancellation of a confident model
  double of_target = -at_target * (result.others / sum) + beside * (result.target_exp / sum) - spread * target_weight;
  if (slope) of_target *= static_cast<double>(slope[target]);
  if (slope || job.label_smoothing > 0) {
    SmoothedScalePass<lanes, Real, Element> pass{terms, gradient, factor, static_cast<Real>(spread),
                                                 job.class_weight, slope};
    walk<lanes>(pass, 0, columns);
  } else {
    ScalePass<lanes, Real, Element> pass{terms, gradient, factor};
    walk<lanes>(pass, 0, columns);
  }
  gradient[target] = static_cast<Element>(static_cast<Real>(of_target));
}

template <int lanes, typename Element>
[[gnu::always_inline]] inline void process_rows(const CrossEntropyJob<Element>& job, int64_t begin, int64_t end,
                                                RealOf<Element>* scratch) {
  for (int64_t row = begin; row < end; ++row) process_row<lanes, Element>(job, row, scratch);
}

template <typename Element>
void process_rows_baseline(const CrossEntropyJob<Element>& job, int64_t begin, int64_t end, RealOf<Element>* scratch) {
  process_rows<16 / sizeof(RealOf<Element>), Element>(job, begin, end, scratch);
}

#if defined(__x86_64__)
template <typename Element>
__attribute__((target("avx2,fma"))) void process_rows_avx2(const CrossEntropyJob<Element>& job, int64_t begin, int64_t end,
                                                           RealOf<Element>* scratch) {
  process_rows<32 / sizeof(RealOf<Element>), Element>(job, begin, end, scratch);
}

template <typename Element>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) void process_rows_avx512(
    const CrossEntropyJob<Element>& job, int64_t begin, int64_t end, RealOf<Element>* scratch) {
  process_rows<64 / sizeof(RealOf<Element>), Element>(job, begin, end, scratch);
}
#endif

template <typename Element>
using ProcessRows = void (*)(const CrossEntropyJob<Element>&, int64_t, int64_t, RealOf<Element>*);

template <typename Element>
ProcessRows<Element> process_rows_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return process_rows_avx512<Element>;
  if (set == InstructionSet::avx2) return process_rows_avx2<Element>;
#endif
  return process_rows_baseline<Element>;
}

/// All rows, on LibTorch's threads. No row depends on another one, so the bits do not depend on how they are split.
template <typename Element>
void cross_entropy(const CrossEntropyJob<Element>& job, int64_t rows) {
  const auto process = process_rows_of<Element>(instruction_set());
  const int64_t grain = std::max<int64_t>(1, 32768 / job.columns);
  parallel_rows(rows, grain, [&](int64_t begin, int64_t end) {
    const bool needs_scratch = job.softcap > 0 || !std::is_same_v<Element, RealOf<Element>>;
    const std::unique_ptr<RealOf<Element>[]> scratch(
        needs_scratch ? new RealOf<Element>[static_cast<size_t>(2 * job.columns)] : nullptr);
    process(job, begin, end, scratch.get());
  });
}

}  // namespace free_transformer::detail::kernels
