// Several threads, each with a model of its own, as population-based training or a server that fine-tunes has them. Each must
// get the bits that it gets alone, and the first step's loss is LibTorch's own.
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <thread>
#include <vector>

#include <free_transformer/linear_logits.hpp>
#include <free_transformer/vae_loss.hpp>

#include "equations.hpp"
#include "expect.hpp"

namespace {

constexpr int64_t workers = 4, steps = 5, tokens = 48, width = 16, vocabulary = 320, latent_bits = 16;

/// Small enough that LibTorch's matrix products take one thread, and so give the same bits every time.
struct Model {
  explicit Model(int64_t worker)
      : hidden(at::randn({tokens, width})),
        head(at::randn({vocabulary, width}).requires_grad_()),
        encoder(at::randn({latent_bits, width}).requires_grad_()),
        targets((at::arange(tokens, at::kLong) * 13 + worker).remainder(vocabulary)) {}

  at::Tensor hidden, head, encoder, targets;
};

struct Run {
  std::vector<at::Tensor> losses;
  at::Tensor head, encoder;
  double elbo = 0;
  bool refused = false;
};

/// Dense logits, given in place, then the fused head; a call that is refused; the metrics of all steps.
Run train(const Model& start) {
  using namespace free_transformer;
  Model model = start;
  model.head = start.head.detach().clone().requires_grad_();
  model.encoder = start.encoder.detach().clone().requires_grad_();
  Run run;
  LossMetrics metrics;
  auto options = VAELossOptions();
  options.reconstruction().inplace(true);
  for (int64_t step = 0; step < steps; ++step) {
    const at::Tensor z_logits = at::linear(model.hidden, model.encoder);
    const auto [dense, of_step] =
        compute_vae_loss(at::linear(model.hidden, model.head), model.targets, z_logits, options);
    const at::Tensor fused = compute_reconstruction_loss(LinearLogits(model.hidden, model.head), model.targets);
    const auto gradients = torch::autograd::grad({dense + fused}, {model.head, model.encoder});
    metrics += of_step;
    run.losses.insert(run.losses.end(), {dense.detach(), fused.detach()});
    const at::NoGradGuard no_grad;
    model.head.sub_(gradients[0], 0.5);
    model.encoder.sub_(gradients[1], 0.5);
  }
  try {
    compute_kl_divergence(model.hidden, latent_bits, /*free_bits=*/-1);
  } catch (const c10::Error&) {
    run.refused = true;
  }
  run.head = model.head.detach(), run.encoder = model.encoder.detach();
  run.elbo = metrics.at("bound/elbo");
  return run;
}

void expect_same(const Run& found, const Run& alone, const std::string& worker) {
  expect(found.refused && alone.refused, worker + ": a negative budget is taken");
  expect(found.losses.size() == alone.losses.size(), worker + ": another number of losses");
  for (size_t index = 0; index < found.losses.size() && index < alone.losses.size(); ++index) {
    expect(found.losses[index].equal(alone.losses[index]), worker + ": loss " + std::to_string(index));
  }
  expect(found.head.equal(alone.head) && found.encoder.equal(alone.encoder), worker + ": other weights than alone");
  expect(at::full({}, found.elbo, at::kDouble).equal(at::full({}, alone.elbo, at::kDouble)), worker + ": metrics");
}

void expect_libtorch(const Run& run, const Model& model, const std::string& worker) {
  const at::Tensor logits = at::linear(model.hidden, model.head), z_logits = at::linear(model.hidden, model.encoder);
  const at::Tensor nll = cross_entropy(exact_leaf(logits), model.targets);
  expect_close(run.losses[0], nll + kl_above(exact_leaf(z_logits), 0.3466).mean(), worker + ", dense");
  expect_close(run.losses[1], nll, worker + ", fused");
  expect((run.losses[2 * steps - 2] < run.losses[0]).item<bool>(), worker + ": the loss does not fall");
}

}  // namespace

int main() {
  at::manual_seed(4);
  std::vector<Model> models;
  for (int64_t worker = 0; worker < workers; ++worker) models.emplace_back(worker);
  std::vector<Run> together(models.size());
  std::vector<std::thread> threads;
  for (size_t worker = 0; worker < models.size(); ++worker) {
    threads.emplace_back([&, worker] { together[worker] = train(models[worker]); });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t worker = 0; worker < models.size(); ++worker) {
    const std::string name = "worker " + std::to_string(worker);
    expect_same(together[worker], train(models[worker]), name);
    expect_libtorch(together[worker], models[worker], name);
  }
  return verdict("worker_threads");
}
