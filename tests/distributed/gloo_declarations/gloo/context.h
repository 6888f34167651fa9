/// What c10d's ProcessGroupGloo.hpp names of Gloo, whose headers come with neither LibTorch: enough to hold pointers to
/// its objects, all of which LibTorch makes and ends.
#pragma once

#include <chrono>

namespace gloo {

class Context {
 public:
  void setTimeout(std::chrono::milliseconds timeout);
};

namespace transport {

class Device;

class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

}  // namespace transport

}  // namespace gloo
