/// What the tests tell the stand-in libraries, and what those have been asked for. The memory is the library's: the
/// test finds it by name.
#pragma once

#include <cstddef>

namespace stand_in {

struct Nvrtc {
  const char* failing = "";  ///< name of the function that fails
  int architectures[8] = {75, 80, 90};
  int architecture_count = 3;
  bool makes_nothing = false;

  int compilations = 0;
  int alive = 0;            ///< programs that have not been destroyed
  char options[1024] = "";  ///< of the last compilation
  char text[200 * 1024] = "";
};

struct Launch {
  char kernel[64];
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  unsigned char argument[512];
};

struct Driver {
  const char* failing = "";
  int architecture = 80;
  void* current_context = nullptr;
  int capture_status = 0;
  const char* refused = "";  ///< a binary that has this in it

  int devices_asked = 0, contexts_retained = 0;
  int modules_loaded = 0, modules_unloaded = 0;
  int pushed = 0, popped = 0;
  char binary[64] = "";       ///< start of the last that was loaded
  size_t argument_bytes = 0;  ///< to be kept of each launch
  int launch_count = 0;
  Launch launches[64];
};

inline constexpr const char* nvrtc_symbol = "stand_in_nvrtc";
inline constexpr const char* driver_symbol = "stand_in_driver";

}  // namespace stand_in
