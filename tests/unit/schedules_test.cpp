#include "free_transformer/schedules.hpp"

#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

std::string text_of(const Schedule& schedule) {
  std::ostringstream text;
  text << schedule;
  return text.str();
}

bool is_near(double found, double expected) { return std::abs(found - expected) <= 4e-16 * (1 + std::abs(expected)); }

}  // namespace

TEST_CASE("A constant schedule has its value at every step", "[schedules]") {
  for (const Schedule& schedule : {Schedule(0.25), Schedule::constant(0.25), Schedule::parse("0.25")}) {
    for (const int64_t step : {int64_t{0}, int64_t{1}, int64_t{1} << 62}) CHECK(schedule(step) == 0.25);
  }
}

TEST_CASE("A linear schedule goes up or down in equal steps and then stays", "[schedules]") {
  const auto up = Schedule::linear(0, 1, 8), down = Schedule::linear(2.5, 0.5, 8);
  for (int64_t step = 0; step < 12; ++step) {
    const double share = std::min(1.0, static_cast<double>(step) / 8);
    CHECK(up(step) == share);
    CHECK(down(step) == 2.5 - 2 * share);
  }
  CHECK(up(int64_t{1} << 62) == 1);
  CHECK(Schedule::linear(0.1, 0.3, 3)(3) == 0.3);  // the very number, not 0.1 + 0.2
  CHECK(Schedule::linear(0.1, 0.3, 3)(0) == 0.1);
}

TEST_CASE("A cosine schedule is half a cosine between its ends", "[schedules]") {
  const auto schedule = Schedule::cosine(0.5, 2.5, 12);
  const double half_root_of_3 = std::sqrt(3.0) / 2;
  // 1 - cos of 0, 30, 60, 90, 120, 150, 180 degrees
  const double expected[] = {0, 1 - half_root_of_3, 0.5, 1, 1.5, 1 + half_root_of_3, 2};
  for (int64_t index = 0; index < 7; ++index) CHECK(is_near(schedule(2 * index), 0.5 + expected[index]));
  CHECK(schedule(0) == 0.5);
  CHECK(schedule(12) == 2.5);
  CHECK(schedule(1000) == 2.5);
  CHECK(schedule(1) - schedule(0) < (2.0 / 12) / 4);  // no jolt: a quarter of the mean slope at most
}

TEST_CASE("A cyclical schedule is that of Fu et al. 2019", "[schedules]") {
  // Their Eq. 6 and 7, t from 1: tau = mod(t-1, ceil(T/M)) / (T/M), beta = min(1, tau / R).
  const int64_t total = 120, cycles = 4;
  for (const double rising : {0.25, 0.5, 1.0}) {
    const auto schedule = Schedule::cyclical(0, 1, total / cycles, rising);
    for (int64_t t = 1; t <= total; ++t) {
      const double tau = static_cast<double>((t - 1) % (total / cycles)) / (static_cast<double>(total) / cycles);
      CHECK(is_near(schedule(t - 1), tau <= rising ? tau / rising : 1));
    }
  }
  const auto between = Schedule::cyclical(1, 3, 4);
  const double expected[] = {1, 2, 3, 3, 1, 2, 3, 3, 1};
  for (int64_t step = 0; step < 9; ++step) CHECK(between(step) == expected[step]);
}

TEST_CASE("A schedule is printed as the text that makes it again", "[schedules]") {
  for (const std::string text : {"0", "0.5", "0.1", "1e-300", "0.3333333333333333", "linear:0:1:1000", "linear:2.5:0:1",
                                 "cosine:0.001:0.3466:9223372036854775807", "cyclical:0:1:100:0.25"}) {
    INFO(text);
    CHECK(text_of(Schedule::parse(text)) == text);
  }
  CHECK(text_of(Schedule::parse("constant:0.5")) == "0.5");
  CHECK(text_of(Schedule::parse("cyclical:0:1:100")) == "cyclical:0:1:100:0.5");
  for (const double value : {0.1, 1.0 / 3, 0.3466, std::nextafter(1.0, 2.0), 1e22, 123456789.125}) {
    const Schedule schedule = Schedule::linear(value, 2 * value, 7);
    const Schedule again = Schedule::parse(text_of(schedule));
    CHECK(again(0) == value);
    CHECK(again(7) == 2 * value);
  }
}

TEST_CASE("Schedules are printed and read alike whatever the program's locale", "[schedules]") {
  struct Comma : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const auto before = std::locale::global(std::locale(std::locale::classic(), new Comma));
  const std::string text = text_of(Schedule::parse("cyclical:0.5:1.25:100000:0.25"));
  std::locale::global(before);
  CHECK(text == "cyclical:0.5:1.25:100000:0.25");
}

TEST_CASE("A text that is no schedule is refused with what could be written", "[schedules][errors]") {
  const auto error = [](const std::string& text) { return error_of([&] { Schedule::parse(text); }); };
  const std::string known =
      "Schedule::parse: text must be a number, constant:value, linear:from:to:steps, cosine:from:to:steps, "
      "cyclical:from:to:steps or cyclical:from:to:steps:rising, got ";
  for (const std::string text : {"", " 1", "linear", "linear:0:1", "linear:0:1:2:3", "Linear:0:1:2", "constant",
                                 "constant:1:2", "cyclical:0:1:2:1:1", "inf", "nan", "warmup:0:1:2", "0.5:1"}) {
    CHECK(error(text) == std::string(known).append("\"").append(text).append("\""));
  }
  CHECK(error("1x") == "Schedule::parse: value must be a number, got \"1x\" in \"1x\"");
  CHECK(error("0,5") == "Schedule::parse: value must be a number, got \"0,5\" in \"0,5\"");
  CHECK(error("linear::1:2") == "Schedule::parse: from must be a number, got \"\" in \"linear::1:2\"");
  CHECK(error("linear:0: 1:2") == "Schedule::parse: to must be a number, got \" 1\" in \"linear:0: 1:2\"");
  CHECK(error("cosine:0:1:1.5") == "Schedule::parse: steps must be a whole number, got \"1.5\" in \"cosine:0:1:1.5\"");
  CHECK(error("cosine:0:1:9223372036854775808") ==
        "Schedule::parse: steps must be a whole number, got \"9223372036854775808\" in "
        "\"cosine:0:1:9223372036854775808\"");
  CHECK(error("cyclical:0:1:2:half") ==
        "Schedule::parse: rising must be a number, got \"half\" in \"cyclical:0:1:2:half\"");
  CHECK(error("1e400") == "Schedule::parse: value must be a number, got \"1e400\" in \"1e400\"");
  CHECK(error("-1") == "Schedule: value must be finite and >= 0, got -1");
}

TEST_CASE("Numbers out of range are refused by every schedule", "[schedules][errors]") {
  const auto error = [](const auto& make) { return after_name("Schedule", error_of(make)); };
  CHECK(error([] { Schedule::constant(-0.5); }) == "value must be finite and >= 0, got -0.5");
  CHECK(error([] { Schedule::constant(not_a_number); }) == "value must be finite and >= 0, got nan");
  CHECK(error([] { Schedule::linear(-1, 1, 5); }) == "from must be finite and >= 0, got -1");
  CHECK(error([] { Schedule::cosine(0, reference::inf, 5); }) == "to must be finite and >= 0, got inf");
  CHECK(error([] { Schedule::linear(0, 1, 0); }) == "steps must be >= 1, got 0");
  CHECK(error([] { Schedule::cyclical(0, 1, -3); }) == "steps must be >= 1, got -3");
  CHECK(error([] { Schedule::cyclical(0, 1, 3, 0); }) == "rising must be in (0, 1], got 0");
  CHECK(error([] { Schedule::cyclical(0, 1, 3, 1.5); }) == "rising must be in (0, 1], got 1.5");
  CHECK(error([] { Schedule::cyclical(0, 1, 3)(-1); }) == "step must be >= 0, got -1");
}
