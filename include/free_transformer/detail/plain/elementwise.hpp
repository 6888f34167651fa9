/// Elementwise operations in terms of those that meta tensors have in every LibTorch: 1.13 lacks at::abs and at::where there.
#pragma once

#include <ATen/ATen.h>

#include "free_transformer/detail/compilation.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// |x|, not to be differentiated.
inline at::Tensor magnitude(const at::Tensor& x) { return at::maximum(x, x.neg()); }

inline at::Tensor choose(const at::Tensor& condition, const at::Tensor& yes, const at::Tensor& no) {
  return yes.is_meta() ? at::empty_like(yes) : at::where(condition, yes, no);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
