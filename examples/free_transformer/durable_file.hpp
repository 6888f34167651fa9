/// Files that a kill or a power cut leaves whole.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

namespace example {

namespace detail {

/// A file descriptor that closes itself; every failure is a std::system_error that names the file.
class Descriptor {
 public:
  Descriptor(std::filesystem::path path, int flags)
      : path_(std::move(path)), number_(open(path_.c_str(), flags, 0666)) {
    if (number_ < 0) fail("cannot open");
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { close(number_); }

  void write_all(const std::string& contents) const {
    for (size_t written = 0; written < contents.size();) {
      const auto count = write(number_, contents.data() + written, contents.size() - written);
      if (count >= 0) {
        written += static_cast<size_t>(count);
      } else if (errno != EINTR) {
        fail("cannot write");
      }
    }
  }

  void sync() const {
    if (fsync(number_) != 0) fail("cannot bring to the disk");
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw std::system_error(errno, std::generic_category(), std::string(what) + " " + path_.string());
  }

  std::filesystem::path path_;
  int number_;
};

}  // namespace detail

/// Returns when the file, or the names in the folder, are on the disk.
inline void bring_to_disk(const std::filesystem::path& path) { detail::Descriptor(path, O_RDONLY).sync(); }

/// Gives the file new contents. At any moment there is the old file or the new one under its name; if `previous` is given, the
/// old one goes on under that name, and for a moment under that name alone.
inline void replace_file(const std::filesystem::path& file, const std::string& contents,
                         const std::filesystem::path& previous = {}) {
  const std::filesystem::path partial = file.string() + ".partial";
  {
    const detail::Descriptor descriptor(partial, O_WRONLY | O_CREAT | O_TRUNC);
    descriptor.write_all(contents);
    descriptor.sync();
  }
  if (!previous.empty() && std::filesystem::exists(file)) {
    std::filesystem::rename(file, previous);
  }
  std::filesystem::rename(partial, file);
  bring_to_disk(std::filesystem::absolute(file).parent_path());
}

}  // namespace example
