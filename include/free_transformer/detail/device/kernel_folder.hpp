/// A folder of compiled kernels, for processes that come later. A file says what it holds and how much; one that is
/// damaged, or of another text or option, is as good as none.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/variant.hpp"

#if defined(__unix__)
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// 64-bit FNV-1a.
[[gnu::cold]] inline std::string hash_of(const std::string& bytes) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char byte : bytes) hash = (hash ^ static_cast<unsigned char>(byte)) * 0x100000001b3;
  char digits[17];
  std::snprintf(digits, sizeof(digits), "%016llx", static_cast<unsigned long long>(hash));
  return digits;
}

class KernelFolder {
 public:
  KernelFolder() = default;
  explicit KernelFolder(std::string path) : path_(std::move(path)) {}

  /// The binary, or nothing.
  [[gnu::cold]] std::string read(const Variant& variant, int architecture) const {
    if (path_.empty()) return "";
    const std::string all = content_of(file_of(variant, architecture));
    const std::string label = label_of(variant, architecture);
    const size_t first = label.size() + 17;  // a hash and the end of its line
    if (all.size() <= first || all.compare(0, label.size(), label) != 0) return "";
    const std::string binary = all.substr(first);
    return all.compare(label.size(), 16, hash_of(binary)) == 0 ? binary : "";
  }

  /// Under another name first, so that no reader sees a part. A folder that cannot be written to stays as it is.
  [[gnu::cold]] void write(const Variant& variant, int architecture, const std::string& binary) const {
#if defined(__unix__)
    if (path_.empty()) return;
    mkdir(path_.c_str(), 0777);
    const std::string file = file_of(variant, architecture), part = file + "." + std::to_string(getpid());
    const std::string all = label_of(variant, architecture) + hash_of(binary) + "\n" + binary;
    std::FILE* const stream = std::fopen(part.c_str(), "wb");
    if (!stream) return;
    const bool is_written = std::fwrite(all.data(), 1, all.size(), stream) == all.size();
    const bool is_closed = std::fclose(stream) == 0;
    if (!is_written || !is_closed || std::rename(part.c_str(), file.c_str()) != 0) std::remove(part.c_str());
#endif
  }

 private:
  std::string path_;  ///< empty: none

  [[gnu::cold]] static std::string label_of(const Variant& variant, int architecture) {
    std::string label = "free_transformer kernel sm_" + std::to_string(architecture) + " " + hash_of(variant.source());
    for (const std::string& option : variant.options()) label += " " + option;
    return label + "\n";
  }
  [[gnu::cold]] std::string file_of(const Variant& variant, int architecture) const {
    return path_ + "/" + variant.name() + "_sm_" + std::to_string(architecture) + "_" +
           hash_of(label_of(variant, architecture)) + ".cubin";
  }
  [[gnu::cold]] static std::string content_of(const std::string& file) {
    std::string content;
    if (std::FILE* const stream = std::fopen(file.c_str(), "rb")) {
      char part[4096];
      while (const size_t count = std::fread(part, 1, sizeof(part), stream)) content.append(part, count);
      std::fclose(stream);
    }
    return content;
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
