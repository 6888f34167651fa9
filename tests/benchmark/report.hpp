/// Results as a table for the eye, and as a CSV for the repository and the picture.
#pragma once

#include <c10/util/Exception.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "comparison.hpp"
#include "environment.hpp"

namespace benchmarks {

inline std::string type_name(c10::ScalarType type) {
  switch (type) {
    case c10::kDouble:
      return "float64";
    case c10::kBFloat16:
      return "bfloat16";
    default:
      return "float32";
  }
}

/// One line for each ratio of a comparison, written when it is known.
class Report {
 public:
  explicit Report(const std::filesystem::path& csv) {
    if (csv.has_parent_path()) std::filesystem::create_directories(csv.parent_path());
    file_.open(csv);
    TORCH_CHECK(file_, "loss_benchmark: csv must be a file that can be written, got ", csv.string());
    file_ << "row,baseline,shape,dtype,threads,processor,instruction_set,libtorch,compiler,"
             "ours_median_s,ours_20_s,ours_80_s,baseline_median_s,baseline_20_s,baseline_80_s,"
             "copy_median_s,copy_20_s,copy_80_s,ratio_of,ratio,must_reach,reached\n";
    std::printf("%s, %s, LibTorch %s, %s\n\n", processor_name().c_str(), instruction_set().c_str(),
                libtorch_version().c_str(), compiler_name().c_str());
    std::printf("%-42s %-12s %-8s %7s  %10s  %-21s %10s %8s\n", "row", "shape", "dtype", "threads", "ours, ms", "ratio",
                "must reach", "reached");
  }

  void add(const Comparison& comparison, int threads, const Timings& timings, const Work& work) {
    for (const auto& requirement : comparison.requirements) {
      const double value = measured_ratio(requirement.ratio, timings, work);
      const bool is_reached = requirement.is_reached_by(value);
      if (requirement.limit > 0) ++(is_reached ? reached_ : missed_);
      print(comparison, threads, timings, requirement, value, is_reached);
      write(comparison, threads, timings, requirement, value, is_reached);
    }
  }

  void print_summary() const { std::printf("\n%d of %d limits reached\n", reached_, reached_ + missed_); }

 private:
  static std::string instruction_set() { return instruction_set_name(kernels::instruction_set()); }

  static std::string limit_text(const Requirement& requirement) {
    if (!(requirement.limit > 0)) return "";
    std::ostringstream text;
    text << (larger_is_better(requirement.ratio) ? ">= " : "<= ") << requirement.limit;
    return text.str();
  }

  static const char* verdict(const Requirement& requirement, bool is_reached) {
    return !(requirement.limit > 0) ? "" : is_reached ? "yes" : "NO";
  }

  static void print(const Comparison& comparison, int threads, const Timings& timings, const Requirement& requirement,
                    double value, bool is_reached) {
    std::printf("%-42s %-12s %-8s %7d  %10.3f  %-21s %10s %8.2f %s\n", comparison.name.c_str(),
                comparison.shape.c_str(), type_name(comparison.type).c_str(), threads, 1e3 * median(timings.ours),
                description(requirement.ratio), limit_text(requirement).c_str(), value,
                verdict(requirement, is_reached));
    std::fflush(stdout);
  }

  void write(const Comparison& comparison, int threads, const Timings& timings, const Requirement& requirement,
             double value, bool is_reached) {
    file_ << comparison.name << ',' << comparison.baseline << ',' << comparison.shape << ','
          << type_name(comparison.type) << ',' << threads << ',' << processor_name() << ',' << instruction_set() << ','
          << libtorch_version() << ',' << compiler_name() << ',';
    for (const auto* sample : {&timings.ours, &timings.baseline, &timings.copy}) {
      for (const double part : {0.5, 0.2, 0.8}) {
        if (!sample->empty()) file_ << quantile(*sample, part);
        file_ << ',';
      }
    }
    file_ << description(requirement.ratio) << ',' << value << ',' << limit_text(requirement) << ','
          << verdict(requirement, is_reached) << std::endl;
  }

  std::ofstream file_;
  int reached_ = 0, missed_ = 0;
};

}  // namespace benchmarks
