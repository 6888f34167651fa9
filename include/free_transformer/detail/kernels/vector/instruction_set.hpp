/// The choice of vector instructions, made once at run time, and the way into each of them.
#pragma once

#include <atomic>
#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

// float32 numbers in a vector of the baseline. Tests make it 16, to run on any processor what AVX-512 runs.
#if !defined(FREE_TRANSFORMER_BASELINE_LANES)
#define FREE_TRANSFORMER_BASELINE_LANES 4
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// In rising order; baseline is what the compiler assumes anyway: SSE2 on x86-64, NEON on 64-bit Arm.
enum class InstructionSet : int { baseline, avx2, avx512 };

/// The best that the processor and the system support.
inline InstructionSet best_instruction_set() {
#if FREE_TRANSFORMER_VECTOR_KERNELS && defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma")) {
    return InstructionSet::avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

/// The instruction set in use. Tests and benchmarks store a lower one than the best to force it.
inline std::atomic<InstructionSet>& instruction_set() {
  static std::atomic<InstructionSet> chosen{best_instruction_set()};
  return chosen;
}

#if FREE_TRANSFORMER_VECTOR_KERNELS
#if defined(__x86_64__)
template <typename Kernel>
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))) auto run_with_avx512(const Kernel kernel) {
  return kernel.template run<16>();
}

template <typename Kernel>
__attribute__((target("avx2,fma"))) auto run_with_avx2(const Kernel kernel) {
  return kernel.template run<8>();
}
#endif

/// Calls the kernel's always_inline `run<lanes>()` from a function of the instruction set. All that is in it is compiled
/// once for each set: a kernel holds the loops over a stretch of numbers and no more.
template <typename Kernel>
auto run_vectorized(const Kernel kernel, [[maybe_unused]] InstructionSet set = instruction_set()) {
#if defined(__x86_64__)
  if (set == InstructionSet::avx512) return run_with_avx512(kernel);
  if (set == InstructionSet::avx2) return run_with_avx2(kernel);
#endif
  return kernel.template run<FREE_TRANSFORMER_BASELINE_LANES>();
}

/// float32 numbers in a vector of the instruction set in use.
struct LaneCount {
  template <int lanes>
  [[gnu::always_inline]] int64_t run() const {
    return lanes;
  }
};
inline int64_t lanes_in_use() { return run_vectorized(LaneCount{}); }
#endif

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
