/// A block of a device's threads on the CPU: the words and functions that CUDA has built in, for the kernels' texts
/// compiled as C++. Each thread of a block is a fiber of one thread here; blocks run one after the other.
///
/// Fibers run in turn, each until a barrier or a shuffle stops it, in ascending or descending order: a result that
/// differs between the two depends on a race. Shared memory keeps what the block before has left, as on a device.
#pragma once

#include <math.h>  // NOLINT(modernize-deprecated-headers): the kernels' texts have its names without std::
#include <ucontext.h>

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define KERNEL inline
#define UNROLL
#define FUNCTION inline
#define __shared__ static
#define __launch_bounds__(...)

struct alignas(16) [[gnu::may_alias]] uint4 {
  unsigned x, y, z, w;
};

namespace emulation {

struct Index {
  unsigned x;
};

enum class Order { ascending, descending };

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "emulation: %s\n", reason);
  std::abort();
}

/// Where threads wait for each other; those that have ended are not waited for.
struct Barrier {
  unsigned arrived = 0, alive = 0;
  unsigned generation = 0;

  void open_if_complete() {
    if (arrived == 0 || arrived < alive) return;
    arrived = 0;
    ++generation;
  }
};

struct Warp {
  Barrier barrier;
  alignas(8) unsigned char values[2][32][8];  ///< of this shuffle and of the next, which a fast lane may have reached
};

struct Fiber {
  ucontext_t start;
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool has_started, has_ended;
};

class Block {
 public:
  /// Runs all threads of all blocks.
  void launch(unsigned blocks, unsigned threads, Order order, const std::function<void()>& kernel);

  void wait(Barrier& barrier) {
    const unsigned generation = barrier.generation;
    ++barrier.arrived;
    barrier.open_if_complete();
    while (barrier.generation == generation) yield();
    progress_ = true;
  }
  void wait_for_block() { wait(barrier_); }

  template <typename Value>
  Value value_of_lane(Value value, unsigned mask) {
    static_assert(sizeof(Value) <= 8);
    const unsigned lane = thread_ % 32;
    Warp& warp = warps_[thread_ / 32];
    auto& values = warp.values[warp.barrier.generation % 2];
    std::memcpy(values[lane], &value, sizeof(value));
    wait(warp.barrier);
    std::memcpy(&value, values[lane ^ mask], sizeof(value));
    return value;
  }

 private:
  static constexpr size_t stack_bytes = 128 * 1024;

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  jmp_buf scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  volatile unsigned thread_ = 0;
  volatile bool progress_ = false;

  static void run_thread();
  [[gnu::noinline]] static void prepare(Fiber& fiber);
  [[gnu::noinline]] void resume(unsigned thread);  // no caller's variable lives in a function that is jumped into
  void run_block(Order order);

  [[gnu::noinline]] void yield() {
    Fiber& fiber = fibers_[thread_];
    if (_setjmp(fiber.state) == 0) _longjmp(scheduler_, 1);
  }
};

extern Block block;

}  // namespace emulation

inline emulation::Index threadIdx, blockIdx, blockDim, gridDim;

inline void __syncthreads() { emulation::block.wait_for_block(); }
inline void __threadfence() {}

template <typename Value>
Value __shfl_xor_sync(unsigned lanes, Value value, int mask) {
  if (lanes != 0xffffffffu) emulation::fail("a shuffle must have all lanes");
  return emulation::block.value_of_lane(value, static_cast<unsigned>(mask));
}

inline unsigned atomicAdd(unsigned* number, unsigned more) {
  const unsigned before = *number;
  *number += more;
  return before;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float float_of_half(unsigned short half) {
  const unsigned exponent = (half >> 10) & 31u, fraction = half & 1023u;
  float magnitude = ldexpf(static_cast<float>(fraction + 1024u), static_cast<int>(exponent) - 25);
  if (exponent == 0) magnitude = ldexpf(static_cast<float>(fraction), -24);
  if (exponent == 31) magnitude = fraction == 0 ? HUGE_VALF : nanf("");
  return half & 0x8000u ? -magnitude : magnitude;
}

/// To the nearest, on a tie to the even one.
inline unsigned short half_of_float(float value) {
  const unsigned sign = (__float_as_uint(value) >> 16) & 0x8000u;
  const float magnitude = fabsf(value);
  if (magnitude != magnitude) return 0x7fffu;
  if (magnitude >= 65520.0f) return static_cast<unsigned short>(sign | 0x7c00u);
  int exponent = 0;
  frexpf(magnitude, &exponent);  // magnitude < 2^exponent
  if (magnitude == 0.0f) exponent = -24;
  const int last_digit = exponent - 11 < -24 ? -24 : exponent - 11;
  const float digits = nearbyintf(ldexpf(magnitude, -last_digit));  // at most 2048
  const auto number = static_cast<unsigned>(digits);
  const unsigned bits = last_digit == -24 ? number : number + (static_cast<unsigned>(last_digit + 24) << 10);
  return static_cast<unsigned short>(sign | bits);
}
