/// What c10d's ProcessGroupGloo.hpp names of Gloo. LibTorch holds Gloo itself, but neither Debian nor the wheel has its headers
/// beside LibTorch's. The process group owns these objects by pointer, and its constructor, destructor and collectives are
/// LibTorch's: nothing of Gloo is made, called or measured in size by who includes this.
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
