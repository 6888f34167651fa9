/// The picture of the training, drawn by gnuplot.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

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

/// Returns whether there is a picture now; there is none without gnuplot.
inline bool draw_training(const std::filesystem::path& log, const std::filesystem::path& picture) {
  const auto script = std::filesystem::path(__FILE__).parent_path() / "plot_training.gp";
  const auto command = "gnuplot -c " + detail::quote(script.string()) + " " + detail::quote(log.string()) + " " +
                       detail::quote(picture.string());
  return std::system((command + " 2>/dev/null").c_str()) == 0;
}

}  // namespace example
