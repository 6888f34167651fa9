/// What the device kernels are given, in numbers and pointers to the device's memory, and the grids that they are
/// launched with. The structs are those of the kernels' texts, field for field; tests/device checks that.
#pragma once

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// How logits and their gradient lie in memory; the numbers are those of ELEMENT in the texts.
enum class Element { float32, float16, bfloat16 };

inline constexpr int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

/// Where the rows of a tensor [..., columns] lie, in elements: in groups of equal strides, as a batch of sequences has
/// them. The columns themselves are adjacent. A tensor of two dimensions is one group.
struct RowLayout {
  int64_t rows_of_group, group_stride, row_stride;
};

/// What a sum of weighted losses is divided by, see `loss_scale`.
struct Divisor {
  enum Kind : int64_t { one, weight_sum, given_number, given_tensor };

  int64_t kind;
  double number;
  const double* tensor;  ///< one number
};

/// The rows of one cross entropy, see `kernels::CrossEntropyJob`. Null pointers stand for weights and scales of 1 and
/// for results not wanted.
struct CrossEntropyJob {
  const void* logits;
  void* gradient;  ///< may be the logits themselves
  RowLayout logit_rows, gradient_rows;
  int64_t columns;
  const int64_t* targets;  ///< [rows]; the row of one that is out of range is NaN
  int64_t ignore_index;
  const float* token_weight;       ///< [rows]
  const float* class_weight;       ///< [columns]
  const double* likelihood_scale;  ///< one number each
  const double* z_scale;
  const float* upstream;  ///< of row r at r * upstream_stride, so that a stride of 0 is one number for all
  int64_t upstream_stride;
  double label_smoothing, z_loss, softcap;
  float* loss;  ///< [rows] each; all weights applied
  float* nll;
  float* likelihood_loss;
  float* log_sum_exp;
  float* entropy;
  int64_t* prediction;
};

/// What is asked of all rows together: the scales before the rows, the sums after them.
struct CrossEntropyBatchJob {
  const int64_t* targets;
  int64_t ignore_index;
  const float* token_weight;
  const float* class_weight;
  int64_t rows, columns;
  Divisor divisor;
  double z_loss;
  const float* nll;  ///< as the rows' kernel has written it, like the next three
  const float* likelihood_loss;
  const float* log_sum_exp;
  const int64_t* prediction;  ///< or null: no hits
  double* scales;             ///< [4]: of the likelihood, of the z-loss, the sums of u w_y and of u
  double* sums;               ///< [6], see `ReconstructionSum`
  float* loss;                ///< one number, or null
  unsigned* ticket;           ///< 0, and left as 0
  double* partial;            ///< `partial_sums_of_batch(rows)` numbers
};

/// The positions of one latent KL, see `kernels::LatentJob`.
struct LatentJob {
  const void* z_logits;
  void* gradient;  ///< [rows, bits] contiguous, or null
  RowLayout z_rows;
  int64_t rows;
  double free_bits;
  const double* token_weight;  ///< [rows], or null for 1
  const double* scale;         ///< one number that multiplies the gradient; null: 1
  const double* mean_kl;       ///< of the batch, for its hinge
  const double* upstream;      ///< as that of a cross entropy
  int64_t upstream_stride;
  float* penalty;  ///< [rows], weighted, or null
  Divisor divisor;
  double* sums;    ///< [3 + bits], see `LatentSum`; or null
  double* totals;  ///< [2]: scale and mean KL; with the sums
  float* loss;     ///< one number, or null
  unsigned* ticket;
  double* partial;  ///< `partial_sums_of_positions(rows, bits)` numbers
};

struct Grid {
  unsigned blocks, threads;
};

/// A block for each row, with four vectors of 16 bytes or more for each thread. With more than 512 threads a
/// multiprocessor could not hold two rows, one of which works while the other waits at a barrier.
inline Grid grid_of_rows(int64_t rows, int64_t columns, Element element) {
  const int64_t vectors = columns * bytes_of(element) / 16;
  unsigned threads = 32;
  while (threads < 512 && threads * int64_t{4} < vectors) threads *= 2;
  return {static_cast<unsigned>(rows), threads};
}

/// Of the kernels that read a few numbers a row.
inline Grid grid_of_batch(int64_t rows) {
  return {static_cast<unsigned>(std::clamp<int64_t>((rows + 2047) / 2048, 1, 128)), 256};
}

inline int64_t partial_sums_of_batch(int64_t rows) { return int64_t{6} * grid_of_batch(rows).blocks; }

inline constexpr int64_t most_latent_bits = 1024;

/// At least two rounds for each block, of as many positions as its lanes read at a time.
inline Grid grid_of_positions(int64_t rows, int64_t bits) {
  int64_t lanes = 1;
  while (lanes < bits && lanes < 32) lanes *= 2;
  const int64_t in_flight = std::max<int64_t>(1, 4 / ((bits + lanes - 1) / lanes));
  const int64_t of_two_rounds = 2 * in_flight * (256 / lanes);
  return {static_cast<unsigned>(std::clamp<int64_t>((rows + of_two_rounds - 1) / of_two_rounds, 1, 512)), 256};
}

inline int64_t partial_sums_of_positions(int64_t rows, int64_t bits) {
  return std::max((3 + bits) * grid_of_positions(rows, bits).blocks, int64_t{grid_of_batch(rows).blocks});
}

/// What the kernels can count with: a block a row, columns in 32 bits, and the bits that a warp's registers hold.
inline bool can_take_rows(int64_t rows, int64_t columns) {
  return rows <= 0x7fffffff && columns > 0 && columns <= 0x7fff0000;
}
inline bool can_take_bits(int64_t bits) { return bits > 0 && bits <= most_latent_bits; }

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
