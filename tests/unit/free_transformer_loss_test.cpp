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

const Tensor module_logits = eighths({3, 5});
const Tensor module_targets = numeric::tensor(std::vector<int64_t>{4, -100, 2}, {3});
const Tensor module_z_logits = eighths({3, 4});

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

TEST_CASE("The module computes what the function does", "[module][cpu]") {
  FreeTransformerLoss criterion(4, 0.5, 0.25, 2);
  const Tensor expected =
      compute_vae_loss(module_logits, module_targets.clamp_min(0), module_z_logits, 4, 0.5, 0.25, 2).loss;
  const auto [loss, metrics] = criterion(module_logits, module_targets.clamp_min(0), module_z_logits);
  CHECK(same_bits(loss, expected));
  CHECK(same_bits(criterion->forward(module_logits, module_targets.clamp_min(0), module_z_logits).loss, expected));
  CHECK_THAT(metrics.at("loss/total"), Catch::Matchers::WithinRel(expected.item<double>(), 1e-14));
}

TEST_CASE("The module takes options, another policy and another source of logits", "[module][cpu]") {
  FreeTransformerLoss criterion(VAELossOptions().latent_dim(4).free_bits(0.125));
  CHECK(same_bits(criterion->forward<PerBit>(module_logits, module_targets, module_z_logits).loss,
                  compute_vae_loss<PerBit>(module_logits, module_targets, module_z_logits, 4, 1.0, 0.125).loss));
  CHECK(same_bits(criterion(user::ScaledLogits{module_logits}, module_targets, module_z_logits).loss,
                  compute_vae_loss(module_logits * 2, module_targets, module_z_logits, 4, 1.0, 0.125).loss));
}

TEST_CASE("The module's defaults are those of the function", "[module][cpu]") {
  FreeTransformerLoss criterion;
  const Tensor sixteen = eighths({3, 16});
  CHECK(same_bits(criterion(module_logits, module_targets, sixteen).loss,
                  compute_vae_loss(module_logits, module_targets, sixteen).loss));
  CHECK(criterion->parameters().empty());
  CHECK(criterion->buffers().empty());
}

TEST_CASE("The module prints its settings", "[module][cpu]") {
  CHECK(printed(FreeTransformerLoss()) ==
        "free_transformer::FreeTransformerLoss(latent_dim=16, beta_kl=1, free_bits=0.3466, ignore_index=-100)");
  CHECK(printed(FreeTransformerLoss(4, 0.25, 0.0, 0)) ==
        "free_transformer::FreeTransformerLoss(latent_dim=4, beta_kl=0.25, free_bits=0, ignore_index=0)");
}

TEST_CASE("Options changed between calls are used by the next call", "[module][cpu]") {
  FreeTransformerLoss criterion(4);
  for (const double beta_kl : {0.0, 0.5, 2.0}) {
    criterion->options.beta_kl(beta_kl).free_bits(0.125);
    CHECK(same_bits(criterion(module_logits, module_targets, module_z_logits).loss,
                    compute_vae_loss(module_logits, module_targets, module_z_logits, 4, beta_kl, 0.125).loss));
  }
}

TEST_CASE("A clone has the options of its original, and keeps them when those change", "[module][cpu]") {
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

TEST_CASE("The module lives in a model that is cloned, converted and trained", "[module][cpu]") {
  const auto model = std::make_shared<ModelImpl>();
  model->criterion->options.free_bits(0.0625);
  const auto clone = std::dynamic_pointer_cast<ModelImpl>(model->clone());
  REQUIRE(clone);
  CHECK(clone->criterion->options.free_bits() == 0.0625);
  CHECK(clone->criterion.get() != model->criterion.get());
  clone->to(torch::kDouble);
  clone->eval();
  CHECK_FALSE(clone->criterion->is_training());
  const auto [loss, metrics] = clone->criterion(clone->head(eighths({3, 3})), module_targets, module_z_logits);
  CHECK(loss.scalar_type() == torch::kDouble);
  loss.backward();
  CHECK(clone->head->weight.grad().isfinite().all().item<bool>());
  CHECK(clone->criterion->options.latent_dim() == 4);
  CHECK(clone->parameters().size() == 2);
}

TEST_CASE("The module refuses a setting when it is made", "[module][errors][cpu]") {
  const std::string range = " must be finite and >= 0, got ";
  CHECK(error_of([] { FreeTransformerLoss(0); }) == "compute_kl_divergence: latent_dim must be >= 1, got 0");
  CHECK(error_of([] { FreeTransformerLoss(-2); }) == "compute_kl_divergence: latent_dim must be >= 1, got -2");
  CHECK(error_of([] { FreeTransformerLoss(4, -1.0); }) == "FreeTransformerLoss: beta_kl" + range + "-1");
  CHECK(error_of([] { FreeTransformerLoss(4, not_a_number); }) == "FreeTransformerLoss: beta_kl" + range + "nan");
  CHECK(error_of([] { FreeTransformerLoss(4, 1.0, -0.5); }) == "compute_kl_divergence: free_bits" + range + "-0.5");
  const auto error = [](const ReconstructionLossOptions& options) {
    return error_of([&] { FreeTransformerLoss(VAELossOptions().reconstruction(options)); });
  };
  CHECK(error(ReconstructionLossOptions().label_smoothing(2)) != "");
  CHECK(error(ReconstructionLossOptions().label_smoothing(not_a_number)) != "");
  CHECK(error(ReconstructionLossOptions().z_loss(-1)) != "");
  CHECK(error(ReconstructionLossOptions().softcap(reference::inf)) != "");
  CHECK(error(ReconstructionLossOptions().normalizer(0)) != "");
  CHECK(error(ReconstructionLossOptions().normalizer(torch::full({1}, -1.0))) != "");
  CHECK(error(ReconstructionLossOptions().reduction(torch::kNone)) != "");
}

namespace {

VAELossOptions options_with_tensors() {
  return VAELossOptions()
      .latent_dim(4)
      .reconstruction(ReconstructionLossOptions()
                          .weight(torch::tensor({1.0, 2.0, 0.5, 1.0, 3.0}))
                          .token_weight(torch::tensor({1.0, 1.0, 0.25}))
                          .normalizer(torch::tensor(int64_t{70000})))
      .kl(KLDivergenceOptions()
              .latent_dim(4)
              .prior_logits(torch::tensor({0.5, -0.5, 1.0, 0.0}).requires_grad_())
              .token_weight(torch::tensor({1.0, 2.0, 3.0}))
              .normalizer(torch::tensor({3.5})));
}

}  // namespace

TEST_CASE("The tensors of the options are the module's: a learned prior a parameter, the others buffers",
          "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors());
  CHECK(criterion->named_parameters().keys() == std::vector<std::string>{"prior_logits"});
  CHECK(criterion->named_buffers().keys() ==
        std::vector<std::string>{"weight", "token_weight", "normalizer", "latent_token_weight", "latent_normalizer"});
  CHECK(FreeTransformerLoss()->named_buffers().is_empty());
  const Tensor expected = compute_vae_loss(module_logits, module_targets, module_z_logits, options_with_tensors()).loss;
  CHECK(same_bits(criterion(module_logits, module_targets, module_z_logits).loss, expected));
  torch::optim::SGD optimizer(criterion->parameters(), 1.0);
  const Tensor before = criterion->options.kl().prior_logits().detach().clone();
  criterion(module_logits, module_targets, module_z_logits).loss.backward();
  optimizer.step();
  CHECK_FALSE(same_bits(criterion->options.kl().prior_logits(), before));  // what the loss reads is what learns
}

TEST_CASE("A clone has tensors of its own, with the values of the original's", "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors());
  const auto clone = std::dynamic_pointer_cast<FreeTransformerLossImpl>(criterion->clone());
  REQUIRE(clone);
  CHECK(clone->parameters().size() == 1);
  CHECK(clone->buffers().size() == 5);
  const Tensor expected = criterion(module_logits, module_targets, module_z_logits).loss;
  CHECK(same_bits(clone->forward(module_logits, module_targets, module_z_logits).loss, expected));
  {
    const torch::NoGradGuard no_grad;
    criterion->options.kl().prior_logits().fill_(9);
    criterion->options.reconstruction().weight().fill_(9);
  }
  CHECK(same_bits(clone->forward(module_logits, module_targets, module_z_logits).loss, expected));
  CHECK(clone->options.kl().prior_logits().requires_grad());
  CHECK_FALSE(same_bits(criterion(module_logits, module_targets, module_z_logits).loss, expected));
}

TEST_CASE("A module that is moved or converted takes its tensors along, but counts keep their type", "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors());
  criterion->to(torch::kHalf);
  CHECK(criterion->options.reconstruction().weight().scalar_type() == torch::kHalf);
  CHECK(criterion->options.kl().prior_logits().scalar_type() == torch::kHalf);
  CHECK(criterion->options.reconstruction().normalizer().tensor()->item<int64_t>() == 70000);
  CHECK(std::isfinite(criterion(module_logits, module_targets, module_z_logits).loss.item<double>()));
  criterion->to(torch::kCPU, torch::kDouble);
  CHECK(criterion->options.kl().token_weight().scalar_type() == torch::kDouble);
  CHECK(criterion->options.kl().normalizer().tensor()->scalar_type() == torch::kFloat);
}

TEST_CASE("Tensors that replace others in the options are used, and then belong to the module", "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors());
  for (const double scale : {1.0, 2.0, 3.0}) {  // a mask for each batch
    const Tensor weight = torch::tensor({0.5, 1.0, scale});
    criterion->options.reconstruction().token_weight(weight);
    VAELossOptions expected = options_with_tensors();
    expected.reconstruction().token_weight(weight);
    CHECK(same_bits(criterion(module_logits, module_targets, module_z_logits).loss,
                    compute_vae_loss(module_logits, module_targets, module_z_logits, expected).loss));
    const auto clone = std::dynamic_pointer_cast<FreeTransformerLossImpl>(criterion->clone());
    CHECK(same_bits(clone->options.reconstruction().token_weight(), weight));
    CHECK(criterion->buffers().size() == 5);
  }
}

TEST_CASE("AnyModule and Sequential hold the module", "[module][cpu]") {
  FreeTransformerLoss criterion(4);
  const Tensor expected = criterion(module_logits, module_targets, module_z_logits).loss;
  torch::nn::AnyModule any(criterion);
  CHECK(same_bits(any.forward<VAELossOutput>(module_logits, module_targets, module_z_logits).loss, expected));
  torch::nn::Sequential sequential(FreeTransformerLoss(4));
  CHECK(same_bits(sequential->forward<VAELossOutput>(module_logits, module_targets, module_z_logits).loss, expected));
  const auto clone = std::dynamic_pointer_cast<torch::nn::SequentialImpl>(sequential->clone());
  CHECK(same_bits(clone->forward<VAELossOutput>(module_logits, module_targets, module_z_logits).loss, expected));
  CHECK(error_of([&] { any.forward<VAELossOutput>(1, module_targets, module_z_logits); }) != "");
}

TEST_CASE("A saved module comes back with its tensors", "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors()), loaded(options_with_tensors());
  {
    const torch::NoGradGuard no_grad;
    criterion->options.kl().prior_logits().fill_(0.75);
  }
  std::stringstream stream;
  torch::save(criterion, stream);
  torch::load(loaded, stream);
  CHECK(same_bits(loaded->options.kl().prior_logits(), criterion->options.kl().prior_logits()));
  CHECK(same_bits(loaded(module_logits, module_targets, module_z_logits).loss,
                  criterion(module_logits, module_targets, module_z_logits).loss));
}
