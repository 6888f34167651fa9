/// The losses go through the emulated kernels, with as few launches as promised: or the unit tests beside this file would
/// prove nothing of them.
#define FREE_TRANSFORMER_VECTOR_KERNELS 0
#define FREE_TRANSFORMER_DEVICE_KERNELS 1
#define FREE_TRANSFORMER_KERNEL_DEVICE at::kCPU
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/version.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "../unit/numeric.hpp"
#include "free_transformer/losses.hpp"
#include "stand_in/stand_in.hpp"

namespace {

#if TORCH_VERSION_MAJOR >= 2
namespace warning = c10::WarningUtils;
#else
namespace warning = c10::Warning;
#endif

using namespace free_transformer;
using namespace numeric;

/// What the stand-in libraries count and are told.
template <typename Value>
Value& variable(const char* name, const char* library = "libcuda.so.1") {
  return *static_cast<Value*>(dlsym(dlopen(library, RTLD_LAZY), name));
}

/// Launches while the function runs.
template <typename Function>
long launches_of(const Function& function) {
  static long& count = variable<long>("emulated_launches");
  const long before = count;
  function();
  return count - before;
}

/// What LibTorch warns of while this lives.
class KeptWarnings final : public c10::WarningHandler {
 public:
  KeptWarnings() { warning::set_warning_handler(this); }
  ~KeptWarnings() override { warning::set_warning_handler(before_); }
  KeptWarnings(const KeptWarnings&) = delete;
  KeptWarnings& operator=(const KeptWarnings&) = delete;

#if TORCH_VERSION_MAJOR >= 2
  void process(const c10::Warning& warning) override { texts.push_back(warning.msg()); }
#else
  void process(const c10::SourceLocation&, const std::string& text, bool) override { texts.push_back(text); }
#endif

  std::vector<std::string> texts;

 private:
  c10::WarningHandler* const before_ = warning::get_warning_handler();
};

/// Loss and gradients of a batch in float32.
std::vector<Tensor> losses_and_gradients() {
  const Tensor logits = leaf(eighths({6, 40}, torch::kFloat)), z_logits = leaf(eighths({6, 16}, torch::kFloat));
  const Tensor loss = compute_vae_loss(logits, torch::arange(6), z_logits).loss;
  auto all = torch::autograd::grad({loss}, {logits, z_logits});
  all.push_back(loss);
  return all;
}

std::vector<Tensor> exact_losses_and_gradients() {
  const Tensor logits = leaf(eighths({6, 40})), z_logits = leaf(eighths({6, 16}));
  const Tensor loss = compute_vae_loss(logits, torch::arange(6), z_logits).loss;  // no kernel takes float64
  auto all = torch::autograd::grad({loss}, {logits, z_logits});
  all.push_back(loss);
  return all;
}

/// A sum over 40 classes or 16 bits is off by a step for each term, and by about eight for what the terms are made of.
void check_exact(const std::vector<Tensor>& found) {
  const auto expected = exact_losses_and_gradients();
  for (size_t index = 0; index < expected.size(); ++index) {
    CHECK(difference(found[index], expected[index], 48 * epsilon(torch::kFloat), 1) == "");
  }
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

// Each of the following needs a process of its own, in which no kernel has been tried: see CMakeLists.txt.

TEST_CASE("While a graph is captured nothing is compiled, and what was called before is launched",
          "[.alone][capture]") {
  long& modules = variable<long>("emulated_modules");
  int& is_capturing = variable<int>("emulated_capture");
  is_capturing = 1;
  CHECK(launches_of([] { check_exact(losses_and_gradients()); }) == 0);
  CHECK(modules == 0);
  is_capturing = 0;
  losses_and_gradients();
  const long compiled = modules;
  CHECK(compiled > 0);
  is_capturing = 1;
  CHECK(launches_of([] { check_exact(losses_and_gradients()); }) == 3 + 2);  // each makes its gradient on the way
  CHECK(modules == compiled);
  is_capturing = 0;
}

TEST_CASE("Where the kernels fail LibTorch's operations are taken, and one warning says why", "[.alone][failing]") {
  const char* const reason = std::getenv("FREE_TRANSFORMER_EXPECTED_REASON");
  REQUIRE(reason != nullptr);
  void* const nvrtc = dlopen("libnvrtc.so.13", RTLD_LAZY);
  if (dlsym(nvrtc, stand_in::nvrtc_symbol)) {  // too old for the device
    variable<stand_in::Nvrtc>(stand_in::nvrtc_symbol, "libnvrtc.so.13").architecture_count = 0;
  }
  const KeptWarnings warnings;
  for (int call = 0; call < 3; ++call) check_exact(losses_and_gradients());
  REQUIRE(warnings.texts.size() == 1);
  CHECK(warnings.texts[0].find("the losses are computed in LibTorch's operations") != std::string::npos);
  CHECK(warnings.texts[0].find(reason) != std::string::npos);
}
