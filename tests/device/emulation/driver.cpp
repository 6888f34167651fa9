/// A library with the CUDA driver's functions whose device is this process: its memory is the host's, and a launch runs
/// the emulated kernel before it returns. With the stand-in for NVRTC beside it, whose binaries say what they were
/// compiled for, the whole library can be tested as if there were a device.
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <string>

#include "block.hpp"
#include "kernels.hpp"

namespace {

using namespace emulation;

std::mutex mutex;

struct Module {
  std::string options;

  int option(const char* macro) const {
    const size_t found = options.find(std::string("-D") + macro + "=");
    return found == std::string::npos ? 0 : std::atoi(options.c_str() + found + std::strlen(macro) + 3);
  }
};

using Function = std::function<void(const void*)>;

std::list<Module> modules;
std::list<Function> functions;

template <typename Job>
Function function_of(void (*kernel)(const Job&)) {
  return [kernel](const void* job) { kernel(*static_cast<const Job*>(job)); };
}

Function rows_of(const Module& module) {
  for (const RowsKernel& kernel : all_rows_kernels()) {
    if (static_cast<int>(kernel.element) == module.option("ELEMENT") && kernel.softcap == module.option("SOFTCAP") &&
        kernel.smoothing == module.option("SMOOTHING") && kernel.entropy == module.option("ENTROPY")) {
      return function_of(kernel.run);
    }
  }
  return nullptr;
}

Function positions_of(const Module& module, bool is_scale) {
  for (const LatentKernel& kernel : all_latent_kernels()) {
    if (static_cast<int>(kernel.element) == module.option("ELEMENT") && kernel.bits == module.option("BITS") &&
        static_cast<int>(kernel.hinge) == module.option("HINGE")) {
      return function_of(is_scale ? kernel.scale : kernel.positions);
    }
  }
  return nullptr;
}

}  // namespace

extern "C" {

long emulated_launches = 0, emulated_modules = 0;
int emulated_capture = 0;  // not 0 while a graph is captured

int cuInit(unsigned) { return 0; }

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == 75 ? 8 : 0;
  return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
  *context = &mutex;
  return 0;
}

int cuCtxGetCurrent(void** context) {
  *context = &mutex;
  return 0;
}

int cuCtxPushCurrent_v2(void*) { return 0; }
int cuCtxPopCurrent_v2(void**) { return 0; }

int cuModuleLoadData(void** module, const void* binary) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++emulated_modules;
  modules.push_back({static_cast<const char*>(binary)});
  *module = &modules.back();
  return 0;
}

int cuModuleUnload(void*) { return 0; }

int cuModuleGetFunction(void** function, void* module, const char* name) {
  const std::lock_guard<std::mutex> lock(mutex);
  const std::string kernel = name;
  const Module& of = *static_cast<const Module*>(module);
  if (kernel == "cross_entropy_rows") functions.push_back(rows_of(of));
  if (kernel == "cross_entropy_scales") functions.push_back(function_of(batch_kernels.scales));
  if (kernel == "cross_entropy_sums") functions.push_back(function_of(batch_kernels.sums));
  if (kernel == "latent_kl_positions") functions.push_back(positions_of(of, false));
  if (kernel == "latent_kl_scale") functions.push_back(positions_of(of, true));
  *function = &functions.back();
  return functions.back() ? 0 : 500;
}

int cuLaunchKernel(void* function, unsigned grid, unsigned, unsigned, unsigned threads, unsigned, unsigned, unsigned,
                   void*, void** parameters, void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++emulated_launches;
  const Function& kernel = *static_cast<const Function*>(function);
  block.launch(grid, threads, Order::ascending, [&] { kernel(parameters[0]); });
  return 0;
}

int cuStreamIsCapturing(void*, int* status) {
  *status = emulated_capture;
  return 0;
}

int cuGetErrorString(int, const char** text) {
  *text = "this kernel has not been emulated";
  return 0;
}
}
