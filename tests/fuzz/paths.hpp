/// Every way that a call can take on this machine.
#pragma once

#include "../unit/instruction_sets.hpp"

namespace fuzz {

/// Calls run(is_strided): with each instruction set, and once with rows that only LibTorch's operations take.
template <typename Run>
void on_each_path(const Run& run) {
  for (const auto set : numeric::available_instruction_sets()) {
    const numeric::Forced forced(set);
    run(/*is_strided=*/false);
  }
  run(/*is_strided=*/true);
}

}  // namespace fuzz
