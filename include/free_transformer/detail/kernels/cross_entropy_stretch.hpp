/// What cross entropy does with a stretch of a row, in vectors: float32 in the first-level cache, one loop a kernel.
#pragma once

#include <cstdint>
#include <limits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy_job.hpp"
#include "free_transformer/detail/kernels/vector/exponential.hpp"
#include "free_transformer/detail/kernels/vector/lanes.hpp"
#include "free_transformer/detail/kernels/vector/logarithm.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Four vectors in flight hide the latency of additions and products.
inline constexpr int in_flight = 4;

/// The largest of whole vectors of logits, and exp(x - reference), which goes to `exponentials`; they may be the logits.
/// The reference is the larger of `maximum` and what the stretch holds, or 0 while that is -inf. The sum leaves out the
/// target, whose place among the exponentials becomes 0.
struct ExponentialsOfStretch {
  struct Result {
    float largest, sum, of_target;
  };

  const float* logits;
  int64_t count;
  int64_t target;  ///< negative if it is in another stretch
  float maximum;
  float* exponentials;

  template <int lanes>
  [[gnu::always_inline]] Result run() const {
    Result result{largest_logit<lanes>(), 0, 0};
    sum_exponentials<lanes>(reference_of(result.largest > maximum ? result.largest : maximum), result);
    return result;
  }

 private:
  template <int lanes>
  [[gnu::always_inline]] float largest_logit() const {
    Lanes<lanes> largest[in_flight], values;
    for (auto& of : largest) of = broadcast<lanes>(-std::numeric_limits<float>::infinity());
    int64_t column = 0;
    for (; column + in_flight * lanes <= count; column += in_flight * lanes) {
#pragma GCC unroll 4
      for (int k = 0; k < in_flight; ++k) {
        load<lanes>(logits + column + k * lanes, values);
        take_larger<lanes>(largest[k], values);
      }
    }
    for (; column < count; column += lanes) {
      load<lanes>(logits + column, values);
      take_larger<lanes>(largest[0], values);
    }
    for (int k = 1; k < in_flight; ++k) take_larger<lanes>(largest[0], largest[k]);
    return largest_lane<lanes>(largest[0]);
  }

  template <int lanes>
  [[gnu::always_inline]] void exponentials_at(int64_t column, float reference, Lanes<lanes>& values) const {
    load<lanes>(logits + column, values);
    values.values -= reference;
    exponentiate<lanes>(values);
    store<lanes>(values, exponentials + column);
  }

  template <int lanes>
  [[gnu::always_inline]] void sum_exponentials(float reference, Result& result) const {
    Lanes<lanes> sums[in_flight], values;
    for (auto& sum : sums) sum = broadcast<lanes>(0.0f);
    int64_t column_of_target = count;
    if (target >= 0) {
      column_of_target = target / lanes * lanes;
      exponentials_at<lanes>(column_of_target, reference, values);
      result.of_target = exponentials[target];
      exponentials[target] = 0;
      load<lanes>(exponentials + column_of_target, sums[0]);
    }
    int64_t column = 0;
    for (const int64_t end : {column_of_target, count}) {
      for (; column + in_flight * lanes <= end; column += in_flight * lanes) {
#pragma GCC unroll 4
        for (int k = 0; k < in_flight; ++k) {
          exponentials_at<lanes>(column + k * lanes, reference, values);
          sums[k].values += values.values;
        }
      }
      for (; column < end; column += lanes) {
        exponentials_at<lanes>(column, reference, values);
        sums[0].values += values.values;
      }
      column += lanes;  // the target's vector
    }
    sums[0].values += sums[1].values;
    sums[2].values += sums[3].values;
    sums[0].values += sums[2].values;
    result.sum = sum_of_lanes<lanes>(sums[0]);
  }
};

/// c tanh(x/c) of whole vectors, and its slope 1 - tanh^2. With s = exp(-2|x/c|), tanh = (1-s)/(1+s) and the slope is
/// 4s/(1+s)^2; for |x/c| < 0.625 the series of tanh keeps the digits that 1-s would lose (fitted by
/// tests/reference/fit_polynomials.py, relative error 5e-9).
struct Cap {
  float* logits;
  int64_t count;
  float limit;
  float* slopes;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    using Values = typename Lanes<lanes>::Values;
    for (int64_t column = 0; column < count; column += lanes) {
      Lanes<lanes> x;
      load<lanes>(logits + column, x);
      const Values ratio = x.values / limit;
      const Values magnitude = ratio < 0 ? -ratio : ratio;
      Lanes<lanes> decay{magnitude * -2.0f};
      exponentiate<lanes>(decay);
      const Values inverse = 1.0f / (1.0f + decay.values);
      const Values far = (1.0f - decay.values) * inverse;
      const Values square = magnitude * magnitude;
      Values near = square * -5.692296196e-03f + 2.062816732e-02f;
      near = near * square - 5.373651534e-02f;
      near = near * square + 1.333140582e-01f;
      near = near * square - 3.333328068e-01f;
      near = near * square * magnitude + magnitude;
      const Values tanh = magnitude < 0.625f ? near : far;
      x.values = (ratio < 0 ? -tanh : tanh) * limit;
      store<lanes>(x, logits + column);
      store<lanes>({4.0f * decay.values * inverse * inverse}, slopes + column);
    }
  }
};

/// sum_c w_c (reference - x_c), w = 1 without class weights; a class of weight 0 may be impossible.
struct SurpriseOf {
  const float* logits;
  const float* class_weight;
  int64_t count;
  float reference;

  template <int lanes>
  [[gnu::always_inline]] double run() const {
    Lanes<lanes> sum = broadcast<lanes>(0.0f), values, weight = broadcast<lanes>(1.0f);
    int64_t column = 0;
    for (; column + lanes <= count; column += lanes) {
      load<lanes>(logits + column, values);
      if (class_weight) load<lanes>(class_weight + column, weight);
      values.values = weight.values <= 0 ? weight.values : weight.values * (reference - values.values);
      sum.values += values.values;
    }
    auto total = static_cast<double>(sum_of_lanes<lanes>(sum));
    for (; column < count; ++column) {
      const float of_class = class_weight ? class_weight[column] : 1.0f;
      if (of_class > 0) total += static_cast<double>(of_class) * static_cast<double>(reference - logits[column]);
    }
    return total;
  }
};

/// sum_c e_c (reference - x_c) of whole vectors, e_c = exp(x_c - reference); an impossible class has no part in it.
struct SurpriseOfPrediction {
  const float* logits;
  const float* exponentials;
  int64_t count;
  float reference;

  template <int lanes>
  [[gnu::always_inline]] double run() const {
    Lanes<lanes> sum = broadcast<lanes>(0.0f), values, share;
    for (int64_t column = 0; column < count; column += lanes) {
      load<lanes>(logits + column, values);
      load<lanes>(exponentials + column, share);
      sum.values += share.values <= 0 ? share.values : share.values * (reference - values.values);
    }
    return static_cast<double>(sum_of_lanes<lanes>(sum));
  }
};

/// (factor e_c - spread w_c) slope_c: the gradient with label smoothing, and with the slope of a cap. Null pointers stand
/// for 1.
struct SmoothedProducts {
  const float* exponentials;
  int64_t count;
  float factor, spread;
  const float* class_weight;
  const float* slopes;
  float* products;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    Lanes<lanes> values, weight = broadcast<lanes>(1.0f), slope = broadcast<lanes>(1.0f);
    int64_t column = 0;
    for (; column + lanes <= count; column += lanes) {
      load<lanes>(exponentials + column, values);
      if (class_weight) load<lanes>(class_weight + column, weight);
      if (slopes) load<lanes>(slopes + column, slope);
      values.values = (values.values * factor - weight.values * spread) * slope.values;
      store<lanes>(values, products + column);
    }
    for (; column < count; ++column) {
      const float of_class = class_weight ? class_weight[column] : 1.0f;
      products[column] = (exponentials[column] * factor - of_class * spread) * (slopes ? slopes[column] : 1.0f);
    }
  }
};

/// log(1 + x) of whole vectors, in place.
struct LogarithmsOfOnePlus {
  float* numbers;
  int64_t count;

  template <int lanes>
  [[gnu::always_inline]] void run() const {
    for (int64_t index = 0; index < count; index += lanes) {
      Lanes<lanes> values;
      load<lanes>(numbers + index, values);
      logarithm_of_one_plus<lanes>(values);
      store<lanes>(values, numbers + index);
    }
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
