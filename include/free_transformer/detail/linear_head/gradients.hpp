/// The gradients of the fused head's operands while they are summed up.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// True if the weight has to be brought into the type of arithmetic.
inline bool converts_weight(const LinearInputs& inputs) {
  return inputs.weight.scalar_type() != arithmetic_type(inputs.hidden.scalar_type());
}

/// The weight's gradient while it is summed up, in the type of arithmetic. That of a half weight takes twice the memory of
/// the result: its front rows are summed in the memory of the result itself, the other rows beside it, and `finished`
/// rounds the front into the front half of that memory before the others take the back half.
struct WeightGradient {
  WeightGradient() = default;
  explicit WeightGradient(const LinearInputs& inputs)
      : result_(kernels::empty_on_large_pages(inputs.weight.sizes(), inputs.weight.options())), front_(result_) {
    if (!converts_weight(inputs)) return;
    const int64_t rows = inputs.classes(), width = inputs.weight.size(1), front_rows = rows / 2;
    front_ = result_.view({-1})
                 .narrow(0, 0, 2 * front_rows * width)
                 .view(arithmetic_type(inputs.hidden.scalar_type()))
                 .view({front_rows, width});
    back_ = kernels::empty_on_large_pages({rows - front_rows, width},
                                          inputs.weight.options().dtype(arithmetic_type(inputs.hidden.scalar_type())));
  }

  bool defined() const { return result_.defined(); }
  int64_t front_rows() const { return front_.size(0); }

  /// Rows that lie on one side of `front_rows`.
  at::Tensor rows(int64_t first, int64_t count) const {
    return first < front_rows() ? front_.narrow(0, first, count) : back_.narrow(0, first - front_rows(), count);
  }
  void zero() {
    front_.zero_();
    if (back_.defined()) back_.zero_();
  }
  void multiply(const at::Tensor& factor) {
    front_.mul_(factor);
    if (back_.defined()) back_.mul_(factor);
  }

  /// In the weight's type, rounded once; this object is empty then.
  at::Tensor finished() {
    if (back_.defined()) {
      const at::Tensor target = result_.view({-1}), source = front_.view({-1});
      constexpr int64_t part = int64_t{1} << 20;
      for (int64_t first = 0; first < source.size(0); first += part) {  // each is read before it is overwritten
        const int64_t count = std::min(part, source.size(0) - first);
        target.narrow(0, first, count).copy_(source.narrow(0, first, count).to(target.scalar_type()));
      }
      result_.narrow(0, front_rows(), back_.size(0)).copy_(back_);
    }
    front_.reset();
    back_.reset();
    return std::move(result_);
  }

 private:
  at::Tensor result_, front_, back_;
};

/// Gradients of the inputs; undefined where none is wanted.
struct LinearGradients {
  at::Tensor hidden, bias;
  WeightGradient weight;

  void multiply(const at::Tensor& factor) {
    for (at::Tensor* gradient : {&hidden, &bias}) {
      if (gradient->defined()) gradient->mul_(factor);
    }
    if (weight.defined()) weight.multiply(factor);
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
