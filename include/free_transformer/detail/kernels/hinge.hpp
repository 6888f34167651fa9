/// Where the hinge of the free bits sits, for the policies that the kernels know.
#pragma once

#include <optional>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

enum class Hinge { per_position, per_bit, batch_mean };

/// The kernel's hinge of a free-bits policy; none for a policy that the kernels do not know.
template <typename FreeBits>
inline constexpr std::optional<Hinge> hinge_of = std::nullopt;

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
