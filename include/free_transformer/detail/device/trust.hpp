/// Whether the kernels are to be used on a device: a kernel must prove itself on the machine that it runs on. Before its
/// first use on a device and with a type, a small batch goes through it and through LibTorch's operations.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/cross_entropy.hpp"
#include "free_transformer/detail/device/kernel_cache.hpp"
#include "free_transformer/detail/device/latent_kl.hpp"
#include "free_transformer/detail/device/stream.hpp"
#include "free_transformer/detail/kernels/hinge.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/latent_kl.hpp"
#include "free_transformer/detail/settings.hpp"

/// Tests let the kernels' emulation take the tensors of another device.
#if !defined(FREE_TRANSFORMER_KERNEL_DEVICE)
#define FREE_TRANSFORMER_KERNEL_DEVICE at::kCUDA
#endif

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

inline bool is_kernel_device(const at::Device& device) { return device.type() == FREE_TRANSFORMER_KERNEL_DEVICE; }

inline const std::string no_stream = "this LibTorch does not say which stream it works on";

/// Where to launch now; none if that cannot be found out.
inline std::optional<Place> place_of(const at::Device& device) {
  if (device.type() != at::kCUDA) return Place{0, nullptr};
  const auto stream = current_native_stream(device);
  if (!stream) return std::nullopt;
  return Place{device.index(), *stream};
}

/// True if there is no reason why not; else that is said, once.
inline bool was_launched(const std::string& reason) {
  if (reason.empty()) return true;
  TORCH_WARN_ONCE("free_transformer: the losses are computed in LibTorch's operations, as a device kernel failed: ",
                  reason);
  return false;
}

enum class Loss : int { cross_entropy, latent_kl };

[[gnu::cold]] inline bool agree(const at::Tensor& found, const at::Tensor& expected) {
  const auto type = expected.scalar_type();
  const double share = type == at::kBFloat16 ? 0x1p-6 : type == at::kHalf ? 0x1p-9 : 1e-5;
  const at::Tensor wide = expected.to(at::kDouble);
  return (found.to(at::kDouble) - wide).abs().max().item<double>() <= share * wide.abs().max().item<double>();
}

/// Logits of both signs, some of them far from the others.
[[gnu::cold]] inline at::Tensor trial_logits(int64_t rows, int64_t columns, const at::TensorOptions& options) {
  const at::Tensor counted = at::arange(rows * columns, at::kLong).mul_(7919).remainder_(257).sub_(128);
  return (counted.to(at::kFloat) / 16).reshape({rows, columns}).to(options.device(), options.dtype().toScalarType());
}

[[gnu::cold]] inline std::string try_cross_entropy(const at::TensorOptions& options, const Place& place) {
  constexpr int64_t rows = 12, classes = 1031;
  const at::Tensor logits = trial_logits(rows, classes, options);
  CrossEntropySettings settings;
  settings.targets = at::arange(rows, at::kLong).mul_(89).to(options.device());
  settings.targets.narrow(0, 5, 1).fill_(settings.ignore_index);
  const auto positions = plain::cross_entropy_positions(settings, classes, at::kFloat, Normalization());
  const at::Tensor expected = at::empty_like(logits), found = at::empty_like(logits);
  const auto of = plain::cross_entropy_rows(logits, settings, positions, expected, {}, {/*sums=*/true, /*each=*/true});
  CrossEntropyBatch batch;
  const auto written = empty_rows(settings.targets, /*wants_prediction=*/false);
  at::Tensor sums, loss;
  std::string reason = launch_scales(settings, classes, Normalization(), place, batch);
  if (reason.empty()) {
    reason = launch_rows(logits, settings, batch.likelihood_scale(), batch.z_scale(), found, {}, written, place);
  }
  if (reason.empty()) reason = launch_sums(settings, classes, batch, written, place, sums, loss);
  if (!reason.empty()) return reason;
  const bool agrees = agree(found, expected) && agree(written.nll, of.rows.nll) && agree(sums, of.sums);
  return agrees ? "" : "its cross entropy differs from that of LibTorch's operations";
}

/// The hinge of `Hinge::per_position`, as a policy.
struct TrialHinge {
  static at::Tensor penalty(const at::Tensor& bit_kl, const at::Tensor& /*mean_kl*/, double free_bits) {
    return (bit_kl.sum(-1) - free_bits).clamp_min(0);
  }
};

[[gnu::cold]] inline std::string try_latent_kl(const at::TensorOptions& options, const Place& place) {
  constexpr int64_t rows = 300, bits = 16;
  const at::Tensor z_logits = trial_logits(rows, bits, options);
  LatentSettings settings;
  settings.free_bits = 0.5;
  const auto expected = plain::latent_rows<TrialHinge>(z_logits, settings, Normalization(), {}, {},
                                                       {/*penalty=*/true, /*gradient=*/true});
  LatentRowResults found;
  std::string reason = launch_latent_rows(kernels::Hinge::per_position, z_logits, settings, Normalization(),
                                          /*wants_penalty=*/true, /*wants_gradient=*/true, place, found);
  if (!reason.empty()) return reason;
  const bool agrees = agree(found.gradient, expected.gradient) && agree(found.penalty, expected.penalty) &&
                      agree(found.sums, expected.sums);
  return agrees ? "" : "its KL differs from that of LibTorch's operations";
}

/// For tensors like this one.
inline bool is_trusted(Loss loss, const at::Tensor& like) {
  if (!kernels_are_wanted()) return false;
  static std::mutex mutex;
  static std::map<std::tuple<Loss, int, int>, bool> verdicts;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(loss, int{like.device().index()}, static_cast<int>(like.scalar_type()));
  const auto known = verdicts.find(key);
  if (known != verdicts.end()) return known->second;
  const auto place = place_of(like.device());
  if (!place) return verdicts[key] = was_launched(no_stream);
  if (kernel_cache().is_capturing(*place)) return false;  // a trial looks at values; the next call outside makes it
  const at::NoGradGuard no_grad;
  std::string reason;
  try {
    reason =
        loss == Loss::cross_entropy ? try_cross_entropy(like.options(), *place) : try_latent_kl(like.options(), *place);
  } catch (const std::exception& error) {
    reason = error.what();
  }
  return verdicts[key] = was_launched(reason);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
