/// The kernels that this process has compiled or tried to: once for each device, type and set of options.
#pragma once

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/kernel_compiler.hpp"
#include "free_transformer/detail/device/kernel_folder.hpp"
#include "free_transformer/detail/device/libraries.hpp"
#include "free_transformer/detail/device/variant.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// Where a kernel is launched.
struct Place {
  int device;    ///< as LibTorch numbers them
  void* stream;  ///< of CUDA; null is its default stream
};

/// Every function returns why it failed, or nothing. What has failed is not tried again, but for a launch and for what
/// a graph's capture forbids.
///
/// All is done under one lock, compilation too: whoever waits would mostly wait for the same kernel, and a process
/// compiles a handful of them, all in its first step. A launch takes the lock for a look into two maps.
class KernelCache {
 public:
  /// Where binaries are kept beyond the process; an empty path: nowhere.
  void keep_in_folder(const std::string& path) {
    const std::lock_guard lock(mutex_);
    folder_ = KernelFolder(path);
  }

  /// `job` is the kernel's argument.
  std::string launch(Kernel kernel, const Variant& variant, const Grid& grid, const Place& place, const void* job) {
    Found found = find(kernel, variant, place);
    if (!found.function) return found.reason;
    void* current = nullptr;
    std::string reason = driver_error(driver_, "cuCtxGetCurrent", driver_.current_context(&current));
    const bool is_other = current != found.context;  // as in a thread where no call of CUDA's has come before
    if (reason.empty() && is_other) {
      reason = driver_error(driver_, "cuCtxPushCurrent", driver_.push_context(found.context));
    }
    if (!reason.empty()) return reason;
    void* argument = const_cast<void*>(job);
    reason = driver_error(
        driver_, name_of(kernel),
        driver_.launch(found.function, grid.blocks, 1, 1, grid.threads, 1, 1, 0, place.stream, &argument, nullptr));
    if (is_other) driver_.pop_context(&current);
    return reason;
  }

  /// True while a graph is captured, which must see neither a compilation nor a look at a value.
  bool is_capturing(const Place& place) {
    const std::lock_guard lock(mutex_);
    return is_driver_loaded() && captures(place);
  }

 private:
  struct Device {
    int architecture = 0;
    void* context = nullptr;
    std::string reason;
  };
  struct Module {
    std::map<Kernel, void*> functions;
    std::string reason;
  };
  struct Found {
    void* function;
    void* context;
    std::string reason;
  };
  enum class Loading { not_tried, done, failed };

  std::mutex mutex_;
  KernelFolder folder_;
  Driver driver_{};
  Nvrtc nvrtc_{};
  Loading driver_loading_ = Loading::not_tried, nvrtc_loading_ = Loading::not_tried;
  std::string driver_reason_, nvrtc_reason_;
  std::map<int, Device> devices_;
  std::map<std::pair<int, Variant>, Module> modules_;

  Found find(Kernel kernel, const Variant& variant, const Place& place) {
    const std::lock_guard lock(mutex_);
    const auto key = std::pair{place.device, variant};
    auto module = modules_.find(key);
    if (module == modules_.end()) {
      if (!is_driver_loaded()) return {nullptr, nullptr, driver_reason_};
      if (captures(place)) {
        return {nullptr, nullptr, "a kernel cannot be compiled while a graph is captured: run the loss once before"};
      }
      module = modules_.emplace(key, load(device_of(place.device), variant)).first;
    }
    const auto function = module->second.functions.find(kernel);
    if (function == module->second.functions.end()) return {nullptr, nullptr, module->second.reason};
    return {function->second, devices_[place.device].context, ""};
  }

  bool captures(const Place& place) const {
    int status = 0;
    return driver_.is_capturing(place.stream, &status) == 0 && status != 0;
  }

  [[gnu::cold]] bool is_driver_loaded() {
    if (driver_loading_ == Loading::not_tried) {
      driver_reason_ = load_driver(driver_);
      if (driver_reason_.empty()) driver_reason_ = driver_error(driver_, "cuInit", driver_.initialize(0));
      driver_loading_ = driver_reason_.empty() ? Loading::done : Loading::failed;
    }
    return driver_loading_ == Loading::done;
  }

  [[gnu::cold]] bool is_nvrtc_loaded() {
    if (nvrtc_loading_ == Loading::not_tried) {
      nvrtc_reason_ = load_nvrtc(nvrtc_);
      nvrtc_loading_ = nvrtc_reason_.empty() ? Loading::done : Loading::failed;
    }
    return nvrtc_loading_ == Loading::done;
  }

  [[gnu::cold]] const Device& device_of(int ordinal) {
    const auto known = devices_.find(ordinal);
    if (known != devices_.end()) return known->second;
    Device& of = devices_[ordinal];
    int handle = 0, major = 0, minor = 0;
    constexpr int compute_capability_major = 75, compute_capability_minor = 76;
    of.reason = driver_error(driver_, "cuDeviceGet", driver_.device(&handle, ordinal));
    for (const auto& [attribute, value] :
         {std::pair{compute_capability_major, &major}, {compute_capability_minor, &minor}}) {
      if (!of.reason.empty()) break;
      of.reason = driver_error(driver_, "cuDeviceGetAttribute", driver_.device_attribute(value, attribute, handle));
    }
    of.architecture = 10 * major + minor;
    if (of.reason.empty()) {  // the context that LibTorch works in; it is kept, like the kernels in it
      of.reason =
          driver_error(driver_, "cuDevicePrimaryCtxRetain", driver_.retain_primary_context(&of.context, handle));
    }
    return of;
  }

  [[gnu::cold]] Module load(const Device& on, const Variant& variant) {
    Module module;
    module.reason = on.reason;
    if (module.reason.empty())
      module.reason = driver_error(driver_, "cuCtxPushCurrent", driver_.push_context(on.context));
    if (!module.reason.empty()) return module;
    module = load_binary(folder_.read(variant, on.architecture), variant);
    if (!module.reason.empty()) {
      if (!is_nvrtc_loaded()) {
        module.reason = nvrtc_reason_;
      } else {
        const CompiledKernel compiled = compile(nvrtc_, variant, on.architecture);
        module = compiled.binary.empty() ? Module{{}, compiled.reason} : load_binary(compiled.binary, variant);
        if (module.reason.empty()) folder_.write(variant, on.architecture, compiled.binary);
      }
    }
    void* popped = nullptr;
    driver_.pop_context(&popped);
    return module;
  }

  [[gnu::cold]] Module load_binary(const std::string& binary, const Variant& variant) const {
    if (binary.empty()) return {{}, "there is no binary"};
    Module module;
    void* handle = nullptr;
    module.reason = driver_error(driver_, "cuModuleLoadData", driver_.load_module(&handle, binary.data()));
    if (!module.reason.empty()) return module;
    for (const Kernel kernel : kernels_of(variant.text)) {
      module.reason = driver_error(driver_, "cuModuleGetFunction",
                                   driver_.function(&module.functions[kernel], handle, name_of(kernel)));
      if (module.reason.empty()) continue;
      driver_.unload_module(handle);
      module.functions.clear();
      break;
    }
    return module;
  }
};

/// The process's; never destroyed, as threads may launch until its end.
inline KernelCache& kernel_cache() {
  static auto* const cache = new KernelCache;
  return *cache;
}

/// Whether the kernels are to be used at all. FREE_TRANSFORMER_DEVICE_KERNELS=0 in the environment turns them off.
inline std::atomic<bool>& kernels_are_wanted() {
  static std::atomic<bool> wanted{[] {
    const char* const setting = std::getenv("FREE_TRANSFORMER_DEVICE_KERNELS");
    return !setting || std::string(setting) != "0";
  }()};
  return wanted;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
