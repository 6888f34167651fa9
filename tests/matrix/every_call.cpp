// Every public header and function, compiled as a cell of the matrix says, beside their equations in LibTorch's operations in
// float64. A program must not have been tuned for a cell: only run.py knows what it is compiled with.
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <string>
#include <vector>

#include <free_transformer/losses.hpp>

#include "../strangers/equations.hpp"
#include "../strangers/expect.hpp"

namespace {

using namespace free_transformer;

constexpr int64_t positions = 9, classes = 333, latent_bits = 6, width = 10;

struct Inputs {
  explicit Inputs(at::ScalarType type)
      : logits(leaf(at::randn({positions, classes}) * 3, type)),
        z_logits(leaf(at::randn({positions, latent_bits}) * 2, type)),
        hidden(leaf(at::randn({positions, width}), type)),
        weight(leaf(at::randn({classes, width}), type)),
        targets((at::arange(positions, at::kLong) * 37 + 1).remainder(classes)) {}

  static at::Tensor leaf(const at::Tensor& values, at::ScalarType type) {
    return values.to(type).detach().requires_grad_();
  }

  std::string type() const { return std::string(c10::toString(logits.scalar_type())) + ", "; }

  at::Tensor logits, z_logits, hidden, weight, targets;
};

/// A loss and its gradients beside an equation of the same inputs in float64.
template <typename Loss, typename Equation>
void expect_loss(const std::string& what, const std::vector<at::Tensor>& inputs, const Loss& compute,
                 const Equation& equation) {
  std::vector<at::Tensor> exact;
  exact.reserve(inputs.size());
  for (const at::Tensor& input : inputs) exact.push_back(exact_leaf(input));
  const at::Tensor loss = compute(), expected = equation(exact);
  const auto found = torch::autograd::grad({loss}, inputs), gradients = torch::autograd::grad({expected}, exact);
  expect_close(loss, expected, what);
  for (size_t index = 0; index < found.size(); ++index) {
    expect_close(found[index], gradients[index], what + ", gradient " + std::to_string(index));
  }
}

using Exact = std::vector<at::Tensor>;

void check_reconstruction(const Inputs& in) {
  const auto plain = [&](const Exact& exact) { return cross_entropy(exact[0], in.targets); };
  expect_loss(
      in.type() + "reconstruction", {in.logits}, [&] { return compute_reconstruction_loss(in.logits, in.targets); },
      plain);
  expect_loss(
      in.type() + "in place", {in.logits},
      [&] { return compute_reconstruction_loss(in.logits * 1, in.targets, ReconstructionLossOptions().inplace(true)); },
      plain);
  const at::Tensor counts = at::ones({positions}, at::kDouble).index_fill_(0, at::tensor({2, 5}, at::kLong), 0);
  expect_loss(
      in.type() + "options", {in.logits},
      [&] {
        return compute_reconstruction_loss(
            in.logits, in.targets,
            ReconstructionLossOptions().token_weight(counts).normalizer(5).label_smoothing(0.125).z_loss(0.25).softcap(
                8));
      },
      [&](const Exact& exact) {
        const at::Tensor capped = 8 * (exact[0] / 8).tanh(), log_p = capped.log_softmax(-1);
        const at::Tensor nll = -log_p.gather(-1, in.targets.unsqueeze(-1)).squeeze(-1);
        const at::Tensor each = 0.875 * nll - 0.125 * log_p.mean(-1) + 0.25 * capped.logsumexp(-1).square();
        return (each * counts).sum() / 5;
      });
}

void check_latent_terms(const Inputs& in) {
  expect_loss(
      in.type() + "KL", {in.z_logits}, [&] { return compute_kl_divergence(in.z_logits, latent_bits); },
      [](const Exact& exact) { return kl_above(exact[0], 0.3466).mean(); });
  expect_loss(
      in.type() + "KL with a budget for each bit", {in.z_logits},
      [&] { return compute_kl_divergence<PerBit>(in.z_logits, latent_bits, bits(0.1)); },
      [](const Exact& exact) {
        const at::Tensor above = kl_of_bits(exact[0], at::zeros_like(exact[0])) - 0.1 * std::log(2.0);
        return above.masked_fill(above < 0, 0).sum(-1).mean();
      });
  expect_loss(
      in.type() + "KL with a budget for the batch", {in.z_logits},
      [&] { return compute_kl_divergence<BatchMean>(in.z_logits, latent_bits); },
      [](const Exact& exact) { return kl_above(exact[0], 0).mean() - 0.3466; });
}

void check_vae_loss(const Inputs& in) {
  const auto equation = [&](const Exact& exact) {
    return cross_entropy(exact[0], in.targets) + 0.5 * kl_above(exact[1], 0.3466).mean();
  };
  const auto options = VAELossOptions().latent_dim(latent_bits).beta_kl(0.5);
  const std::vector<at::Tensor> leaves{in.logits, in.z_logits};
  expect_loss(
      in.type() + "VAE", leaves, [&] { return compute_vae_loss(in.logits, in.targets, in.z_logits, options).loss; },
      equation);
  FreeTransformerLoss criterion(options);
  expect_loss(
      in.type() + "module", leaves, [&] { return criterion(in.logits, in.targets, in.z_logits).loss; }, equation);
  LossMetrics metrics = criterion(in.logits, in.targets, in.z_logits).metrics;
  metrics += criterion(in.logits, in.targets, in.z_logits).metrics;
  const at::Tensor exact = equation({exact_leaf(in.logits), exact_leaf(in.z_logits)});
  expect_close(at::full({}, metrics.at("loss/total"), at::kFloat), exact, in.type() + "metrics");
}

void check_linear_logits(const Inputs& in) {
  expect_loss(
      in.type() + "LinearLogits", {in.hidden, in.weight},
      [&] { return compute_reconstruction_loss(LinearLogits(in.hidden, in.weight), in.targets); },
      [&](const Exact& exact) { return cross_entropy(exact[0].matmul(exact[1].t()), in.targets); });
}

void check_statistics(const Inputs& in) {
  const TokenStatistics statistics = compute_token_statistics(in.logits, in.targets);
  const at::Tensor exact = in.logits.detach().to(at::kDouble), log_p = exact.log_softmax(-1);
  expect_close(statistics.target_log_probability, log_p.gather(-1, in.targets.unsqueeze(-1)).squeeze(-1),
               in.type() + "log-probability");
  expect_close(statistics.log_sum_exp, exact.logsumexp(-1), in.type() + "log-sum-exp");
  expect_close(statistics.entropy, -(log_p.exp() * log_p).sum(-1), in.type() + "entropy");
  expect(statistics.prediction.equal(exact.argmax(-1)), in.type() + "prediction");
}

void check_latent_code(const Inputs& in) {
  const at::Tensor bits = sample_latent_bits(in.z_logits), codes = pack_latent_bits(bits);
  expect(unpack_latent_codes(codes, latent_bits).equal(bits), in.type() + "codes");
  const at::Tensor z = in.z_logits.detach().to(at::kDouble);
  expect_close(compute_latent_log_probability(in.z_logits, bits), at::log_sigmoid(at::where(bits, z, -z)).sum(-1),
               in.type() + "log q");
  const at::Tensor codebook = at::randn({int64_t{1} << latent_bits, width}).to(in.z_logits.scalar_type());
  expect(map_latent_codes(in.z_logits, codes, codebook).detach().equal(codebook.index_select(0, codes)),
         in.type() + "rows of the codebook");
  expect(straight_through_latent_bits(in.z_logits, bits).detach().equal(bits.to(in.z_logits.scalar_type())),
         in.type() + "straight-through bits");

  const at::Tensor log_likelihood = compute_token_statistics(in.logits, in.targets).target_log_probability;
  const at::Tensor log_q = at::log_sigmoid(at::where(bits, z, -z)).sum();
  const at::Tensor log_x = log_likelihood.to(at::kDouble).sum();
  const double log_prior = -static_cast<double>(positions * latent_bits) * std::log(2.0);
  expect_close(compute_evidence_lower_bound(log_likelihood, in.z_logits).nats,
               kl_of_bits(z, at::zeros_like(z)).sum() - log_x, in.type() + "lower bound");
  expect_close(compute_importance_weighted_bound(log_likelihood.unsqueeze(0), in.z_logits, bits.unsqueeze(0)).nats,
               log_q - log_prior - log_x, in.type() + "importance-weighted bound");
}

/// NaN and infinity are told from numbers by LibTorch, as this program may be compiled to assume that there are none.
void check_special_values(const Inputs& in) {
  const auto infinity = at::ones({}, at::kDouble).div(0).item<double>();
  const at::Tensor nan = at::zeros({}, in.logits.options()).div(0);
  const at::Tensor logits = in.logits.detach().clone();
  logits[4][7] = nan;
  expect(compute_reconstruction_loss(logits, in.targets).isnan().item<bool>(), in.type() + "a NaN is hidden");
  expect(compute_reconstruction_loss(in.logits, at::full_like(in.targets, -100)).eq(0).item<bool>(),
         in.type() + "nothing counted costs something");
  const at::Tensor sure = at::full({2, latent_bits}, infinity, in.z_logits.options().requires_grad(false));
  expect_close(compute_kl_divergence(sure, latent_bits, 0.0), at::full({}, latent_bits * std::log(2.0), at::kDouble),
               in.type() + "KL of sure bits");
  for (const at::Tensor& bad : {in.z_logits.narrow(1, 0, 3), in.z_logits.to(at::kLong)}) {
    try {
      compute_kl_divergence(bad, latent_bits);
      expect(false, in.type() + "bad z_logits are taken");
    } catch (const c10::Error&) {
    }
  }
}

}  // namespace

int main() {
  at::manual_seed(6);
  use_device_kernels(true);
  keep_device_kernels("");
  expect(Schedule::parse("linear:0:1:4")(3) == 0.75, "schedule");
  for (const auto type : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}) {
    const Inputs inputs(type);
    check_reconstruction(inputs);
    check_latent_terms(inputs);
    check_vae_loss(inputs);
    check_linear_logits(inputs);
    check_statistics(inputs);
    check_latent_code(inputs);
    check_special_values(inputs);
  }
  return verdict("every_call");
}
