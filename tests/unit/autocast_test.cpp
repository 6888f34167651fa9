#include <ATen/autocast_mode.h>
#include <torch/version.h>

#include <functional>
#include <optional>
#include <vector>

#include "free_transformer/latent_code.hpp"
#include "free_transformer/losses.hpp"
#include "numeric.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

/// LibTorch's autocast on the CPU, to bfloat16, as long as it lives.
class Autocast {
 public:
  Autocast() { turn(true); }
  ~Autocast() {
    turn(false);
    at::autocast::clear_cache();
  }
  Autocast(const Autocast&) = delete;
  Autocast& operator=(const Autocast&) = delete;

 private:
  static void turn(bool on) {
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 4)
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::set_autocast_enabled(at::kCPU, on);
#else
    at::autocast::set_autocast_cpu_dtype(at::kBFloat16);
    at::autocast::set_cpu_enabled(on);
#endif
  }
};

struct LossAndGradients {
  Tensor loss;
  std::vector<Tensor> gradients;
};

/// Backward, too: whoever has autocast on for the forward pass alone gets the same from it.
LossAndGradients under_autocast(bool on, const std::function<Tensor()>& loss, const std::vector<Tensor>& inputs) {
  std::optional<Autocast> autocast;
  if (on) autocast.emplace();
  const Tensor value = loss();
  return {value, torch::autograd::grad({value}, inputs)};
}

void check_unchanged(const std::function<Tensor()>& loss, const std::vector<Tensor>& inputs) {
  const auto without = under_autocast(false, loss, inputs), with = under_autocast(true, loss, inputs);
  CHECK(same_bits(with.loss, without.loss));
  for (size_t index = 0; index < inputs.size(); ++index) {
    CHECK(with.gradients[index].scalar_type() == inputs[index].scalar_type());
    CHECK(same_bits(with.gradients[index], without.gradients[index]));
  }
}

const Tensor autocast_targets = indices({4, -100, 2, 0});

}  // namespace

TEST_CASE("Autocast multiplies in bfloat16 where these tests turn it on", "[autocast][cpu]") {
  const Tensor matrix = eighths({4, 4}, torch::kFloat);
  CHECK(matrix.mm(matrix).scalar_type() == torch::kFloat);
  const Autocast autocast;
  CHECK(matrix.mm(matrix).scalar_type() == torch::kBFloat16);
}

TEST_CASE("Autocast changes nothing inside a loss", "[autocast][cpu]") {
  const auto all_options = ReconstructionLossOptions().label_smoothing(0.25).z_loss(0.0078125).softcap(4);
  for (const auto type : all_types) {
    INFO(type);
    const Tensor logits = leaf(eighths({4, 5}, type)), z_logits = leaf(eighths({4, 3}, type));
    check_unchanged(
        [&] {
          Tensor loss = compute_vae_loss(logits, autocast_targets, z_logits, 3).loss;
          CHECK(loss.scalar_type() == arithmetic(type));
          return loss;
        },
        {logits, z_logits});
    check_unchanged([&] { return compute_reconstruction_loss(logits, autocast_targets, all_options); }, {logits});
    const Tensor strided = leaf(with_strided_rows(logits)), strided_z = leaf(with_strided_rows(z_logits));
    check_unchanged([&] { return compute_reconstruction_loss(strided, autocast_targets, all_options); }, {strided});
    const Tensor probabilities = eighths({4, 5}).softmax(-1).to(arithmetic(type));
    check_unchanged([&] { return compute_reconstruction_loss(logits, probabilities); }, {logits});
    check_unchanged([&] { return compute_kl_divergence<PerBit>(strided_z, 3); }, {strided_z});
  }
}

TEST_CASE("Autocast changes nothing inside the latent code's tools", "[autocast][latent_code][cpu]") {
  for (const auto type : all_types) {
    INFO(type);
    // From 11 bits on codes come in several blocks.
    const Tensor z_logits = leaf(eighths({5, 12}, type) / 4), codebook = leaf(eighths({4096, 3}, type, 2));
    const Tensor bits = eighths({5, 12}) > 0, upstream = eighths({5, 3}, type, 3);
    const auto rows = [&] { return (map_latent_codes(z_logits, pack_latent_bits(bits), codebook) * upstream).sum(); };
    check_unchanged(rows, {z_logits, codebook});
    check_unchanged([&] { return compute_latent_log_probability(z_logits, bits).sum(); }, {z_logits});
    check_unchanged([&] { return straight_through_latent_bits(z_logits, bits).sum(); }, {z_logits});
  }
}

TEST_CASE("Autocast changes nothing inside a fused head", "[autocast][linear][cpu]") {
  for (const auto type : all_types) {
    for (const bool is_strided : {false, true}) {  // a block that the kernels do not take is LibTorch's
      INFO(type << ", softcap and smoothing " << is_strided);
      const std::vector<Tensor> inputs{leaf(eighths({4, 6}, type) / 8), leaf(eighths({5, 6}, type, 2) / 8),
                                       leaf(eighths({5}, type, 3))};
      auto options = ReconstructionLossOptions();
      if (is_strided) options.softcap(4).label_smoothing(0.25);
      const auto head = LinearLogits(inputs[0], inputs[1], inputs[2]);
      check_unchanged([&] { return compute_reconstruction_loss(head, autocast_targets, options); }, inputs);
      CHECK(same_bits(compute_token_statistics(head, autocast_targets).loss, [&] {
        const Autocast autocast;
        return compute_token_statistics(head, autocast_targets).loss;
      }()));
    }
  }
}

TEST_CASE("A hidden state that autocast has made bfloat16 goes with a head of float32", "[autocast][linear][cpu]") {
  const Tensor input = leaf(eighths({4, 3}, torch::kFloat)), layer = leaf(eighths({6, 3}, torch::kFloat, 2) / 64);
  const Tensor weight = leaf(eighths({5, 6}, torch::kFloat, 3) / 8), bias = leaf(eighths({5}, torch::kFloat, 4) / 8);
  Tensor hidden, loss;
  {
    const Autocast autocast;
    hidden = torch::linear(input, layer);
    loss = compute_reconstruction_loss(LinearLogits(hidden, weight, bias), autocast_targets);
  }
  REQUIRE(hidden.scalar_type() == torch::kBFloat16);
  CHECK(loss.scalar_type() == torch::kFloat);
  const auto found = torch::autograd::grad({loss}, {hidden, weight, bias, input, layer});

  const std::vector<Tensor> exact{leaf(hidden.to(torch::kDouble)), leaf(weight.to(torch::kDouble)),
                                  leaf(bias.to(torch::kDouble))};
  const Tensor expected = compute_reconstruction_loss(torch::linear(exact[0], exact[1], exact[2]), autocast_targets);
  const auto expected_gradients = torch::autograd::grad({expected}, exact);
  // Sums of six products of at most 4, of five classes and of three tokens, and about eight steps for each term.
  const double relative = (6 + 5 + 3 + 8) * epsilon(torch::kFloat);
  CHECK(difference(loss, expected, relative, 6 * 4) == "");
  for (size_t index = 0; index < exact.size(); ++index) {
    CHECK(found[index].scalar_type() == (index == 0 ? torch::kBFloat16 : torch::kFloat));
    CHECK(difference(found[index], expected_gradients[index], relative, 4) == "");
  }
  CHECK(found[3].scalar_type() == torch::kFloat);  // through autocast's own copies
  CHECK(found[4].scalar_type() == torch::kFloat);
}
