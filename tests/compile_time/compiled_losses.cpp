#include <free_transformer/compiled_losses.hpp>
