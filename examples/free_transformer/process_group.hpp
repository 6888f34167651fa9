/// c10d's process group over Gloo, joined as torchrun's environment variables say.
#pragma once

// Debian's CMake package defines it, the wheel's users do: without it c10d's header is empty.
#ifndef USE_C10D_GLOO
#define USE_C10D_GLOO
#endif
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace example {

/// A c10d::ProcessGroup in LibTorch 1.13, a c10d::Backend in LibTorch 2; its collectives are spelled alike.
using ProcessGroup = c10d::ProcessGroupGloo;

/// Which of the processes this one is, and where they meet: at a store that rank 0 keeps.
///     RANK                          from 0 to WORLD_SIZE - 1
///     WORLD_SIZE                    how many they are; this process is alone where it is not set
///     MASTER_ADDR, MASTER_PORT      of rank 0
///     GLOO_SOCKET_IFNAME            the network interface, if it is not the one of the host's name
///     TORCHELASTIC_USE_AGENT_STORE  True where torchrun keeps the store
struct Rendezvous {
  int rank = 0;
  int size = 1;
  std::string address;
  uint16_t port = 0;
};

namespace detail {

inline std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

inline int environment_number(const char* name, int low, int high) {
  const auto text = environment(name);
  char* end = nullptr;
  const auto number = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || number < low || number > high) {
    throw std::runtime_error(std::string(name) + " must be a number from " + std::to_string(low) + " to " +
                             std::to_string(high) + ", got '" + text + "'");
  }
  return static_cast<int>(number);
}

}  // namespace detail

/// Throws std::runtime_error if a variable is missing or no such number.
inline Rendezvous rendezvous_of_environment() {
  Rendezvous rendezvous;
  if (detail::environment("WORLD_SIZE").empty()) return rendezvous;
  rendezvous.size = detail::environment_number("WORLD_SIZE", 1, 65536);
  if (rendezvous.size == 1) return rendezvous;
  rendezvous.rank = detail::environment_number("RANK", 0, rendezvous.size - 1);
  rendezvous.port = static_cast<uint16_t>(detail::environment_number("MASTER_PORT", 1, 65535));
  rendezvous.address = detail::environment("MASTER_ADDR");
  if (rendezvous.address.empty()) throw std::runtime_error("MASTER_ADDR must be the host of rank 0, got nothing");
  return rendezvous;
}

/// Waits for the store no longer than the time-out, and throws then.
inline c10::intrusive_ptr<c10d::Store> connect_to_store(const Rendezvous& rendezvous,
                                                        std::chrono::milliseconds timeout) {
  const bool torchrun_keeps_it = detail::environment("TORCHELASTIC_USE_AGENT_STORE") == "True";
  c10d::TCPStoreOptions options;
  options.port = rendezvous.port;
  options.isServer = rendezvous.rank == 0 && !torchrun_keeps_it;
  options.waitWorkers = false;  // the group does, and knows which of them it waits for
  options.timeout = timeout;
  options.multiTenant = true;  // this process may have two connections to the store that it keeps
  auto store = c10::make_intrusive<c10d::TCPStore>(rendezvous.address, options);
  if (!torchrun_keeps_it) return store;
  // The store outlives the processes that torchrun starts anew.
  return c10::make_intrusive<c10d::PrefixStore>("attempt " + detail::environment("TORCHELASTIC_RESTART_COUNT"), store);
}

/// Waits for all ranks no longer than the time-out, which is also that of each collective, and throws then.
inline c10::intrusive_ptr<ProcessGroup> join_group(const Rendezvous& rendezvous,
                                                   const c10::intrusive_ptr<c10d::Store>& store,
                                                   std::chrono::milliseconds timeout) {
  const auto options = ProcessGroup::Options::create(timeout);
  const auto interface = detail::environment("GLOO_SOCKET_IFNAME");
  const bool one_machine = rendezvous.address == "localhost" || rendezvous.address.rfind("127.", 0) == 0;
  options->devices.push_back(!interface.empty() ? ProcessGroup::createDeviceForInterface(interface)
                             : one_machine      ? ProcessGroup::createDeviceForHostname(rendezvous.address)
                                                : ProcessGroup::createDefaultDevice());
  return c10::make_intrusive<ProcessGroup>(store, rendezvous.rank, rendezvous.size, options);
}

}  // namespace example
