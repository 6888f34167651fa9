/// The metrics of a training as a table, one row a report.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <free_transformer/loss_metrics.hpp>

#include "durable_file.hpp"

namespace example {

/// Step, every metric of the loss, and further columns.
class MetricsLog {
 public:
  using Columns = std::vector<std::pair<std::string, double>>;

  /// Goes on after a step: rows of later ones, and one that was cut short, are removed. After step 0 it begins anew.
  MetricsLog(const std::filesystem::path& file, int64_t step) : file_(file) {
    if (step > 0) {
      replace_file(file, rows_until(file, step));
    }
    stream_.open(file, step > 0 ? std::ios::app | std::ios::ate : std::ios::trunc);
    if (!stream_) {
      throw std::runtime_error("cannot write " + file.string());
    }
    stream_.precision(9);  // enough to tell any two floats apart
  }

  void write(int64_t step, const free_transformer::LossMetrics& metrics, const Columns& columns = {}) {
    if (stream_.tellp() == 0) {
      write_header(metrics, columns);
    }
    stream_ << step;
    for (const auto& [key, value] : metrics) {
      stream_ << ',' << value;
    }
    for (const auto& [key, value] : columns) {
      stream_ << ',' << value;
    }
    stream_ << std::endl;  // flushed: an interrupted run keeps its log
  }

  const std::filesystem::path& file() const { return file_; }

 private:
  /// The header, and the whole rows of the steps that are kept.
  static std::string rows_until(const std::filesystem::path& file, int64_t step) {
    std::ifstream stream(file);
    std::string kept, row;
    while (std::getline(stream, row) && !stream.eof()) {
      if (kept.empty() || std::stoll(row) <= step) {
        kept += row + '\n';
      }
    }
    return kept;
  }

  void write_header(const free_transformer::LossMetrics& metrics, const Columns& columns) {
    stream_ << "step";
    for (const auto& [key, value] : metrics) {
      stream_ << ',' << key;
    }
    for (const auto& [key, value] : columns) {
      stream_ << ',' << key;
    }
    stream_ << '\n';
  }

  std::filesystem::path file_;
  std::ofstream stream_;
};

}  // namespace example
