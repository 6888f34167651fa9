// What is refused, for all losses, and the whole text of each refusal.
#include "free_transformer/losses.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

const torch::TensorOptions on_meta = torch::TensorOptions().device(torch::kMeta);

/// What the reconstruction loss says, without its name, both alone and as a part of the whole loss.
std::string reconstruction_error(const Tensor& logits, const Tensor& targets, int64_t ignore_index = -100) {
  const std::string alone = error_of([&] { compute_reconstruction_loss(logits, targets, ignore_index); });
  CHECK(error_of([&] { compute_vae_loss(logits, targets, eighths({2, 16}), 16, 1.0, 0.5, ignore_index); }) == alone);
  return after_name("compute_reconstruction_loss", alone);
}

std::string latent_error(const Tensor& z_logits, int64_t latent_dim = 3, double free_bits = 0.25) {
  const std::string alone = error_of([&] { compute_kl_divergence(z_logits, latent_dim, free_bits); });
  if (z_logits.defined() && z_logits.layout() == torch::kStrided) {  // else the whole loss refuses it before this term
    CHECK(error_of([&] {
            compute_vae_loss<PerBit>(eighths({2, 5}), indices({0, 1}), z_logits, latent_dim, 1.0, free_bits);
          }) == alone);
  }
  return after_name("compute_kl_divergence", alone);
}

std::string vae_error(const Tensor& z_logits, double beta_kl) {
  return error_of([&] { compute_vae_loss(eighths({2, 5}), indices({0, 1}), z_logits, 3, beta_kl); });
}

}  // namespace

TEST_CASE("Logits must be dense, floating and have classes", "[errors][reconstruction][cpu]") {
  const Tensor targets = indices({0, 1});
  CHECK(reconstruction_error({}, targets) == "logits must be a defined tensor, got an undefined one");
  CHECK(reconstruction_error(eighths({2, 5}).to_sparse(), targets) ==
        "logits must be a dense (strided) tensor, got layout Sparse");
  const std::string kind = "logits must be of type float64, float32, float16 or bfloat16, got ";
  CHECK(reconstruction_error(torch::zeros({2, 5}, torch::kLong), targets) == kind + "Long");
  CHECK(reconstruction_error(torch::zeros({2, 5}, torch::kBool), targets) == kind + "Bool");
  CHECK(reconstruction_error(torch::zeros({2, 5}, torch::kComplexFloat), targets) == kind + "ComplexFloat");
  const std::string shape = "logits must have at least one dimension, and a last one of at least 1, got shape ";
  CHECK(reconstruction_error(torch::tensor(1.0), targets) == shape + "[]");
  CHECK(reconstruction_error(torch::zeros({2, 0}), targets) == shape + "[2, 0]");
}

TEST_CASE("Targets must be dense indices, one for each position, on the device of the logits",
          "[errors][reconstruction][cpu]") {
  const Tensor logits = eighths({2, 5});
  CHECK(reconstruction_error(logits, {}) == "targets must be a defined tensor, got an undefined one");
  CHECK(reconstruction_error(logits, indices({0, 1}).to_sparse()) ==
        "targets must be a dense (strided) tensor, got layout Sparse");
  const std::string kind = "targets must be class indices (an integer type) or class probabilities (floating), got ";
  CHECK(reconstruction_error(logits, torch::zeros({2}, torch::kBool)) == kind + "Bool");
  CHECK(reconstruction_error(logits, torch::zeros({2}, torch::kComplexDouble)) == kind + "ComplexDouble");
  const std::string shape = "targets must have the shape of the logits without their last size, ";
  CHECK(reconstruction_error(logits, indices({0, 1, 2})) == shape + "[2], got [3]");
  CHECK(reconstruction_error(logits, torch::zeros({2, 1}, torch::kLong)) == shape + "[2], got [2, 1]");
  CHECK(reconstruction_error(eighths({2, 3, 5}), torch::zeros({3, 2}, torch::kLong)) == shape + "[2, 3], got [3, 2]");
  CHECK(reconstruction_error(eighths({5}), indices({0})) == shape + "[], got [1]");
  CHECK(reconstruction_error(logits, torch::zeros({2}, on_meta.dtype(torch::kLong))) ==
        "targets must be on the device of the logits, cpu, got meta");
  CHECK(reconstruction_error(torch::zeros({2, 5}, on_meta), indices({0, 1})) ==
        "targets must be on the device of the logits, meta, got cpu");
}

TEST_CASE("A target out of range is shown with its position", "[errors][reconstruction][cpu]") {
  const Tensor logits = eighths({4, 5});
  const std::string range = "targets must lie in [0, 5) or be ignore_index = ";
  CHECK(reconstruction_error(logits, indices({0, 5, 1, -1})) == range + "-100, got 5 at position 1");
  CHECK(reconstruction_error(logits, indices({0, 4, 1, -1})) == range + "-100, got -1 at position 3");
  CHECK(reconstruction_error(logits, indices({0, -100, 1, 7}), /*ignore_index=*/7) ==
        range + "7, got -100 at position 1");
  CHECK(reconstruction_error(logits, torch::tensor({0, 1, 255, 2}, torch::kByte)) ==
        range + "-100, got 255 at position 2");
  CHECK(reconstruction_error(logits, indices({std::numeric_limits<int64_t>::min(), 0, 0, 0})) ==
        range + "-100, got -9223372036854775808 at position 0");
  CHECK(reconstruction_error(eighths({2, 2, 5}).transpose(0, 1), indices({0, 1, 9, 2}).reshape({2, 2}).t()) ==
        range + "-100, got 9 at position 1");
}

TEST_CASE("Latent logits must be dense, floating and have latent_dim bits", "[errors][kl][cpu]") {
  CHECK(latent_error({}) == "z_logits must be a defined tensor, got an undefined one");
  CHECK(latent_error(eighths({2, 3}).to_sparse()) == "z_logits must be a dense (strided) tensor, got layout Sparse");
  const std::string kind = "z_logits must be of type float64, float32, float16 or bfloat16, got ";
  CHECK(latent_error(torch::zeros({2, 3}, torch::kInt)) == kind + "Int");
  CHECK(latent_error(torch::zeros({2, 3}, torch::kBool)) == kind + "Bool");
  CHECK(latent_error(torch::zeros({2, 3}, torch::kComplexDouble)) == kind + "ComplexDouble");
  CHECK(latent_error(eighths({2, 4})) == "z_logits must have latent_dim = 3 as its last size, got shape [2, 4]");
  CHECK(latent_error(eighths({3, 2})) == "z_logits must have latent_dim = 3 as its last size, got shape [3, 2]");
  CHECK(latent_error(torch::tensor(1.0)) == "z_logits must have latent_dim = 3 as its last size, got shape []");
}

TEST_CASE("Settings that are negative, infinite or no number are refused", "[errors][kl][vae]") {
  const Tensor z_logits = eighths({2, 3});
  CHECK(latent_error(z_logits, 0) == "latent_dim must be >= 1, got 0");
  CHECK(latent_error(torch::zeros({2, 0}), 0) == "latent_dim must be >= 1, got 0");
  CHECK(latent_error(z_logits, -3) == "latent_dim must be >= 1, got -3");
  CHECK(latent_error(z_logits, 3, -0.5) == "free_bits must be finite and >= 0, got -0.5");
  CHECK(latent_error(z_logits, 3, not_a_number) == "free_bits must be finite and >= 0, got nan");
  CHECK(latent_error(z_logits, 3, reference::inf) == "free_bits must be finite and >= 0, got inf");
  CHECK(vae_error(z_logits, -1) == "compute_vae_loss: beta_kl must be finite and >= 0, got -1");
  CHECK(vae_error(z_logits, not_a_number) == "compute_vae_loss: beta_kl must be finite and >= 0, got nan");
  CHECK(vae_error(z_logits, -reference::inf) == "compute_vae_loss: beta_kl must be finite and >= 0, got -inf");
}

TEST_CASE("Both terms must be on one device", "[errors][vae][cpu]") {
  CHECK(vae_error({}, 1.0) == "compute_vae_loss: z_logits must be a defined tensor, got an undefined one");
  CHECK(vae_error(torch::zeros({2, 3}, on_meta), 1.0) ==
        "compute_vae_loss: z_logits must be on the device of the logits, cpu, got meta");
}

TEST_CASE("The module refuses what the function refuses", "[errors][module][cpu]") {
  FreeTransformerLoss criterion(3);
  criterion->options.beta_kl(-1);
  CHECK(error_of([&] {
          criterion(eighths({2, 5}), indices({0, 1}), eighths({2, 3}));
        }) == "compute_vae_loss: beta_kl must be finite and >= 0, got -1");
}

TEST_CASE("Logits in LibTorch's order are told how to be turned", "[errors]") {
  const std::string hint = "pass logits.movedim(1, -1)";
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  const auto zeros = [](torch::IntArrayRef shape) { return torch::zeros(shape, torch::kLong); };
  CHECK(contains(reconstruction_error(eighths({2, 7, 5}), zeros({2, 5})), hint));
  CHECK(contains(reconstruction_error(eighths({2, 7, 5, 3}), zeros({2, 5, 3})), hint));
  CHECK(contains(reconstruction_error(eighths({2, 7, 0}), zeros({2, 0})), "at least 1"));
  CHECK_FALSE(contains(reconstruction_error(eighths({2, 7, 5}), zeros({5, 2})), hint));
  CHECK_FALSE(contains(reconstruction_error(eighths({2, 7, 5}), zeros({3, 5})), hint));
  CHECK_FALSE(contains(reconstruction_error(eighths({7, 5}), zeros({5})), hint));
  CHECK(contains(error_of([&] { compute_token_statistics(eighths({2, 7, 5}), zeros({2, 5})); }), hint));
  CHECK(contains(latent_error(eighths({2, 3, 8})), "pass z_logits.movedim(1, -1)"));
  CHECK_FALSE(contains(latent_error(eighths({2, 4, 8})), "movedim"));
  CHECK(contains(error_of([&] {
                   compute_reconstruction_loss(LinearLogits(eighths({2, 4, 8}), eighths({9, 4})), zeros({2, 8}));
                 }),
                 "pass hidden.movedim(1, -1)"));
}

TEST_CASE("A tensor for a normalizer is looked at on the CPU", "[errors][normalizer][cpu]") {
  const Tensor logits = eighths({2, 5}), targets = indices({0, 1});
  for (const double bad : {-1.0, not_a_number, reference::inf}) {
    const Tensor normalizer = torch::full({1}, bad);
    CHECK_THAT(error_of([&] {
                 compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().normalizer(normalizer));
               }),
               Catch::Matchers::Contains("normalizer must be finite and >= 0 where it is a tensor"));
    CHECK_THAT(
        error_of([&] { compute_kl_divergence(logits, KLDivergenceOptions().latent_dim(5).normalizer(normalizer)); }),
        Catch::Matchers::Contains("normalizer must be finite and >= 0 where it is a tensor"));
  }
}

TEST_CASE("Every tensor must be dense, and the one that is not is named", "[errors][vae][inplace][cpu]") {
  using Change = std::function<void(VAELossOptions&, Tensor & logits, Tensor & targets, Tensor & z_logits)>;
  struct Case {
    std::string error;
    Change change;
  };
  const std::string first = "compute_reconstruction_loss: ", second = "compute_kl_divergence: ";
  const auto sparse = [](torch::IntArrayRef shape) { return torch::ones(shape).to_sparse(); };
  const std::vector<Case> cases{
      {first + "logits", [](auto&, Tensor& logits, auto&, auto&) { logits = logits.to_sparse(); }},
      {first + "targets", [](auto&, auto&, Tensor& targets, auto&) { targets = targets.to_sparse(); }},
      {first + "token_weight",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.reconstruction().token_weight(sparse({2})); }},
      {first + "weight",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.reconstruction().weight(sparse({5})); }},
      {first + "normalizer",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.reconstruction().normalizer(sparse({1})); }},
      {"compute_vae_loss: z_logits", [](auto&, auto&, auto&, Tensor& z) { z = z.to_sparse(); }},
      {second + "token_weight",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.kl().token_weight(sparse({2})); }},
      {second + "prior_logits",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.kl().prior_logits(sparse({3})); }},
      {second + "normalizer",
       [&](VAELossOptions& options, auto&, auto&, auto&) { options.kl().normalizer(sparse({1})); }},
  };
  for (const auto& [error, change] : cases) {
    for (const auto type : all_types) {
      for (const bool inplace : {false, true}) {
        for (const bool mask : {false, true}) {
          INFO(error << ", " << type << (inplace ? ", in place" : "") << (mask ? ", masked" : ""));
          Tensor dense = leaf(eighths({2, 5}, type)) * 1, targets = indices({0, 1}), z_logits = leaf(eighths({2, 3}));
          auto options = VAELossOptions().latent_dim(3).mask_ignored_latents(mask);
          options.reconstruction().inplace(inplace);
          Tensor logits = dense;
          change(options, logits, targets, z_logits);
          const std::string text = " must be a dense (strided) tensor, got layout Sparse";
          CHECK(error_of([&] { compute_vae_loss(logits, targets, z_logits, options); }) == error + text);
          CHECK(same_bits(dense, eighths({2, 5}, type)));
          if (error.find(first) == 0) {
            CHECK(error_of([&] { compute_reconstruction_loss(logits, targets, options.reconstruction()); }) ==
                  error + text);
          }
        }
      }
    }
  }
}

TEST_CASE("A mask of targets that do not fit leaves the refusal to the loss of the logits", "[errors][vae][cpu]") {
  const auto options = VAELossOptions().latent_dim(3).mask_ignored_latents(true);
  const auto error = [&](const Tensor& logits, const Tensor& targets, const Tensor& token_weight, const Tensor& z) {
    auto reconstruction = ReconstructionLossOptions().token_weight(token_weight);
    return after_name("compute_reconstruction_loss", error_of([&] {
                        compute_vae_loss(logits, targets, z, VAELossOptions(options).reconstruction(reconstruction));
                      }));
  };
  const Tensor logits = eighths({2, 5}), targets = indices({0, 1}), z = eighths({2, 3});
  CHECK(error(logits, {}, {}, z) == "targets must be a defined tensor, got an undefined one");
  CHECK(error(logits, torch::zeros({2}, torch::kBool), {}, z).find("targets must be class indices") == 0);
  CHECK(error(logits, torch::zeros({2}, torch::kComplexFloat), {}, z).find("targets must be class indices") == 0);
  CHECK(error(logits, targets.to(torch::kMeta), {}, z) == "targets must be on the device of the logits, cpu, got meta");
  CHECK(error(logits, targets.repeat(2), {}, eighths({4, 3})).find("targets must have the shape") == 0);
  CHECK(error(logits, torch::zeros({2, 4}), {}, z).find("targets that are class probabilities") == 0);
  CHECK(error(logits, targets, torch::ones({3}), z).find("token_weight must have one value for each") == 0);
  CHECK(error(logits, targets, torch::ones({2}, torch::kLong), z) == "token_weight must be bool or floating, got Long");
  CHECK(error(logits, targets, torch::ones({2}, on_meta), z).find("token_weight must be on the device") == 0);
  CHECK(error(logits, targets, -torch::ones({2}), z).find("token_weight must be finite") == 0);
  CHECK(error({}, targets, {}, z) == "logits must be a defined tensor, got an undefined one");
}
