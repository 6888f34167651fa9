/// A library with the CUDA driver's functions and no device behind them: it notes what it is asked for.
#include <cstdio>
#include <cstring>
#include <list>
#include <mutex>
#include <string>

#include "stand_in.hpp"

extern "C" {
stand_in::Driver stand_in_driver;
}

namespace {

std::mutex mutex;
std::list<std::string> modules;
thread_local int pushed_here = 0;
char contexts[4];

bool fails(const char* function) { return std::strcmp(stand_in_driver.failing, function) == 0; }

}  // namespace

extern "C" {

int cuInit(unsigned) { return fails("cuInit") ? 100 : 0; }

int cuDeviceGet(int* device, int ordinal) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++stand_in_driver.devices_asked;
  *device = ordinal + 40;
  return fails("cuDeviceGet") ? 101 : 0;
}

int cuDeviceGetAttribute(int* value, int attribute, int) {
  if (attribute == 75) *value = stand_in_driver.architecture / 10;
  if (attribute == 76) *value = stand_in_driver.architecture % 10;
  return fails("cuDeviceGetAttribute") ? 101 : 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++stand_in_driver.contexts_retained;
  *context = &contexts[device - 40];
  return fails("cuDevicePrimaryCtxRetain") ? 2 : 0;
}

int cuCtxGetCurrent(void** context) {
  *context = stand_in_driver.current_context;
  return fails("cuCtxGetCurrent") ? 4 : 0;
}

int cuCtxPushCurrent_v2(void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuCtxPushCurrent")) return 201;
  ++stand_in_driver.pushed;
  ++pushed_here;
  return 0;
}

int cuCtxPopCurrent_v2(void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++stand_in_driver.popped;
  return pushed_here-- > 0 ? 0 : 201;
}

int cuModuleLoadData(void** module, const void* binary) {
  const std::lock_guard<std::mutex> lock(mutex);
  const char* const text = static_cast<const char*>(binary);
  const bool is_known = std::strncmp(text, "cubin ", 6) == 0 || std::strncmp(text, "ptx ", 4) == 0;
  const bool is_refused = *stand_in_driver.refused && std::strstr(text, stand_in_driver.refused);
  if (fails("cuModuleLoadData") || !is_known || is_refused) return 200;
  std::snprintf(stand_in_driver.binary, sizeof(stand_in_driver.binary), "%s", text);
  modules.emplace_back(text);
  *module = &modules.back();
  ++stand_in_driver.modules_loaded;
  return 0;
}

int cuModuleUnload(void*) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++stand_in_driver.modules_unloaded;
  return 0;
}

int cuModuleGetFunction(void** function, void*, const char* name) {
  if (fails("cuModuleGetFunction")) return 500;
  *function = const_cast<char*>(name);  // a literal of the caller's
  return 0;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** parameters, void**) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("cuLaunchKernel")) return 700;
  auto& launch = stand_in_driver.launches[stand_in_driver.launch_count++ % 64];
  launch = {"", {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared_bytes, stream, {}};
  std::snprintf(launch.kernel, sizeof(launch.kernel), "%s", static_cast<const char*>(function));
  std::memcpy(launch.argument, parameters[0], stand_in_driver.argument_bytes);
  return 0;
}

int cuStreamIsCapturing(void*, int* status) {
  *status = stand_in_driver.capture_status;
  return 0;
}

int cuGetErrorString(int error, const char** text) {
  static const char texts[] = "an error of the stand-in";
  *text = texts;
  return error == 201 ? 1 : 0;  // which it has no text for
}
}
