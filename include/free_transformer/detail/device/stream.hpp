/// The CUDA stream behind a stream of LibTorch's, without CUDA's headers.
#pragma once

#include <c10/core/Device.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <optional>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/libraries.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Newer versions of LibTorch say it themselves.
template <typename Stream>
auto native_stream(const Stream& stream, int) -> decltype(std::optional<void*>(stream.native_handle())) {
  return stream.native_handle();
}

/// Older ones by c10::cuda::CUDAStream::stream() const, a class whose one member is the stream.
template <typename Stream>
std::optional<void*> native_stream(const Stream& stream, long) {
  using Function = void* (*)(const Stream*);
  static const auto function = reinterpret_cast<Function>(symbol_of_libtorch("_ZNK3c104cuda10CUDAStream6streamEv"));
  if (!function) return std::nullopt;
  return function(&stream);
}

/// Of the stream that LibTorch works on now, which may be null, CUDA's default stream; none if LibTorch does not tell.
inline std::optional<void*> current_native_stream(const c10::Device& device) {
  const c10::impl::VirtualGuardImpl guard(device.type());
  return native_stream(guard.getStream(device), 0);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
