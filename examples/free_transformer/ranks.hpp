/// The processes that train one model, each with a rank.
#pragma once

#include <torch/torch.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "heartbeat.hpp"
#include "process_group.hpp"

namespace example {

class Ranks {
 public:
  /// This process alone.
  Ranks() = default;

  /// Meets the other ranks. Throws std::runtime_error that names those that did not come within the time-out.
  Ranks(const Rendezvous& rendezvous, std::chrono::seconds timeout)
      : rank_(rendezvous.rank), size_(rendezvous.size), timeout_(timeout) {
    if (size_ == 1) return;
    store_ = connect_to_store(rendezvous, timeout);
    heartbeat_ = std::make_unique<Heartbeat>(connect_to_store(rendezvous, timeout), rank_, size_);
    try {
      group_ = join_group(rendezvous, store_, timeout);
    } catch (const std::exception& error) {
      fail(error);
    }
  }

  int rank() const { return rank_; }
  int size() const { return size_; }
  bool is_first() const { return rank_ == 0; }

  /// call(group) with a pointer to the group of at least two ranks. Whatever it throws becomes a std::runtime_error that names the ranks which
  /// no longer answer. This rank then leaves the group, so that no other one goes on waiting for it.
  template <typename Call>
  auto collective(const Call& call) {
    try {
      return call(group_);
    } catch (const std::exception& error) {
      fail(error);
    }
  }

  /// Replaces a tensor of each rank by their sum.
  void sum(const torch::Tensor& tensor) {
    if (size_ == 1) return;
    collective([&](const auto& group) {
      std::vector<torch::Tensor> tensors{tensor};
      group->allreduce(tensors)->wait();
    });
  }

  /// Returns once all ranks have called it.
  void barrier() { sum(torch::zeros({1})); }

  /// Rank 0's value.
  double from_first(double value) {
    const auto shared = torch::full({1}, is_first() ? value : 0.0, torch::kFloat64);
    sum(shared);
    return shared.item<double>();
  }

  /// Throws on every rank unless all have the same value; says which rank has another one than rank 0.
  void check_same(const std::string& what, uint64_t value) {
    const auto values = torch::zeros({size_}, torch::kInt64);
    values[rank_] = static_cast<int64_t>(value);
    sum(values);
    for (int rank = 1; rank < size_; ++rank) {
      if (values[rank].item<int64_t>() != values[0].item<int64_t>()) {
        throw std::runtime_error("all ranks must have the same " + what + ", got others on rank " +
                                 std::to_string(rank) + " than on rank 0");
      }
    }
  }

 private:
  [[noreturn]] void fail(const std::exception& error) {
    const auto* libtorch_error = dynamic_cast<const c10::Error*>(&error);
    const std::string reason = libtorch_error == nullptr ? error.what() : libtorch_error->what_without_backtrace();
    group_.reset();  // closes this rank's connections, which ends the waiting of those that are connected with it
    throw std::runtime_error("rank " + std::to_string(rank_) + " stops: " + name_silent_ranks() + " (--timeout " +
                             std::to_string(timeout_.count()) + "): " + reason);
  }

  /// Ranks that leave the group are watched while they watch the others.
  std::string name_silent_ranks() {
    const auto silent = heartbeat_->silent_ranks(std::chrono::seconds(4));
    if (silent == std::vector<int>{0} && rank_ != 0) return "rank 0 no longer answers";
    std::string names;
    for (const int rank : silent) names += (names.empty() ? "rank " : ", rank ") + std::to_string(rank);
    // A rank that was busy meanwhile would find those gone, too, that have stopped because of the first.
    if (!names.empty()) {
      const std::vector<uint8_t> none, found(names.begin(), names.end());
      const auto found_first = store_->compareSet("silent ranks", none, found);
      names.assign(found_first.begin(), found_first.end());
    }
    if (is_first()) std::this_thread::sleep_for(std::chrono::seconds(2));  // the others may still ask the store
    return names.empty() ? "no answer in time from a rank that still runs" : names + " no longer answers";
  }

  int rank_ = 0;
  int size_ = 1;
  std::chrono::seconds timeout_{0};
  c10::intrusive_ptr<c10d::Store> store_;  // outlives the group
  std::unique_ptr<Heartbeat> heartbeat_;
  c10::intrusive_ptr<ProcessGroup> group_;
};

}  // namespace example
