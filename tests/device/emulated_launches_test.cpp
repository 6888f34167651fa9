/// The losses go through the emulated kernels, with as few launches as promised: or the unit tests beside this file would
/// prove nothing of them.
#define FREE_TRANSFORMER_VECTOR_KERNELS 0
#define FREE_TRANSFORMER_DEVICE_KERNELS 1
#define FREE_TRANSFORMER_KERNEL_DEVICE at::kCPU
#include <dlfcn.h>

#include "../unit/numeric.hpp"
#include "free_transformer/losses.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

/// Launches while the function runs.
template <typename Function>
long launches_of(const Function& function) {
  static long& count = *static_cast<long*>(dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "emulated_launches"));
  const long before = count;
  function();
  return count - before;
}

}  // namespace

TEST_CASE("Each loss takes the launches that the documentation names", "[device]") {
  for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    INFO(type);
    const Tensor logits = leaf(eighths({6, 40}, type)), targets = torch::arange(6),
                 z_logits = leaf(eighths({6, 16}, type));
    compute_vae_loss(logits, targets, z_logits);  // what the first call tries and compiles
    CHECK(launches_of([&] { compute_reconstruction_loss(logits, targets); }) == 3);
    CHECK(launches_of([&] { compute_kl_divergence(z_logits); }) == 2);
    const Tensor each =
        compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().reduction(torch::kNone));
    CHECK(launches_of([&] { gradient(each.sum(), logits); }) == 1);
  }
}

TEST_CASE("The fused head on a device takes the row kernel once a block, over the logits", "[device]") {
  namespace losses = free_transformer::detail;
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    for (const double z_loss : {0.0, 0.0078125}) {
      INFO(type << ", z_loss " << z_loss);
      const Tensor hidden = leaf(eighths({6, 8}, torch::kDouble) / 8), targets = torch::arange(6);
      const Tensor weight = leaf(eighths({40, 8}, torch::kDouble, 2) / 8),
                   bias = leaf(eighths({40}, torch::kDouble, 3) / 8);
      compute_reconstruction_loss(eighths({6, 40}, type), targets);  // what the first call tries and compiles
      const losses::LinearInputs inputs{hidden.detach().to(type), weight.detach().to(type), bias.detach().to(type),
                                        /*block_bytes=*/3 * 40 * 4};
      losses::CrossEntropySettings settings;
      settings.targets = targets;
      settings.z_loss = z_loss;
      const auto positions = losses::plain::cross_entropy_positions(settings, 40, torch::kFloat, {});
      losses::DeviceLinearRows found;
      CHECK(launches_of([&] {
              found = losses::device_linear_rows(inputs, settings, positions, /*upstream=*/{}, {true, true, true},
                                                 {/*sums=*/false, /*each=*/true});
            }) == 2);
      const auto gradients = found.gradients.finished(inputs, /*upstream=*/{});
      const Tensor loss = compute_reconstruction_loss(torch::linear(hidden, weight, bias), targets,
                                                      ReconstructionLossOptions().z_loss(z_loss));
      const auto expected = torch::autograd::grad({loss}, {hidden, weight, bias});
      // Logits of 9 at most are rounded to the type, and so is what they are multiplied on by: see pretend_device.
      const double relative = type == torch::kFloat ? 64 * epsilon(type) : 12 * epsilon(type);
      for (size_t index = 0; index < expected.size(); ++index) {
        CHECK(gradients[index].scalar_type() == type);
        CHECK(difference(gradients[index], expected[index], relative, 1) == "");
      }
    }
  }
}

TEST_CASE("What the kernels do not take is computed without them", "[device]") {
  const Tensor targets = torch::arange(6), logits = eighths({6, 40}, torch::kDouble);
  CHECK(launches_of([&] { compute_reconstruction_loss(logits, targets); }) == 0);
  CHECK(launches_of([&] {
          compute_reconstruction_loss(logits.to(torch::kFloat).softmax(-1), logits.to(torch::kFloat).softmax(-1));
        }) == 0);
}

TEST_CASE("Kernels that are turned off are not launched", "[device]") {
  const Tensor targets = torch::arange(6), logits = eighths({6, 40}, torch::kFloat);
  use_device_kernels(false);
  CHECK(launches_of([&] { compute_reconstruction_loss(logits, targets); }) == 0);
  use_device_kernels(true);
  CHECK(launches_of([&] { compute_reconstruction_loss(logits, targets); }) == 3);
}
