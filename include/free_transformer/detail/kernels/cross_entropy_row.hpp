/// Cross entropy of one row of logits and its gradient, in vector code.
///
/// A row costs: the largest logit (one read), exp(x - largest) and its sum (one read, one exp an element, one write
/// into the gradient's row), the product with the row's factor (one read, one write). The row stays in the core's cache
/// from the first read on, so memory sees the logits read once and the gradient written once. The terms of half types and
/// of capped logits go to a row of float32 that belongs to the thread. The sum is kept in float32 for 512 elements at a
/// time and in float64 beyond; it leaves out the target's class, so that a confident row keeps its relative accuracy. The
/// last elements of a row are padded with -inf in registers: nothing is read or written behind the row's end.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/elementary.hpp"
#include "free_transformer/detail/kernels/lanes.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// What a row of logits and its target are reduced to.
template <typename Real>
struct CrossEntropyRow {
  Real maximum;                   ///< largest (capped) logit
  Real at_target;                 ///< (capped) logit of the target
  double others;                  ///< sum of exp(x_j - maximum) over all classes but the target
  double target_exp;              ///< exp(x_y - maximum)
  double surprise;                ///< sum_c w_c (maximum - x_c), if label smoothing asks for it
  double surprise_of_prediction;  ///< sum_c exp(x_c - maximum) (maximum - x_c), if the entropy is asked for

  double log_sum() const { return at_target >= maximum ? std::log1p(others) : std::log(others + target_exp); }
  double nll() const { return log_sum() + static_cast<double>(maximum - at_target); }
  /// -sum_c p_c log p_c with -log p_c = log_sum + maximum - x_c: no term is negative, and none cancels
  double entropy() const { return log_sum() + surprise_of_prediction / (others + target_exp); }
  double log_sum_exp() const { return static_cast<double>(maximum) + log_sum(); }
};

template <typename Element>
[[gnu::always_inline]] inline Element minus_infinity() {
  return static_cast<Element>(-std::numeric_limits<float>::infinity());
}

/// Four vectors in flight hide the latency of additions and products.
inline constexpr int unroll = 4;

/// Calls pass.full(column, k) for whole vectors, with k < unroll the independent accumulator to use, pass.part(column,
/// count) for the rest, and pass.flush() at least every 512 elements and at the end.
template <int lanes, typename Pass>
[[gnu::always_inline]] inline void walk(Pass& pass, int64_t begin, int64_t end) {
  constexpr int64_t step = int64_t{lanes} * unroll;
  constexpr int64_t block = 512 / step * step;
  int64_t column = begin;
  while (column + step <= end) {
    const int64_t block_end = end - column < block ? end : column + block;
    for (; column + step <= block_end; column += step) {
#pragma GCC unroll 4
      for (int k = 0; k < unroll; ++k) pass.full(column + k * lanes, k);
    }
    pass.flush();
  }
  for (; column + lanes <= end; column += lanes) pass.full(column, 0);
  if (column < end) pass.part(column, end - column);
  pass.flush();
}

/// The same for [0, end) without [hole_begin, hole_end).
template <int lanes, typename Pass>
[[gnu::always_inline]] inline void walk_around(Pass& pass, int64_t hole_begin, int64_t hole_end, int64_t end) {
#pragma GCC unroll 1  // one copy of the loops in walk
  for (int side = 0; side < 2; ++side) walk<lanes>(pass, side == 0 ? 0 : hole_end, side == 0 ? hole_begin : end);
}

/// The largest logit. To be walked by pairs of vectors.
template <int lanes, typename Real, typename Element>
struct LargestPass {
  const Element* logits;
  Lanes<Real, lanes> largest[unroll];

  [[gnu::always_inline]] explicit LargestPass(const Element* logits_) : logits(logits_) {
    for (auto& values : largest) values = broadcast<Real, lanes>(-std::numeric_limits<Real>::infinity());
  }
  [[gnu::always_inline]] void full(int64_t column, int k) {
    Lanes<Real, lanes> values[2];
    load_unordered<lanes>(logits + column, values);
    take_larger(largest[k], values[0]);
    take_larger(largest[k], values[1]);
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    for (const int64_t end = column + count; column < end; column += lanes) {
      Lanes<Real, lanes> values;
      load_part<lanes>(logits + column, std::min<int64_t>(lanes, end - column), minus_infinity<Element>(), values);
      take_larger(largest[0], values);
    }
  }
  [[gnu::always_inline]] void flush() {}
  [[gnu::always_inline]] Real result() {
    for (int k = 1; k < unroll; ++k) take_larger(largest[0], largest[k]);
    return largest_lane(largest[0]);
  }
};

/// The largest capped logit, c tanh(x/c); also the capped logits and the slope of the cap, 1 - tanh^2.
/// With s = exp(-2|x/c|), tanh = (1-s)/(1+s) and the slope is 4s/(1+s)^2; for |x/c| < 0.625 the series of tanh keeps
/// the digits that 1-s would lose (fitted by tests/reference/fit_polynomials.py, relative error 5e-9).
template <int lanes, typename Element>
struct CapPass {
  using Values = typename Lanes<float, lanes>::Values;

  const Element* logits;
  float* capped;
  float* slope;
  float cap;
  Lanes<float, lanes> largest = broadcast<float, lanes>(-std::numeric_limits<float>::infinity());

  [[gnu::always_inline]] CapPass(const Element* logits_, float* capped_, float* slope_, float cap_)
      : logits(logits_), capped(capped_), slope(slope_), cap(cap_) {}

  [[gnu::always_inline]] void apply(Lanes<float, lanes>& x, Lanes<float, lanes>& slopes) const {
    const Values ratio = x.values / cap;
    const Values magnitude = ratio < 0 ? -ratio : ratio;
    Lanes<float, lanes> decay{magnitude * -2.0f};
    exponentiate(decay);
    const Values inverse = 1.0f / (1.0f + decay.values);
    const Values far = (1.0f - decay.values) * inverse;
    const Values square = magnitude * magnitude;
    Values near = square * -5.692296196e-03f + 2.062816732e-02f;
    near = near * square - 5.373651534e-02f;
    near = near * square + 1.333140582e-01f;
    near = near * square - 3.333328068e-01f;
    near = near * square * magnitude + magnitude;
    const Values tanh = magnitude < 0.625f ? near : far;
    x.values = (ratio < 0 ? -tanh : tanh) * cap;
    slopes.values = 4.0f * decay.values * inverse * inverse;
  }
  [[gnu::always_inline]] void full(int64_t column, int) {
    Lanes<float, lanes> values, slopes;
    load<lanes>(logits + column, values);
    apply(values, slopes);
    store<lanes>(values, capped + column);
    store<lanes>(slopes, slope + column);
    take_larger(largest, values);
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    Lanes<float, lanes> values, slopes;
    load_part<lanes>(logits + column, count, logits[column], values);
    apply(values, slopes);
    store_part<lanes>(values, count, capped + column);
    store_part<lanes>(slopes, count, slope + column);
    take_larger(largest, values);
  }
  [[gnu::always_inline]] void flush() {}
  [[gnu::always_inline]] float result() { return largest_lane(largest); }
};

/// Sum of exp(x - maximum), each term written to `terms` if it is kept.
template <int lanes, typename Real, typename Element, bool keep>
struct ExponentialPass {
  const Element* logits;
  Real* terms;
  Real maximum;
  double total = 0;
  Lanes<Real, lanes> sums[unroll] = {};

  [[gnu::always_inline]] void full(int64_t column, int k) {
    Lanes<Real, lanes> values;
    load<lanes>(logits + column, values);
    values.values -= maximum;
    exponentiate(values);
    if constexpr (keep) store<lanes>(values, terms + column);
    sums[k].values += values.values;
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    Lanes<Real, lanes> values;
    load_part<lanes>(logits + column, count, minus_infinity<Element>(), values);
    values.values -= maximum;
    exponentiate(values);
    if constexpr (keep) store_part<lanes>(values, count, terms + column);
    Real part[size_t{lanes}] = {};
    store_part<lanes>(values, count, part);  // in a row of -inf alone the filler is NaN, too
    load<lanes>(part, values);
    sums[0].values += values.values;
  }
  [[gnu::always_inline]] void flush() {
    sums[0].values += sums[1].values;
    sums[2].values += sums[3].values;
    sums[0].values += sums[2].values;
    total += static_cast<double>(sum_of_lanes(sums[0]));
    for (auto& sum : sums) sum = Lanes<Real, lanes>{};
  }

  /// The vector that holds the target: summed without it. Returns the target's own term.
  [[gnu::always_inline]] double except(int64_t column, int64_t count, int64_t target) {
    Lanes<Real, lanes> values;
    load_part<lanes>(logits + column, count, minus_infinity<Element>(), values);
    values.values -= maximum;
    exponentiate(values);
    if constexpr (keep) store_part<lanes>(values, count, terms + column);
    Real part[size_t{lanes}];
    store<lanes>(values, part);
    for (int64_t lane = 0; lane < count; ++lane) {
      if (column + lane != target) total += static_cast<double>(part[lane]);
    }
    return static_cast<double>(part[target - column]);
  }
};

/// sum_c w_c (maximum - x_c) over a row, w = 1 without class weights; a class of weight 0 may be impossible.
template <int lanes, typename Real, typename Element, bool weighted>
struct SurprisePass {
  const Element* logits;
  const Real* class_weight;
  Real maximum;
  double total = 0;
  Lanes<Real, lanes> sums[unroll] = {};

  [[gnu::always_inline]] void full(int64_t column, int k) {
    Lanes<Real, lanes> values, weight;
    load<lanes>(logits + column, values);
    values.values = maximum - values.values;
    if constexpr (weighted) {
      load<lanes>(class_weight + column, weight);
      values.values = weight.values <= 0 ? weight.values : weight.values * values.values;
    }
    sums[k].values += values.values;
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane) {
      const Real weight = weighted ? class_weight[column + lane] : Real{1};
      if (weight > 0)
        total += static_cast<double>(weight) * static_cast<double>(maximum - static_cast<Real>(logits[column + lane]));
    }
  }
  [[gnu::always_inline]] void flush() {
    for (auto& sum : sums) {
      total += static_cast<double>(sum_of_lanes(sum));
      sum = Lanes<Real, lanes>{};
    }
  }
};

/// sum_c exp(x_c - maximum) (maximum - x_c) over a row; an impossible class has no part in it.
template <int lanes, typename Real, typename Element>
struct SurpriseOfPredictionPass {
  const Element* logits;
  Real maximum;
  double total = 0;
  Lanes<Real, lanes> sums[unroll] = {};

  [[gnu::always_inline]] void add(const Lanes<Real, lanes>& x, int k) {
    Lanes<Real, lanes> share{x.values - maximum};
    const typename Lanes<Real, lanes>::Values surprise = -share.values;
    exponentiate(share);
    sums[k].values += share.values <= 0 ? share.values : share.values * surprise;
  }
  [[gnu::always_inline]] void full(int64_t column, int k) {
    Lanes<Real, lanes> values;
    load<lanes>(logits + column, values);
    add(values, k);
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    Lanes<Real, lanes> values;
    load_part<lanes>(logits + column, count, minus_infinity<Element>(), values);
    add(values, 0);
  }
  [[gnu::always_inline]] void flush() {
    for (auto& sum : sums) {
      total += static_cast<double>(sum_of_lanes(sum));
      sum = Lanes<Real, lanes>{};
    }
  }
};

/// The lowest column that holds `value`, the largest of the row; 0 if none does, which is a row of NaN.
template <int lanes, typename Real, typename Element>
[[gnu::always_inline]] inline int64_t first_equal(const Element* logits, int64_t columns, Real value) {
  int64_t column = 0;
  for (; column + lanes <= columns; column += lanes) {
    Lanes<Real, lanes> values;
    load<lanes>(logits + column, values);
    const typename Lanes<Real, lanes>::Integers equal = values.values >= value;
    typename Lanes<Real, lanes>::Integer parts[size_t{lanes}], any = 0;
    std::memcpy(parts, &equal, sizeof(parts));
    for (int lane = 0; lane < lanes; ++lane) any |= parts[lane];
    if (any) break;
  }
  for (; column < columns; ++column) {
    if (static_cast<Real>(logits[column]) >= value) return column;
  }
  return 0;
}

/// gradient = factor term, the whole of it but the target's own element. To be walked by pairs of vectors: those of
/// half types are packed into one.
template <int lanes, typename Real, typename Element>
struct ScalePass {
  const Real* terms;
  Element* gradient;
  Real factor;

  [[gnu::always_inline]] void full(int64_t column, int) {
    Lanes<Real, lanes> values[2];
    for (int k = 0; k < 2; ++k) {
      load<lanes>(terms + column + k * lanes, values[k]);
      values[k].values *= factor;
    }
    store_pair<lanes>(values, gradient + column);
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    for (const int64_t end = column + count; column < end; column += lanes) {
      Lanes<Real, lanes> values;
      load_part<lanes>(terms + column, std::min<int64_t>(lanes, end - column), Real{0}, values);
      values.values *= factor;
      store_part<lanes>(values, std::min<int64_t>(lanes, end - column), gradient + column);
    }
  }
  [[gnu::always_inline]] void flush() {}
};

/// gradient = (factor term - spread w) slope: with label smoothing, and the slope of the cap where there is one.
template <int lanes, typename Real, typename Element>
struct SmoothedScalePass {
  const Real* terms;
  Element* gradient;
  Real factor;
  Real spread;
  const Real* class_weight;  ///< or null
  const Real* slope;         ///< or null

  [[gnu::always_inline]] void full(int64_t column, int) {
    Lanes<Real, lanes> values;
    load<lanes>(terms + column, values);
    Lanes<Real, lanes> weight = broadcast<Real, lanes>(1), slopes = weight;
    if (class_weight) load<lanes>(class_weight + column, weight);
    if (slope) load<lanes>(slope + column, slopes);
    values.values = (values.values * factor - weight.values * spread) * slopes.values;
    store<lanes>(values, gradient + column);
  }
  [[gnu::always_inline]] void part(int64_t column, int64_t count) {
    Real part[size_t{lanes}];
    for (int64_t lane = 0; lane < count; ++lane) {
      const Real weight = class_weight ? class_weight[column + lane] : Real{1};
      const Real slope_ = slope ? slope[column + lane] : Real{1};
      part[lane] = (terms[column + lane] * factor - weight * spread) * slope_;
    }
    for (int64_t lane = count; lane < lanes; ++lane) part[lane] = 0;
    Lanes<Real, lanes> values;
    load<lanes>(part, values);
    store_part<lanes>(values, count, gradient + column);
  }
  [[gnu::always_inline]] void flush() {}
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
