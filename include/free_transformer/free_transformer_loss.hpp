/// The loss as a module that holds its options.
#pragma once

#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <utility>

#include "free_transformer/detail/checks/vae_loss.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/vae_loss.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// `compute_vae_loss` as a `torch::nn::Module`. The tensors of the options belong to it: prior_logits that require grad
/// are a parameter, all others buffers, so that `to()`, `clone()`, `parameters()` and `torch::save` reach them; `to()` with
/// a type leaves a normalizer's own, which may count beyond a half type. `options` may be changed between calls; a
/// tensor that replaces another one becomes the module's with the next call.
/// Throws c10::Error at construction as at each call if a setting is out of its range.
class FreeTransformerLossImpl : public torch::nn::Cloneable<FreeTransformerLossImpl> {
 public:
  explicit FreeTransformerLossImpl(int64_t latent_dim = 16, double beta_kl = 1.0, double free_bits = 0.3466,
                                   int64_t ignore_index = -100)
      : FreeTransformerLossImpl(
            VAELossOptions().latent_dim(latent_dim).beta_kl(beta_kl).free_bits(free_bits).ignore_index(ignore_index)) {}

  explicit FreeTransformerLossImpl(VAELossOptions options_) : options(std::move(options_)) {
    detail::check_vae_options("FreeTransformerLoss", options);
    adopt_tensors();
  }

  /// Called by `clone()`: tensors of the module's own, which that fills, instead of those shared with the original.
  inline void reset() override;  // inline here, or it is the key function for which every unit emits the class

  void pretty_print(std::ostream& stream) const override {
    stream << "free_transformer::FreeTransformerLoss(latent_dim=" << options.latent_dim()
           << ", beta_kl=" << options.beta_kl() << ", free_bits=" << options.free_bits()
           << ", ignore_index=" << options.ignore_index() << ")";
  }

  void to(torch::Device device, torch::Dtype type, bool non_blocking = false) override {
    move(device, type, non_blocking);
  }
  void to(torch::Dtype type, bool non_blocking = false) override { move(type, non_blocking); }
  void to(torch::Device device, bool non_blocking = false) override { move(device, non_blocking); }

  /// See `compute_vae_loss`. Another free-bits policy: `criterion->forward<PerBit>(logits, targets, z_logits)`.
  template <typename FreeBits = PerPosition, typename Logits>
  VAELossOutput forward(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits) {
    adopt_tensors();
    return compute_vae_loss<FreeBits>(logits, targets, z_logits, options);
  }

  VAELossOptions options;

 private:
  /// One of the tensors that options may hold.
  struct Slot {
    const char* name;
    bool is_count;
    at::Tensor (*read)(const VAELossOptions&);
    void (*write)(VAELossOptions&, const at::Tensor&);
  };
  static const std::array<Slot, 6>& slots();

  at::Tensor register_as(const char* name, const at::Tensor& tensor) {
    return tensor.requires_grad() ? register_parameter(name, tensor) : register_buffer(name, tensor);
  }

  /// Registers the tensors that the options hold by now. What is no leaf belongs to the graph that made it.
  void adopt_tensors();

  template <typename... Arguments>
  void move(Arguments... arguments);

  std::array<at::Tensor, 6> registered_;  ///< in the order of the slots
};

inline auto FreeTransformerLossImpl::slots() -> const std::array<Slot, 6>& {
  using Options = VAELossOptions;
  using at::Tensor;
  static const std::array<Slot, 6> all{{
      {"weight", false, [](const Options& from) { return from.reconstruction().weight(); },
       [](Options& of, const Tensor& tensor) { of.reconstruction().weight(tensor); }},
      {"token_weight", false, [](const Options& from) { return from.reconstruction().token_weight(); },
       [](Options& of, const Tensor& tensor) { of.reconstruction().token_weight(tensor); }},
      {"normalizer", true,
       [](const Options& from) { return from.reconstruction().normalizer().tensor().value_or(Tensor()); },
       [](Options& of, const Tensor& tensor) { of.reconstruction().normalizer(tensor); }},
      {"latent_token_weight", false, [](const Options& from) { return from.kl().token_weight(); },
       [](Options& of, const Tensor& tensor) { of.kl().token_weight(tensor); }},
      {"latent_normalizer", true,
       [](const Options& from) { return from.kl().normalizer().tensor().value_or(Tensor()); },
       [](Options& of, const Tensor& tensor) { of.kl().normalizer(tensor); }},
      {"prior_logits", false, [](const Options& from) { return from.kl().prior_logits(); },
       [](Options& of, const Tensor& tensor) { of.kl().prior_logits(tensor); }},
  }};
  return all;
}

inline void FreeTransformerLossImpl::adopt_tensors() {
  for (size_t index = 0; index < slots().size(); ++index) {
    const Slot& slot = slots()[index];
    at::Tensor& registered = registered_[index];
    const at::Tensor tensor = slot.read(options);
    if (!tensor.defined() || !tensor.is_leaf() || tensor.is_same(registered)) continue;
    if (!registered.defined()) {
      registered = register_as(slot.name, tensor);
    } else if (registered.requires_grad() == tensor.requires_grad()) {
      registered.set_data(tensor.detach());
      slot.write(options, registered);
    }
  }
}

inline void FreeTransformerLossImpl::reset() {
  for (size_t index = 0; index < slots().size(); ++index) {
    at::Tensor& registered = registered_[index];
    if (!registered.defined()) continue;
    const bool is_used = slots()[index].read(options).is_same(registered);
    const bool requires_grad = registered.requires_grad();
    registered =
        register_as(slots()[index].name, torch::empty_like(registered.detach()).set_requires_grad(requires_grad));
    if (is_used) slots()[index].write(options, registered);
  }
}

template <typename... Arguments>
void FreeTransformerLossImpl::move(Arguments... arguments) {
  adopt_tensors();
  std::array<at::Tensor, 6> before;
  for (size_t index = 0; index < slots().size(); ++index) {
    if (registered_[index].defined()) before[index] = registered_[index].detach();
  }
  torch::nn::Module::to(arguments...);
  for (size_t index = 0; index < slots().size(); ++index) {
    if (!before[index].defined() || !slots()[index].is_count) continue;
    registered_[index].set_data(before[index].to(registered_[index].device()));
  }
}

/// What `TORCH_MODULE` would define, with a call operator that takes any source of logits: LibTorch's own deduces its
/// result from a `forward` that is not a template.
class FreeTransformerLoss : public torch::nn::ModuleHolder<FreeTransformerLossImpl> {
 public:
  using torch::nn::ModuleHolder<FreeTransformerLossImpl>::ModuleHolder;
  using Impl = FreeTransformerLossImpl;

  template <typename Logits>
  VAELossOutput operator()(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits) {
    return impl_->forward(logits, targets, z_logits);
  }
};

}  // namespace FREE_TRANSFORMER_TYPES

}  // namespace free_transformer

/// `AnyModule` and `Sequential` find a module's arguments by the type of its `forward`, which a template has not; for
/// this one they are dense logits, targets and z_logits: `sequential->forward<VAELossOutput>(logits, targets, z_logits)`.
template <>
inline torch::nn::AnyModule::AnyModule(std::shared_ptr<free_transformer::FreeTransformerLossImpl> module)
    : content_(std::make_unique<torch::nn::AnyModuleHolder<free_transformer::FreeTransformerLossImpl, const at::Tensor&,
                                                           const at::Tensor&, const at::Tensor&>>(std::move(module))) {}
