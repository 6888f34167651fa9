/// Splits rows over LibTorch's own threads.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>

#include <cstdint>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// Calls run(begin, end) for ranges that together are [0, rows), at least `grain` rows each, on LibTorch's threads.
/// `at::parallel_for` would be the obvious way, but in a header it is compiled by the user, and without -fopenmp it is
/// a serial loop. A TensorIterator's loop is started inside LibTorch.
template <typename Run>
void parallel_rows(int64_t rows, int64_t grain, const Run& run) {
  if (rows <= grain || at::get_num_threads() == 1) return run(int64_t{0}, rows);
  const at::Tensor tickets = at::empty({rows}, at::kByte);
  const char* first = static_cast<const char*>(tickets.data_ptr());
  auto iterator =
      at::TensorIteratorConfig().set_check_mem_overlap(false).add_output(tickets).add_input(tickets).build();
  // The loop over two dimensions, of which the second has one element: that over one makes g++ warn of what it is wrapped in.
  iterator.for_each([&](char** data, const int64_t* /*strides*/, int64_t count,
                        int64_t /*one*/) { run(data[0] - first, data[0] - first + count); },
                    grain);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
