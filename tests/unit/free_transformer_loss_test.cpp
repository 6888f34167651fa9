#include "free_transformer/free_transformer_loss.hpp"

#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

struct ModelImpl final : torch::nn::Cloneable<ModelImpl> {
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

namespace {

/// One of the options that hold a tensor, and two values for it.
struct TensorOption {
  std::string name;
  std::function<void(VAELossOptions&, const Tensor&)> set;
  std::function<Tensor(const VAELossOptions&)> get;
  Tensor first, second;
};

std::vector<TensorOption> tensor_options() {
  using Options = VAELossOptions;
  return {
      {"weight", [](Options& of, const Tensor& value) { of.reconstruction().weight(value); },
       [](const Options& of) { return of.reconstruction().weight(); }, torch::tensor({1.0, 0.5, 2.0, 1.0, 4.0}),
       torch::tensor({0.5, 2.0, 1.0, 3.0, 0.25})},
      {"token_weight", [](Options& of, const Tensor& value) { of.reconstruction().token_weight(value); },
       [](const Options& of) { return of.reconstruction().token_weight(); }, torch::tensor({0.5, 1.0, 2.0}),
       torch::tensor({1.0, 1.0, 0.125})},
      {"normalizer", [](Options& of, const Tensor& value) { of.reconstruction().normalizer(value); },
       [](const Options& of) { return *of.reconstruction().normalizer().tensor(); }, torch::tensor(3.0),
       torch::tensor(5.5)},
      {"latent_token_weight", [](Options& of, const Tensor& value) { of.kl().token_weight(value); },
       [](const Options& of) { return of.kl().token_weight(); }, torch::tensor({0.25, 1.0, 3.0}),
       torch::tensor({2.0, 0.5, 1.0})},
      {"latent_normalizer", [](Options& of, const Tensor& value) { of.kl().normalizer(value); },
       [](const Options& of) { return *of.kl().normalizer().tensor(); }, torch::tensor(int64_t{2}),
       torch::tensor(int64_t{7})},
      {"prior_logits", [](Options& of, const Tensor& value) { of.kl().prior_logits(value); },
       [](const Options& of) { return of.kl().prior_logits(); }, torch::tensor({0.5, -0.5, 1.0, 0.0}),
       torch::tensor({-1.0, 0.25, 2.0, 0.5})},
  };
}

VAELossOptions options_with(const TensorOption& option, const Tensor& value) {
  VAELossOptions options = VAELossOptions().latent_dim(4).free_bits(0.125);
  option.set(options, value);
  return options;
}

VAELossOptions options_with_prior(const Tensor& prior) { return options_with(tensor_options().back(), prior); }

Tensor call(FreeTransformerLossImpl& criterion) {
  return criterion.forward(module_logits, module_targets, module_z_logits).loss;
}

Tensor loss_with(const VAELossOptions& options) {
  return compute_vae_loss(module_logits, module_targets, module_z_logits, options).loss;
}

Tensor learned_prior(double first = 0.5) { return torch::tensor({first, -0.5, 1.0, 0.0}).requires_grad_(); }

Tensor prior_gradient(const Tensor& prior) {
  const Tensor other = leaf(prior.detach().clone());
  loss_with(options_with_prior(other)).backward();
  return other.grad();
}

std::shared_ptr<FreeTransformerLossImpl> clone_of(const FreeTransformerLoss& criterion) {
  return std::dynamic_pointer_cast<FreeTransformerLossImpl>(criterion->clone());
}

bool is_only_parameter(const FreeTransformerLoss& criterion, const Tensor& prior) {
  const auto parameters = criterion->parameters();
  return parameters.size() == 1 && parameters[0].is_same(prior) && criterion->buffers().empty();
}

bool is_only_buffer(const FreeTransformerLoss& criterion, const Tensor& value) {
  const auto buffers = criterion->buffers();
  return buffers.size() == 1 && same_bits(buffers[0], value) && criterion->parameters().empty();
}

}  // namespace

TEST_CASE("The module never writes into its callers' tensors", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    const Tensor first = option.first.clone(), second = option.second.clone();
    FreeTransformerLoss criterion(options_with(option, first));
    for (int epoch = 0; epoch < 2; ++epoch) {
      for (const Tensor& value : {first, second}) {
        option.set(criterion->options, value);
        CHECK(same_bits(call(*criterion), loss_with(options_with(option, value))));
        CHECK(is_only_buffer(criterion, value));
      }
    }
    std::stringstream stream;
    torch::save(criterion, stream);
    option.set(criterion->options, first);
    torch::load(criterion, stream);
    CHECK(same_bits(option.get(criterion->options), option.second));
    criterion->to(torch::kHalf);
    CHECK(same_bits(first, option.first));
    CHECK(same_bits(second, option.second));
  }
}

TEST_CASE("Modules that were given one tensor don't change each other", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    const Tensor shared = option.first.clone();
    FreeTransformerLoss one(options_with(option, shared)), other(options_with(option, shared));
    FreeTransformerLoss third(one->options);  // has what the first one's options hold by now
    FreeTransformerLossImpl copied(*one);
    option.set(one->options, option.second);
    CHECK(same_bits(call(*one), loss_with(options_with(option, option.second))));
    one->to(torch::kDouble);
    const Tensor expected = loss_with(options_with(option, option.first));
    for (FreeTransformerLossImpl* module : {other.get(), third.get(), &copied}) {
      CHECK(same_bits(call(*module), expected));
      CHECK(same_bits(module->buffers()[0], option.first));
    }
  }
}

TEST_CASE("What a caller writes into a tensor of the options counts in the next call", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    const Tensor value = option.first.clone();
    FreeTransformerLoss criterion(options_with(option, value));
    call(*criterion);
    value.copy_(option.second);
    CHECK(same_bits(call(*criterion), loss_with(options_with(option, option.second))));
  }
}

TEST_CASE("A graph keeps the tensors of its own call", "[module][gradient][cpu]") {
  const auto gradients = [](const Tensor& loss, const std::vector<Tensor>& inputs) {
    return torch::autograd::grad({loss}, inputs);
  };
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    const Tensor logits = leaf(module_logits), z_logits = leaf(module_z_logits);
    const auto expected =
        gradients(compute_vae_loss(logits, module_targets, z_logits, options_with(option, option.first)).loss,
                  {logits, z_logits});
    FreeTransformerLoss criterion(options_with(option, option.first));
    const Tensor replaced = criterion(logits, module_targets, z_logits).loss;
    option.set(criterion->options, option.second);
    call(*criterion);
    const Tensor before_load = [&] {
      option.set(criterion->options, option.first);
      return criterion(logits, module_targets, z_logits).loss;
    }();
    std::stringstream stream;
    torch::save(FreeTransformerLoss(options_with(option, option.second)), stream);
    torch::load(criterion, stream);
    option.set(criterion->options, option.first);
    const Tensor converted = criterion(logits, module_targets, z_logits).loss;
    criterion->to(torch::kHalf);
    for (const Tensor& loss : {replaced, before_load, converted}) {
      const auto found = gradients(loss, {logits, z_logits});
      CHECK(same_bits(found[0], expected[0]));
      CHECK(same_bits(found[1], expected[1]));
    }
  }
}

TEST_CASE("A prior for each batch: one backward pass over two calls", "[module][gradient][cpu]") {
  const auto summed_gradient = [](const auto& call_with) {
    const Tensor z_logits = leaf(module_z_logits);
    Tensor loss = torch::zeros({}, torch::kDouble);
    for (const double first : {0.5, -2.0}) loss = loss + call_with(z_logits, torch::tensor({first, -0.5, 1.0, 0.0}));
    loss.backward();
    return z_logits.grad();
  };
  FreeTransformerLoss criterion(VAELossOptions().latent_dim(4).free_bits(0.125));
  CHECK(same_bits(summed_gradient([&](const Tensor& z_logits, const Tensor& prior) {
                    criterion->options.kl().prior_logits(prior);
                    return criterion(module_logits, module_targets, z_logits).loss;
                  }),
                  summed_gradient([](const Tensor& z_logits, const Tensor& prior) {
                    return compute_vae_loss(module_logits, module_targets, z_logits, options_with_prior(prior)).loss;
                  })));
}

TEST_CASE("A tensor that was replaced may be written while a graph waits", "[module][gradient][cpu]") {
  const Tensor z_logits = leaf(module_z_logits);
  const Tensor first = torch::tensor({0.5, -0.5, 1.0, 0.0}), second = torch::tensor({-1.0, 0.25, 2.0, 0.5});
  FreeTransformerLoss criterion(options_with_prior(first));
  criterion->options.kl().prior_logits(second);
  const Tensor loss = criterion(module_logits, module_targets, z_logits).loss;
  first.fill_(9);
  loss.backward();
  CHECK(z_logits.grad().isfinite().all().item<bool>());
  const Tensor z_logits_of_half = leaf(module_z_logits);
  criterion->to(torch::kHalf);  // memory of the module's own
  const Tensor loss_of_half = criterion(module_logits, module_targets, z_logits_of_half).loss;
  second.fill_(9);
  loss_of_half.backward();
  CHECK(z_logits_of_half.grad().isfinite().all().item<bool>());
  criterion->options.kl().prior_logits(second);
  const Tensor waiting = criterion(module_logits, module_targets, leaf(module_z_logits)).loss;
  second.fill_(9);  // but one that the graph saved may not, as with the function
  CHECK(error_of([&] { waiting.backward(); }).find("modified by an inplace operation") != std::string::npos);
}

TEST_CASE("Another learned prior takes the place of the first one and learns", "[module][gradient][cpu]") {
  const Tensor first = learned_prior(0.5), second = learned_prior(-2.0);
  FreeTransformerLoss criterion(options_with_prior(first));
  call(*criterion).backward();
  CHECK(same_bits(first.grad(), prior_gradient(first)));
  criterion->options.kl().prior_logits(second);
  call(*criterion).backward();
  REQUIRE(second.grad().defined());
  CHECK(same_bits(second.grad(), prior_gradient(second)));
  CHECK(same_bits(first.grad(), prior_gradient(first)));
  CHECK(same_bits(first, learned_prior(0.5)));
  CHECK(is_only_parameter(criterion, second));
}

TEST_CASE("A fixed prior that a learned one replaces becomes a parameter", "[module][gradient][cpu]") {
  const bool had_a_call = GENERATE(false, true);
  const Tensor fixed = torch::tensor({0.25, -0.5, 1.0, 0.0}), learned = learned_prior();
  FreeTransformerLoss criterion(options_with_prior(fixed));
  if (had_a_call) call(*criterion);
  criterion->options.kl().prior_logits(learned);
  criterion->adopt_tensors();  // before a call: an optimizer needs its parameters
  CHECK(is_only_parameter(criterion, learned));
  torch::optim::SGD optimizer(criterion->parameters(), 1.0);
  call(*criterion).backward();
  const Tensor gradient = prior_gradient(learned);
  CHECK(same_bits(learned.grad(), gradient));
  optimizer.step();
  CHECK(same_bits(learned, learned_prior().detach() - gradient));
  CHECK(same_bits(fixed, torch::tensor({0.25, -0.5, 1.0, 0.0})));
  CHECK(same_bits(call(*criterion), loss_with(options_with_prior(learned))));

  const auto clone = clone_of(criterion);
  criterion->to(torch::kDouble);
  CHECK(criterion->options.kl().prior_logits().scalar_type() == torch::kDouble);
  CHECK(is_only_parameter(criterion, learned));
  const Tensor cloned = clone->options.kl().prior_logits();
  CHECK(cloned.scalar_type() == torch::kFloat);
  CHECK(clone->parameters().at(0).is_same(cloned));
  CHECK(cloned.is_leaf());
  CHECK(cloned.requires_grad());
}

TEST_CASE("A learned prior that a fixed one replaces is no parameter any more", "[module][gradient][cpu]") {
  const Tensor learned = learned_prior(), fixed = torch::tensor({0.25, -0.5, 1.0, 0.0});
  FreeTransformerLoss criterion(options_with_prior(learned));
  criterion->options.kl().prior_logits(fixed);
  CHECK(same_bits(call(*criterion), loss_with(options_with_prior(fixed))));
  CHECK_FALSE(call(*criterion).requires_grad());
  CHECK(is_only_buffer(criterion, fixed));
  criterion->to(torch::kDouble);
  CHECK(criterion->options.kl().prior_logits().scalar_type() == torch::kDouble);
  CHECK(fixed.scalar_type() == torch::kFloat);
  CHECK(learned.scalar_type() == torch::kFloat);
  CHECK(clone_of(criterion)->buffers().size() == 1);

  criterion->options.kl().prior_logits(learned);  // and back
  call(*criterion).backward();
  CHECK(is_only_parameter(criterion, learned));
  CHECK(same_bits(learned.grad(), prior_gradient(learned)));
}

TEST_CASE("The module's own prior begins to learn, and may be frozen for a time", "[module][gradient][cpu]") {
  FreeTransformerLoss criterion(options_with_prior(torch::tensor({0.5, -0.5, 1.0, 0.0})));
  criterion->options.kl().prior_logits().requires_grad_();
  criterion->adopt_tensors();
  const Tensor prior = criterion->options.kl().prior_logits();
  CHECK(is_only_parameter(criterion, prior));
  prior.requires_grad_(false);
  CHECK_FALSE(call(*criterion).requires_grad());
  CHECK(is_only_parameter(criterion, prior));
  const auto clone = clone_of(criterion);
  CHECK(clone->parameters().size() == 1);
  CHECK_FALSE(clone->options.kl().prior_logits().requires_grad());
  prior.requires_grad_(true);
  call(*criterion).backward();
  CHECK(same_bits(prior.grad(), prior_gradient(prior)));
}

TEST_CASE("A learned prior stays the parameter that an optimizer holds", "[module][gradient][cpu]") {
  const Tensor prior = learned_prior();
  FreeTransformerLoss criterion(options_with_prior(prior));
  torch::optim::SGD optimizer(criterion->parameters(), 1.0);
  const auto step = [&] {
    const Tensor before = prior.detach().clone();
    optimizer.zero_grad();
    call(*criterion).backward();
    optimizer.step();
    CHECK_FALSE(same_bits(prior, before));
    CHECK(is_only_parameter(criterion, prior));
  };
  step();
  criterion->to(torch::kDouble);
  CHECK(prior.scalar_type() == torch::kDouble);
  prior.mutable_grad() = Tensor();  // of the old type
  step();
  std::stringstream stream;
  torch::save(criterion, stream);
  torch::load(criterion, stream);
  step();
  criterion->options.kl().prior_logits(prior);
  step();
}

TEST_CASE("A tensor that is taken out of the options leaves the module", "[module][cpu]") {
  const auto all = tensor_options();
  for (const TensorOption& option : all) {
    CAPTURE(option.name);
    if (option.name.find("normalizer") != std::string::npos) continue;
    FreeTransformerLoss criterion(options_with(option, option.first));
    option.set(criterion->options, Tensor());
    CHECK(same_bits(call(*criterion), loss_with(VAELossOptions().latent_dim(4).free_bits(0.125))));
    CHECK(criterion->buffers().empty());
    CHECK(clone_of(criterion)->buffers().empty());
  }
  FreeTransformerLoss criterion(VAELossOptions(options_with(all[2], all[2].first)));
  criterion->options.reconstruction().normalizer(2.0);
  call(*criterion);
  CHECK(criterion->buffers().empty());
}

TEST_CASE("A prior that another module computes is used, but is not the criterion's", "[module][gradient][cpu]") {
  const Tensor source = learned_prior(), replaced = learned_prior(-2.0);
  FreeTransformerLoss criterion(options_with_prior(replaced));
  criterion->options.kl().prior_logits(source * 1);
  call(*criterion).backward();
  CHECK(criterion->parameters().empty());
  CHECK(same_bits(source.grad(), prior_gradient(source)));
  CHECK_FALSE(replaced.grad().defined());
}

TEST_CASE("A weight that requires grad is refused, also where it replaces another one", "[module][errors][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    if (option.name.find("weight") == std::string::npos) continue;
    FreeTransformerLoss criterion(options_with(option, option.first));
    option.set(criterion->options, option.second.clone().requires_grad_());
    for (int attempt = 0; attempt < 2; ++attempt) {
      CHECK(error_of([&] { call(*criterion); }).find("must not require grad") != std::string::npos);
    }
    option.set(criterion->options, option.second);
    CHECK(same_bits(call(*criterion), loss_with(options_with(option, option.second))));
    CHECK(is_only_buffer(criterion, option.second));
  }
}

TEST_CASE("Tensors made under InferenceMode can be replaced, converted, loaded and trained with", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    FreeTransformerLoss criterion(VAELossOptions().latent_dim(4).free_bits(0.125));
    Tensor first, second;
    {
      const c10::InferenceMode inference;
      first = option.first.clone();
      second = option.second.clone();
      for (const Tensor& value : {first, second, option.first}) {
        option.set(criterion->options, value);
        CHECK(same_bits(call(*criterion), loss_with(options_with(option, value))));
      }
      option.set(criterion->options, first);
      call(*criterion);
    }
    const Tensor z_logits = leaf(module_z_logits);
    criterion(leaf(module_logits), module_targets, z_logits).loss.backward();
    CHECK(z_logits.grad().isfinite().all().item<bool>());
    const auto clone = clone_of(criterion);
    std::stringstream stream;
    torch::save(criterion, stream);
    for (const Tensor& value : {option.second, second, first}) {
      option.set(criterion->options, value);
      CHECK(same_bits(call(*criterion), loss_with(options_with(option, value))));
      CHECK(is_only_buffer(criterion, value));
    }
    torch::load(criterion, stream);
    criterion->to(torch::kDouble);
    clone->to(torch::kDouble);
    CHECK(same_bits(option.get(criterion->options).to(option.first.scalar_type()), option.first));
    CHECK(same_bits(option.get(clone->options).to(option.first.scalar_type()), option.first));
    CHECK(same_bits(first, option.first));
    CHECK(same_bits(second, option.second));
  }
}

TEST_CASE("A module that is converted under InferenceMode can be trained and converted afterwards", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name);
    FreeTransformerLoss criterion(options_with(option, option.first));
    {
      const c10::InferenceMode inference;
      criterion->to(torch::kDouble);
      call(*criterion);
      criterion->to(torch::kDouble);
    }
    const Tensor z_logits = leaf(module_z_logits);
    criterion(leaf(module_logits), module_targets, z_logits).loss.backward();
    CHECK(z_logits.grad().isfinite().all().item<bool>());
    criterion->to(torch::kHalf);
    CHECK(same_bits(option.get(criterion->options).to(option.first.scalar_type()), option.first));
    option.set(criterion->options, option.second);
    CHECK(same_bits(call(*criterion), loss_with(options_with(option, option.second))));
  }
}

TEST_CASE("A clone has tensors of its own, also of those set since the last call", "[module][cpu]") {
  for (const TensorOption& option : tensor_options()) {
    for (const bool had_one : {false, true}) {
      CAPTURE(option.name, had_one);
      const Tensor value = option.second.clone();
      FreeTransformerLoss criterion(had_one ? options_with(option, option.first)
                                            : VAELossOptions().latent_dim(4).free_bits(0.125));
      option.set(criterion->options, value);
      const auto clone = clone_of(criterion);
      value.zero_();
      CHECK(same_bits(call(*clone), loss_with(options_with(option, option.second))));
      CHECK(clone->buffers().size() == 1);
    }
  }
  const Tensor learned = learned_prior();
  FreeTransformerLoss criterion(options_with_prior(torch::zeros({4})));
  criterion->options.kl().prior_logits(learned);
  const auto clone = clone_of(criterion);
  call(*clone).backward();
  CHECK(clone->parameters().size() == 1);
  CHECK(same_bits(clone->options.kl().prior_logits().grad(), prior_gradient(learned)));
  CHECK_FALSE(learned.grad().defined());
}

TEST_CASE("A reset keeps the values", "[module][cpu]") {
  FreeTransformerLoss criterion(options_with_tensors());
  const Tensor expected = call(*criterion);
  criterion->reset();
  CHECK(same_bits(call(*criterion), expected));
  CHECK(criterion->parameters().size() == 1);
  CHECK(criterion->buffers().size() == 5);
}

TEST_CASE("A module is saved and loaded with the tensors that its options hold", "[module][cpu]") {
  const bool had_a_call = GENERATE(false, true);
  for (const TensorOption& option : tensor_options()) {
    CAPTURE(option.name, had_a_call);
    FreeTransformerLoss saved(options_with(option, option.first));
    FreeTransformerLoss loaded(VAELossOptions().latent_dim(4).free_bits(0.125));
    option.set(saved->options, option.second);
    const Tensor place = had_a_call ? option.first.clone()
                                    : torch::zeros({2, 3}, option.first.options());  // of the archive's shape or not
    const Tensor place_before = place.clone();
    option.set(loaded->options, place);
    if (had_a_call) call(*saved), call(*loaded);
    std::stringstream stream;
    torch::save(saved, stream);
    torch::load(loaded, stream);
    CHECK(same_bits(option.get(loaded->options), option.second));
    CHECK(same_bits(call(*loaded), loss_with(options_with(option, option.second))));
    CHECK(same_bits(place, place_before));
  }
  const Tensor learned = learned_prior(3.0);
  FreeTransformerLoss saved(options_with_prior(torch::zeros({4}))), loaded(options_with_prior(learned_prior()));
  saved->options.kl().prior_logits(learned);
  if (had_a_call) call(*saved);
  std::stringstream stream;
  torch::save(saved, stream);
  torch::load(loaded, stream);
  CHECK(same_bits(loaded->options.kl().prior_logits(), learned));
  CHECK(loaded->parameters().size() == 1);
}

namespace {

struct WeightedLossImpl : FreeTransformerLossImpl {
  WeightedLossImpl() : FreeTransformerLossImpl(4) { register_buffer("weight", torch::ones({2})); }
};

}  // namespace

TEST_CASE("A name that a derived module has taken is refused", "[module][errors][cpu]") {
  WeightedLossImpl criterion;
  criterion.options.reconstruction().weight(torch::ones({5}));
  CHECK(error_of([&] { call(criterion); }).find("weight") != std::string::npos);
  CHECK(same_bits(criterion.buffers()[0], torch::ones({2})));
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
