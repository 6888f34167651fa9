/// The loss as a module that holds its options.
#pragma once

#include <c10/core/InferenceMode.h>
#include <c10/core/TensorImpl.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/container/any.h>
#include <torch/nn/pimpl.h>
#include <torch/ordered_dict.h>
#include <torch/serialize/archive.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "free_transformer/detail/checks/vae_loss.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/module_buffers.hpp"
#include "free_transformer/vae_loss.hpp"

namespace free_transformer {

inline namespace FREE_TRANSFORMER_TYPES {

/// `compute_vae_loss` as a `torch::nn::Module`, whose state are the tensors that its options hold:
/// - A leaf that requires grad, the learned `prior_logits`, is a parameter: the caller's tensor itself, the same over
///   all calls and conversions. Set it anew if it requires grad only later.
/// - Any other leaf is a buffer: a tensor of the module's own in the caller's memory (a copy of an inference tensor).
///   What the caller writes counts; what replaces, converts or loads the buffer leaves the caller's tensor alone.
///   `to()` with a type leaves a normalizer's own, which may count beyond a half type.
/// - What is no leaf belongs to the graph that made it, and is used as it is.
/// `options` may be changed between calls. What is set, replaced or taken away there is so in the module with the next
/// call, `to()`, `torch::save`, `torch::load` or `adopt_tensors()`, and in a clone. Another learned prior is another
/// parameter, which an optimizer made before does not train. A graph keeps the fixed tensors that its call had.
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

  /// Called by `clone()`: tensors of the module's own instead of those shared with the original.
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

  // As `torch::save` and `torch::load` call them.
  inline void save(torch::serialize::OutputArchive& archive) const override;
  inline void load(torch::serialize::InputArchive& archive) override;

  /// Makes the module's parameters and buffers those that the options hold by now, as each call does. For an optimizer
  /// that is made after `options` got a learned prior and before the next call.
  void adopt_tensors();

  /// See `compute_vae_loss`. Another free-bits policy: `criterion->forward<PerBit>(logits, targets, z_logits)`.
  template <typename FreeBits = PerPosition, typename Logits>
  VAELossOutput forward(const Logits& logits, const at::Tensor& targets, const at::Tensor& z_logits) {
    adopt_tensors();
    return compute_vae_loss<FreeBits>(logits, targets, z_logits, options_of_call());
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

  /// What the module has registered for a slot. A parameter stays one while its gradient is switched off.
  struct Registered {
    at::Tensor tensor;
    bool is_parameter = false;
  };
  static Registered owned(const at::Tensor& tensor);
  static at::Tensor copy_of(const at::Tensor& tensor);
  static void part_from_caller(const at::Tensor& buffer);

  void assign(const Slot& slot, Registered& registered, const Registered& next);
  void forget(const Slot& slot, Registered& registered);

  torch::OrderedDict<std::string, at::Tensor>& dictionary(const Registered& registered) {
    return registered.is_parameter ? parameters_ : detail::buffers_of(*this);
  }

  /// The options with aliases of the buffers, which later conversions do not reach: a graph keeps what it has seen.
  VAELossOptions options_of_call() const;

  template <typename... Arguments>
  void move(Arguments... arguments);

  std::array<Registered, 6> registered_;  ///< in the order of the slots
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
    Registered& registered = registered_[index];
    const at::Tensor tensor = slot.read(options);
    const bool is_registered =
        tensor.is_same(registered.tensor) &&
        (registered.is_parameter || !tensor.defined() || !(tensor.requires_grad() || tensor.is_inference()));
    if (is_registered) continue;
    if (tensor.defined() && tensor.is_leaf()) {
      assign(slot, registered, owned(tensor));
      slot.write(options, registered.tensor);
    } else {
      forget(slot, registered);
    }
  }
}

/// A learned tensor itself. Of others a tensor that shares the memory but not the object, so that `set_data`, by which
/// LibTorch converts and loads, does not reach the caller's.
inline auto FreeTransformerLossImpl::owned(const at::Tensor& tensor) -> Registered {
  const bool learns = tensor.requires_grad();
  if (tensor.is_inference()) return {copy_of(tensor), learns};  // itself it could not be saved for backward
  return {learns ? tensor : tensor.detach(), learns};
}

inline at::Tensor FreeTransformerLossImpl::copy_of(const at::Tensor& tensor) {
  const c10::InferenceMode no_inference(false);
  return tensor.detach().clone().set_requires_grad(tensor.requires_grad());
}

/// For a buffer whose memory is another than the caller's, or is about to be (`load` counts as a change): from here on
/// autograd counts the changes of the two apart.
inline void FreeTransformerLossImpl::part_from_caller(const at::Tensor& buffer) {
  if (buffer.is_inference()) return;  // converted where nothing is counted; the next call replaces it
  buffer.unsafeGetTensorImpl()->set_version_counter(c10::VariableVersion(0));
}

/// Throws if a derived class has registered a tensor of that name.
inline void FreeTransformerLossImpl::assign(const Slot& slot, Registered& registered, const Registered& next) {
  if (registered.is_parameter != next.is_parameter) forget(slot, registered);
  if (registered.tensor.defined()) {
    dictionary(next)[slot.name] = next.tensor;
  } else {
    dictionary(next).insert(slot.name, next.tensor);
  }
  registered = next;
}

inline void FreeTransformerLossImpl::forget(const Slot& slot, Registered& registered) {
  const bool is_there = registered.tensor.defined() && dictionary(registered).contains(slot.name);
  if (is_there) dictionary(registered).erase(slot.name);
  registered = {};
}

inline void FreeTransformerLossImpl::reset() {
  for (size_t index = 0; index < slots().size(); ++index) {
    const Slot& slot = slots()[index];
    const Registered before = registered_[index];
    const at::Tensor tensor = slot.read(options);
    if (before.tensor.defined()) {
      forget(slot, registered_[index]);
      assign(slot, registered_[index], {copy_of(before.tensor), before.is_parameter});
    }
    if (!tensor.defined()) continue;
    if (tensor.is_same(before.tensor)) {
      slot.write(options, registered_[index].tensor);
    } else if (tensor.is_leaf()) {
      slot.write(options, copy_of(tensor));  // set since the last call
    }
  }
}

inline VAELossOptions FreeTransformerLossImpl::options_of_call() const {
  VAELossOptions aliased = options;
  for (size_t index = 0; index < slots().size(); ++index) {
    const Registered& registered = registered_[index];
    if (registered.tensor.defined() && !registered.is_parameter) {
      slots()[index].write(aliased, registered.tensor.detach());
    }
  }
  return aliased;
}

inline void FreeTransformerLossImpl::save(torch::serialize::OutputArchive& archive) const {
  FreeTransformerLossImpl current(*this);
  current.adopt_tensors();
  current.torch::nn::Module::save(archive);
}

inline void FreeTransformerLossImpl::load(torch::serialize::InputArchive& archive) {
  adopt_tensors();
  for (const Registered& registered : registered_) {
    if (registered.tensor.defined() && !registered.is_parameter) part_from_caller(registered.tensor);
  }
  torch::nn::Module::load(archive);
}

template <typename... Arguments>
void FreeTransformerLossImpl::move(Arguments... arguments) {
  adopt_tensors();
  std::array<at::Tensor, 6> before;
  for (size_t index = 0; index < slots().size(); ++index) {
    if (registered_[index].tensor.defined()) before[index] = registered_[index].tensor.detach();
  }
  torch::nn::Module::to(arguments...);
  for (size_t index = 0; index < slots().size(); ++index) {
    const Registered& registered = registered_[index];
    if (!before[index].defined() || registered.is_parameter) continue;
    if (slots()[index].is_count) registered.tensor.set_data(before[index].to(registered.tensor.device()));
    if (!registered.tensor.is_alias_of(before[index])) part_from_caller(registered.tensor);
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
