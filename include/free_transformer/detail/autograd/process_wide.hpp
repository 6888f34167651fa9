/// One object for all copies of this library in a process: a plug-in whose symbols are hidden has a copy of its own, and so
/// has each set of flags. LibTorch they share.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/function_schema.h>
#include <c10/util/Exception.h>
#include <torch/csrc/jit/frontend/function_schema_parser.h>

#include <cstdint>
#include <memory>
#include <string>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// The address that the dispatcher knows by this name, or 0.
[[gnu::cold]] inline intptr_t known_address(const std::string& name) {
  const auto handle = c10::Dispatcher::singleton().findSchema({name, ""});
  return handle ? static_cast<intptr_t>(handle->schema().arguments()[0].default_value()->toInt()) : 0;
}

/// Made by the copy that asks first, and never freed: others may outlive the plug-in that made it. Its address is known
/// to LibTorch's dispatcher as the default of an argument, of an operator that has no kernel and that nobody calls.
/// Copies of other versions see the object, too: another layout of it, down to its members, needs another name.
template <typename Object>
[[gnu::cold]] Object& process_wide(const char* object_name) {
  const std::string name = std::string("free_transformer::") + object_name;
  intptr_t address = known_address(name);
  if (address == 0) {
    auto made = std::make_unique<Object>();
    const auto own_address = reinterpret_cast<intptr_t>(made.get());
    try {
      static_cast<void>(new c10::RegistrationHandleRAII(c10::Dispatcher::singleton().registerDef(
          torch::jit::parseSchema(name + "(int address=" + std::to_string(own_address) + ") -> ()"), name)));
      static_cast<void>(made.release());
    } catch (const c10::Error&) {  // another copy was faster
    }
    address = known_address(name);
    TORCH_CHECK(address != 0, name, " cannot be made known to LibTorch");
  }
  return *reinterpret_cast<Object*>(address);  // NOLINT(performance-no-int-to-ptr): the dispatcher keeps numbers
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
