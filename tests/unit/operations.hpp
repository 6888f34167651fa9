/// Which LibTorch operations a function calls.
#pragma once

#include <ATen/record_function.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

namespace numeric {

/// The names of the operations that were called in this thread while the function ran, in order.
template <typename Function>
std::vector<std::string> operations_of(const Function& function) {
  static thread_local std::vector<std::string> names;
  names.clear();
  const auto note = [](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
    names.emplace_back(call.name());
    return nullptr;
  };
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(note).scopes({at::RecordScope::FUNCTION}));
  function();
  at::removeCallback(handle);
  return names;
}

/// True for an operation whose result or shape the host must wait for.
inline bool reads_a_value(const std::string& operation) {
  static const char* const readers[] = {
      "aten::item",     "aten::_local_scalar_dense", "aten::is_nonzero",    "aten::equal",   "aten::nonzero",
      "aten::allclose", "aten::unique_dim",          "aten::masked_select", "aten::_unique2"};
  return std::find(std::begin(readers), std::end(readers), operation) != std::end(readers);
}

}  // namespace numeric
