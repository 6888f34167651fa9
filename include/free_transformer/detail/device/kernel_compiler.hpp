/// From a kernel's text to what the driver loads, by NVRTC.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/libraries.hpp"
#include "free_transformer/detail/device/variant.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

struct CompiledKernel {
  std::string binary;  ///< a cubin, or PTX with its closing 0
  std::string log;
  std::string reason;  ///< why there is no binary
};

/// The option that tells NVRTC the architecture (90 for compute capability 9.0); none if it cannot serve it. A device
/// newer than NVRTC gets PTX of the newest older architecture, which its driver compiles.
[[gnu::cold]] inline std::string architecture_option(const Nvrtc& nvrtc, int architecture, std::string& reason) {
  int count = 0, major = 0, minor = 0;
  nvrtc.version(&major, &minor);
  nvrtc.architecture_count(&count);
  std::vector<int> known(static_cast<size_t>(std::max(count, 0)) + 1);
  if (count > 0) nvrtc.architectures(known.data());
  int newest = 0;
  for (const int other : known) {
    if (other == architecture) return "--gpu-architecture=sm_" + std::to_string(architecture);
    if (other < architecture) newest = std::max(newest, other);
  }
  if (newest > 0) return "--gpu-architecture=compute_" + std::to_string(newest);
  reason = "NVRTC " + std::to_string(major) + "." + std::to_string(minor) + " does not know the architecture sm_" +
           std::to_string(architecture);
  return "";
}

/// `more` are options beside the variant's.
[[gnu::cold]] inline CompiledKernel compile(const Nvrtc& nvrtc, const Variant& variant, int architecture,
                                            const std::vector<std::string>& more = {}) {
  CompiledKernel compiled;
  const std::string for_architecture = architecture_option(nvrtc, architecture, compiled.reason);
  if (for_architecture.empty()) return compiled;
  std::vector<std::string> options = variant.options();
  options.push_back(for_architecture);
  options.insert(options.end(), more.begin(), more.end());
  std::vector<const char*> pointers;
  pointers.reserve(options.size());
  for (const std::string& option : options) pointers.push_back(option.c_str());

  void* program = nullptr;
  const std::string source = variant.source();
  int error = nvrtc.create(&program, source.c_str(), variant.name(), 0, nullptr, nullptr);
  if (error == 0) {
    error = nvrtc.compile(program, static_cast<int>(pointers.size()), pointers.data());
    size_t size = 0;
    if (nvrtc.log_size(program, &size) == 0 && size > 1) {
      compiled.log.resize(size);
      if (nvrtc.log(program, compiled.log.data()) != 0) compiled.log.clear();
      compiled.log = compiled.log.substr(0, compiled.log.find('\0'));  // NVRTC counts its closing 0
    }
    const bool is_ptx = for_architecture.find("compute_") != std::string::npos;
    if (error == 0) error = (is_ptx ? nvrtc.ptx_size : nvrtc.cubin_size)(program, &size);
    if (error == 0) {
      compiled.binary.resize(size);
      error = (is_ptx ? nvrtc.ptx : nvrtc.cubin)(program, compiled.binary.data());
    }
    nvrtc.destroy(&program);
  }
  if (error != 0) {
    compiled.binary.clear();
    compiled.reason = std::string("NVRTC could not compile ") + variant.name() + " with " + for_architecture + ": " +
                      nvrtc.error_text(error) + "\n" + compiled.log;
  } else if (compiled.binary.empty()) {
    compiled.reason = std::string("NVRTC made nothing of ") + variant.name();
  }
  return compiled;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
