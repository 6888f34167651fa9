/// A schedule on the command line.
#pragma once

#include <CLI/CLI.hpp>

#include <sstream>
#include <string>

#include <free_transformer/schedules.hpp>

namespace example {

inline std::string schedule_forms() {
  return "a number, linear:from:to:steps, cosine:from:to:steps or cyclical:from:to:steps:rising";
}

inline std::string refusal_of_schedule(const std::string& text) {
  try {
    free_transformer::Schedule::parse(text);
    return "";
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
}

inline CLI::Option* add_schedule(CLI::App& app, const std::string& name, free_transformer::Schedule& schedule,
                                 const std::string& description) {
  std::ostringstream default_text;
  default_text << schedule;
  const auto read = [&schedule](const std::string& text) { schedule = free_transformer::Schedule::parse(text); };
  return app.add_option_function<std::string>(name, read, description)
      ->check(refusal_of_schedule)
      ->type_name("SCHEDULE")
      ->default_str(default_text.str());
}

}  // namespace example
