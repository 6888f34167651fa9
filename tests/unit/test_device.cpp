// Before the first test: is there the device that FREE_TRANSFORMER_TEST_DEVICE asks for? If not, the tests are skipped.
#define CATCH_CONFIG_EXTERNAL_INTERFACES  // of Catch2 2, which the precompiled header leaves out
#include "test_device.hpp"

#include <cstdlib>
#include <exception>
#include <iostream>
#include <string>

#include "catch.hpp"

namespace {

#if __has_include(<catch2/catch_all.hpp>)
using ListenerBase = Catch::EventListenerBase;
#else
using ListenerBase = Catch::TestEventListenerBase;
#endif

struct DeviceListener : ListenerBase {
  using ListenerBase::ListenerBase;

  void testRunStarting(const Catch::TestRunInfo& info) override {
    ListenerBase::testRunStarting(info);
    try {
      if (numeric::test_device()) torch::ones({1}).to(*numeric::test_device()).add_(1);
    } catch (const std::exception& error) {
      constexpr int is_skipped = 77;
      const std::string text = error.what();
      std::cout << "skipped: no device (" << text.substr(0, text.find('\n')) << ")" << std::endl;
      std::_Exit(is_skipped);
    }
  }
};

CATCH_REGISTER_LISTENER(DeviceListener)

}  // namespace
