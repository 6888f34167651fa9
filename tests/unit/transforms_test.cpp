// Ways of running a function that the losses cannot follow are refused: no derivative and no trace is lost without a word.
#include <ATen/TracerMode.h>
#include <ATen/functorch/BatchedTensorImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "free_transformer/losses.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

struct Arguments {
  Tensor logits = eighths({2, 5}), targets = torch::tensor({int64_t{1}, int64_t{4}}), z_logits = eighths({2, 3});
  Tensor hidden = eighths({2, 4}), weight = eighths({5, 4}), bias = eighths({5}), prior = eighths({3});
  Tensor probabilities = torch::full({2, 5}, 0.2, torch::kDouble), ones = torch::ones({2}, torch::kDouble);
  Tensor class_weight = torch::ones({5}, torch::kDouble), normalizer = torch::full({}, 2.0, torch::kDouble);
};

struct Call {
  std::string argument;
  Tensor Arguments::*tensor;  ///< what is changed
  std::function<void(const Arguments&)> run;
};

/// Each argument that can carry a derivative, in each function.
std::vector<Call> calls() {
  const auto reconstruction = [](const auto& options_of) {
    return [=](const Arguments& with) { compute_reconstruction_loss(with.logits, with.targets, options_of(with)); };
  };
  const auto kl = [](const auto& options_of) {
    return [=](const Arguments& with) { compute_kl_divergence(with.z_logits, options_of(with).latent_dim(3)); };
  };
  const auto vae = [](const Arguments& with) { compute_vae_loss<PerBit>(with.logits, with.targets, with.z_logits, 3); };
  const auto head = [](const Arguments& with) {
    compute_reconstruction_loss(LinearLogits(with.hidden, with.weight, with.bias), with.targets);
  };
  using Options = ReconstructionLossOptions;
  using KLOptions = KLDivergenceOptions;
  return {
      {"logits", &Arguments::logits, reconstruction([](const Arguments&) { return Options(); })},
      {"logits", &Arguments::logits,
       [](const Arguments& with) { compute_token_statistics(with.logits, with.targets); }},
      {"logits", &Arguments::logits, vae},
      {"targets", &Arguments::probabilities,
       [](const Arguments& with) { compute_reconstruction_loss(with.logits, with.probabilities); }},
      {"token_weight", &Arguments::ones,
       reconstruction([](const Arguments& with) { return Options().token_weight(with.ones); })},
      {"weight", &Arguments::class_weight,
       reconstruction([](const Arguments& with) { return Options().weight(with.class_weight); })},
      {"normalizer", &Arguments::normalizer,
       reconstruction([](const Arguments& with) { return Options().normalizer(with.normalizer); })},
      {"z_logits", &Arguments::z_logits, kl([](const Arguments&) { return KLOptions(); })},
      {"z_logits", &Arguments::z_logits, vae},
      {"prior_logits", &Arguments::prior,
       kl([](const Arguments& with) { return KLOptions().prior_logits(with.prior); })},
      {"token_weight", &Arguments::ones, kl([](const Arguments& with) { return KLOptions().token_weight(with.ones); })},
      {"normalizer", &Arguments::normalizer,
       kl([](const Arguments& with) { return KLOptions().normalizer(with.normalizer); })},
      {"hidden", &Arguments::hidden, head},
      {"weight", &Arguments::weight, head},
      {"bias", &Arguments::bias, head},
  };
}

void check_refusals(const std::function<Tensor(const Tensor&)>& change, const std::string& reason) {
  for (const Call& call : calls()) {
    INFO(call.argument);
    Arguments example;
    CHECK(error_of([&] { call.run(example); }).empty());
    example.*call.tensor = change(example.*call.tensor);
    const std::string text = error_of([&] { call.run(example); });
    CHECK_THAT(text, Catch::Matchers::StartsWith("compute_"));
    CHECK_THAT(text, Catch::Matchers::Contains(": " + call.argument + " must"));
    CHECK_THAT(text, Catch::Matchers::Contains(reason));
  }
}

}  // namespace

TEST_CASE("A forward-mode tangent that the loss would lose is refused", "[errors][transforms][cpu]") {
  const auto opened = torch::autograd::ForwardADLevel::get_next_idx();
  REQUIRE(opened == 0);
  check_refusals([](const Tensor& tensor) { return at::_make_dual(tensor, torch::ones_like(tensor), 0); },
                 "must have no forward-mode tangent");
  torch::autograd::ForwardADLevel::release_idx(opened);
}

TEST_CASE("A tensor inside of vmap is refused with what to do instead", "[errors][transforms][cpu]") {
  check_refusals([](const Tensor& tensor) { return at::functorch::makeBatched(tensor.unsqueeze(0), 0, 1); },
                 "call the loss outside of it, on the whole batch");
}

TEST_CASE("A trace does not keep the loss as a constant: it is refused", "[errors][transforms][cpu]") {
  const Arguments example;
  const auto trace_of = [&](const std::function<Tensor(const Tensor&)>& loss) {
    return error_of([&] {
      torch::jit::tracer::trace(
          {example.logits}, [&](torch::jit::Stack inputs) { return torch::jit::Stack{loss(inputs[0].toTensor())}; },
          [](const Tensor&) { return std::string(); });
    });
  };
  const std::string refusal = "must not be called while a program is traced";
  CHECK(trace_of([](const Tensor& logits) { return logits.exp(); }).empty());
  CHECK_THAT(trace_of([&](const Tensor& logits) { return compute_reconstruction_loss(logits, example.targets); }),
             Catch::Matchers::Contains(refusal));
  CHECK_THAT(trace_of([&](const Tensor& logits) { return compute_token_statistics(logits, example.targets).loss; }),
             Catch::Matchers::Contains(refusal));
  CHECK_THAT(trace_of([&](const Tensor& logits) { return compute_kl_divergence(logits, 5); }),
             Catch::Matchers::Contains(refusal));
  CHECK_THAT(trace_of([&](const Tensor& logits) {
               return compute_vae_loss(logits, example.targets, example.z_logits, 3).loss;
             }),
             Catch::Matchers::Contains(refusal));
  CHECK_THAT(
      trace_of([&](const Tensor& logits) {
        return compute_reconstruction_loss(LinearLogits(logits, torch::ones({7, 5}, torch::kDouble)), example.targets);
      }),
      Catch::Matchers::Contains(refusal));
}

TEST_CASE("Under a Python dispatch mode, as make_fx traces, every loss is refused", "[errors][transforms][cpu]") {
  const Arguments example;
  std::vector<std::string> texts;
  {
    const c10::impl::IncludeDispatchKeyGuard as_a_mode_does(c10::DispatchKey::Python);
    texts = {error_of([&] { compute_reconstruction_loss(example.logits, example.targets); }),
             error_of([&] { compute_token_statistics(example.logits, example.targets); }),
             error_of([&] { compute_kl_divergence(example.z_logits, 3); }),
             error_of([&] { compute_vae_loss(example.logits, example.targets, example.z_logits, 3); }), error_of([&] {
               compute_reconstruction_loss(LinearLogits(example.hidden, example.weight), example.targets);
             })};
  }
  for (const auto& text : texts) {
    CHECK_THAT(text, Catch::Matchers::Contains("must not be called while a program is traced"));
  }
}

TEST_CASE("Tensors that stand for a negated or a zero one have their own values", "[reconstruction][kl][layout][cpu]") {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    const Arguments example;
    const auto negated = [&](const Tensor& tensor) { return torch::_neg_view(-tensor.to(type)); };
    const auto zero = [&](const Tensor& tensor) { return torch::_efficientzerotensor(tensor.sizes(), type); };
    for (const Tensor& logits : {example.logits.to(type), example.logits.to(type).t().contiguous().t()}) {
      CHECK(difference(compute_reconstruction_loss(negated(logits), example.targets),
                       compute_reconstruction_loss(logits, example.targets), 8 * epsilon(type)) == "");
      CHECK(difference(compute_reconstruction_loss(zero(logits), example.targets), {std::log(5.0)},
                       8 * epsilon(type)) == "");
    }
    CHECK(compute_kl_divergence(zero(example.z_logits), 3).item<double>() == 0);
    CHECK(difference(compute_kl_divergence(negated(example.z_logits), 3), compute_kl_divergence(example.z_logits, 3),
                     8 * epsilon(type)) == "");
    const Tensor weight = torch::tensor({0.5, 2.0}, type), one_of_five = torch::tensor({1.0, 2.0, 3.0, 4.0, 5.0}, type);
    const Tensor logits = example.logits.to(type);
    const auto with = [&](const Tensor& token_weight, const Tensor& class_weight) {
      return compute_reconstruction_loss(logits, example.targets,
                                         ReconstructionLossOptions().token_weight(token_weight).weight(class_weight));
    };
    CHECK(same_bits(with(negated(weight), negated(one_of_five)), with(weight, one_of_five)));
  }
}
