/// How a rank learns which of the others has died: each counts up in the store twice a second, and a dead one no longer does.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace example {

class Heartbeat {
 public:
  /// The store must be a connection of its own, as an operation that waits keeps it.
  Heartbeat(c10::intrusive_ptr<c10d::Store> store, int rank, int size)
      : state_(std::make_shared<State>(rank, size)), thread_(run, std::move(store), state_) {}
  Heartbeat(const Heartbeat&) = delete;
  Heartbeat& operator=(const Heartbeat&) = delete;

  ~Heartbeat() {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->stops = true;
    state_->changed.notify_all();
    // A host that no longer answers could hold the thread, and so the end of this process, for ever.
    const bool ended = state_->changed.wait_for(lock, std::chrono::seconds(2), [&] { return state_->ended; });
    lock.unlock();
    ended ? thread_.join() : thread_.detach();
  }

  /// The ranks that do not count up while they are watched: all that are dead or stopped. Rank 0 alone if the store, which it
  /// keeps, does not answer.
  std::vector<int> silent_ranks(std::chrono::milliseconds watch) {
    std::unique_lock<std::mutex> lock(state_->mutex);
    state_->first.clear();
    state_->watches = true;
    state_->changed.wait_for(lock, watch, [&] { return state_->ended; });
    state_->watches = false;
    std::vector<int> silent;
    for (size_t rank = 0; rank < state_->first.size(); ++rank) {
      if (state_->first[rank] == state_->last[rank]) silent.push_back(static_cast<int>(rank));
    }
    const auto own = static_cast<size_t>(state_->rank);
    const bool store_answers = !state_->first.empty() && state_->first[own] != state_->last[own] && !state_->ended;
    return store_answers ? silent : std::vector<int>{0};
  }

 private:
  struct State {
    State(int own_rank, int rank_count) : rank(own_rank), size(rank_count) {}

    const int rank, size;
    std::mutex mutex;
    std::condition_variable changed;
    bool stops = false, ended = false, watches = false;
    std::vector<int64_t> first, last;  // the count of each rank, when the watch began and now
  };

  static int64_t count(c10d::Store& store, int rank, int64_t more) {
    return store.add("heartbeat of rank " + std::to_string(rank), more);
  }

  /// The counts of all ranks, this one's counted up.
  static std::vector<int64_t> beat(c10d::Store& store, const State& state) {
    std::vector<int64_t> counts;
    for (int rank = 0; rank < state.size; ++rank) counts.push_back(count(store, rank, rank == state.rank ? 1 : 0));
    return counts;
  }

  static void run(const c10::intrusive_ptr<c10d::Store>& store, const std::shared_ptr<State>& state) {
    std::unique_lock<std::mutex> lock(state->mutex);
    try {
      while (!state->stops) {
        const bool watches = state->watches;
        lock.unlock();
        auto counts = watches ? beat(*store, *state) : std::vector<int64_t>{count(*store, state->rank, 1)};
        lock.lock();
        if (watches) {
          state->last = std::move(counts);
          if (state->first.empty()) state->first = state->last;
        }
        state->changed.wait_for(lock, std::chrono::milliseconds(500), [&] { return state->stops; });
      }
    } catch (const std::exception&) {  // the store is gone: whoever waits for a rank is told
      lock.lock();
    }
    state->ended = true;
    state->changed.notify_all();
  }

  std::shared_ptr<State> state_;
  std::thread thread_;
};

}  // namespace example
