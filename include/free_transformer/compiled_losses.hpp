/// Compiles the losses that units with `extern_losses.hpp` call. Include it in one unit of a program, or of a shared library
/// for its own; in a second one it costs time, and is no error.
#pragma once

#include "free_transformer/extern_losses.hpp"

namespace free_transformer {
inline namespace FREE_TRANSFORMER_FUNCTIONS {

FREE_TRANSFORMER_LOSS_INSTANCES()

}  // namespace FREE_TRANSFORMER_FUNCTIONS
}  // namespace free_transformer
