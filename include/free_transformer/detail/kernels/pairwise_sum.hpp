/// Sums whose order, and so whose bits, depend on nothing but the number of terms.
#pragma once

#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Pairwise sum of term(0) ... term(count - 1) in float64: the error grows with log(count).
template <typename Term>
double pairwise_sum(int64_t begin, int64_t end, const Term& term) {
  if (end - begin <= 128) {
    double sum = 0;
    for (int64_t index = begin; index < end; ++index) sum += term(index);
    return sum;
  }
  const int64_t middle = begin + (end - begin) / 2;
  return pairwise_sum(begin, middle, term) + pairwise_sum(middle, end, term);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
