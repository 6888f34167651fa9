// LibTorch's data loader with worker threads and sentences of many lengths, padded to the longest of their batch by a token of
// the vocabulary. Padding has no part in either term, its gradient is 0, and a batch of nothing else costs nothing.
#include <torch/csrc/autograd/autograd.h>
#include <torch/data.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <free_transformer/vae_loss.hpp>

#include "equations.hpp"
#include "expect.hpp"

namespace {

constexpr int64_t padding = 0, vocabulary = 50, latent_bits = 8, sentences = 14, sentences_of_a_batch = 4;
constexpr double beta = 0.5, free_bits = 0.3;

/// Sentences of 1 to 5 tokens and, in the last batch, of a single one, after which nothing is left to predict.
class Sentences : public torch::data::datasets::Dataset<Sentences, at::Tensor> {
 public:
  at::Tensor get(size_t index) override {
    const auto number = static_cast<int64_t>(index);
    const bool is_last_batch = number >= sentences / sentences_of_a_batch * sentences_of_a_batch;
    const int64_t length = is_last_batch ? 1 : 1 + number % 5;
    return (at::arange(length, at::kLong) * 7 + number).remainder(vocabulary - 1) + 1;
  }
  torch::optional<size_t> size() const override { return static_cast<size_t>(sentences); }
};

struct Batch {
  at::Tensor tokens, targets;
};

struct PadToTheLongest : torch::data::transforms::Collation<Batch, std::vector<at::Tensor>> {
  Batch apply_batch(std::vector<at::Tensor> examples) override {
    int64_t longest = 0;
    for (const at::Tensor& example : examples) longest = std::max(longest, example.size(0));
    for (at::Tensor& example : examples) {
      example = at::constant_pad_nd(example, {0, longest + 1 - example.size(0)}, padding);
    }
    const at::Tensor padded = at::stack(examples);
    return {padded.narrow(1, 0, longest), padded.narrow(1, 1, longest)};
  }
};

struct Model {
  at::Tensor embedding = at::randn({vocabulary, 16}).requires_grad_();
  at::Tensor head = at::randn({vocabulary, 16}).requires_grad_();
  at::Tensor encoder = at::randn({latent_bits, 16}).requires_grad_();
};

/// Sums over all batches, from the equations.
struct Epoch {
  at::Tensor nll = at::zeros({}, at::kDouble), kl = at::zeros({}, at::kDouble), count = at::zeros({}, at::kLong);
};

void train_on(const Batch& batch, const Model& model, free_transformer::LossMetrics& metrics, Epoch& epoch) {
  const at::Tensor hidden = at::embedding(model.embedding, batch.tokens);
  const at::Tensor logits = at::linear(hidden, model.head), z_logits = at::linear(hidden, model.encoder);
  const auto options = free_transformer::VAELossOptions()
                           .latent_dim(latent_bits)
                           .beta_kl(beta)
                           .free_bits(free_bits)
                           .ignore_index(padding)
                           .mask_ignored_latents(true);
  const auto [loss, of_batch] = free_transformer::compute_vae_loss(logits, batch.targets, z_logits, options);
  metrics += of_batch;
  const auto found = torch::autograd::grad({loss}, {logits, z_logits}, {}, /*retain_graph=*/true);
  loss.backward();

  const at::Tensor is_counted = batch.targets != padding, is_padding = is_counted.logical_not();
  expect(found[0].index({is_padding}).eq(0).all().item<bool>(), "padding moves the logits");
  expect(found[1].index({is_padding}).eq(0).all().item<bool>(), "padding moves the latent bits");
  if (!is_counted.any().item<bool>()) {
    expect_close(loss, at::zeros({}), "a batch of padding costs something");
    return expect(found[0].eq(0).all().item<bool>(), "a batch of padding has a gradient");
  }
  const at::Tensor exact_logits = exact_leaf(logits), exact_z = exact_leaf(z_logits);
  const at::Tensor nll = cross_entropy(exact_logits, batch.targets, padding);
  const at::Tensor kl = kl_above(exact_z, free_bits).index({is_counted});
  const at::Tensor expected = nll + beta * kl.mean();
  const auto expected_gradients = torch::autograd::grad({expected}, {exact_logits, exact_z});
  expect_close(loss, expected, "loss of a batch");
  expect_close(found[0], expected_gradients[0], "gradient of the logits");
  expect_close(found[1], expected_gradients[1], "gradient of the latent bits");
  epoch.nll += nll.detach() * is_counted.sum();
  epoch.kl += kl.detach().sum();
  epoch.count += is_counted.sum();
}

}  // namespace

int main() {
  at::manual_seed(2);
  const Model model;
  free_transformer::LossMetrics metrics;
  Epoch epoch;
  int64_t batches = 0;
  auto loader = torch::data::make_data_loader<torch::data::samplers::SequentialSampler>(
      Sentences().map(PadToTheLongest()),
      torch::data::DataLoaderOptions().batch_size(static_cast<size_t>(sentences_of_a_batch)).workers(2));
  for (const Batch& batch : *loader) {
    train_on(batch, model, metrics, epoch);
    ++batches;
  }
  expect(batches == 4, "another number of batches: " + std::to_string(batches));
  const at::Tensor expected = (epoch.nll + beta * epoch.kl) / epoch.count;
  expect_close(at::full({}, metrics.at("loss/total"), at::kFloat), expected, "the epoch's loss");
  expect(model.embedding.grad().any().item<bool>(), "the embedding learns nothing");
  return verdict("padded_loader");
}
