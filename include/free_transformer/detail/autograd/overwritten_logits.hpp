/// Remembers memory that holds a gradient where its owner may still expect logits, so that another call with it is refused:
/// autograd sees a later read through the graph, but not one of an alias without a graph (detach, no_grad).
#pragma once

#include <ATen/ATen.h>
#include <c10/core/StorageImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "free_transformer/detail/autograd/process_wide.hpp"
#include "free_transformer/detail/checks/memory.hpp"
#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// One for the process, whichever copy of the library has overwritten the memory. An entry ends with its memory, or when
/// somebody writes to it, which autograd counts; a storage has one entry, as its older ones are of versions that are gone.
class OverwrittenLogits {
 public:
  static OverwrittenLogits& instance() {
    static auto& all = process_wide<OverwrittenLogits>("overwritten_logits_1");  // 1: this layout
    return all;
  }

  void add(const at::Tensor& logits) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto storage = weak_storage(logits);
    forget(storage);
    entries_.push_back({storage, MemoryOfRows(logits), static_cast<int64_t>(logits._version())});
    is_empty_ = false;
  }

  /// For each call: a look at one flag where nothing was ever given inplace.
  bool contains(const at::Tensor& tensor) {
    if (is_empty_ || !tensor.device().is_cpu() || tensor.is_inference()) return false;
    const std::lock_guard<std::mutex> lock(mutex_);
    forget(none());
    const MemoryOfRows rows(tensor);
    const auto version = static_cast<int64_t>(tensor._version());
    return std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
      return entry.version == version && may_share_memory(entry.rows, rows);
    });
  }

  /// Entries whose memory lives.
  size_t size() {
    const std::lock_guard<std::mutex> lock(mutex_);
    forget(none());
    return entries_.size();
  }

 private:
  using WeakStorage = c10::weak_intrusive_ptr<c10::StorageImpl>;

  struct Entry {
    WeakStorage storage;
    MemoryOfRows rows;
    int64_t version;
  };

  static WeakStorage weak_storage(const at::Tensor& tensor) {
    return WeakStorage(c10::intrusive_ptr<c10::StorageImpl>::reclaim_copy(tensor.storage().unsafeGetStorageImpl()));
  }

  static WeakStorage none() { return WeakStorage(c10::intrusive_ptr<c10::StorageImpl>()); }

  /// What lies in this storage, and in those that are freed.
  void forget(const WeakStorage& storage) {
    const auto ends = [&](const Entry& entry) { return entry.storage.expired() || entry.storage == storage; };
    entries_.erase(std::remove_if(entries_.begin(), entries_.end(), ends), entries_.end());
    is_empty_ = entries_.empty();
  }

  std::mutex mutex_;
  std::vector<Entry> entries_;
  std::atomic<bool> is_empty_{true};
};

inline void check_not_overwritten_before(const char* function, const at::Tensor& logits) {
  TORCH_CHECK(!OverwrittenLogits::instance().contains(logits), function,
              ": logits must not be used again after inplace has overwritten them with their gradient; read what is ",
              "needed of them before (accuracy(true) counts hits in the same call)");
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
