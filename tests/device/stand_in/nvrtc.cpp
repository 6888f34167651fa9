/// A library with NVRTC's functions, which compiles nothing: its binaries say what they were to be made of.
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string>

#include "stand_in.hpp"

extern "C" {
stand_in::Nvrtc stand_in_nvrtc;
}

namespace {

std::mutex mutex;

struct Program {
  std::string text, binary, log = "a line of the log";
};

bool fails(const char* function) { return std::strcmp(stand_in_nvrtc.failing, function) == 0; }

int copy(const std::string& from, char* to) {
  std::memcpy(to, from.c_str(), from.size() + 1);
  return 0;
}

}  // namespace

extern "C" {

int nvrtcVersion(int* major, int* minor) {
  *major = 13;
  *minor = 2;
  return 0;
}

int nvrtcCreateProgram(void** program, const char* text, const char*, int, const char* const*, const char* const*) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (fails("nvrtcCreateProgram")) return 5;
  *program = new Program{text, "", "a line of the log"};
  ++stand_in_nvrtc.alive;
  return 0;
}

int nvrtcDestroyProgram(void** program) {
  const std::lock_guard<std::mutex> lock(mutex);
  delete static_cast<Program*>(*program);
  *program = nullptr;
  --stand_in_nvrtc.alive;
  return 0;
}

int nvrtcCompileProgram(void* program, int options, const char* const* option) {
  const std::lock_guard<std::mutex> lock(mutex);
  auto& of = *static_cast<Program*>(program);
  ++stand_in_nvrtc.compilations;
  std::string all;
  for (int index = 0; index < options; ++index) all += std::string(option[index]) + " ";
  std::snprintf(stand_in_nvrtc.options, sizeof(stand_in_nvrtc.options), "%s", all.c_str());
  std::snprintf(stand_in_nvrtc.text, sizeof(stand_in_nvrtc.text), "%s", of.text.c_str());
  of.binary = (all.find("compute_") != std::string::npos ? "ptx " : "cubin ") + all;
  return fails("nvrtcCompileProgram") ? 6 : 0;
}

int nvrtcGetProgramLogSize(void* program, size_t* size) {
  if (fails("nvrtcGetProgramLogSize")) return 1;
  *size = static_cast<Program*>(program)->log.size() + 1;
  return 0;
}

int nvrtcGetProgramLog(void* program, char* log) { return copy(static_cast<Program*>(program)->log, log); }

static int size_of(void* program, const char* function, size_t* size) {
  if (fails(function)) return 1;
  *size = stand_in_nvrtc.makes_nothing ? 0 : static_cast<Program*>(program)->binary.size() + 1;
  return 0;
}

static int binary_of(void* program, const char* function, char* binary) {
  if (fails(function)) return 1;
  return stand_in_nvrtc.makes_nothing ? 0 : copy(static_cast<Program*>(program)->binary, binary);
}

int nvrtcGetCUBINSize(void* program, size_t* size) { return size_of(program, "nvrtcGetCUBINSize", size); }
int nvrtcGetCUBIN(void* program, char* cubin) { return binary_of(program, "nvrtcGetCUBIN", cubin); }
int nvrtcGetPTXSize(void* program, size_t* size) { return size_of(program, "nvrtcGetPTXSize", size); }
int nvrtcGetPTX(void* program, char* ptx) { return binary_of(program, "nvrtcGetPTX", ptx); }

const char* nvrtcGetErrorString(int error) { return error == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR_OTHER"; }

int nvrtcGetNumSupportedArchs(int* count) {
  *count = stand_in_nvrtc.architecture_count;
  return 0;
}

int nvrtcGetSupportedArchs(int* architectures) {
  const auto count = static_cast<size_t>(stand_in_nvrtc.architecture_count);
  std::memcpy(architectures, stand_in_nvrtc.architectures, sizeof(int) * count);
  return 0;
}
}
