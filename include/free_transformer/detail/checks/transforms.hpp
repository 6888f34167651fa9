/// Refuses what would lose a derivative or freeze a value without a word: forward-mode tangents, functorch, tracing. The
/// losses read numbers where they lie, and those ways of running a function cannot follow that.
#pragma once

#include <ATen/ATen.h>
#include <ATen/TracerMode.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/util/Exception.h>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

inline void check_no_transform(const char* function, const char* argument, const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet wrapped({c10::DispatchKey::FuncTorchBatched, c10::DispatchKey::FuncTorchGradWrapper,
                                         c10::DispatchKey::Batched, c10::DispatchKey::Functionalize,
                                         c10::DispatchKey::Python});
  TORCH_CHECK(!tensor.key_set().has_any(wrapped), function, ": ", argument,
              " must be an ordinary tensor, got one of a transform (vmap, functorch's grad, make_fx) or a Python "
              "subclass: call the loss outside of it, on the whole batch, and differentiate it by backward()");
  TORCH_CHECK(!tensor._fw_grad(/*level=*/0).defined(), function, ": ", argument,
              " must have no forward-mode tangent, which would be lost: differentiate the loss by backward(), got a "
              "dual tensor");
}

/// A trace would keep the number of this call as a constant.
inline void check_not_traced(const char* function) {
  TORCH_CHECK(
      !at::tracer::impl::is_dispatch_enabled() && !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::Python),
      function, ": must not be called while a program is traced (torch::jit::trace, make_fx, a Python dispatch ",
      "mode), which would keep its result as a constant: trace the model and call the loss on its outputs");
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
