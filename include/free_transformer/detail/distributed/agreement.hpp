/// The first message of a loss that ranks compute together: whether all of them can go on, and whether they compute the
/// same.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/distributed/rank_group.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// A number that must be the same on every rank.
struct CommonNumber {
  const char* name = "";
  double value = 0;
};

/// They are the same ones on every rank, a rank that refuses its arguments included.
template <size_t count>
using CommonNumbers = std::array<CommonNumber, count>;

/// 52 bits that depend on each value and its place, for `CommonNumber`; 0 where the values are not on the CPU.
inline double checksum(const at::Tensor& values) {
  if (!values.defined() || !values.device().is_cpu()) return 0;
  const at::Tensor bytes = values.contiguous();
  uint64_t sum = 1469598103934665603u;  // FNV-1a, eight bytes at a time
  const auto* data = static_cast<const char*>(bytes.data_ptr());
  const size_t size = bytes.nbytes();
  for (size_t place = 0; place < size; place += sizeof(uint64_t)) {
    uint64_t word = 0;
    std::memcpy(&word, data + place, size - place < sizeof(word) ? size - place : sizeof(word));
    sum = (sum ^ word) * 1099511628211u;
    sum ^= sum >> 29;
  }
  return static_cast<double>(sum >> 12);
}

/// The maximum over ranks of what each has found out, once it is known that all of them go on with the same numbers.
/// One all-reduce of 1 + 2 common + found numbers, whatever the shapes are: messages that depend on a shape come after
/// it. A rank that refuses its arguments takes part with its refusal, which then is the error of each rank. `found` is
/// on the device where the ranks speak, undefined on a rank that refuses; the host waits once, for the answer.
template <size_t found_count, size_t count>
std::array<double, found_count> agree(const char* function, const RankGroup& ranks, const at::Device& device,
                                      const CommonNumbers<count>& common, const at::Tensor& found,
                                      const std::exception_ptr& refusal) {
  const auto none = -std::numeric_limits<double>::max();
  const at::Tensor numbers = at::full({int64_t{1 + 2 * count + found_count}}, none, at::kDouble);
  auto* number = numbers.data_ptr<double>();
  if (refusal) {
    number[0] = static_cast<double>(ranks.rank());
  } else {
    for (size_t index = 0; index < count; ++index) {
      number[1 + index] = common[index].value;
      number[1 + count + index] = -common[index].value;
    }
  }
  const at::Tensor message = numbers.to(device, /*non_blocking=*/true);
  if (!refusal) message.narrow(0, int64_t{1 + 2 * count}, int64_t{found_count}).copy_(found);
  ranks.maximum(function, message);
  if (refusal) std::rethrow_exception(refusal);
  const at::Tensor answers = message.to(at::kCPU);
  const double* answer = answers.data_ptr<double>();
  TORCH_CHECK(answer[0] < 0, function, ": arguments must fit on every rank, got a refusal from rank ", answer[0],
              ", whose own error says why");
  for (size_t index = 0; index < count; ++index) {
    const double highest = answer[1 + index], lowest = -answer[1 + count + index];
    TORCH_CHECK(is_zero(highest - lowest), function, ": ", common[index].name,
                " must be the same on all ranks of the group, got ", lowest, " to ", highest, ", here ",
                common[index].value);
  }
  std::array<double, found_count> highest_found;
  std::copy_n(answer + 1 + 2 * count, found_count, highest_found.begin());
  return highest_found;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
