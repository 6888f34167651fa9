/// The device kernels of the free-bits KL, as a text for NVRTC: what a mean divides by, and the positions.
///
/// A position belongs to neighbouring lanes of a warp, each with every so many of its bits: the sum over the bits,
/// which the hinge asks for, is a few shuffles, and the sum over the positions stays in a lane's registers. An element
/// is read once and its gradient written once, 8 bytes of float32; the mean over the batch is known after all have been
/// read, so its gradient is a second launch. KL and derivative are those of the CPU's kernel, within 2 and 4 ulp. Sums
/// are float32 with what their roundings lose, for each lane, and float64 beyond, in an order that the numbers of
/// positions and bits fix.
#pragma once

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Goes behind `arithmetic_source`. Compiled for
///     BITS   latent bits of a position, 1 ... 1024
///     HINGE  0: each position has a budget, 1: each bit, 2: the batch's mean
/// The struct is that of `jobs.hpp`.
inline constexpr char latent_kl_source[] = R"(
struct LatentJob {
  const Number* z_logits;
  Number* gradient;  // [rows, BITS] contiguous, or null
  RowLayout z_rows;
  long long rows;
  double free_bits;
  const double* token_weight;
  const double* scale;
  const double* mean_kl;
  const double* upstream;
  long long upstream_stride;
  float* penalty;
  Divisor divisor;
  double* sums;    // LatentSum, then the KL of each bit; null: not asked for
  double* totals;  // scale, mean KL
  float* loss;
  unsigned* ticket;
  double* partial;
};

constexpr int lanes_of_position = BITS > 16 ? 32 : BITS > 8 ? 16 : BITS > 4 ? 8 : BITS > 2 ? 4 : BITS;
constexpr int bits_of_lane = (BITS + lanes_of_position - 1) / lanes_of_position;
constexpr int in_flight = bits_of_lane < 4 ? 4 / bits_of_lane : 1;  // positions that a lane reads ahead
constexpr int sum_count = 3 + BITS;
constexpr int most_warps = 8;

// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)) and its derivative l sigmoid(l) sigmoid(-l). With x = |l|, s = exp(-x):
//     x < 2       x^2/8 + x^4 q(x^2)
//     2 <= x < 4  a polynomial in x - 3, where the others would cancel
//     4 <= x      log 2 - (x s/(1+s) + log(1+s)), the bracket by its series in s
// with the coefficients of tests/reference/fit_polynomials.py. x is held at 110: KL is log 2 to the last digit, and the
// derivative has faded through the subnormal numbers to 0; until then it is computed 2^64 times as large.
FUNCTION void bernoulli_kl(float logit, float& kl, float& derivative) {
  float x = fabsf(logit);
  x = x > 110.0f ? 110.0f : x;  // a NaN stays
  // exp(-x) = 2^n exp(r): n is rounded by adding 1.5 2^23, whose last digit counts ones, and 127 + 64 with it
  const float round = 12582912.0f + 127.0f + 64.0f;
  const float shifted = x * -1.44269504f + round;
  const float n = shifted - round;
  float r = fmaf(n, -0.693359375f, -x);  // log 2 in two parts
  r = fmaf(n, 2.12194440e-4f, r);
  float power = fmaf(r, 1.390128513e-03f, 8.363140747e-03f);
  power = fmaf(power, r, 4.166685417e-02f);
  power = fmaf(power, r, 1.666657776e-01f);
  power = fmaf(power, r, 0.5f);
  power = fmaf(power, r * r, r) + 1.0f;
  const float large = power * __uint_as_float(__float_as_uint(shifted) << 23);  // 2^64 s
  const float s = large * 5.42101086e-20f;

  const float square = x * x;
  float near = fmaf(square, -5.042490869e-09f, 1.292011973e-07f);
  near = fmaf(near, square, -1.771283905e-06f);
  near = fmaf(near, square, 1.886471546e-05f);
  near = fmaf(near, square, -1.841297781e-04f);
  near = fmaf(near, square, 1.735961181e-03f);
  near = fmaf(near, square, -1.562497672e-02f);
  near = fmaf(square * square, near, square * 0.125f);

  const float y = x - 3.0f;
  float middle = fmaf(y, -8.706122571e-06f, 6.178730018e-06f);
  middle = fmaf(middle, y, 1.330219238e-04f);
  middle = fmaf(middle, y, -7.526140544e-04f);
  middle = fmaf(middle, y, 1.775251934e-03f);
  middle = fmaf(middle, y, 2.836070023e-03f);
  middle = fmaf(middle, y, -3.874890879e-02f);
  middle = fmaf(middle, y, 1.355299056e-01f);
  middle = fmaf(middle, y, 5.022822022e-01f);

  const float first = x + 1.0f - s * (x + 0.5f), second = x + 0.333333343f - s * (x + 0.25f);
  const float far = 0.693147182f - s * (s * s * second + first);
  kl = x < 2.0f ? near : x < 4.0f ? middle : far;
  const float magnitude = x * large / (s * (2.0f + s) + 1.0f) * 5.42101086e-20f;
  derivative = logit < 0.0f ? -magnitude : magnitude;
}

// What a lane has summed over its positions.
struct LaneSums {
  CompensatedSum penalty, weight, active;
  CompensatedSum kl[bits_of_lane];
};

FUNCTION float sum_over_position(float value) {
  for (int offset = lanes_of_position / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(all_lanes, value, offset);
  }
  return value;
}

// A budget in two parts, so that what is above it keeps the digits of float64.
struct Budget {
  float upper, lower;
};

// How far the KL is above the budget, summed over a position's bits, and the derivatives of what the hinge lets pass.
FUNCTION float hinge(const float (&kl)[bits_of_lane], Budget budget, bool is_closed,
                     float (&derivatives)[bits_of_lane]) {
  float excess = 0.0f;
#if HINGE == 1
  UNROLL
  for (int k = 0; k < bits_of_lane; ++k) {  // bits that a lane lacks have no KL, and nothing above any budget
    const float of_bit = kl[k] - budget.upper - budget.lower;
    const bool passes = !(of_bit < 0.0f);  // so that a NaN stays visible
    excess += passes ? of_bit : 0.0f;
    derivatives[k] = passes ? derivatives[k] : 0.0f;
  }
  excess = sum_over_position(excess);
#else
  UNROLL
  for (int k = 0; k < bits_of_lane; ++k) excess += kl[k];
  excess = sum_over_position(excess) - budget.upper - budget.lower;
  const bool passes = HINGE == 2 ? !is_closed : !(excess < 0.0f);
  UNROLL
  for (int k = 0; k < bits_of_lane; ++k) derivatives[k] = passes ? derivatives[k] : 0.0f;
#endif
  return excess;
}

FUNCTION void process_position(const LatentJob& job, long long position, bool is_inside, Budget budget, bool is_closed,
                               double scale, const float (&logits)[bits_of_lane], LaneSums& sums) {
  const int lane = static_cast<int>(threadIdx.x) % lanes_of_position;
  float weight = is_inside ? 1.0f : 0.0f;
  if (is_inside && job.token_weight) weight = static_cast<float>(job.token_weight[position]);
  const bool counts = weight != 0.0f;
  float kl[bits_of_lane], derivatives[bits_of_lane];
  UNROLL
  for (int k = 0; k < bits_of_lane; ++k) {
    bernoulli_kl(counts ? logits[k] : 0.0f, kl[k], derivatives[k]);  // whose KL and derivative are 0
    add(sums.kl[k], kl[k] * weight);
  }
  const float excess = hinge(kl, budget, is_closed, derivatives);
  const bool passes = HINGE == 1 || (HINGE == 2 ? !is_closed : !(excess < 0.0f));
  const float penalty = counts && passes ? excess * weight : 0.0f;
  if (lane == 0) {
    add(sums.penalty, penalty);
    add(sums.weight, weight);
    add(sums.active, excess > 0.0f ? weight : 0.0f);
    if (is_inside && job.penalty) job.penalty[position] = penalty;
  }
  if (!is_inside || !job.gradient) return;
  double factor = scale;
  if (job.upstream && job.upstream_stride != 0) factor *= job.upstream[position * job.upstream_stride];
  const float of_position = static_cast<float>(factor) * weight;
  UNROLL
  for (int k = 0; k < bits_of_lane; ++k) {
    const int bit = lane + k * lanes_of_position;
    const float gradient = counts ? derivatives[k] * of_position : 0.0f;
    if (bit < BITS) job.gradient[position * BITS + bit] = narrowed(gradient);
  }
}

// The sums of all lanes of a block, the bits in the order of the lanes that have them.
FUNCTION void write_partial_sums(const LaneSums& sums, double* partial) {
  __shared__ double room[most_warps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  for (int k = -3; k < bits_of_lane; ++k) {
    double value = 0.0;
    if (k == -3) value = value_of(sums.penalty);
    if (k == -2) value = value_of(sums.weight);
    if (k == -1) value = value_of(sums.active);
    UNROLL
    for (int own = 0; own < bits_of_lane; ++own) value = own == k ? value_of(sums.kl[own]) : value;
    room[warp][lane] = sum_of_lanes(value, 16, lanes_of_position);
    __syncthreads();
    if (warp == 0) {
      double sum = 0.0;
      for (int other = 0; other < warps; ++other) sum += room[other][lane];
      const int bit = lane + k * lanes_of_position;
      if (k < 0 && lane == 0) partial[k + 3] = sum;
      if (k >= 0 && lane < lanes_of_position && bit < BITS) partial[3 + bit] = sum;
    }
    __syncthreads();
  }
}

// By the last block: the sums over all blocks, and what follows from them.
FUNCTION void finish_sums(const LatentJob& job) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  const volatile double* parts = job.partial;
  for (int column = warp; column < sum_count; column += warps) {
    double sum = 0.0;
    for (long long block = lane; block < gridDim.x; block += 32) sum += parts[block * sum_count + column];
    sum = sum_of_lanes(sum, 16, 1);
    if (lane == 0) job.sums[column] = sum;
  }
  __syncthreads();
  if (warp != 0) return;
  double kl = 0.0;
  for (int bit = lane; bit < BITS; bit += 32) kl += job.sums[3 + bit];
  kl = sum_of_lanes(kl, 16, 1);
  if (lane != 0) return;
  const double weight = job.sums[1], mean_kl = kl / weight;
  const double scale = loss_scale(job.divisor, weight, weight);
  if (HINGE == 2 && mean_kl < job.free_bits) job.sums[0] = 0.0;
  job.totals[0] = scale;
  job.totals[1] = mean_kl;
  if (job.loss) *job.loss = static_cast<float>(job.sums[0] * scale);
}

// As many as leave each thread registers enough: more of them hide the latency of the reads.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 750
constexpr int blocks_at_once = bits_of_lane > 4 ? 1 : 4;  // its multiprocessors hold 1024 threads
#else
constexpr int blocks_at_once = bits_of_lane > 4 ? 1 : 5;
#endif

KERNEL void __launch_bounds__(256, blocks_at_once) latent_kl_positions(const LatentJob job) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % lanes_of_position;
  const int positions_of_block = static_cast<int>(blockDim.x) / lanes_of_position;
  Budget budget;
  budget.upper = static_cast<float>(job.free_bits);
  budget.lower = static_cast<float>(job.free_bits - static_cast<double>(budget.upper));
  const bool is_closed = HINGE == 2 && job.mean_kl && *job.mean_kl < job.free_bits;
  double scale = job.scale ? *job.scale : 1.0;
  if (job.upstream && job.upstream_stride == 0) scale *= *job.upstream;
  LaneSums sums = {};
  const long long stride = static_cast<long long>(gridDim.x) * positions_of_block * in_flight;
  long long first = static_cast<long long>(blockIdx.x) * positions_of_block * in_flight;
  for (; first < job.rows; first += stride) {  // by whole blocks: every lane takes part in the shuffles
    float logits[in_flight][bits_of_lane];
    UNROLL
    for (int ahead = 0; ahead < in_flight; ++ahead) {
      const long long position = first + ahead * positions_of_block + thread / lanes_of_position;
      const Number* const row = job.z_logits + (position < job.rows ? offset_of(job.z_rows, position) : 0);
      UNROLL
      for (int k = 0; k < bits_of_lane; ++k) {
        const int bit = lane + k * lanes_of_position;
        logits[ahead][k] = position < job.rows && bit < BITS ? widened(row[bit]) : 0.0f;
      }
    }
    UNROLL
    for (int ahead = 0; ahead < in_flight; ++ahead) {
      const long long position = first + ahead * positions_of_block + thread / lanes_of_position;
      process_position(job, position, position < job.rows, budget, is_closed, scale, logits[ahead], sums);
    }
  }
  if (!job.sums) return;
  write_partial_sums(sums, job.partial + static_cast<long long>(blockIdx.x) * sum_count);
  if (is_last_block(job.ticket)) finish_sums(job);
}

// The scale of a mean, which the gradient asks for before the positions' sums are known.
KERNEL void __launch_bounds__(256, 4) latent_kl_scale(const LatentJob job) {
  double weight[1] = {0.0};
  const long long stride = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; row < job.rows; row += stride) {
    weight[0] += job.token_weight ? job.token_weight[row] : 1.0;
  }
  double* const sum = job.totals + 1;
  if (!sum_over_launch(weight, job.partial, job.ticket, sum) || threadIdx.x != 0) return;
  job.totals[0] = loss_scale(job.divisor, *sum, *sum);
}
)";

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
