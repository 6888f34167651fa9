/// NVRTC and the CUDA driver, found at run time: the functions that the kernels need, declared here, so that neither
/// CUDA's headers nor its libraries are needed to build.
///
/// A library is opened once and never closed, as its kernels live as long as the process. What runs once a process is
/// marked cold: optimized for size, it compiles faster and weighs less in every program that includes this.
#pragma once

#include <cstddef>
#include <string>

#include "free_transformer/detail/compilation.hpp"

#if defined(__unix__)
#include <dlfcn.h>
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Each function returns 0 for success.
struct Nvrtc {
  int (*version)(int* major, int* minor);
  int (*create)(void** program, const char* text, const char* name, int headers, const char* const* header_texts,
                const char* const* header_names);
  int (*destroy)(void** program);
  int (*compile)(void* program, int options, const char* const* option);
  int (*log_size)(void* program, size_t* size);
  int (*log)(void* program, char* log);
  int (*cubin_size)(void* program, size_t* size);
  int (*cubin)(void* program, char* cubin);
  int (*ptx_size)(void* program, size_t* size);
  int (*ptx)(void* program, char* ptx);
  const char* (*error_text)(int error);
  int (*architecture_count)(int* count);
  int (*architectures)(int* architectures);
};

struct Driver {
  int (*initialize)(unsigned flags);
  int (*device)(int* device, int ordinal);
  int (*device_attribute)(int* value, int attribute, int device);
  int (*retain_primary_context)(void** context, int device);
  int (*current_context)(void** context);
  int (*push_context)(void* context);
  int (*pop_context)(void** context);
  int (*load_module)(void** module, const void* binary);
  int (*unload_module)(void* module);
  int (*function)(void** function, void* module, const char* name);
  int (*launch)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void** extra);
  int (*is_capturing)(void* stream, int* status);
  int (*error_text)(int error, const char** text);
};

#if defined(__unix__)

/// The address of a symbol of LibTorch's, or null: LibTorch may be loaded for this library alone (Python), where the
/// process's own symbols don't have it.
inline void* symbol_of_libtorch(const char* name) {
  if (void* const symbol = dlsym(RTLD_DEFAULT, name)) return symbol;
  void* const library = dlopen("libc10_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

/// The NVRTC that LibTorch would use, through the library that links it and lies in LibTorch's folder.
inline void* open_nvrtc_of_libtorch() {
  Dl_info of_symbol;
  void* const symbol = symbol_of_libtorch("_ZN3c104cuda20getCurrentCUDAStreamEa");
  if (!symbol || !dladdr(symbol, &of_symbol) || !of_symbol.dli_fname) return nullptr;
  const std::string path = of_symbol.dli_fname;
  return dlopen((path.substr(0, path.rfind('/') + 1) + "libcaffe2_nvrtc.so").c_str(), RTLD_LAZY | RTLD_LOCAL);
}

/// LibTorch's first, as it fits the driver that LibTorch runs with; then what is loaded already; then the newest.
inline void* open_nvrtc() {
  if (void* const library = open_nvrtc_of_libtorch()) return library;
  for (const int flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY | RTLD_LOCAL}) {
    for (const char* name : {"libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so.11.2", "libnvrtc.so"}) {
      if (void* const library = dlopen(name, flags)) return library;
    }
  }
  return nullptr;
}

template <typename Function>
bool find_function(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  return function != nullptr;
}

/// Empty, or why they are not all there.
[[gnu::cold]] inline std::string find_functions(void* library, Nvrtc& nvrtc) {
  const bool has_all = find_function(library, "nvrtcVersion", nvrtc.version) &&
                       find_function(library, "nvrtcCreateProgram", nvrtc.create) &&
                       find_function(library, "nvrtcDestroyProgram", nvrtc.destroy) &&
                       find_function(library, "nvrtcCompileProgram", nvrtc.compile) &&
                       find_function(library, "nvrtcGetProgramLogSize", nvrtc.log_size) &&
                       find_function(library, "nvrtcGetProgramLog", nvrtc.log) &&
                       find_function(library, "nvrtcGetCUBINSize", nvrtc.cubin_size) &&
                       find_function(library, "nvrtcGetCUBIN", nvrtc.cubin) &&
                       find_function(library, "nvrtcGetPTXSize", nvrtc.ptx_size) &&
                       find_function(library, "nvrtcGetPTX", nvrtc.ptx) &&
                       find_function(library, "nvrtcGetErrorString", nvrtc.error_text) &&
                       find_function(library, "nvrtcGetNumSupportedArchs", nvrtc.architecture_count) &&
                       find_function(library, "nvrtcGetSupportedArchs", nvrtc.architectures);
  return has_all ? "" : "NVRTC is older than 11.2";
}

/// Empty, or why there is none.
[[gnu::cold]] inline std::string load_nvrtc(Nvrtc& nvrtc) {
  void* const library = open_nvrtc();
  return library ? find_functions(library, nvrtc) : "NVRTC (libnvrtc.so) was not found";
}

[[gnu::cold]] inline std::string load_driver(Driver& driver) {
  void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (!library) return "the CUDA driver (libcuda.so.1) was not found";
  const bool has_all = find_function(library, "cuInit", driver.initialize) &&
                       find_function(library, "cuDeviceGet", driver.device) &&
                       find_function(library, "cuDeviceGetAttribute", driver.device_attribute) &&
                       find_function(library, "cuDevicePrimaryCtxRetain", driver.retain_primary_context) &&
                       find_function(library, "cuCtxGetCurrent", driver.current_context) &&
                       find_function(library, "cuCtxPushCurrent_v2", driver.push_context) &&
                       find_function(library, "cuCtxPopCurrent_v2", driver.pop_context) &&
                       find_function(library, "cuModuleLoadData", driver.load_module) &&
                       find_function(library, "cuModuleUnload", driver.unload_module) &&
                       find_function(library, "cuModuleGetFunction", driver.function) &&
                       find_function(library, "cuLaunchKernel", driver.launch) &&
                       find_function(library, "cuStreamIsCapturing", driver.is_capturing) &&
                       find_function(library, "cuGetErrorString", driver.error_text);
  return has_all ? "" : "the CUDA driver lacks a function that the kernels need";
}

#else

inline void* symbol_of_libtorch(const char*) { return nullptr; }
[[gnu::cold]] inline std::string load_nvrtc(Nvrtc&) {
  return "device kernels are compiled at run time on Unix systems only";
}
[[gnu::cold]] inline std::string load_driver(Driver&) {
  return "device kernels are compiled at run time on Unix systems only";
}

#endif

/// Why a call of the driver failed; empty if it did not.
[[gnu::cold]] inline std::string driver_error(const Driver& driver, const char* call, int error) {
  if (error == 0) return "";
  const char* text = nullptr;
  if (driver.error_text(error, &text) != 0 || !text) text = "unknown error";
  return std::string(call) + ": " + text + " (" + std::to_string(error) + ")";
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
