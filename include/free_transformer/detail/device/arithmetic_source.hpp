/// The part that the device kernels' texts share: how numbers lie in memory, sums that keep their digits, and how the
/// threads of a block and the blocks of a launch put their parts together.
#pragma once

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Goes before each of the other texts. It is CUDA C++ without any include; the tests compile it as C++ against an
/// emulation of a block, which brings what CUDA has built in. Compiled for
///     ELEMENT   how numbers lie in memory: 0 float32, 1 float16, 2 bfloat16 (`Element`)
/// without contraction into fused products (--fmad=false): what is fused is written so. Half types are converted by
/// what every device has since sm_53, or by their bits.
inline constexpr char arithmetic_source[] = R"(
#if defined(__CUDACC_RTC__)
#define KERNEL extern "C" __global__
#define FUNCTION __device__ __forceinline__
#define UNROLL _Pragma("unroll")
FUNCTION float float_of_half(unsigned short half) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
  return value;
}
FUNCTION unsigned short half_of_float(float value) {
  unsigned short half;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
  return half;
}
#endif

#if ELEMENT == 0
typedef float Number;
#else
typedef unsigned short Number;
#endif

constexpr int numbers_of_vector = 16 / static_cast<int>(sizeof(Number));
constexpr unsigned all_lanes = 0xffffffffu;

FUNCTION float infinity() { return __uint_as_float(0x7f800000u); }
FUNCTION float not_a_number() { return __uint_as_float(0x7fc00000u); }

FUNCTION float widened(Number number) {
#if ELEMENT == 0
  return number;
#elif ELEMENT == 1
  return float_of_half(number);
#else
  return __uint_as_float(static_cast<unsigned>(number) << 16);
#endif
}

// To the nearest, on a tie to the even one.
FUNCTION Number narrowed(float value) {
#if ELEMENT == 0
  return value;
#elif ELEMENT == 1
  return half_of_float(value);
#else
  const unsigned bits = __float_as_uint(value);
  const unsigned rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<Number>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
#endif
}

// Of an address that 16 divides.
FUNCTION void load_vector(const Number* address, float (&values)[numbers_of_vector]) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(address);
  const unsigned words[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
  UNROLL
  for (int k = 0; k < 4; ++k) {
#if ELEMENT == 0
    values[k] = __uint_as_float(words[k]);
#else
    values[2 * k] = widened(static_cast<Number>(words[k] & 0xffffu));
    values[2 * k + 1] = widened(static_cast<Number>(words[k] >> 16));
#endif
  }
}

FUNCTION void store_vector(const float (&values)[numbers_of_vector], Number* address) {
  unsigned words[4];
  UNROLL
  for (int k = 0; k < 4; ++k) {
#if ELEMENT == 0
    words[k] = __float_as_uint(values[k]);
#else
    const unsigned upper = narrowed(values[2 * k + 1]);
    words[k] = upper << 16 | narrowed(values[2 * k]);
#endif
  }
  *reinterpret_cast<uint4*>(address) = uint4{words[0], words[1], words[2], words[3]};
}

// Where the rows of a tensor [..., columns] lie, in elements: in groups of equal strides, as a batch of sequences has
// them.
struct RowLayout {
  long long rows_of_group, group_stride, row_stride;
};

FUNCTION long long offset_of(const RowLayout& layout, long long row) {
  if (row < layout.rows_of_group) return row * layout.row_stride;  // a division costs some hundred instructions
  return row / layout.rows_of_group * layout.group_stride + row % layout.rows_of_group * layout.row_stride;
}

// The token weight of a row that counts, NaN where its target is out of range; 0 where it does not count.
FUNCTION float weight_of_row(long long target, long long ignore_index, const float* token_weight, long long row,
                             long long columns) {
  if (target == ignore_index) return 0.0f;
  const float weight = token_weight ? token_weight[row] : 1.0f;
  return weight == 0.0f || (target >= 0 && target < columns) ? weight : not_a_number();
}

// A float32 sum and what its roundings have lost.
struct CompensatedSum {
  float sum, lost;
};

FUNCTION void add(CompensatedSum& to, float term) {
  const float sum = to.sum + term;
  const float of_term = sum - to.sum;
  to.lost += (to.sum - (sum - of_term)) + (term - of_term);
  to.sum = sum;
}

FUNCTION double value_of(const CompensatedSum& of) {
  const bool is_finite = fabsf(of.sum) < infinity();  // else what was lost is a NaN
  return is_finite ? static_cast<double>(of.sum) + static_cast<double>(of.lost) : static_cast<double>(of.sum);
}

// Over the lanes that differ in the bits from first_offset down to last_offset; each of them gets the same bits.
FUNCTION double sum_of_lanes(double value, int first_offset, int last_offset) {
  for (int offset = first_offset; offset >= last_offset; offset /= 2) {
    value += __shfl_xor_sync(all_lanes, value, offset);
  }
  return value;
}

// What a sum of weighted losses is divided by.
struct Divisor {
  long long kind;  // 0: 1, 1: the sum of the weights, 2: a number, 3: a number on the device
  double number;
  const double* tensor;
};

// The factor of every weighted loss. A mean of nothing is 0; a divisor of 0 for something that counts divides by 0.
FUNCTION double loss_scale(const Divisor& divisor, double weight_sum, double counted) {
  if (divisor.kind == 0) return 1.0;
  if (divisor.kind == 1) return weight_sum == 0.0 ? 0.0 : 1.0 / weight_sum;
  if (counted == 0.0) return 0.0;
  return 1.0 / (divisor.kind == 2 ? divisor.number : *divisor.tensor);
}

// True in the block that comes here last, which then sees what all others have written before. The ticket is 0 before
// the launch and after it.
FUNCTION bool is_last_block(unsigned* ticket) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1u;
    if (is_last) *ticket = 0;
  }
  __syncthreads();
  if (is_last) __threadfence();
  return is_last;
}

// Sums of `count` values that every thread of the block has, written by thread 0; `room` holds 32 * count numbers.
template <int count>
FUNCTION void sum_over_block(const double (&values)[count], double (&room)[32][count], double* sums) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int warps = static_cast<int>(blockDim.x) / 32;
  UNROLL
  for (int k = 0; k < count; ++k) {
    const double of_warp = sum_of_lanes(values[k], 16, 1);
    if (lane == 0) room[warp][k] = of_warp;
  }
  __syncthreads();
  if (warp == 0) {
    UNROLL
    for (int k = 0; k < count; ++k) {
      const double sum = sum_of_lanes(lane < warps ? room[lane][k] : 0.0, 16, 1);
      if (lane == 0) sums[k] = sum;
    }
  }
  __syncthreads();
}

// The sums of `count` values over all threads of the launch, in the order of the blocks. True in the one block that has
// them, to be read after a barrier. `partial` holds count numbers for each block.
template <int count>
FUNCTION bool sum_over_launch(const double (&values)[count], double* partial, unsigned* ticket, double* sums) {
  __shared__ double room[32][count];
  sum_over_block(values, room, partial + static_cast<long long>(blockIdx.x) * count);
  if (!is_last_block(ticket)) return false;
  double of_blocks[count];
  UNROLL
  for (int k = 0; k < count; ++k) of_blocks[k] = 0.0;
  const volatile double* parts = partial;
  for (long long block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    UNROLL
    for (int k = 0; k < count; ++k) of_blocks[k] += parts[block * count + k];
  }
  sum_over_block(of_blocks, room, sums);
  return true;
}
)";

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
