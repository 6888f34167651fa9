/// How much memory LibTorch holds at most while a function runs.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace numeric {

/// Counts what LibTorch's own CPU allocator hands out in this thread.
class Memory : public c10::MemoryReportingInfoBase {
 public:
  // One of the two overrides: the types of the totals, which are not used, changed between LibTorch 1.13 and 2.
  void reportMemoryUsage(void*, int64_t size, int64_t, int64_t, c10::Device) { count(size); }
  void reportMemoryUsage(void*, int64_t size, size_t, size_t, c10::Device) { count(size); }
  bool memoryProfilingEnabled() const override { return true; }
  int64_t peak() const { return peak_; }
  int64_t now() const { return now_; }

 private:
  void count(int64_t size) { peak_ = std::max(peak_, now_ += size); }
  int64_t now_ = 0, peak_ = 0;
};

/// The largest number of bytes that were allocated at one time while the function ran.
template <typename Function>
int64_t peak_of(const Function& function) {
  const auto memory = std::make_shared<Memory>();
  const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
  function();
  return memory->peak();
}

}  // namespace numeric
