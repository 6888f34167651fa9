/// The losses' kernels for CUDA devices, which are compiled when a loss is first called on one: what a program may choose.
#pragma once

#include <string>

#include "free_transformer/detail/compilation.hpp"
#if FREE_TRANSFORMER_DEVICE_KERNELS
#include "free_transformer/detail/device/kernel_cache.hpp"
#endif

namespace free_transformer {

inline namespace FREE_TRANSFORMER_FUNCTIONS {

/// Turns the kernels on or off, for all units that are compiled with the caller's flags; without them the losses are
/// computed in LibTorch's operations. They are on unless the environment has FREE_TRANSFORMER_DEVICE_KERNELS=0. A LibTorch
/// without CUDA has none to turn on.
///
/// A kernel is compiled once for each device, type and set of options, by the NVRTC that comes with LibTorch or CUDA, in
/// about a tenth of a second. Before its first use on a device it must give what LibTorch's operations give for a small
/// batch: else, and where it cannot be compiled or launched, one warning says why and the operations are taken. Under
/// the capture of a CUDA graph nothing is compiled: call the loss once before.
inline void use_device_kernels([[maybe_unused]] bool wanted) {
#if FREE_TRANSFORMER_DEVICE_KERNELS
  detail::device::kernels_are_wanted() = wanted;
#endif
}

/// Keeps compiled kernels in a folder, which is made if it is not there, and looks for them there first; an empty path,
/// the default, keeps them nowhere. A damaged file is compiled anew.
inline void keep_device_kernels([[maybe_unused]] const std::string& folder) {
#if FREE_TRANSFORMER_DEVICE_KERNELS
  detail::device::kernel_cache().keep_in_folder(folder);
#endif
}

}  // namespace FREE_TRANSFORMER_FUNCTIONS

}  // namespace free_transformer
