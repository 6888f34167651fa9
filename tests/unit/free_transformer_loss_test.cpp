#include "free_transformer/free_transformer_loss.hpp"

#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

struct ModelImpl : torch::nn::Cloneable<ModelImpl> {
  ModelImpl() { reset(); }
  void reset() override {
    head = register_module("head", torch::nn::Linear(3, 5));
    criterion = register_module("criterion", FreeTransformerLoss(/*latent_dim=*/4, /*beta_kl=*/0.5));
  }
  torch::nn::Linear head{nullptr};
  FreeTransformerLoss criterion{nullptr};
};

const Tensor logits = eighths({3, 5});
const Tensor targets = numeric::tensor(std::vector<int64_t>{4, -100, 2}, {3});
const Tensor z_logits = eighths({3, 4});

std::string printed(const FreeTransformerLoss& criterion) {
  std::ostringstream stream;
  stream << criterion;
  return stream.str();
}

}  // namespace

namespace user {

struct ScaledLogits {
  torch::Tensor logits;
};

free_transformer::ReconstructionResult reconstruct(const ScaledLogits& source, const torch::Tensor& labels,
                                                   const free_transformer::ReconstructionLossOptions& options) {
  return free_transformer::reconstruct(source.logits * 2, labels, options);
}

}  // namespace user

TEST_CASE("The module computes what the function does", "[module]") {
  FreeTransformerLoss criterion(4, 0.5, 0.25, 2);
  const Tensor expected = compute_vae_loss(logits, targets.clamp_min(0), z_logits, 4, 0.5, 0.25, 2).loss;
  const auto [loss, metrics] = criterion(logits, targets.clamp_min(0), z_logits);
  CHECK(same_bits(loss, expected));
  CHECK(same_bits(criterion->forward(logits, targets.clamp_min(0), z_logits).loss, expected));
  CHECK_THAT(metrics.at("loss/total"), Catch::Matchers::WithinRel(expected.item<double>(), 1e-14));
}

TEST_CASE("The module takes options, another policy and another source of logits", "[module]") {
  FreeTransformerLoss criterion(VAELossOptions().latent_dim(4).free_bits(0.125));
  CHECK(same_bits(criterion->forward<PerBit>(logits, targets, z_logits).loss,
                  compute_vae_loss<PerBit>(logits, targets, z_logits, 4, 1.0, 0.125).loss));
  CHECK(same_bits(criterion(user::ScaledLogits{logits}, targets, z_logits).loss,
                  compute_vae_loss(logits * 2, targets, z_logits, 4, 1.0, 0.125).loss));
}

TEST_CASE("The module's defaults are those of the function", "[module]") {
  FreeTransformerLoss criterion;
  const Tensor sixteen = eighths({3, 16});
  CHECK(same_bits(criterion(logits, targets, sixteen).loss, compute_vae_loss(logits, targets, sixteen).loss));
  CHECK(criterion->parameters().empty());
  CHECK(criterion->buffers().empty());
}

TEST_CASE("The module prints its settings", "[module]") {
  CHECK(printed(FreeTransformerLoss()) ==
        "free_transformer::FreeTransformerLoss(latent_dim=16, beta_kl=1, free_bits=0.3466, ignore_index=-100)");
  CHECK(printed(FreeTransformerLoss(4, 0.25, 0.0, 0)) ==
        "free_transformer::FreeTransformerLoss(latent_dim=4, beta_kl=0.25, free_bits=0, ignore_index=0)");
}

TEST_CASE("Options changed between calls are used by the next call", "[module]") {
  FreeTransformerLoss criterion(4);
  for (const double beta_kl : {0.0, 0.5, 2.0}) {
    criterion->options.beta_kl(beta_kl).free_bits(0.125);
    CHECK(same_bits(criterion(logits, targets, z_logits).loss,
                    compute_vae_loss(logits, targets, z_logits, 4, beta_kl, 0.125).loss));
  }
}

TEST_CASE("A clone has the options of its original, and keeps them when those change", "[module]") {
  FreeTransformerLoss criterion(4, 0.25, 0.125, 2);
  const auto clone = std::dynamic_pointer_cast<FreeTransformerLossImpl>(criterion->clone());
  REQUIRE(clone);
  criterion->options.beta_kl(9).latent_dim(7);
  CHECK(clone->options.latent_dim() == 4);
  CHECK(clone->options.beta_kl() == 0.25);
  CHECK(clone->options.free_bits() == 0.125);
  CHECK(clone->options.ignore_index() == 2);
  clone->options.free_bits(3);
  CHECK(criterion->options.free_bits() == 0.125);
}

TEST_CASE("The module lives in a model that is cloned, converted and trained", "[module]") {
  const auto model = std::make_shared<ModelImpl>();
  model->criterion->options.free_bits(0.0625);
  const auto clone = std::dynamic_pointer_cast<ModelImpl>(model->clone());
  REQUIRE(clone);
  CHECK(clone->criterion->options.free_bits() == 0.0625);
  CHECK(clone->criterion.get() != model->criterion.get());
  clone->to(torch::kDouble);
  clone->eval();
  CHECK_FALSE(clone->criterion->is_training());
  const auto [loss, metrics] = clone->criterion(clone->head(eighths({3, 3})), targets, z_logits);
  CHECK(loss.scalar_type() == torch::kDouble);
  loss.backward();
  CHECK(clone->head->weight.grad().isfinite().all().item<bool>());
  CHECK(clone->criterion->options.latent_dim() == 4);
  CHECK(clone->parameters().size() == 2);
}
