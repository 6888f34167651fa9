/// Pictures, drawn by gnuplot.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

namespace example {

namespace detail {

/// One argument for the shell, whatever its characters.
inline std::string quote(const std::string& argument) {
  std::string quoted = "'";
  for (const char character : argument) {
    quoted += character == '\'' ? "'\\''" : std::string(1, character);
  }
  return quoted + "'";
}

}  // namespace detail

/// Returns whether the script, one beside this file, has drawn; it has not without gnuplot.
inline bool draw_with_gnuplot(const std::string& script, const std::vector<std::filesystem::path>& arguments) {
  auto command = "gnuplot -c " + detail::quote((std::filesystem::path(__FILE__).parent_path() / script).string());
  for (const auto& argument : arguments) {
    command += " " + detail::quote(argument.string());
  }
  return std::system((command + " 2>/dev/null").c_str()) == 0;
}

}  // namespace example
