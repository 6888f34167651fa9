/// Which files are trained on, and which are held out for evaluation.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fingerprint.hpp"

namespace example {

struct TextFiles {
  std::vector<std::filesystem::path> training, held_out;
};

namespace detail {

/// Files by their canonical path, so that none is counted twice and thus on both sides; the value is the name to be sorted by.
using FileNames = std::map<std::filesystem::path, std::string>;

inline void add_files(const std::filesystem::path& path, FileNames& names) {
  namespace filesystem = std::filesystem;
  if (filesystem::is_regular_file(path)) {
    names.emplace(filesystem::canonical(path), path.filename().generic_string());
  } else if (filesystem::is_directory(path)) {
    for (const auto& entry : filesystem::recursive_directory_iterator(path)) {
      if (entry.is_regular_file()) {
        names.emplace(filesystem::canonical(entry.path()), entry.path().lexically_relative(path).generic_string());
      }
    }
  } else {
    throw std::runtime_error("text must be a file or a folder, got " + path.string());
  }
}

}  // namespace detail

/// Every regular file at or below the paths; the tenth with the smallest fingerprints of their relative names is held out.
inline TextFiles find_text_files(const std::vector<std::filesystem::path>& paths) {
  detail::FileNames names;
  for (const auto& path : paths) {
    detail::add_files(path, names);
  }
  if (names.size() < 2) {
    throw std::runtime_error("whole files are held out for evaluation: the text must have at least 2 files, got " +
                             std::to_string(names.size()));
  }
  std::vector<std::pair<uint64_t, std::filesystem::path>> shuffled;
  for (const auto& [path, name] : names) {
    shuffled.emplace_back(fingerprint(name.data(), name.size()), path);
  }
  std::sort(shuffled.begin(), shuffled.end());

  TextFiles files;
  const auto held_out = (shuffled.size() + 9) / 10;
  for (const auto& [number, path] : shuffled) {
    (files.held_out.size() < held_out ? files.held_out : files.training).push_back(path);
  }
  return files;
}

}  // namespace example
