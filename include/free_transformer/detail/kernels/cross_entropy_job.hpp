/// What the cross entropy kernels are given, and what they reduce a row to.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/kernels/vector/elements.hpp"
#include "free_transformer/detail/kernels/vector/instruction_set.hpp"
#include "free_transformer/detail/positions.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// What is to be computed, in numbers and pointers. Null pointers stand for weights of 1 and for results not wanted.
struct CrossEntropyJob {
  const void* logits;
  Element element;  ///< of logits and gradient
  const RowOffsets* logit_rows;
  int64_t columns;
  PositionWeights weights;          ///< of the rows
  const float* class_weight;        ///< [columns]
  double class_weight_sum;          ///< columns without class weights
  const double* weight_of_stretch;  ///< sum of the class weights of each stretch
  double label_smoothing, z_loss, softcap;

  void* gradient;  ///< may be the logits themselves
  const RowOffsets* gradient_rows;
  const float* upstream;  ///< [rows], multiplies the scales
  double likelihood_scale, z_scale;

  float* nll;              ///< [rows] each, 0 where the position does not count
  float* likelihood_loss;  ///< with class weights and smoothing, without the token weight
  float* log_sum_exp;
  float* entropy;       ///< of the prediction
  int64_t* prediction;  ///< the most likely class, the lowest on a tie

  const void* logits_of(int64_t row) const {
    return static_cast<const char*>(logits) + (*logit_rows)(row)*bytes_of(element);
  }
  void* gradient_of(int64_t row) const {
    return gradient ? static_cast<char*>(gradient) + (*gradient_rows)(row)*bytes_of(element) : nullptr;
  }
  double class_weight_of(int64_t row) const {
    return class_weight ? static_cast<double>(class_weight[weights.targets[row]]) : 1.0;
  }
};

/// Weighted sums over the rows of one block.
struct CrossEntropySums {
  double likelihood_loss = 0, z_loss = 0, nll = 0, hits = 0;
};

/// Columns that are worked on at one time: 2 KiB.
inline constexpr int64_t stretch = 512;

/// A row of 65 classes takes 460 instructions as a lane of columns and 890 in its own way (AVX2, forward alone; 970 and
/// 1190 with its gradient). Each class adds 7 (15) there and 3 (4) here.
inline constexpr int64_t most_narrow_columns = 72;

/// What a thread works in.
struct CrossEntropyScratch {
  explicit CrossEntropyScratch(const CrossEntropyJob& job)
      : references(static_cast<size_t>((job.columns + stretch - 1) / stretch)) {
    const auto row = static_cast<size_t>(job.columns + most_lanes);
    const bool needs_row = job.gradient && (job.softcap > 0 || job.element != Element::float32);
    if (needs_row) exponentials.reset(new float[row]);
    if (job.softcap > 0) slopes.reset(new float[row]);
  }

  const int64_t lanes = lanes_in_use();
  alignas(64) float values[size_t{stretch + most_lanes}];   ///< logits of a stretch
  alignas(64) float results[size_t{stretch + most_lanes}];  ///< exponentials that go nowhere else, or their products
  alignas(64) float columns[size_t{most_narrow_columns * most_lanes}];  ///< of narrow rows
  alignas(64) float rows[size_t{most_narrow_columns * most_lanes}];     ///< narrow rows, widened
  std::unique_ptr<float[]> exponentials;                                ///< of the row, for half types and with a cap
  std::unique_ptr<float[]> slopes;                                      ///< of the cap
  std::vector<float> references;  ///< of each stretch: what its exponentials are relative to
};

/// What exponentials are relative to, given the largest logit.
inline float reference_of(float maximum) { return maximum < -std::numeric_limits<float>::max() ? 0.0f : maximum; }

/// What the logits of a row and its target are reduced to, while it is walked along. Sums are relative to `reference`, the
/// largest logit so far, or 0 while that is -inf.
struct CrossEntropyRow {
  float maximum = 0, target_logit = 0;
  float reference = 0;
  double others = 0;                  ///< sum of exp(x_j - reference) over all classes but the target
  double target_exponential = 0;      ///< exp(x_y - reference)
  double surprise = 0;                ///< sum_c w_c (reference - x_c), if label smoothing asks for it
  double weight = 0;                  ///< sum of the w_c in it
  double surprise_of_prediction = 0;  ///< sum_c exp(x_c - reference) (reference - x_c), if the entropy is asked for
  int64_t prediction = 0;

  CrossEntropyRow() = default;
  CrossEntropyRow(float logit, int64_t target)
      : maximum(logit), target_logit(logit), reference(reference_of(logit)), prediction(target) {}

  void raise_maximum(float larger) {
    const float next = reference_of(larger);
    const double rise = static_cast<double>(next) - static_cast<double>(reference);
    if (others > 0 || target_exponential > 0) {
      const double factor = std::exp(-rise);
      surprise_of_prediction = factor * (surprise_of_prediction + rise * others);
      others *= factor;
      target_exponential *= factor;
    }
    if (weight > 0) surprise += rise * weight;
    maximum = larger;
    reference = next;
  }
};

/// w with log(1 + w) = log sum_j exp(x_j - maximum): the others alone where the target is the largest, which keeps the
/// digits of a confident row; else the largest's own 1 is taken away.
inline float argument_of_log_sum(const CrossEntropyRow& row) {
  return static_cast<float>(row.target_logit >= row.maximum ? row.others : row.others - 1 + row.target_exponential);
}

/// Rows that are reduced before their logarithms are taken, in vectors.
inline constexpr int64_t rows_of_group = 16;

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
