/// The matrix products of a fused head on a device: in the weight's type, float32 inside, and float32 outside where
/// LibTorch and the device offer that.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/numbers.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// True if this LibTorch has products of half matrices with a float32 result; whether the device has is another question.
template <typename Tensor, typename = void>
inline constexpr bool has_float_products = false;
template <typename Tensor>
inline constexpr bool has_float_products<
    Tensor,
    std::void_t<decltype(at::addmm_out(std::declval<Tensor&>(), std::declval<const Tensor&>(),
                                       std::declval<const Tensor&>(), std::declval<const Tensor&>(), at::kFloat))>> =
    true;

/// The products of tensors like one, on its device.
class DeviceProducts {
 public:
  explicit DeviceProducts(const at::Tensor& like) : type_(like.scalar_type()), result_type_(type_) {
    if (!has_float_products<at::Tensor> || arithmetic_type(type_) == type_) return;
    const auto key = like.options().computeDispatchKey();
    const auto offers = [&](const char* name) {
      const auto found = c10::Dispatcher::singleton().findSchema({name, "dtype_out"});
      return found.has_value() && found->hasKernelForDispatchKey(key);
    };
    if (offers("aten::mm") && offers("aten::addmm")) result_type_ = at::kFloat;
  }

  /// The type of the operands, and that of the results.
  at::ScalarType type() const { return type_; }
  at::ScalarType result_type() const { return result_type_; }

  /// left right, into a tensor of the results' type.
  void multiply(const at::Tensor& left, const at::Tensor& right, at::Tensor result) const {
    multiply_into<at::Tensor>(left, right, result);
  }

  /// left right in the type of the operands, times `share()`.
  at::Tensor product(const at::Tensor& left, const at::Tensor& right) const {
    if (is_one(share())) return at::mm(left, right);
    return at::addmm(right.narrow(0, 0, 1), left, right, /*beta=*/0, /*alpha=*/share());  // nothing is added
  }

  /// A sum over thousands of tokens may be larger than any float16, 65504; a 64th of it is not, and loses digits below
  /// 2^-8 alone, where the probabilities of a float16 have lost theirs.
  double share() const { return type_ == at::kHalf ? 1.0 / 64 : 1.0; }

  /// Adds left right to a sum in the type of arithmetic, which is made if it is undefined.
  void add(const at::Tensor& left, const at::Tensor& right, at::Tensor& sum) const {
    const auto options = left.options().dtype(arithmetic_type(type_));
    const bool is_first = !sum.defined(), is_rounded = result_type_ != arithmetic_type(type_);
    if (is_first) {
      const std::vector<int64_t> sizes{left.size(0), right.size(1)};
      sum = is_rounded ? at::zeros(sizes, options) : at::empty(sizes, options);
    }
    if (is_rounded) {
      sum.add_(product(left, right), 1 / share());
    } else if (is_first) {
      multiply(left, right, sum);
    } else {
      add_into<at::Tensor>(left, right, sum);
    }
  }

 private:
  template <typename Tensor>
  void multiply_into(const Tensor& left, const Tensor& right, Tensor& result) const {
    if constexpr (has_float_products<Tensor>) {
      if (result_type_ != type_) {
        at::mm_out(result, left, right, result_type_);
        return;
      }
    }
    at::mm_out(result, left, right);
  }
  template <typename Tensor>
  void add_into(const Tensor& left, const Tensor& right, Tensor& sum) const {
    if constexpr (has_float_products<Tensor>) {
      if (result_type_ != type_) {
        at::addmm_out(sum, sum, left, right, result_type_);
        return;
      }
    }
    sum.addmm_(left, right);
  }

  at::ScalarType type_, result_type_;
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
