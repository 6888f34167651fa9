/// How tensors say what the device kernels are to read.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <optional>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/jobs.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

inline std::optional<Element> element_of(at::ScalarType type) {
  if (type == at::kFloat) return Element::float32;
  if (type == at::kHalf) return Element::float16;
  if (type == at::kBFloat16) return Element::bfloat16;
  return std::nullopt;
}

/// Of a tensor [..., columns]; none if its columns are not adjacent, or its rows do not lie in groups of equal strides.
inline std::optional<RowLayout> row_layout_of(const at::Tensor& tensor) {
  if (tensor.stride(-1) != 1 && tensor.size(-1) != 1) return std::nullopt;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};  // of the groups and of the rows in one
  int used = 0;
  for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
    if (tensor.size(dim) == 1) continue;
    const bool joins = used > 0 && strides[used - 1] == tensor.size(dim) * tensor.stride(dim);
    if (!joins && used == 2) return std::nullopt;
    if (!joins) ++used;
    sizes[used - 1] *= tensor.size(dim);
    strides[used - 1] = tensor.stride(dim);
  }
  if (used < 2) return RowLayout{sizes[0], 0, strides[0]};
  return RowLayout{sizes[1], strides[0], strides[1]};
}

/// True for memory that is what it seems to be.
inline bool is_plain_memory(const at::Tensor& tensor) { return !tensor.is_neg() && !tensor._is_zerotensor(); }

/// A tensor's divisor must be `divisor` of float64 on the logits' device, and live until the launch.
inline Divisor divisor_of(const Normalization& normalization, const at::Tensor& divisor) {
  if (normalization.reduction != ReductionKind::mean) return {Divisor::one, 0, nullptr};
  if (normalization.number) return {Divisor::given_number, *normalization.number, nullptr};
  if (divisor.defined()) return {Divisor::given_tensor, 0, divisor.data_ptr<double>()};
  return {Divisor::weight_sum, 0, nullptr};
}

/// The normalizer's tensor as `divisor_of` asks for it, or undefined.
inline at::Tensor divisor_on(const at::Device& device, const Normalization& normalization) {
  const bool is_tensor = normalization.reduction == ReductionKind::mean && !normalization.number;
  if (!is_tensor || !normalization.tensor.defined()) return {};
  return normalization.tensor.detach().to(device, at::kDouble);
}

/// One zeroed allocation for a ticket and for `partial` numbers behind it.
inline at::Tensor workspace_of(const at::TensorOptions& options, int64_t partial) {
  return at::zeros({1 + partial}, options.dtype(at::kDouble));
}
inline unsigned* ticket_of(const at::Tensor& workspace) {
  return reinterpret_cast<unsigned*>(workspace.data_ptr<double>());
}
inline double* partial_of(const at::Tensor& workspace) { return workspace.data_ptr<double>() + 1; }

inline const float* floats_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<float>() : nullptr;
}
inline const double* doubles_of(const at::Tensor& tensor) {
  return tensor.defined() ? tensor.data_ptr<double>() : nullptr;
}

/// An upstream [N] as the kernels take it: one number if all rows share one, else numbers that are adjacent.
inline at::Tensor readable_upstream(const at::Tensor& upstream) {
  if (!upstream.defined() || upstream.dim() == 0 || upstream.size(0) == 0) return upstream;
  return upstream.stride(0) == 0 ? upstream.select(0, 0) : upstream.contiguous();
}

/// 0 for one number that all rows share.
inline int64_t stride_of_upstream(const at::Tensor& upstream) { return upstream.defined() && upstream.dim() > 0; }

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
