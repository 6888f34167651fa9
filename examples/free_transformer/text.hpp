/// The bytes of some files, cut into windows for the model.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "fingerprint.hpp"

namespace example {

struct Batch {
  torch::Tensor tokens;   // int64 [batch, positions]
  torch::Tensor targets;  // int64 [batch, positions]: the byte after each token
  int64_t first = 0;      // of its windows in the batch that it is a part of
  int64_t whole = 0;      // windows of that batch; 0 for one that is no part
};

/// `windows` of a batch, or of a part of one, from `first` on.
inline Batch part_of(const Batch& batch, int64_t first, int64_t windows) {
  return {batch.tokens.narrow(0, first, windows), batch.targets.narrow(0, first, windows), batch.first + first,
          batch.whole == 0 ? batch.tokens.size(0) : batch.whole};
}

/// Part `index` of `count` of nearly the same number of windows.
inline Batch share_of(const Batch& batch, int64_t index, int64_t count) {
  const auto windows = batch.tokens.size(0);
  const auto first = windows * index / count;
  return part_of(batch, first, windows * (index + 1) / count - first);
}

/// At most `count` parts of nearly the same number of windows.
inline std::vector<Batch> parts_of(const Batch& batch, int64_t count) {
  std::vector<Batch> parts;
  const auto parts_with_windows = std::min(count, batch.tokens.size(0));
  for (int64_t index = 0; index < parts_with_windows; ++index) {
    parts.push_back(share_of(batch, index, parts_with_windows));
  }
  return parts;
}

/// Bytes as a tensor, uint8 [bytes].
inline torch::Tensor to_tensor(const std::string& bytes) {
  auto tensor = torch::empty(static_cast<int64_t>(bytes.size()), torch::kUInt8);
  std::copy(bytes.begin(), bytes.end(), tensor.data_ptr<uint8_t>());
  return tensor;
}

inline std::string read_files(const std::vector<std::filesystem::path>& files) {
  std::string bytes;
  for (const auto& file : files) {
    std::ifstream stream(file, std::ios::binary);
    if (!stream) {
      throw std::runtime_error("cannot read " + file.string());
    }
    bytes.append(std::istreambuf_iterator<char>(stream), {});
  }
  return bytes;
}

class Text {
 public:
  /// The files one after the other, seen through windows of the model's context that start at multiples of window_step.
  Text(const std::vector<std::filesystem::path>& files, int64_t context, int64_t window_step = 1)
      : bytes_(to_tensor(read_files(files))), window_(torch::arange(context + 1)), window_step_(window_step) {
    if (size() <= context) {
      throw std::runtime_error("the text must be longer than the context of " + std::to_string(context) +
                               " bytes, got " + std::to_string(size()) + " bytes in " + std::to_string(files.size()) +
                               " files");
    }
  }

  /// Windows drawn at random.
  Batch random_batch(int64_t batch_size) const {
    return windows_at(torch::randint(last_window() + 1, {batch_size}, torch::kInt64));
  }

  /// Batch index of count, whose windows together lie evenly over the whole text.
  Batch even_batch(int64_t batch_size, int64_t index, int64_t count) const {
    const auto numbers = torch::arange(index * batch_size, (index + 1) * batch_size);
    return windows_at(torch::div(numbers * last_window(), count * batch_size, "floor"));
  }

  int64_t size() const { return bytes_.size(0); }

  /// Differs, but for chance, where a byte does.
  uint64_t fingerprint() const { return example::fingerprint(bytes_.data_ptr(), static_cast<size_t>(size())); }

 private:
  int64_t last_window() const { return (size() - window_.size(0)) / window_step_; }

  Batch windows_at(const torch::Tensor& numbers) const {
    const auto windows = bytes_.index({numbers.unsqueeze(1) * window_step_ + window_}).to(torch::kInt64);
    return {windows.slice(1, 0, -1), windows.slice(1, 1)};
  }

  torch::Tensor bytes_, window_;
  int64_t window_step_;
};

}  // namespace example
