// What the messages of a split vocabulary take on this machine, for docs/distributed.md: not a test, so it is hidden.
#include <algorithm>
#include <chrono>

#include "../unit/numeric.hpp"
#include "free_transformer/distributed.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"

namespace {

using namespace free_transformer;

/// The median of eleven calls, in milliseconds.
template <typename Function>
double milliseconds(const Function& function) {
  std::vector<double> times;
  for (int repetition = 0; repetition < 11; ++repetition) {
    const auto start = std::chrono::steady_clock::now();
    function();
    times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::nth_element(times.begin(), times.begin() + 5, times.end());
  return times[5];
}

}  // namespace

TEST_CASE("measurement", "[.measurement]") {
  constexpr int64_t positions = 1024, classes = 32768;
  const int64_t columns = classes * (ranks::rank() + 1) / ranks::size() - classes * ranks::rank() / ranks::size();
  const auto shard = torch::randn({positions, columns}).requires_grad_();
  const auto targets = torch::randint(classes, {positions}, torch::TensorOptions(torch::kLong));
  targets.copy_(torch::arange(positions) * 31);
  for (const bool accuracy : {false, true}) {
    ranks::WatchedGroup watched;
    const auto call = [&] {
      return compute_reconstruction_loss(VocabParallelLogits(shard, &watched, classes), targets,
                                         ReconstructionLossOptions().accuracy(accuracy));
    };
    call();
    const auto bytes = watched.bytes;
    const double forward = milliseconds(call), both = milliseconds([&] { call().backward(); });
    const auto message = torch::zeros({static_cast<int64_t>(bytes[1] / sizeof(double))}, torch::kDouble);
    const double messages = milliseconds([&] {
      std::vector<torch::Tensor> first{torch::zeros({37}, torch::kDouble)}, second{message};
      ranks::group()->allreduce(first)->wait();
      ranks::group()->allreduce(second)->wait();
    });
    if (ranks::rank() == 0) {
      std::cout << "R = " << ranks::size() << (accuracy ? ", accuracy" : "") << ": forward " << forward
                << " ms, with backward " << both << " ms; two all-reduces of these sizes alone " << messages
                << " ms; bytes given " << bytes[0] << " + " << bytes[1] << "\n";
    }
  }
  if (ranks::size() == 1) {
    for (const bool is_eager : {false, true}) {
      const auto call = [&] {
        return is_eager ? torch::nn::functional::cross_entropy(shard, targets)
                        : compute_reconstruction_loss(shard, targets);
      };
      const auto forward = milliseconds([&] {
        const torch::NoGradGuard no_grad;
        call();
      });
      std::cout << (is_eager ? "eager" : "dense") << ": forward alone " << forward << " ms, with backward "
                << milliseconds([&] { call().backward(); }) << " ms\n";
    }
  }
}
