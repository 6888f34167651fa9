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
