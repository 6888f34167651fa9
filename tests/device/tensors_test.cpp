/// The losses from tensors to tensors by the device kernels, emulated on the CPU's memory, against the library's own on
/// the CPU.
#include <dlfcn.h>
#include <torch/torch.h>
#include <free_transformer/detail/device/cross_entropy.hpp>
#include <free_transformer/detail/device/latent_kl.hpp>
#include <free_transformer/kl_divergence.hpp>
#include <free_transformer/reconstruction_loss.hpp>

#include <cstdio>
#include <string>

namespace free_transformer {
namespace {

using at::Tensor;

const detail::device::Place place{0, nullptr};
int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::printf("tensors_test: %s\n", what.c_str());
}

void expect_launched(const std::string& reason) { expect(reason.empty(), reason); }

void expect_close(const Tensor& got, const Tensor& wanted, double tolerance, const std::string& what) {
  const double size = wanted.abs().max().to(at::kDouble).item<double>() + 1e-30;
  const double error = (got.to(at::kDouble) - wanted.to(at::kDouble)).abs().max().item<double>() / size;
  expect(got.sizes() == wanted.sizes() && error <= tolerance,
         what + ": error " + std::to_string(error / tolerance) + " of what is allowed");
}

/// Launches since the last call.
long launches() {
  static long& count = *static_cast<long*>(dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "emulated_launches"));
  const long since = count;
  count = 0;
  return since;
}

double tolerance_of(at::ScalarType type) { return type == at::kFloat ? 2e-6 : type == at::kHalf ? 1e-3 : 8e-3; }

struct Options {
  double label_smoothing, z_loss, softcap;
  bool class_weight, token_weight;
};

void check_cross_entropy(const Tensor& given, const Options& of, const detail::Normalization& normalization,
                         bool in_place, const std::string& name) {
  const int64_t classes = given.size(-1);
  const Tensor targets = at::randint(classes, given.sizes().slice(0, static_cast<size_t>(given.dim() - 1)), at::kLong);
  targets.view({-1}).narrow(0, 1, 1).fill_(-100);
  auto options = ReconstructionLossOptions().label_smoothing(of.label_smoothing).z_loss(of.z_loss).softcap(of.softcap);
  detail::CrossEntropySettings settings;
  settings.targets = targets.reshape({-1});
  settings.label_smoothing = of.label_smoothing;
  settings.z_loss = of.z_loss;
  settings.softcap = of.softcap;
  if (of.class_weight) {
    settings.class_weight = at::rand({classes});
    options.weight(settings.class_weight);
  }
  if (of.token_weight) {
    settings.token_weight = at::rand({settings.targets.numel()});
    options.token_weight(settings.token_weight.reshape(targets.sizes()));
  }
  if (normalization.number) options.normalizer(*normalization.number);
  if (normalization.tensor.defined()) options.normalizer(normalization.tensor);
  const Tensor leaf = given.detach().clone().requires_grad_();
  const Tensor wanted = compute_reconstruction_loss(leaf, targets, options);
  wanted.backward();

  expect(detail::device::can_read(given, settings), name + " is not taken");
  const Tensor logits = in_place ? given : given.detach();
  const Tensor gradient = in_place ? given : at::empty(given.sizes(), given.options());
  detail::device::CrossEntropyBatch batch;
  auto rows = detail::device::empty_rows(settings.targets, /*wants_prediction=*/true);
  Tensor sums, loss;
  launches();
  expect_launched(detail::device::launch_scales(settings, classes, normalization, place, batch));
  expect_launched(detail::device::launch_rows(logits, settings, batch.likelihood_scale(), batch.z_scale(), gradient, {},
                                              rows, place));
  expect_launched(detail::device::launch_sums(settings, classes, batch, rows, place, sums, loss));
  expect(launches() == 3, name + ": launches");
  expect_close(loss, wanted.detach(), 1e-6, name + ", loss");
  expect_close(gradient, leaf.grad(), tolerance_of(given.scalar_type()), name + ", gradient");
}

void test_cross_entropy() {
  const auto kinds = {at::kFloat, at::kHalf, at::kBFloat16};
  for (const auto type : kinds) {
    const auto logits = [&](at::IntArrayRef sizes) { return (at::randn(sizes) * 3).to(type); };
    detail::Normalization by_weight, by_number, by_tensor;
    by_number.number = 7.0;
    by_tensor.tensor = at::full({}, 3.5, at::kDouble);
    check_cross_entropy(logits({6, 1000}), {0, 0, 0, false, false}, by_weight, false, "plain");
    check_cross_entropy(logits({2, 5, 37}), {0, 0, 0, false, true}, by_number, true, "in place");
    check_cross_entropy(logits({3, 4, 129}).slice(1, 0, 3), {0.1, 0.01, 20, true, true}, by_weight, false,
                        "all options");
    check_cross_entropy(logits({3, 6, 64}).slice(1, 1, 5), {0.1, 0, 0, false, false}, by_tensor, true,
                        "a slice in place");
    check_cross_entropy(logits({40, 7}).slice(1, 1, 6), {0, 0.5, 0, true, false}, by_weight, false, "some columns");
  }
  const detail::CrossEntropySettings settings{at::zeros({12}, at::kLong), {}, {}};
  using detail::device::can_read;
  expect(!can_read(at::zeros({12, 4}, at::kDouble), settings), "float64 is taken");
  expect(!can_read(at::zeros({4, 12}).t(), settings), "strided columns are taken");
  expect(!can_read(at::zeros({5, 5, 5, 4}).slice(0, 0, 2).slice(1, 0, 2).slice(2, 0, 3), settings),
         "rows in groups of groups are taken");
}

template <typename FreeBits>
void check_latent_kl(const Tensor& z_logits, detail::kernels::Hinge hinge, bool weighted, const std::string& name) {
  const int64_t bits = z_logits.size(-1), positions = z_logits.numel() / bits;
  auto options = KLDivergenceOptions().latent_dim(bits).free_bits(0.1);
  detail::LatentSettings settings;
  settings.free_bits = 0.1;
  if (weighted) {
    settings.token_weight = at::rand({positions}, at::kDouble);
    options.token_weight(
        settings.token_weight.reshape(z_logits.sizes().slice(0, static_cast<size_t>(z_logits.dim() - 1))));
  }
  const Tensor leaf = z_logits.detach().clone().requires_grad_();
  const Tensor wanted = compute_kl_divergence<FreeBits>(leaf, options);
  wanted.backward();
  expect(detail::device::can_read(z_logits, settings), name + " is not taken");
  detail::device::LatentRowResults rows;
  launches();
  expect_launched(detail::device::launch_latent_rows(hinge, z_logits, settings, {}, /*wants_penalty=*/true,
                                                     /*wants_gradient=*/true, place, rows));
  expect(launches() == 2, name + ": launches");
  const double tolerance = tolerance_of(z_logits.scalar_type());
  expect_close(rows.loss, wanted.detach(), 1e-6, name + ", loss");
  expect_close(rows.gradient, leaf.grad(), tolerance, name + ", gradient");
  Tensor gradient;
  expect_launched(detail::device::launch_latent_gradient(hinge, z_logits, settings, rows.totals.select(0, 0),
                                                         rows.totals.select(0, 1), at::full({}, 2.0, at::kDouble),
                                                         place, gradient));
  expect(launches() == 1, name + ": launches of a backward");
  expect_close(gradient, leaf.grad() * 2, tolerance, name + ", a later gradient");
}

void test_latent_kl() {
  using detail::kernels::Hinge;
  for (const auto type : {at::kFloat, at::kHalf, at::kBFloat16}) {
    const auto logits = [&](at::IntArrayRef sizes) { return at::randn(sizes).to(type); };
    check_latent_kl<PerPosition>(logits({3, 50, 16}), Hinge::per_position, false, "per position");
    check_latent_kl<PerBit>(logits({3, 50, 16}).slice(1, 0, 40), Hinge::per_bit, true, "per bit");
    check_latent_kl<BatchMean>(logits({70, 16}), Hinge::batch_mean, true, "batch mean");
    check_latent_kl<BatchMean>(logits({70, 16}) / 50, Hinge::batch_mean, false, "batch mean below the budget");
  }
}

}  // namespace
}  // namespace free_transformer

int main() {
  torch::manual_seed(3);
  free_transformer::test_cross_entropy();
  free_transformer::test_latent_kl();
  return free_transformer::failures > 0;
}
