/// How much memory LibTorch holds at most while a function runs.
#pragma once

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>

#include <algorithm>
#include <cstdint>
#include <memory>

namespace numeric {

/// The type of the totals that an allocator reports: another one in LibTorch 1.13 than in 2.
template <typename Total>
Total total_of(void (c10::MemoryReportingInfoBase::*report)(void*, int64_t, Total, Total, c10::Device));
using Total = decltype(total_of(&c10::MemoryReportingInfoBase::reportMemoryUsage));

/// Counts what LibTorch's own CPU allocator hands out in this thread.
class Memory : public c10::MemoryReportingInfoBase {
 public:
  void reportMemoryUsage(void*, int64_t size, Total, Total, c10::Device) override { count(size); }
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
