/// The choice of vector instructions, made once at run time.
#pragma once

#include <atomic>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// In rising order; baseline is what the compiler assumes anyway: SSE2 on x86-64, NEON on 64-bit Arm.
enum class InstructionSet : int { baseline, avx2, avx512 };

/// The best that the processor and the system support.
inline InstructionSet best_instruction_set() {
#if defined(__GNUC__) && defined(__x86_64__)
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

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
