// A split vocabulary whose shards lie on a device: the numbers of float64 on the CPU, and how often the host waits.
#include "../pretend_device/pretend_device.hpp"
#include "../unit/operations.hpp"
#include "free_transformer/distributed.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"
#include "problem.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
using ranks::Columns;
using ranks::group;
using ranks::largest_of;
using ranks::padded;
using ranks::Problem;

/// Gloo for tensors of the pretend device, by way of the host: what NCCL is to a GPU's.
class DeviceGroup {
 public:
  int getRank() const { return group()->getRank(); }
  int getSize() const { return group()->getSize(); }

  c10::intrusive_ptr<c10d::Work> allreduce(std::vector<Tensor>& tensors, const c10d::AllreduceOptions& options) {
    ++messages;
    CHECK(tensors[0].device() == pretend_device::device());
    std::vector<Tensor> on_host{tensors[0].cpu()};
    auto work = group()->allreduce(on_host, options);
    work->wait();
    tensors[0].copy_(on_host[0]);
    return work;
  }
  c10::intrusive_ptr<c10d::Work> allgather(std::vector<std::vector<Tensor>>& outputs, std::vector<Tensor>& inputs) {
    ++messages;
    std::vector<Tensor> on_host{inputs[0].cpu()};
    std::vector<std::vector<Tensor>> of_ranks(1);
    for (const Tensor& output : outputs[0]) of_ranks[0].push_back(torch::empty(output.sizes(), on_host[0].options()));
    auto work = group()->allgather(of_ranks, on_host);
    work->wait();
    for (size_t rank = 0; rank < outputs[0].size(); ++rank) outputs[0][rank].copy_(of_ranks[0][rank]);
    return work;
  }

  int messages = 0;  ///< each of which has copied to the host once
};

Tensor on_device(const Tensor& tensor) {
  return tensor.defined() ? tensor.detach().to(pretend_device::device()) : Tensor();
}

ReconstructionLossOptions on_device(ReconstructionLossOptions options) {
  options.token_weight(on_device(options.token_weight())).weight(on_device(options.weight()));
  if (const auto& tensor = options.normalizer().tensor()) options.normalizer(on_device(*tensor));
  return options;
}

/// How often the host has waited for the device since the last call.
int waits() {
  int count = 0;
  for (const auto& name : pretend_device::take_operations()) {
    if (name == pretend_device::copy_to_host || reads_a_value(name.substr(0, name.find('.')))) ++count;
  }
  return count;
}

}  // namespace

TEST_CASE("A shard on a device has the loss and gradient of all columns, and the host waits once", "[device]") {
  for (const auto type : {torch::kDouble, torch::kFloat}) {
    // Sums of at most 70 terms in the type of arithmetic, see losses_test.cpp of the pretend device.
    const double bound = type == torch::kDouble ? ranks::relative : 2 * (70 + 8) * epsilon(type);
    for (uint64_t seed = 0; seed < 40; ++seed) {
      const Problem problem(seed);
      INFO(type << ", seed " << seed << ", logits " << problem.logits.sizes() << ", rank " << ranks::rank());
      const Tensor logits = problem.logits.to(type), all = leaf(logits.to(torch::kDouble));
      const auto expected = reconstruct(all, problem.targets, problem.options);
      const Tensor own =
          leaf(on_device(Columns(problem.padded_size).of(padded(logits, problem.padded_size, not_a_number))));
      const Tensor targets = on_device(problem.targets);
      const auto options = on_device(problem.shard_options());
      DeviceGroup messages;
      pretend_device::take_operations();
      const auto found = reconstruct(
          VocabParallelLogits(own, &messages, problem.classes).padded_size(problem.padded_size), targets, options);
      CHECK(waits() == messages.messages + 1);
      CHECK(found.loss.device() == pretend_device::device());
      CHECK(difference(found.loss.cpu(), expected.loss, bound, largest_of(expected.loss.detach())) == "");
      // Rounding to float32 may decide which of two classes is the most likely one, and so the last sum.
      const int64_t sums = type == torch::kDouble ? 6 : 5;
      CHECK(difference(found.sums.cpu().narrow(0, 0, sums), expected.sums.narrow(0, 0, sums), bound,
                       largest_of(expected.sums)) == "");
      const Tensor whole = padded(gradient(expected.loss, all, problem.upstream), problem.padded_size, 0);
      pretend_device::take_operations();
      const Tensor of_shard =
          gradient(found.loss, own,
                   problem.upstream.defined() ? on_device(problem.upstream.to(found.loss.scalar_type())) : Tensor());
      CHECK(waits() == 0);
      CHECK(difference(of_shard.cpu(), Columns(problem.padded_size).of(whole), bound, largest_of(whole)) == "");
    }
  }
}

TEST_CASE("A shard of the head on a device has the gradients of the whole head", "[device][linear]") {
  torch::manual_seed(9);
  constexpr int64_t classes = 23;
  const Tensor hidden = leaf(torch::randn({7, 5}, torch::kDouble)),
               weight = leaf(torch::randn({classes, 5}, torch::kDouble)),
               bias = leaf(torch::randn({classes}, torch::kDouble));
  const Tensor targets = torch::randint(classes, {7}, torch::kLong).index_fill_(0, torch::tensor({2}), -100);
  const Tensor expected = compute_reconstruction_loss(LinearLogits(hidden, weight, bias), targets);
  const auto whole = torch::autograd::grad({expected}, {hidden, weight, bias});
  const Columns own(classes);
  const std::vector<Tensor> inputs{leaf(on_device(hidden)), leaf(on_device(own.of(weight.detach(), 0))),
                                   leaf(on_device(own.of(bias.detach())))};
  DeviceGroup messages;
  const Tensor found = compute_reconstruction_loss(
      VocabParallelLogits(LinearLogits(inputs[0], inputs[1], inputs[2]), &messages, classes), on_device(targets));
  CHECK(difference(found.cpu(), expected, ranks::relative) == "");
  const auto parts = torch::autograd::grad({found}, inputs);
  CHECK(messages.messages == 3);
  for (size_t index = 0; index < whole.size(); ++index) {
    INFO("input " << index);
    CHECK(difference(parts[index].cpu(), index == 0 ? whole[0] : own.of(whole[index], 0), 1e-11,
                     largest_of(whole[index])) == "");
  }
}

TEST_CASE("Statistics of a shard on a device are those of all columns", "[device][statistics]") {
  const Tensor logits = eighths({6, 12}), targets = torch::arange(6);
  DeviceGroup messages;
  const auto found = compute_token_statistics(VocabParallelLogits(on_device(Columns(12).of(logits)), &messages, 12),
                                              on_device(targets));
  const auto expected = compute_token_statistics(logits, targets);
  CHECK(difference(found.entropy.cpu(), expected.entropy, ranks::relative, 1) == "");
  CHECK(difference(found.loss.cpu(), expected.loss, ranks::relative, 1) == "");
  CHECK(torch::equal(found.prediction.cpu(), expected.prediction));
}

TEST_CASE("A target out of range on a device makes the loss NaN on every rank", "[device]") {
  const Tensor targets = torch::arange(6).index_fill_(0, torch::tensor({4}), 12);
  DeviceGroup messages;
  const VocabParallelLogits<> shard(on_device(Columns(12).of(eighths({6, 12}))), &messages, 12);
  CHECK(std::isnan(compute_reconstruction_loss(shard, on_device(targets)).cpu().item<double>()));
  const auto statistics = compute_token_statistics(shard, on_device(targets));
  CHECK(statistics.entropy.cpu().isnan().equal(torch::arange(6) == 4));
}

TEST_CASE("What one rank refuses of a shard on a device is an error on every rank", "[device][failure]") {
  const bool is_first = ranks::rank() == 0;
  DeviceGroup messages;
  const VocabParallelLogits<> shard(on_device(Columns(12).of(eighths({6, 12}))), &messages, 12);
  const Tensor targets = torch::arange(6);
  const auto error = error_of([&] { compute_reconstruction_loss(shard, is_first ? targets : on_device(targets)); });
  CHECK(error.find(is_first ? "targets must be on the device" : "got a refusal from rank 0") != std::string::npos);
  CHECK(error_of([&] { compute_reconstruction_loss(shard, on_device(targets)); }) == "");  // all are in step
}

TEST_CASE("Counts and metrics of ranks on a device add up, and the host does not wait", "[device][batch]") {
  const Tensor logits = eighths({6, 12}), targets = torch::arange(6), z_logits = eighths({6, 4}, torch::kDouble, 2);
  const Tensor device_targets = on_device(targets);
  const auto options = VAELossOptions().latent_dim(4);
  const auto own = compute_vae_loss(on_device(logits), device_targets, on_device(z_logits), options).metrics;
  DeviceGroup messages;
  pretend_device::take_operations();
  const Tensor count = count_across_ranks(device_targets, &messages, ReconstructionLossOptions().ignore_index(2));
  const auto sum = sum_across_ranks(own, &messages);
  CHECK(messages.messages == 2);
  CHECK(waits() == messages.messages);
  CHECK(count.cpu().item<double>() == 5.0 * ranks::size());
  // As many equal batches as there are ranks have the means of one.
  for (const auto& [name, value] : compute_vae_loss(logits, targets, z_logits, options).metrics) {
    INFO(name);
    CHECK_THAT(sum.at(name), Catch::Matchers::WithinRel(value, 1e-12) || Catch::Matchers::WithinAbs(value, 1e-15));
  }
}
