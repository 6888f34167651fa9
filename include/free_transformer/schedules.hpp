/// Weights that change while a model trains: beta_kl and free_bits as functions of the step.
///
///     const auto beta = Schedule::parse("linear:0:1:1000");  // as from a command line; or Schedule::linear(0, 1, 1000)
///     options.beta_kl(beta(step));
#pragma once

#include <c10/util/Exception.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <locale>
#include <ostream>
#include <sstream>
#include <string>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// A value for every step, in the unit of what it is for. Between `from` and `to`, finite and >= 0 both, with s = step /
/// steps, steps >= 1; the first step is 0, and after the last one the value stays at `to`.
///     constant  value                                     "0.5" or "constant:0.5"
///     linear    from + (to - from) s                      "linear:from:to:steps"
///     cosine    from + (to - from) (1 - cos(pi s)) / 2    "cosine:from:to:steps"; starts and ends without a jolt
///     cyclical  from + (to - from) min(1, tau / rising), tau = s - floor(s)
///               "cyclical:from:to:steps" or "cyclical:from:to:steps:rising". Fu et al. 2019: for their M cycles in T steps,
///               steps = T / M; each rises for the share `rising` of it, in (0, 1], 0.5 by default, then stays at `to`
/// It prints as the text that `parse` reads, with every digit that its numbers need.
/// Throws c10::Error for a number out of range, a step below 0, and a text that is none of these
class Schedule {
 public:
  Schedule(double value) : Schedule(Kind::constant, value, value, 1) {}
  static Schedule constant(double value) { return value; }
  static Schedule linear(double from, double to, int64_t steps) { return {Kind::linear, from, to, steps}; }
  static Schedule cosine(double from, double to, int64_t steps) { return {Kind::cosine, from, to, steps}; }
  static Schedule cyclical(double from, double to, int64_t steps, double rising = 0.5) {
    return {Kind::cyclical, from, to, steps, rising};
  }
  static Schedule parse(const std::string& text);

  double operator()(int64_t step) const;

  friend std::ostream& operator<<(std::ostream& stream, const Schedule& schedule) { return stream << schedule.text(); }

 private:
  enum class Kind { constant, linear, cosine, cyclical };

  Schedule(Kind kind, double from, double to, int64_t steps, double rising = 1);

  std::string text() const;

  Kind kind_;
  double from_, to_;
  int64_t steps_;
  double rising_;
};

}  // namespace FREE_TRANSFORMER_TYPES

namespace FREE_TRANSFORMER_DETAIL {

/// The shortest decimal text that reads back as the same number.
inline std::string shortest_text(double value) {
  for (int digits = 1;; ++digits) {
    std::stringstream text;
    text.imbue(std::locale::classic());
    text.precision(digits);
    text << value;
    double read = 0;
    if (digits == std::numeric_limits<double>::max_digits10 || (text >> read && is_zero(read - value))) {
      return text.str();
    }
  }
}

/// A part of a schedule's text that is a number and nothing else.
template <typename Number>
Number parsed_number(const char* name, const std::string& part, const std::string& text) {
  std::istringstream reader(part);
  reader.imbue(std::locale::classic());
  Number number = 0;
  reader >> std::noskipws >> number;
  TORCH_CHECK(!reader.fail() && reader.peek() == std::istringstream::traits_type::eof(), "Schedule::parse: ", name,
              " must be a ", std::numeric_limits<Number>::is_integer ? "whole number" : "number", ", got \"", part,
              "\" in \"", text, "\"");
  return number;
}

}  // namespace FREE_TRANSFORMER_DETAIL

inline namespace FREE_TRANSFORMER_TYPES {

inline Schedule::Schedule(Kind kind, double from, double to, int64_t steps, double rising)
    : kind_(kind), from_(from), to_(to), steps_(steps), rising_(rising) {
  const auto is_value = [](double value) { return detail::is_finite(value) && value >= 0; };
  TORCH_CHECK(is_value(from), "Schedule: ", kind == Kind::constant ? "value" : "from", " must be finite and >= 0, got ",
              from);
  TORCH_CHECK(is_value(to), "Schedule: to must be finite and >= 0, got ", to);
  TORCH_CHECK(steps >= 1, "Schedule: steps must be >= 1, got ", steps);
  TORCH_CHECK(detail::is_finite(rising) && rising > 0 && rising <= 1, "Schedule: rising must be in (0, 1], got ",
              rising);
}

inline double Schedule::operator()(int64_t step) const {
  TORCH_CHECK(step >= 0, "Schedule: step must be >= 0, got ", step);
  const bool is_over = kind_ != Kind::cyclical && step >= steps_;
  double share = is_over ? 1 : static_cast<double>(step % steps_) / (rising_ * static_cast<double>(steps_));
  if (share >= 1) return to_;
  if (kind_ == Kind::cosine) share = (1 - std::cos(std::acos(-1.0) * share)) / 2;
  return from_ + (to_ - from_) * share;
}

inline std::string Schedule::text() const {
  if (kind_ == Kind::constant) return detail::shortest_text(from_);
  const std::string numbers =
      ":" + detail::shortest_text(from_) + ":" + detail::shortest_text(to_) + ":" + std::to_string(steps_);
  if (kind_ == Kind::linear) return "linear" + numbers;
  if (kind_ == Kind::cosine) return "cosine" + numbers;
  return "cyclical" + numbers + ":" + detail::shortest_text(rising_);
}

inline Schedule Schedule::parse(const std::string& text) {
  std::vector<std::string> parts{""};
  for (const char letter : text) {
    if (letter == ':') {
      parts.emplace_back();
    } else {
      parts.back() += letter;
    }
  }
  const auto number = [&](const char* name, size_t index) {
    return detail::parsed_number<double>(name, parts[index], text);
  };
  const auto steps = [&] { return detail::parsed_number<int64_t>("steps", parts[3], text); };
  const std::string& kind = parts[0];
  if (kind == "constant" && parts.size() == 2) return number("value", 1);
  if (kind == "linear" && parts.size() == 4) return linear(number("from", 1), number("to", 2), steps());
  if (kind == "cosine" && parts.size() == 4) return cosine(number("from", 1), number("to", 2), steps());
  if (kind == "cyclical" && parts.size() == 4) return cyclical(number("from", 1), number("to", 2), steps());
  if (kind == "cyclical" && parts.size() == 5) {
    return cyclical(number("from", 1), number("to", 2), steps(), number("rising", 4));
  }
  TORCH_CHECK(parts.size() == 1 && kind.find_first_of("0123456789+-.") == 0,
              "Schedule::parse: text must be a number, constant:value, linear:from:to:steps, cosine:from:to:steps, ",
              "cyclical:from:to:steps or cyclical:from:to:steps:rising, got \"", text, "\"");
  return number("value", 0);
}

}  // namespace FREE_TRANSFORMER_TYPES

}  // namespace free_transformer
