/// Cross entropy of many rows on the CPU: the entry functions of each instruction set, and the threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy_row.hpp"
#include "free_transformer/detail/kernels/instruction_set.hpp"
#include "free_transformer/detail/kernels/parallel_rows.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

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
  const Real* token_weight;  ///< [rows]
  const Real* class_weight;  ///< [columns]
  double class_weight_sum;   ///< columns without class weights
  double label_smoothing, z_loss, softcap;

  Element* gradient;  ///< may be the logits themselves
  const RowOffsets* gradient_rows;
  const Real* upstream;  ///< [rows], multiplies the scales
  double likelihood_scale, z_scale;

  Real* nll;              ///< [rows] each, 0 where the position does not count
  Real* likelihood_loss;  ///< with class weights and smoothing, without the token weight
  Real* log_sum_exp;
  Real* entropy;        ///< of the prediction
  int64_t* prediction;  ///< the most likely class, the lowest on a tie
};

/// The sums of a row from its logits, which are those of the job, or capped ones. The terms exp(x - maximum) go to
/// `terms` if the gradient is wanted.
template <int lanes, typename Element, typename Real, typename Source>
[[gnu::always_inline]] inline void reduce_row(const CrossEntropyJob<Element>& job, int64_t row, const Source* logits,
                                              Real* terms, CrossEntropyRow<Real>& result) {
  const int64_t columns = job.columns, target = job.targets[row];
  result.at_target = static_cast<Real>(logits[target]);
  if (job.prediction) job.prediction[row] = first_equal<lanes>(logits, columns, result.maximum);
  if (job.label_smoothing > 0 && job.class_weight) {
    SurprisePass<lanes, Real, Source, true> pass{logits, job.class_weight, result.maximum};
    walk<lanes>(pass, 0, columns);
    result.surprise = pass.total;
  } else if (job.label_smoothing > 0) {
    SurprisePass<lanes, Real, Source, false> pass{logits, nullptr, result.maximum};
    walk<lanes>(pass, 0, columns);
    result.surprise = pass.total;
  }
  if (job.entropy) {
    SurpriseOfPredictionPass<lanes, Real, Source> pass{logits, result.maximum};
    walk<lanes>(pass, 0, columns);
    result.surprise_of_prediction = pass.total;
  }
  // The target's vector is summed apart, without the target.
  const int64_t begin = target / lanes * lanes, end = std::min<int64_t>(begin + lanes, columns);
  if (job.gradient) {
    ExponentialPass<lanes, Real, Source, true> pass{logits, terms, result.maximum};
    result.target_exp = pass.except(begin, end - begin, target);
    walk_around<lanes>(pass, begin, end, columns);
    result.others = pass.total;
  } else {
    ExponentialPass<lanes, Real, Source, false> pass{logits, nullptr, result.maximum};
    result.target_exp = pass.except(begin, end - begin, target);
    walk_around<lanes>(pass, begin, end, columns);
    result.others = pass.total;
  }
}

/// The gradient of a row from its terms: in general a p_j - spread w_j, less the target's coefficient at the target.
template <int lanes, typename Element, typename Real>
[[gnu::always_inline]] inline void write_gradient(const CrossEntropyJob<Element>& job, int64_t row, double u,
                                                  const CrossEntropyRow<Real>& result, const Real* terms,
                                                  const Real* slope, Element* gradient) {
  const int64_t columns = job.columns, target = job.targets[row];
  const double target_weight = job.class_weight ? static_cast<double>(job.class_weight[target]) : 1.0;
  const double upstream = u * (job.upstream ? static_cast<double>(job.upstream[row]) : 1.0);
  const double at_target = upstream * job.likelihood_scale * (1 - job.label_smoothing) * target_weight;
  const double spread = upstream * job.likelihood_scale * job.label_smoothing / static_cast<double>(columns);
  const double beside = spread * job.class_weight_sum + 2 * upstream * job.z_scale * job.z_loss * result.log_sum_exp();
  const double sum = result.others + result.target_exp;
  const Real factor = static_cast<Real>(without_payload((at_target + beside) / sum));
  if (slope || job.label_smoothing > 0) {
    SmoothedScalePass<lanes, Real, Element> pass{
        terms, gradient, factor, static_cast<Real>(without_payload(spread)), job.class_weight, slope};
    walk<lanes>(pass, 0, columns);
  } else {
    ScalePass<lanes, Real, Element> pass{terms, gradient, factor};
    walk<2 * lanes>(pass, 0, columns);
  }
  // (at_target + beside) p_y - at_target - spread w_y, without the cancellation of a confident model
  double of_target = -at_target * (result.others / sum) + beside * (result.target_exp / sum) - spread * target_weight;
  if (slope) of_target *= static_cast<double>(slope[target]);
  gradient[target] = static_cast<Element>(static_cast<Real>(of_target));
}

/// One row. `scratch` has room for two rows; it is used for half types and capped logits.
template <int lanes, typename Element>
[[gnu::always_inline]] inline void process_row(const CrossEntropyJob<Element>& job, int64_t row,
                                               RealOf<Element>* scratch) {
  using Real = RealOf<Element>;
  const int64_t columns = job.columns, target = job.targets[row];
  const double u = job.token_weight ? static_cast<double>(job.token_weight[row]) : 1.0;
  Element* gradient = job.gradient ? job.gradient + (*job.gradient_rows)(row) : nullptr;
  if (target == job.ignore_index || !(u > 0)) {
    job.nll[row] = job.likelihood_loss[row] = job.log_sum_exp[row] = 0;
    if (job.prediction) job.prediction[row] = 0;
    if (job.entropy) job.entropy[row] = 0;
    if (gradient) std::memset(static_cast<void*>(gradient), 0, sizeof(Element) * static_cast<size_t>(columns));
    return;
  }
  const Element* logits = job.logits + (*job.logit_rows)(row);
  CrossEntropyRow<Real> result{};
  Real* terms = scratch;
  const Real* slope = nullptr;
  if (job.softcap > 0) {
    if constexpr (std::is_same_v<Real, float>) {
      CapPass<lanes, Element> pass(logits, scratch, scratch + columns, static_cast<float>(job.softcap));
      walk<lanes>(pass, 0, columns);
      result.maximum = pass.result();
      slope = scratch + columns;
      reduce_row<lanes>(job, row, static_cast<const Real*>(scratch), scratch, result);
    }
  } else {
    LargestPass<lanes, Real, Element> pass(logits);
    walk<2 * lanes>(pass, 0, columns);
    result.maximum = pass.result();
    if constexpr (std::is_same_v<Element, Real>) {
      if (gradient) terms = gradient;
    }
    reduce_row<lanes>(job, row, logits, terms, result);
  }

  const double log_sum = result.log_sum(), nll = result.nll();
  const double target_weight = job.class_weight ? static_cast<double>(job.class_weight[target]) : 1.0;
  double likelihood_loss = !(target_weight > 0) ? 0 : (1 - job.label_smoothing) * target_weight * nll;
  if (job.label_smoothing > 0) {
    likelihood_loss +=
        job.label_smoothing / static_cast<double>(columns) * (job.class_weight_sum * log_sum + result.surprise);
  }
  job.nll[row] = static_cast<Real>(nll);
  job.likelihood_loss[row] = static_cast<Real>(likelihood_loss);
  job.log_sum_exp[row] = static_cast<Real>(result.log_sum_exp());
  if (job.entropy) job.entropy[row] = static_cast<Real>(result.entropy());
  if (gradient) write_gradient<lanes>(job, row, u, result, terms, slope, gradient);
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
__attribute__((target("avx2,fma"))) void process_rows_avx2(const CrossEntropyJob<Element>& job, int64_t begin,
                                                           int64_t end, RealOf<Element>* scratch) {
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

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
