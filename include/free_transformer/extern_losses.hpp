/// Everything of `losses.hpp`, in a program whose losses another unit compiles: a call costs no compile time here.
/// For        `compute_reconstruction_loss`, `compute_kl_divergence`, `compute_vae_loss` and `compute_token_statistics`, also
///            through the module, of dense logits and `LinearLogits` and with the three policies of the free bits; what
///            takes a source of logits or a policy of your own is compiled where it is used
/// Needs      one unit with `compiled_losses.hpp`, and with the flags of this one as far as the losses depend on them
///            (optimized or not, -ffast-math, -mavx and the like): names say so, and the linker misses them otherwise
#pragma once

#include "free_transformer/losses.hpp"

// `extern` and nothing cannot stand in parentheses. NOLINTBEGIN(bugprone-macro-parentheses)
#define FREE_TRANSFORMER_INSTANCES_OF_LOGITS(storage, Logits)                                         \
  storage template at::Tensor compute_reconstruction_loss(const Logits&, const at::Tensor&,           \
                                                          const ReconstructionLossOptions&);          \
  storage template at::Tensor compute_reconstruction_loss(const Logits&, const at::Tensor&, int64_t); \
  storage template TokenStatistics compute_token_statistics(const Logits&, const at::Tensor&,         \
                                                            const ReconstructionLossOptions&);

#define FREE_TRANSFORMER_INSTANCES_OF_POLICY(storage, FreeBits)                                               \
  storage template at::Tensor compute_kl_divergence<FreeBits>(const at::Tensor&, const KLDivergenceOptions&); \
  storage template at::Tensor compute_kl_divergence<FreeBits>(const at::Tensor&, int64_t, double);

#define FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, FreeBits, Logits)                                            \
  storage template VAELossOutput compute_vae_loss<FreeBits>(const Logits&, const at::Tensor&, const at::Tensor&, \
                                                            const VAELossOptions&);                              \
  storage template VAELossOutput compute_vae_loss<FreeBits>(const Logits&, const at::Tensor&, const at::Tensor&, \
                                                            int64_t, double, double, int64_t);

// NOLINTEND(bugprone-macro-parentheses)

#define FREE_TRANSFORMER_LOSS_INSTANCES(storage)                         \
  FREE_TRANSFORMER_INSTANCES_OF_LOGITS(storage, at::Tensor)              \
  FREE_TRANSFORMER_INSTANCES_OF_LOGITS(storage, LinearLogits)            \
  FREE_TRANSFORMER_INSTANCES_OF_POLICY(storage, PerPosition)             \
  FREE_TRANSFORMER_INSTANCES_OF_POLICY(storage, PerBit)                  \
  FREE_TRANSFORMER_INSTANCES_OF_POLICY(storage, BatchMean)               \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, PerPosition, at::Tensor)   \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, PerBit, at::Tensor)        \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, BatchMean, at::Tensor)     \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, PerPosition, LinearLogits) \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, PerBit, LinearLogits)      \
  FREE_TRANSFORMER_INSTANCES_OF_BOTH(storage, BatchMean, LinearLogits)

namespace free_transformer {
inline namespace FREE_TRANSFORMER_FUNCTIONS {

FREE_TRANSFORMER_LOSS_INSTANCES(extern)

}  // namespace FREE_TRANSFORMER_FUNCTIONS
}  // namespace free_transformer
