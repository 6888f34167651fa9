// A program that loads its loss by dlopen, and has the library in itself, too: losses, gradients, graphs, errors and the memory
// that `inplace` has written over pass between the two copies. The argument is the plug-in's file.
#include <dlfcn.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <vector>

#include <free_transformer/reconstruction_loss.hpp>
#include <free_transformer/vae_loss.hpp>

#include "equations.hpp"
#include "expect.hpp"
#include "plug_in.hpp"

namespace {

struct Inputs {
  at::Tensor logits = at::randn({24, 500}).requires_grad_(), z_logits = at::randn({24, 8}).requires_grad_();
  at::Tensor targets = at::randint(500, {24}, at::kLong);
};

void expect_numbers(const std::string& what, const at::Tensor& loss, const std::vector<at::Tensor>& found,
                    const Inputs& inputs) {
  const at::Tensor logits = exact_leaf(inputs.logits), z_logits = exact_leaf(inputs.z_logits);
  const at::Tensor expected = cross_entropy(logits, inputs.targets) + kl_above(z_logits, 0.3466).mean();
  const auto gradients = torch::autograd::grad({expected}, {logits, z_logits});
  expect_close(loss, expected, what);
  expect_close(found[0], gradients[0], what + ", gradient of the logits");
  expect_close(found[1], gradients[1], what + ", gradient of the latent bits");
}

/// The graph is made by the plug-in and walked by the program, alone and joined with one of its own.
void share_a_graph(ComputeLoss compute, bool inplace) {
  const Inputs inputs;
  const std::string how = inplace ? "in place" : "plug-in";
  PlugInLoss of_plug_in;
  compute(inputs.logits * 1, inputs.targets, inputs.z_logits, inplace, of_plug_in);
  const auto [own, metrics] = free_transformer::compute_vae_loss(inputs.logits, inputs.targets, inputs.z_logits, 8);
  const at::Tensor half = (of_plug_in.loss + own) / 2;
  expect_numbers(how, of_plug_in.loss, torch::autograd::grad({half}, {inputs.logits, inputs.z_logits}), inputs);
  expect(of_plug_in.loss.equal(own), how + ": other bits than the program's own copy gives");
  expect_close(at::full({}, of_plug_in.elbo, at::kDouble), at::full({}, metrics.at("bound/elbo"), at::kDouble), how);
}

void catch_an_error(ComputeLoss compute) {
  const Inputs inputs;
  PlugInLoss result;
  try {
    compute(inputs.logits, inputs.targets + 500, inputs.z_logits, false, result);
    expect(false, "targets out of range are taken");
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    expect(text.find("compute_reconstruction_loss: ") == 0, "another error than the library's: " + text);
  }
}

/// What the plug-in has overwritten the program's copy knows as well, also where there is no graph that would say it; and no
/// longer once somebody has written there.
void reuse_overwritten_logits(ComputeLoss compute) {
  const Inputs inputs;
  const at::Tensor logits = inputs.logits * 1;
  PlugInLoss result;
  compute(logits, inputs.targets, inputs.z_logits, true, result);
  for (const at::Tensor& alias : {logits, logits.detach(), logits.detach().slice(0, 3, 9)}) {
    try {
      free_transformer::compute_reconstruction_loss(alias, inputs.targets.narrow(0, 0, alias.size(0)));
      expect(false, "logits that the plug-in has overwritten are taken");
    } catch (const c10::Error& error) {
      const std::string text = error.what_without_backtrace();
      expect(text.find("logits must not be used again after inplace") != std::string::npos, "another error: " + text);
    }
  }
  const at::Tensor memory = logits.detach().copy_(inputs.logits.detach());
  const at::Tensor loss = free_transformer::compute_reconstruction_loss(memory, inputs.targets);
  expect_close(loss, cross_entropy(exact_leaf(inputs.logits), inputs.targets), "logits written anew");
}

void use(void* plug_in) {
  void* const symbol = dlsym(plug_in, "compute_loss");
  if (!symbol) return expect(false, "the plug-in has no loss");
  const auto compute = reinterpret_cast<ComputeLoss>(symbol);
  share_a_graph(compute, false);
  share_a_graph(compute, true);
  catch_an_error(compute);
  reuse_overwritten_logits(compute);
}

}  // namespace

int main(int count, char** arguments) {
  at::manual_seed(5);
  for (int time = 0; time < 2; ++time) {  // unloaded and loaded again, as a host that updates its plug-ins does
    void* const plug_in = count == 2 ? dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (!plug_in) {
      expect(false, count == 2 ? dlerror() : "the plug-in's file must be named");
      break;
    }
    use(plug_in);
    expect(dlclose(plug_in) == 0, "the plug-in cannot be unloaded");
  }
  return verdict("plug_in");
}
