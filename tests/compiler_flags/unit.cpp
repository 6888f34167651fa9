// Compiled once for each set of flags, all of which are linked into one program. FLAGS is their text.
#include "losses.hpp"

#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include <free_transformer/loss_metrics.hpp>
#include <free_transformer/losses.hpp>

namespace {

using namespace free_transformer;

at::Tensor leaf(const at::Tensor& values) { return values.detach().clone().requires_grad_(); }

template <typename Function>
std::string refusal_of(const Function& function) {
  try {
    function();
  } catch (const c10::Error& error) {
    return error.what_without_backtrace();
  }
  return {};
}

double read(const LossMetrics& metrics, const char* name) { return metrics.at(name); }

Outcome run(const Inputs& inputs) {
  Outcome outcome;
  auto& numbers = outcome.numbers;
  const at::Tensor logits = leaf(inputs.logits), z_logits = leaf(inputs.z_logits);
  const at::Tensor hidden = leaf(inputs.hidden), weight = leaf(inputs.weight);
  const auto add = [&](const at::Tensor& loss, const std::vector<at::Tensor>& of) {
    const auto gradients = torch::autograd::grad({loss}, of);
    numbers.push_back(loss.detach());
    numbers.insert(numbers.end(), gradients.begin(), gradients.end());
  };
  add(compute_reconstruction_loss(logits, inputs.targets), {logits});
  add(compute_reconstruction_loss(logits * 1, inputs.targets, ReconstructionLossOptions().inplace(true)), {logits});
  add(compute_reconstruction_loss(logits, inputs.targets,
                                  ReconstructionLossOptions().label_smoothing(0.125).z_loss(0.25).softcap(8)),
      {logits});
  add(compute_reconstruction_loss(LinearLogits(hidden, weight), inputs.targets), {hidden, weight});
  add(compute_kl_divergence(z_logits), {z_logits});
  add(compute_kl_divergence<PerBit>(z_logits, 16, 0.01), {z_logits});
  auto [loss, metrics] = compute_vae_loss<BatchMean>(logits, inputs.targets, z_logits);
  add(loss, {logits, z_logits});
  const auto statistics = compute_token_statistics(inputs.logits, inputs.targets);
  numbers.insert(numbers.end(), {statistics.loss, statistics.entropy, statistics.log_sum_exp});
  for (const char* name : {"loss/total", "loss/kl", "latent/kl_bits", "bound/elbo"}) {
    numbers.push_back(at::scalar_tensor(read(metrics, name), at::kDouble));
  }

  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const at::Tensor x = inputs.logits.detach(), z = inputs.z_logits.detach();
  for (const double bad : {nan, inf, -inf, -1.0}) {
    outcome.refusals.push_back(refusal_of([&] { compute_kl_divergence(z, 16, bad); }));
    outcome.refusals.push_back(refusal_of([&] { compute_vae_loss(x, inputs.targets, z, 16, bad); }));
    const auto refused = [&](const ReconstructionLossOptions& options) {
      outcome.refusals.push_back(refusal_of([&] { compute_reconstruction_loss(x, inputs.targets, options); }));
    };
    refused(ReconstructionLossOptions().z_loss(bad));
    refused(ReconstructionLossOptions().softcap(bad));
    refused(ReconstructionLossOptions().label_smoothing(bad));
    refused(ReconstructionLossOptions().normalizer(bad));
    at::Tensor weights = at::ones_like(inputs.targets, at::kDouble);
    weights.view({-1})[1] = at::full({}, bad, at::kDouble);
    refused(ReconstructionLossOptions().token_weight(weights));
    refused(ReconstructionLossOptions().normalizer(weights.view({-1})[1]));
  }
  return outcome;
}

const bool announced = (units().push_back({FLAGS, run}), true);

}  // namespace
