/// Fresh memory for a gradient.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// An uninitialised contiguous tensor. A large one on the CPU is fresh from the system, and the first touch of its 4
/// KiB pages costs more than the whole gradient's arithmetic: its inside is asked to be backed by pages of 2 MiB.
inline at::Tensor empty_on_large_pages(at::IntArrayRef sizes, const at::TensorOptions& options) {
  at::Tensor result = at::empty(sizes, options);
  if (!result.device().is_cpu()) return result;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + result.nbytes()) / page * page;
  if (begin < end)
    // Advice: a refusal does no harm.  NOLINTNEXTLINE(performance-no-int-to-ptr)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return result;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
