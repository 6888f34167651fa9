/// Runs a test with every instruction set that the machine has.
#pragma once

#include <vector>

#include "free_transformer/detail/kernels/vector/instruction_set.hpp"

namespace numeric {

using free_transformer::detail::kernels::InstructionSet;

/// Forces an instruction set for as long as it lives.
struct Forced {
  explicit Forced(InstructionSet set) : before(free_transformer::detail::kernels::instruction_set().exchange(set)) {}
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;
  ~Forced() { free_transformer::detail::kernels::instruction_set() = before; }

  InstructionSet before;
};

/// The baseline first.
inline std::vector<InstructionSet> available_instruction_sets() {
  std::vector<InstructionSet> sets;
  for (const auto set : {InstructionSet::baseline, InstructionSet::avx2, InstructionSet::avx512}) {
    if (set <= free_transformer::detail::kernels::best_instruction_set()) sets.push_back(set);
  }
  return sets;
}

}  // namespace numeric
