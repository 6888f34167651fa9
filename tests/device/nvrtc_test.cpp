/// Compiles the device kernels by NVRTC, as the library would, for architectures that need no device here. A spill is
/// an error: registers and shared memory are printed as CSV.
///     nvrtc_test few|every [libnvrtc.so.12 [70]]
/// `few`: for most architectures the plain kernels and those with all options; `every`: every combination. A library and
/// one architecture can be named. Ends with 77 where there is no NVRTC; it is part of CUDA, and of the Python package
/// nvidia-cuda-nvrtc.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "free_transformer/detail/device/kernel_compiler.hpp"
#include "free_transformer/detail/device/libraries.hpp"
#include "free_transformer/detail/device/variant.hpp"

namespace {

using namespace free_transformer::detail;
using namespace free_transformer::detail::device;

struct Resources {
  int registers = -1, spilled_bytes = -1, stack_bytes = -1, shared_bytes = 0;
};

/// The number before `unit` that is nearest to it, from `first` on.
int number_before(const std::string& log, const char* unit, size_t first) {
  const size_t end = log.find(unit, first);
  if (end == std::string::npos) return -1;
  size_t begin = end;
  while (begin > 0 && (log[begin - 1] == ' ')) --begin;
  while (begin > 0 && log[begin - 1] >= '0' && log[begin - 1] <= '9') --begin;
  return std::atoi(log.c_str() + begin);
}

/// Of a kernel, from what ptxas says with -v.
Resources resources_of(const std::string& log, Kernel kernel) {
  Resources of;
  const size_t entry = log.find("Compiling entry function '" + std::string(name_of(kernel)) + "'");
  if (entry == std::string::npos) return of;
  of.stack_bytes = number_before(log, "bytes stack frame", entry);
  of.spilled_bytes = number_before(log, "bytes spill stores", entry) + number_before(log, "bytes spill loads", entry);
  const size_t used = log.find("Used ", entry);
  of.registers = number_before(log, "registers", used);
  const size_t line_end = log.find('\n', used), shared = log.find("bytes smem", used);
  if (shared < line_end) of.shared_bytes = number_before(log, "bytes smem", used);
  return of;
}

/// True if all is as it should be.
bool compile_and_print(const Nvrtc& nvrtc, const Variant& variant, int architecture) {
  const CompiledKernel compiled = compile(nvrtc, variant, architecture, {"--ptxas-options=-v"});
  if (!compiled.reason.empty()) {
    std::printf("%s\n", compiled.reason.c_str());
    return false;
  }
  bool is_good = true;
  for (const Kernel kernel : kernels_of(variant.text)) {
    const Resources of = resources_of(compiled.log, kernel);
    const bool is_cubin = compiled.binary.compare(1, 3, "ELF") == 0;
    is_good = is_good && is_cubin && of.registers > 0 && of.spilled_bytes == 0 && of.stack_bytes == 0;
    std::string options;
    for (const std::string& option : variant.options()) {
      if (option.compare(0, 2, "-D") == 0) options += (options.empty() ? "" : " ") + option.substr(2);
    }
    std::printf("sm_%d,%s,%s", architecture, name_of(kernel), options.c_str());
    std::printf(",%d,%d,%d,%d\n", of.registers, of.spilled_bytes, of.stack_bytes, of.shared_bytes);
  }
  if (compiled.log.find("warning") != std::string::npos) {
    std::printf("%s\n", compiled.log.c_str());
    return false;
  }
  return is_good;
}

std::vector<Variant> every_variant() {
  std::vector<Variant> all{{Text::cross_entropy_sums}};
  for (const Element element : {Element::float32, Element::float16, Element::bfloat16}) {
    for (int options = 0; options < 12; ++options) {
      Variant variant{Text::cross_entropy, element};
      variant.softcap = options % 2;
      variant.entropy = options / 2 % 2;
      variant.smoothing = options / 4;
      all.push_back(variant);
    }
    for (const int bits : {1, 5, 16, 33, 1024}) {
      for (const auto hinge : {kernels::Hinge::per_position, kernels::Hinge::per_bit, kernels::Hinge::batch_mean}) {
        all.push_back(variant_of(element, hinge, bits));
      }
    }
  }
  return all;
}

/// Plain, with all options, and the paper's number of bits.
std::vector<Variant> few_variants() {
  std::vector<Variant> few{{Text::cross_entropy_sums},
                           {Text::cross_entropy, Element::float32},
                           {Text::cross_entropy, Element::bfloat16},
                           {Text::cross_entropy, Element::float16},
                           variant_of(Element::bfloat16, kernels::Hinge::per_position, 16)};
  few[3].softcap = few[3].entropy = 1;
  few[3].smoothing = 2;
  return few;
}

}  // namespace

int main(int count, char** arguments) {
  const bool every = count > 1 && std::string(arguments[1]) == "every";
  Nvrtc nvrtc{};
  void* const library = count > 2 ? dlopen(arguments[2], RTLD_LAZY) : nullptr;
  const std::string reason = count > 2 && library ? find_functions(library, nvrtc) : load_nvrtc(nvrtc);
  if (!reason.empty() || (count > 2 && !library)) {
    std::printf("skipped: %s\n", reason.c_str());
    return 77;
  }
  int failures = 0;
  std::printf("architecture,kernel,options,registers,spilled bytes,stack bytes,shared bytes\n");
  for (const int architecture : {70, 75, 80, 86, 89, 90, 100, 120}) {
    if (!every && (architecture == 86 || architecture == 89)) continue;  // like 80 and 90
    if (count > 3 && architecture != std::atoi(arguments[3])) continue;
    std::string unknown;
    const std::string option = architecture_option(nvrtc, architecture, unknown);
    if (option != "--gpu-architecture=sm_" + std::to_string(architecture))
      continue;  // too old or too new for this NVRTC
    for (const Variant& variant : every ? every_variant() : few_variants()) {
      if (!compile_and_print(nvrtc, variant, architecture)) ++failures;
    }
  }
  if (failures > 0) std::printf("%d combinations spill or do not compile\n", failures);
  return failures > 0;
}
