/// The gradients of all ranks, added up.
#pragma once

#include <torch/torch.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ranks.hpp"

namespace example {

namespace detail {

/// Tensors in groups of at least `bytes`, but for the last one.
inline std::vector<std::vector<torch::Tensor>> buckets_of(const std::vector<torch::Tensor>& tensors, size_t bytes) {
  std::vector<std::vector<torch::Tensor>> buckets;
  size_t filled = bytes;
  for (const auto& tensor : tensors) {
    if (filled >= bytes) {
      buckets.emplace_back();
      filled = 0;
    }
    buckets.back().push_back(tensor);
    filled += tensor.nbytes();
  }
  return buckets;
}

inline torch::Tensor joined(const std::vector<torch::Tensor>& tensors) {
  std::vector<torch::Tensor> flat;
  for (const auto& tensor : tensors) flat.push_back(tensor.reshape(-1));
  return torch::cat(flat);
}

inline void split_into(const std::vector<torch::Tensor>& tensors, const torch::Tensor& flat) {
  int64_t begin = 0;
  for (const auto& tensor : tensors) {
    tensor.copy_(flat.narrow(0, begin, tensor.numel()).view(tensor.sizes()));
    begin += tensor.numel();
  }
}

}  // namespace detail

/// Replaces the gradients by their sum over the ranks: all-reduces of a bucket of them each, under way while the next bucket is
/// filled. A message a tensor would cost more than the gains and small matrices that it carries. All ranks get the same bits.
inline void sum_gradients(Ranks& ranks, const std::vector<torch::Tensor>& parameters) {
  constexpr size_t bucket_bytes = size_t{1} << 20;
  if (ranks.size() == 1) return;
  std::vector<torch::Tensor> gradients;
  for (const auto& parameter : parameters) gradients.push_back(parameter.grad());
  const auto buckets = detail::buckets_of(gradients, bucket_bytes);
  ranks.collective([&](const auto& group) {
    std::vector<std::vector<torch::Tensor>> flat;
    std::vector<c10::intrusive_ptr<c10d::Work>> sums;
    for (const auto& bucket : buckets) {
      flat.push_back({detail::joined(bucket)});
      sums.push_back(group->allreduce(flat.back()));
    }
    for (size_t index = 0; index < buckets.size(); ++index) {
      sums[index]->wait();
      detail::split_into(buckets[index], flat[index].front());
    }
  });
}

}  // namespace example
