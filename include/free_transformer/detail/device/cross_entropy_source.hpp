/// The device kernels of cross entropy, as a text for NVRTC: the rows, what a mean divides by, and the sums.
///
/// A block works on one row. It is read once for the largest logit and for the sums of exponentials, and with a
/// gradient wanted once more, where each thread writes what it has just read: fresh or in place. Float32 logits move 12
/// bytes an element with a gradient and 4 without, half types half of that. Between aligned ends the row is read and
/// written 16 bytes at a time; where gradient and logits are not aligned alike, their second reading is one number at a
/// time.
///
/// The numbers are those of the CPU's kernel: the sum leaves out the target's class, so that a confident row keeps its
/// relative accuracy; each thread's sums are float32 with what their roundings lose, beyond that float64; exp and log
/// are CUDA's own in float32, without fast-math. The order of every sum is fixed by the row's size and alignment. A
/// float64 operation costs a consumer's device as much as 64 float32 ones: no element has one.
#pragma once

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Goes behind `arithmetic_source`. The options that cost each element something are compiled for:
///     SOFTCAP    1: with a cap
///     SMOOTHING  0: none, 1: label smoothing, 2: label smoothing with class weights
///     ENTROPY    1: with the entropy of the prediction
/// and those of a row are fields of the job. The struct is that of `jobs.hpp`.
inline constexpr char cross_entropy_source[] = R"(
struct CrossEntropyJob {
  const Number* logits;
  Number* gradient;  // may be the logits, or null
  RowLayout logit_rows, gradient_rows;
  long long columns;
  const long long* targets;
  long long ignore_index;
  const float* token_weight;
  const float* class_weight;
  const double* likelihood_scale;
  const double* z_scale;
  const float* upstream;
  long long upstream_stride;
  double label_smoothing, z_loss, softcap;
  float* loss;
  float* nll;
  float* likelihood_loss;
  float* log_sum_exp;
  float* entropy;
  long long* prediction;
};

FUNCTION float capped(float x, float cap, float inverse_cap) {
#if SOFTCAP
  return cap * tanhf(x * inverse_cap);
#else
  return x;
#endif
}

// The cap's derivative 1 - tanh^2, in a form that keeps its digits where tanh is near 1.
FUNCTION float slope_of_cap(float x, float inverse_cap) {
#if SOFTCAP
  const float decay = expf(-2.0f * inverse_cap * fabsf(x));
  return 4.0f * decay / ((1.0f + decay) * (1.0f + decay));
#else
  return 1.0f;
#endif
}

// What exponentials are taken relative to.
FUNCTION float reference_of(float largest) { return largest == -infinity() ? 0.0f : largest; }

// What a thread has seen of the row's classes other than the target; all relative to reference_of(largest).
struct Seen {
  float largest;
  int prediction;               // class of the largest, the lowest on a tie
  CompensatedSum exponentials;  // exp(x_c - reference)
#if ENTROPY
  CompensatedSum surprise_of_prediction;  // exp(x_c - reference) (reference - x_c)
#endif
#if SMOOTHING
  CompensatedSum surprise;  // w_c (reference - x_c)
  CompensatedSum weight;    // w_c
#endif
};

FUNCTION void scale(CompensatedSum& sum, float factor) {
  sum.sum *= factor;
  sum.lost *= factor;
}

FUNCTION void raise_largest(Seen& seen, float larger, int prediction) {
  const float rise = reference_of(larger) - reference_of(seen.largest);
  seen.largest = larger;
  seen.prediction = prediction;
#if SMOOTHING
  if (seen.weight.sum != 0.0f) add(seen.surprise, rise * seen.weight.sum);
#endif
  if (!(seen.exponentials.sum > 0.0f)) return;  // nothing yet, or a NaN that stays
  const float factor = expf(-rise);
#if ENTROPY
  add(seen.surprise_of_prediction, rise * seen.exponentials.sum);
  scale(seen.surprise_of_prediction, factor);
#endif
  scale(seen.exponentials, factor);
}

// Takes in `count` logits from `column` on.
template <int count>
FUNCTION void take_in(float (&x)[count], int column, int target, const CrossEntropyJob& job, Seen& seen) {
  if (target >= column && target < column + count) {
    UNROLL
    for (int k = 0; k < count; ++k) x[k] = column + k == target ? -infinity() : x[k];
  }
  float largest = x[0] == x[0] ? x[0] : -infinity();
  UNROLL
  for (int k = 1; k < count; ++k) largest = fmaxf(largest, x[k]);  // which passes by a NaN
  if (largest > seen.largest) {
    int first = count - 1;
    UNROLL
    for (int k = count - 2; k >= 0; --k) first = x[k] == largest ? k : first;
    raise_largest(seen, largest, column + first);
  }
  const float reference = reference_of(seen.largest);
  float sum = 0.0f;
#if ENTROPY
  float surprise_of_prediction = 0.0f;
#endif
  UNROLL
  for (int k = 0; k < count; ++k) {
    const float exponential = expf(x[k] - reference);
    sum += exponential;
#if ENTROPY
    surprise_of_prediction += exponential > 0.0f ? exponential * (reference - x[k]) : exponential;
#endif
  }
  add(seen.exponentials, sum);
#if ENTROPY
  add(seen.surprise_of_prediction, surprise_of_prediction);
#endif
#if SMOOTHING
  float surprise = 0.0f, weights = 0.0f;
  UNROLL
  for (int k = 0; k < count; ++k) {
    if (column + k == target) continue;
#if SMOOTHING == 2
    const float weight = job.class_weight[column + k];
    if (weight != 0.0f) surprise += weight * (reference - x[k]);
    weights += weight;
#else
    surprise += reference - x[k];
    weights += 1.0f;
#endif
  }
  add(seen.surprise, surprise);
  add(seen.weight, weights);
#endif
}

// The same of many threads, in float64.
struct Reduced {
  float largest;
  int prediction;
  double exponentials;
#if ENTROPY
  double surprise_of_prediction;
#endif
#if SMOOTHING
  double surprise, weight;
#endif
};

FUNCTION Reduced reduced(const Seen& seen) {
  Reduced of;
  of.largest = seen.largest;
  of.prediction = seen.prediction;
  of.exponentials = value_of(seen.exponentials);
#if ENTROPY
  of.surprise_of_prediction = value_of(seen.surprise_of_prediction);
#endif
#if SMOOTHING
  of.surprise = value_of(seen.surprise);
  of.weight = value_of(seen.weight);
#endif
  return of;
}

// Makes everything relative to the reference of a largest logit that is not below the present one.
FUNCTION void refer_to(float largest, Reduced& row) {
  const double rise = static_cast<double>(reference_of(largest)) - static_cast<double>(reference_of(row.largest));
  row.largest = largest;
#if SMOOTHING
  if (row.weight != 0.0) row.surprise += rise * row.weight;
#endif
  if (!(row.exponentials > 0.0)) return;
  const double factor = static_cast<double>(expf(static_cast<float>(-rise)));
#if ENTROPY
  row.surprise_of_prediction = factor * (row.surprise_of_prediction + rise * row.exponentials);
#endif
  row.exponentials *= factor;
}

// Every lane gets what all lanes of its warp have.
FUNCTION void combine_lanes(Reduced& row) {
  float largest = row.largest;
  int prediction = row.prediction;
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(all_lanes, largest, offset);
    const int of_other = __shfl_xor_sync(all_lanes, prediction, offset);
    if (other > largest || (other == largest && of_other < prediction)) {
      largest = other;
      prediction = of_other;
    }
  }
  refer_to(largest, row);
  row.prediction = prediction;
  row.exponentials = sum_of_lanes(row.exponentials, 16, 1);
#if ENTROPY
  row.surprise_of_prediction = sum_of_lanes(row.surprise_of_prediction, 16, 1);
#endif
#if SMOOTHING
  row.surprise = sum_of_lanes(row.surprise, 16, 1);
  row.weight = sum_of_lanes(row.weight, 16, 1);
#endif
}

// Warp 0 gets what the whole block has.
FUNCTION void combine_block(Reduced& row) {
  __shared__ Reduced of_warps[16];
  const int thread = static_cast<int>(threadIdx.x), warps = static_cast<int>(blockDim.x) / 32;
  combine_lanes(row);
  if (warps == 1) return;
  if (thread % 32 == 0) of_warps[thread / 32] = row;
  __syncthreads();
  if (thread >= 32) return;
  row = of_warps[thread < warps ? thread : 0];
  if (thread >= warps) {
    row.exponentials = 0.0;
#if ENTROPY
    row.surprise_of_prediction = 0.0;
#endif
#if SMOOTHING
    row.surprise = row.weight = 0.0;
#endif
  }
  combine_lanes(row);
}

// gradient = (factor exp(x_c - reference) - spread w_c) slope_c, but for the target
struct Coefficients {
  float reference, factor, spread, of_target;
};

// Where the vectors of a row lie: `head` numbers before them, and as many behind them as are left.
struct Vectors {
  int head, count, tail;
};

FUNCTION Vectors vectors_of(const Number* row, int columns) {
  const unsigned long long behind = reinterpret_cast<unsigned long long>(row) % 16;
  const int to_boundary = static_cast<int>((16 - behind) % 16 / sizeof(Number));
  Vectors vectors;
  vectors.head = to_boundary < columns ? to_boundary : columns;
  vectors.count = (columns - vectors.head) / numbers_of_vector;
  vectors.tail = vectors.head + vectors.count * numbers_of_vector;
  return vectors;
}

FUNCTION void take_in_number(const Number* logits, int column, int target, const CrossEntropyJob& job, float cap,
                             float inverse_cap, Seen& seen) {
  float x[1] = {capped(widened(logits[column]), cap, inverse_cap)};
  take_in(x, column, target, job, seen);
}

FUNCTION Reduced read_row(const Number* logits, int target, const CrossEntropyJob& job) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int columns = static_cast<int>(job.columns);
  const float cap = static_cast<float>(job.softcap), inverse_cap = 1.0f / cap;
  const Vectors vectors = vectors_of(logits, columns);
  Seen seen = {};
  seen.largest = -infinity();
  seen.prediction = target;
  if (thread < vectors.head) take_in_number(logits, thread, target, job, cap, inverse_cap, seen);
  int index = thread;
  for (; index + threads < vectors.count; index += 2 * threads) {  // two in flight
    float x[numbers_of_vector], next[numbers_of_vector];
    const int column = vectors.head + index * numbers_of_vector, next_column = column + threads * numbers_of_vector;
    load_vector(logits + column, x);
    load_vector(logits + next_column, next);
    UNROLL
    for (int k = 0; k < numbers_of_vector; ++k) {
      x[k] = capped(x[k], cap, inverse_cap);
      next[k] = capped(next[k], cap, inverse_cap);
    }
    take_in(x, column, target, job, seen);
    take_in(next, next_column, target, job, seen);
  }
  if (index < vectors.count) {
    float x[numbers_of_vector];
    const int column = vectors.head + index * numbers_of_vector;
    load_vector(logits + column, x);
    UNROLL
    for (int k = 0; k < numbers_of_vector; ++k) x[k] = capped(x[k], cap, inverse_cap);
    take_in(x, column, target, job, seen);
  }
  if (vectors.tail + thread < columns) {
    take_in_number(logits, vectors.tail + thread, target, job, cap, inverse_cap, seen);
  }
  return reduced(seen);
}

template <int count>
FUNCTION void differentiate(float (&x)[count], int column, int target, const CrossEntropyJob& job, float cap,
                            float inverse_cap, const Coefficients& coefficients) {
  UNROLL
  for (int k = 0; k < count; ++k) {
    float gradient = expf(capped(x[k], cap, inverse_cap) - coefficients.reference) * coefficients.factor;
#if SMOOTHING == 2
    gradient -= coefficients.spread * job.class_weight[column + k];
#elif SMOOTHING
    gradient -= coefficients.spread;
#endif
#if SOFTCAP
    gradient *= slope_of_cap(x[k], inverse_cap);
#endif
    x[k] = column + k == target ? coefficients.of_target : gradient;
  }
}

FUNCTION void differentiate_number(const Number* logits, int column, int target, const CrossEntropyJob& job, float cap,
                                   float inverse_cap, const Coefficients& coefficients, Number* gradient) {
  float x[1] = {widened(logits[column])};
  differentiate(x, column, target, job, cap, inverse_cap, coefficients);
  gradient[column] = narrowed(x[0]);
}

// Each number is read by the thread that writes it, before: gradient and logits may be the same.
FUNCTION void write_gradient(const Number* logits, int target, const CrossEntropyJob& job,
                             const Coefficients& coefficients, Number* gradient) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int columns = static_cast<int>(job.columns);
  const float cap = static_cast<float>(job.softcap), inverse_cap = 1.0f / cap;
  const Vectors vectors = vectors_of(logits, columns);
  if (vectors.head != vectors_of(gradient, columns).head) {
    for (int column = thread; column < columns; column += threads) {
      differentiate_number(logits, column, target, job, cap, inverse_cap, coefficients, gradient);
    }
    return;
  }
  if (thread < vectors.head) {
    differentiate_number(logits, thread, target, job, cap, inverse_cap, coefficients, gradient);
  }
  int index = thread;
  for (; index + threads < vectors.count; index += 2 * threads) {
    float x[numbers_of_vector], next[numbers_of_vector];
    const int column = vectors.head + index * numbers_of_vector, next_column = column + threads * numbers_of_vector;
    load_vector(logits + column, x);
    load_vector(logits + next_column, next);
    differentiate(x, column, target, job, cap, inverse_cap, coefficients);
    store_vector(x, gradient + column);
    differentiate(next, next_column, target, job, cap, inverse_cap, coefficients);
    store_vector(next, gradient + next_column);
  }
  if (index < vectors.count) {
    float x[numbers_of_vector];
    const int column = vectors.head + index * numbers_of_vector;
    load_vector(logits + column, x);
    differentiate(x, column, target, job, cap, inverse_cap, coefficients);
    store_vector(x, gradient + column);
  }
  if (vectors.tail + thread < columns) {
    differentiate_number(logits, vectors.tail + thread, target, job, cap, inverse_cap, coefficients, gradient);
  }
}

// The gradient of a row whose logits have no say.
FUNCTION void fill_gradient(float value, int columns, Number* gradient) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const Number number = narrowed(value);
  const Vectors vectors = vectors_of(gradient, columns);
  float filled[numbers_of_vector];
  UNROLL
  for (int k = 0; k < numbers_of_vector; ++k) filled[k] = value;
  if (thread < vectors.head) gradient[thread] = number;
  for (int index = thread; index < vectors.count; index += threads) {
    store_vector(filled, gradient + vectors.head + index * numbers_of_vector);
  }
  if (vectors.tail + thread < columns) gradient[vectors.tail + thread] = number;
}

struct RowLosses {
  double loss, nll, likelihood_loss, log_sum_exp, entropy;
  long long prediction;
};

FUNCTION void write_row(const RowLosses& losses, long long row, const CrossEntropyJob& job) {
  if (job.loss) job.loss[row] = static_cast<float>(losses.loss);
  if (job.nll) job.nll[row] = static_cast<float>(losses.nll);
  if (job.likelihood_loss) job.likelihood_loss[row] = static_cast<float>(losses.likelihood_loss);
  if (job.log_sum_exp) job.log_sum_exp[row] = static_cast<float>(losses.log_sum_exp);
#if ENTROPY
  if (job.entropy) job.entropy[row] = static_cast<float>(losses.entropy);
#endif
  if (job.prediction) job.prediction[row] = losses.prediction;
}

// A row that counts, with its target's class taken in.
struct Row {
  double others;              // sum over the other classes of exp(x_c - reference)
  double target_exponential;  // exp(x_y - reference)
  double surprise, weight;    // of all classes: sum_c w_c (reference - x_c), sum_c w_c
  double rise;                // reference - x_y
  double log_sum;             // lse - largest
  float largest;
  long long prediction;
};

FUNCTION Row with_target(Reduced of_others, int target, float target_logit, float target_weight) {
  Row row;
  const bool is_prediction =
      target_logit > of_others.largest || (target_logit == of_others.largest && target < of_others.prediction);
  const bool is_largest = target_logit >= of_others.largest;
  row.prediction = is_prediction ? target : of_others.prediction;
  row.largest = is_largest ? target_logit : of_others.largest;
  if (!(target_logit == target_logit)) row.largest = target_logit;
  if (is_largest) refer_to(target_logit, of_others);
  row.rise = static_cast<double>(row.largest) - static_cast<double>(target_logit);
  row.others = of_others.exponentials;
  row.target_exponential = static_cast<double>(expf(target_logit - reference_of(row.largest)));
  const double argument = is_largest ? row.others : row.others - 1.0 + row.target_exponential;
  row.log_sum = static_cast<double>(log1pf(static_cast<float>(argument)));
  if (fabsf(row.largest) == infinity()) row.log_sum = static_cast<double>(not_a_number());
  row.surprise = row.weight = 0.0;
#if SMOOTHING
  const double weight = static_cast<double>(target_weight);
  row.surprise = of_others.surprise + (target_weight == 0.0f ? 0.0 : weight * row.rise);
  row.weight = of_others.weight + weight;
#endif
  return row;
}

FUNCTION double entropy_of(const Reduced& of_others, const Row& row) {
#if ENTROPY
  // -sum_c p_c log p_c with -log p_c = log_sum + largest - x_c: no term is negative, none cancels
  double surprise = of_others.surprise_of_prediction;
  if (row.rise > 0.0) {
    if (row.target_exponential > 0.0) surprise += row.target_exponential * row.rise;
  } else {
    Reduced raised = of_others;
    refer_to(row.largest, raised);
    surprise = raised.surprise_of_prediction;
  }
  return row.log_sum + surprise / (row.others + row.target_exponential);
#else
  return 0.0;
#endif
}

FUNCTION Coefficients coefficients_of(const Row& row, float token_weight, float target_weight, float slope,
                                      long long index, const CrossEntropyJob& job) {
  const double upstream = job.upstream ? static_cast<double>(job.upstream[index * job.upstream_stride]) : 1.0;
  const double of_token = static_cast<double>(token_weight) * upstream;
  const double likelihood = of_token * (job.likelihood_scale ? *job.likelihood_scale : 1.0);
  const double target_part = likelihood * (1.0 - job.label_smoothing) * static_cast<double>(target_weight);
  double beside = 0.0, spread = 0.0;
  if (job.z_loss > 0.0) {
    const double z = of_token * (job.z_scale ? *job.z_scale : 1.0);
    beside = 2.0 * z * job.z_loss * (static_cast<double>(row.largest) + row.log_sum);
  }
#if SMOOTHING
  spread = likelihood * job.label_smoothing / static_cast<double>(job.columns);
  beside += spread * row.weight;
#endif
  const double inverse_sum = 1.0 / (row.others + row.target_exponential);
  Coefficients coefficients;
  coefficients.reference = reference_of(row.largest);
  coefficients.factor = static_cast<float>((target_part + beside) * inverse_sum);
  coefficients.spread = static_cast<float>(spread);
  // (target_part + beside) p_y - target_part - spread w_y, without the cancellation of a confident model
  coefficients.of_target =
      static_cast<float>(beside * (row.target_exponential * inverse_sum) - target_part * (row.others * inverse_sum) -
                         spread * static_cast<double>(target_weight)) *
      slope;
  return coefficients;
}

FUNCTION RowLosses losses_of(const Row& row, float token_weight, float target_weight, double entropy,
                             const CrossEntropyJob& job) {
  RowLosses losses;
  losses.nll = row.log_sum + row.rise;
  losses.log_sum_exp = static_cast<double>(row.largest) + row.log_sum;
  double target_share = static_cast<double>(target_weight);
#if SMOOTHING
  target_share *= 1.0 - job.label_smoothing;
#endif
  losses.likelihood_loss = target_share == 0.0 ? 0.0 : target_share * losses.nll;
#if SMOOTHING
  if (row.weight > 0.0) {  // else no class has a part in it, whatever the logits are
    losses.likelihood_loss +=
        job.label_smoothing / static_cast<double>(job.columns) * (row.weight * row.log_sum + row.surprise);
  }
#endif
  losses.loss = losses.likelihood_loss;
  if (job.z_loss > 0.0) losses.loss += job.z_loss * losses.log_sum_exp * losses.log_sum_exp;
  losses.loss *= static_cast<double>(token_weight);
  losses.entropy = entropy;
  losses.prediction = row.prediction;
  return losses;
}

// With few options two blocks of 64 registers a thread share a multiprocessor; with more, so few would spill.
constexpr int blocks_at_once = SOFTCAP + SMOOTHING + ENTROPY < 2 ? 2 : 1;

KERNEL void __launch_bounds__(512, blocks_at_once) cross_entropy_rows(const CrossEntropyJob job) {
  __shared__ Coefficients shared_coefficients;
  const long long index = blockIdx.x;
  const int columns = static_cast<int>(job.columns);
  const long long given_target = job.targets[index];
  const float token_weight = weight_of_row(given_target, job.ignore_index, job.token_weight, index, job.columns);
  Number* const gradient = job.gradient ? job.gradient + offset_of(job.gradient_rows, index) : nullptr;
  const bool is_in_range = given_target >= 0 && given_target < job.columns;
  if (token_weight == 0.0f || !is_in_range) {
    const float value = token_weight == 0.0f ? 0.0f : not_a_number();
    const double wide = static_cast<double>(value);
    if (threadIdx.x == 0) write_row({wide, wide, wide, wide, wide, 0}, index, job);
    if (gradient) fill_gradient(value, columns, gradient);
    return;
  }
  const Number* const logits = job.logits + offset_of(job.logit_rows, index);
  const int target = static_cast<int>(given_target);
  const float target_weight = job.class_weight ? job.class_weight[target] : 1.0f;
  const float given_logit = widened(logits[target]);

  Reduced of_others = read_row(logits, target, job);
  combine_block(of_others);
  if (threadIdx.x == 0) {
    const float cap = static_cast<float>(job.softcap), inverse_cap = 1.0f / cap;
    const float target_logit = capped(given_logit, cap, inverse_cap);
    const Row row = with_target(of_others, target, target_logit, target_weight);
    if (gradient) {
      const float slope = slope_of_cap(given_logit, inverse_cap);
      shared_coefficients = coefficients_of(row, token_weight, target_weight, slope, index, job);
    }
    write_row(losses_of(row, token_weight, target_weight, entropy_of(of_others, row), job), index, job);
  }
  if (!gradient) return;
  __syncthreads();
  const bool has_part_in_loss = target_weight != 0.0f || SMOOTHING != 0 || job.z_loss > 0.0;
  if (has_part_in_loss) {
    write_gradient(logits, target, job, shared_coefficients, gradient);
  } else {
    fill_gradient(0.0f, columns, gradient);
  }
}
)";

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
