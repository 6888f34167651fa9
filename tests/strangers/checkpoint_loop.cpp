// Train, write a checkpoint, and go on from it in another process' place: the model holds the loss as a module, with a prior that
// is learned, and beta rises. What goes on must be what never stopped, bit for bit, and each step's loss LibTorch's own.
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>
#include <torch/serialize.h>

#include <string>
#include <vector>

#include <free_transformer/free_transformer_loss.hpp>
#include <free_transformer/schedules.hpp>

#include "equations.hpp"
#include "expect.hpp"

namespace {

constexpr int64_t vocabulary = 300, width = 24, latent_bits = 6, steps = 6;
constexpr double free_bits = 0.2;

struct ModelImpl : torch::nn::Module {
  ModelImpl() {
    embedding = register_module("embedding", torch::nn::Embedding(vocabulary, width));
    head = register_module("head", torch::nn::Linear(width, vocabulary));
    encoder = register_module("encoder", torch::nn::Linear(width, latent_bits));
    auto options = free_transformer::VAELossOptions().latent_dim(latent_bits).free_bits(free_bits);
    options.kl().prior_logits(at::full({latent_bits}, 0.25).requires_grad_());
    criterion = register_module("criterion", free_transformer::FreeTransformerLoss(options));
  }

  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear head{nullptr}, encoder{nullptr};
  free_transformer::FreeTransformerLoss criterion{nullptr};
};
TORCH_MODULE(Model);

struct Trainer {
  Model model;
  torch::optim::AdamW optimizer{model->parameters(), torch::optim::AdamWOptions(0.01)};
};

/// What this step's loss and its gradients are in float64.
void expect_step(const free_transformer::VAELossOutput& output, const std::vector<at::Tensor>& inputs,
                 const at::Tensor& targets, double beta) {
  const auto found = torch::autograd::grad({output.loss}, inputs, {}, /*retain_graph=*/true);
  std::vector<at::Tensor> exact;
  exact.reserve(inputs.size());
  for (const at::Tensor& input : inputs) exact.push_back(exact_leaf(input));
  const at::Tensor kl = kl_above(exact[1], free_bits, exact[2].expand_as(exact[1]));
  const at::Tensor expected = cross_entropy(exact[0], targets) + beta * kl.mean();
  const auto expected_gradients = torch::autograd::grad({expected}, exact);
  expect_close(output.loss, expected, "loss of a step");
  expect_close(found[0], expected_gradients[0], "gradient of the logits");
  expect_close(found[1], expected_gradients[1], "gradient of the latent bits");
  // Each position adds beta (r - p) / T of both signs: the roundings are of what is added up.
  const at::Tensor added = (exact[2].sigmoid() - exact[1].sigmoid()).abs().flatten(0, -2).mean(0) * beta;
  expect_close(found[2], expected_gradients[2], "gradient of the prior", added);
}

void train(Trainer& trainer, int64_t first, int64_t end) {
  static const auto beta = free_transformer::Schedule::parse("linear:0.5:1:4");
  Model& model = trainer.model;
  for (int64_t step = first; step < end; ++step) {
    const at::Tensor tokens = (at::arange(4 * 17, at::kLong) * 31 + step * 11).remainder(vocabulary).reshape({4, 17});
    const at::Tensor targets = tokens.slice(1, 1);
    const at::Tensor hidden = model->embedding(tokens.slice(1, 0, 16));
    const at::Tensor logits = model->head(hidden), z_logits = model->encoder(hidden);
    auto& options = model->criterion->options;
    options.beta_kl(beta(step));
    const auto output = model->criterion(logits, targets, z_logits);
    expect_step(output, {logits, z_logits, options.kl().prior_logits()}, targets, beta(step));
    trainer.optimizer.zero_grad();
    output.loss.backward();
    trainer.optimizer.step();
  }
}

}  // namespace

int main() {
  at::manual_seed(3);
  Trainer unbroken;
  const at::Tensor prior_before = unbroken.model->criterion->options.kl().prior_logits().detach().clone();
  train(unbroken, 0, steps / 2);
  torch::save(unbroken.model, "checkpoint_loop.model");
  torch::save(unbroken.optimizer, "checkpoint_loop.optimizer");
  train(unbroken, steps / 2, steps);

  Trainer resumed;
  torch::load(resumed.model, "checkpoint_loop.model");
  torch::load(resumed.optimizer, "checkpoint_loop.optimizer");
  train(resumed, steps / 2, steps);

  const auto expected = unbroken.model->named_parameters(), found = resumed.model->named_parameters();
  expect(expected.size() == 6 && found.size() == expected.size(), "another number of parameters");
  for (const auto& parameter : expected) {
    expect(found[parameter.key()].equal(parameter.value()), parameter.key() + " is not what it was without a break");
  }
  expect(!prior_before.equal(resumed.model->criterion->options.kl().prior_logits().detach()),
         "the prior learns nothing");
  return verdict("checkpoint_loop");
}
