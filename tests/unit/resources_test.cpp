// What a call may use, for all losses: threads without a trace in the result, one gradient of memory, no look at the
// device.
#include <ATen/ExpandUtils.h>
#include <torch/library.h>

#include "free_transformer/losses.hpp"
#include "numeric.hpp"
#include "operations.hpp"
#include "peak_memory.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

constexpr torch::ScalarType resource_types[] = {torch::kFloat, torch::kDouble, torch::kBFloat16};

/// Rows are handled in blocks of 2^18 elements. Of the cross entropy eight may be at work at one time in the type of
/// its arithmetic, of the KL twelve in float64.
int64_t blocks(int64_t count, torch::ScalarType type) {
  return count * (int64_t{1} << 18) * (type == torch::kDouble ? 8 : 4);
}

Tensor random(torch::IntArrayRef shape, torch::ScalarType type) {
  torch::manual_seed(20251017);
  return (torch::randn(shape) * 2).to(type);
}

/// The loss, the gradients and every metric, to the bit.
template <typename FreeBits>
std::vector<Tensor> everything(const Tensor& logits, const Tensor& targets, const Tensor& z_logits) {
  const Tensor x = leaf(logits), z = leaf(z_logits);
  const auto [loss, metrics] = compute_vae_loss<FreeBits>(x, targets, z, z.size(-1), 0.5, 0.25);
  std::vector<double> read;
  for (const auto& entry : metrics) read.push_back(entry.second);
  return {loss.detach(), gradient(loss, x), gradient(loss, z), torch::tensor(read, torch::kDouble)};
}

template <typename FreeBits>
void check_threads(const Tensor& logits, const Tensor& z_logits) {
  const Tensor targets = (torch::arange(logits.numel() / logits.size(-1)) * 7919)
                             .remainder(logits.size(-1))
                             .reshape(logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1)));
  const auto run = [&] { return everything<FreeBits>(logits, targets, z_logits); };
  const auto one = with_threads(1, run);
  for (const int threads : {2, 3}) {
    INFO(threads << " threads");
    const auto several = with_threads(threads, run);
    for (size_t index = 0; index < one.size(); ++index) {
      INFO("result " << index);
      CHECK(same_bits(one[index], several[index]));
    }
  }
}

Tensor where_without_values(const Tensor& condition, const Tensor& left, const Tensor& right) {
  return torch::empty(at::infer_size(condition.sizes(), at::infer_size(left.sizes(), right.sizes())), left.options());
}

Tensor& unary_without_values(const Tensor& x, Tensor& result) {
  result.resize_(x.sizes());
  return result;
}

}  // namespace

// What LibTorch has for tensors without storage in Python only.
TORCH_LIBRARY_IMPL(aten, Meta, library) {
  library.impl("abs.out", &unary_without_values);
  library.impl("logical_not.out", &unary_without_values);
  library.impl("where.self", &where_without_values);
}

TEST_CASE("Any number of threads gives the same bits", "[threads][cpu]") {
  const auto type = GENERATE(torch::kFloat, torch::kDouble, torch::kBFloat16);
  INFO(type);
  SECTION("many positions") { check_threads<PerPosition>(random({200001, 5}, type), random({50001, 16}, type)); }
  SECTION("many positions, a budget for each bit and for the batch") {
    check_threads<PerBit>(random({40001, 3}, type), random({40001, 7}, type));
    check_threads<BatchMean>(random({40001, 3}, type), random({40001, 7}, type));
  }
  SECTION("a real vocabulary") { check_threads<PerPosition>(random({64, 50257}, type), random({64, 16}, type)); }
  SECTION("one long row") { check_threads<PerPosition>(random({1, 300001}, type), random({1, 20003}, type)); }
  SECTION("one dimension") { check_threads<PerPosition>(random({300001}, type), random({20003}, type)); }
  SECTION("classes first in memory") {
    check_threads<PerPosition>(random({5003, 96}, type).t(), random({16, 20003}, type).t());
  }
  SECTION("shifted") {
    check_threads<PerPosition>(random({3, 65, 5003}, type).slice(1, 1), random({3, 9001, 16}, type).slice(1, 1));
  }
}

TEST_CASE("Cross entropy needs one gradient of memory beside the logits", "[memory]") {
  for (const auto type : resource_types) {
    const std::vector<std::pair<const char*, Tensor>> layouts{
        {"contiguous", torch::zeros({256, 32768}, type)},
        {"shifted", torch::zeros({4, 65, 32768}, type).slice(1, 0, 64)},
    };
    for (const auto& [name, layout] : layouts) {
      INFO(type << ", " << name);
      const Tensor base = layout, logits = leaf(base);
      const Tensor targets = torch::zeros(base.sizes().slice(0, static_cast<size_t>(base.dim() - 1)), torch::kLong);
      const int64_t gradient_bytes = logits.numel() * static_cast<int64_t>(logits.element_size());
      const int64_t small = blocks(8, type);
      CHECK(peak_of([&] { compute_reconstruction_loss(base, targets); }) <= small);
      Tensor found;
      CHECK(peak_of([&] { found = gradient(compute_reconstruction_loss(logits, targets), logits); }) <=
            gradient_bytes + small);
    }
  }
}

TEST_CASE("The latent KL needs one gradient of memory beside the logits", "[memory]") {
  const Tensor base = torch::zeros({262152, 16}, torch::kDouble);
  const int64_t small = blocks(12, torch::kDouble);
  for (const Tensor& view : {base, base.view({8, 32769, 16}).slice(1, 1)}) {
    const Tensor z_logits = leaf(view);
    const int64_t gradient_bytes = z_logits.numel() * static_cast<int64_t>(z_logits.element_size());
    CHECK(gradient_bytes > small);  // or a second gradient would not be noticed
    CHECK(peak_of([&] { compute_kl_divergence(view); }) <= small);
    Tensor found;
    CHECK(peak_of([&] { found = gradient(compute_kl_divergence(z_logits), z_logits); }) <= gradient_bytes + small);
  }
}

TEST_CASE("A prior for each position needs a block of memory more than one for all", "[memory]") {
  const Tensor z_logits = torch::zeros({2, 65538, 16});
  const auto peak = [&](const Tensor& prior_logits) {
    return peak_of([&] { compute_kl_divergence(z_logits, KLDivergenceOptions().prior_logits(prior_logits)); });
  };
  const int64_t block = blocks(1, torch::kDouble), of_one_for_all = peak(torch::zeros({16}));
  CHECK(z_logits.numel() * 8 > 3 * block);  // or a wide copy of all would not be noticed
  CHECK(peak(torch::zeros({2, 65538, 16})) <= of_one_for_all + block);
  // Rows that cannot be viewed are copied, in their own type.
  const Tensor batch_second = torch::zeros({65538, 2, 16}).transpose(0, 1);
  CHECK(peak(batch_second) <= of_one_for_all + block + static_cast<int64_t>(batch_second.nbytes()));
}

TEST_CASE("The memory that is counted is what tensors take", "[memory]") {
  CHECK(peak_of([] { torch::empty({1000}, torch::kDouble) + torch::ones({1000}, torch::kDouble); }) >= 24000);
  CHECK(peak_of([] {
          for (int repeat = 0; repeat < 10; ++repeat) torch::empty({1000}, torch::kDouble);
        }) < 9000);
}

TEMPLATE_TEST_CASE("The whole loss reads no value, neither forward nor backward", "[vae][metrics][device][cpu]",
                   PerPosition, PerBit, BatchMean) {
  const auto step = [](const Tensor& logits, const Tensor& targets, const Tensor& z_logits, bool create_graph) {
    auto [loss, metrics] = compute_vae_loss<TestType>(logits, targets, z_logits, 3);
    metrics += compute_vae_loss<TestType>(logits, targets, z_logits, 3).metrics;
    torch::autograd::grad({loss * 3}, {logits, z_logits}, {}, /*retain_graph=*/create_graph, create_graph);
    return metrics;
  };
  const Tensor logits = leaf(eighths({2, 4, 5})), z_logits = leaf(eighths({2, 4, 3}));
  const Tensor targets = torch::zeros({2, 4}, torch::kLong);
  SECTION("as the operations that it calls show") {
    for (const bool create_graph : {false, true}) {
      const auto operations = operations_of([&] { step(logits, targets, z_logits, create_graph); });
      CHECK(operations.size() > 20);
      for (const auto& operation : operations) {
        INFO(operation);
        CHECK_FALSE(reads_a_value(operation));
      }
    }
  }
  SECTION("as a device without values shows") {
    for (const auto type : all_types) {
      INFO(type);
      const auto options = torch::TensorOptions(type).device(torch::kMeta);
      const Tensor meta_logits = torch::empty({2, 4, 5}, options).requires_grad_();
      const Tensor meta_z = torch::empty({2, 4, 3}, options).requires_grad_();
      const Tensor meta_targets = torch::empty({2, 4}, options.dtype(torch::kLong));
      for (const bool create_graph : {false, true}) step(meta_logits, meta_targets, meta_z, create_graph);
      compute_vae_loss<TestType>(meta_logits, meta_targets, meta_z, 3).loss.backward();
      CHECK(meta_logits.grad().sizes() == meta_logits.sizes());
      CHECK(meta_z.grad().scalar_type() == type);
    }
  }
}

TEST_CASE("Reading a value is noticed by the test above", "[device]") {
  const auto read = operations_of([] { torch::ones({}).item<double>(); });
  CHECK(std::any_of(read.begin(), read.end(), reads_a_value));
  CHECK_THROWS_AS(torch::empty({}, torch::kMeta).item<double>(), std::exception);
}

TEST_CASE("A backward pass lets go of all that was saved, though the loss lives on", "[memory]") {
  const Tensor targets = torch::zeros({512}, torch::kLong), weight = torch::ones({512});
  const Tensor probabilities = torch::full({512, 64}, 1.0 / 64), vocabulary = torch::ones({64, 16});
  struct Held {
    Tensor loss, input;
  };
  const std::vector<std::pair<const char*, std::function<Held()>>> losses{
      {"kernel",
       [&] {
         const Tensor x = leaf(torch::zeros({512, 64}));
         return Held{compute_reconstruction_loss(x, targets, ReconstructionLossOptions().token_weight(weight)), x};
       }},
      {"operations",
       [&] {
         const Tensor x = leaf(torch::zeros({64, 512}).t());
         return Held{compute_reconstruction_loss(x, targets, ReconstructionLossOptions().token_weight(weight)), x};
       }},
      {"probabilities",
       [&] {
         const Tensor x = leaf(torch::zeros({512, 64}));
         return Held{compute_reconstruction_loss(x, probabilities.clone()), x};
       }},
      {"in place",
       [&] {
         const Tensor x = leaf(torch::zeros({512, 64}, torch::kHalf));
         return Held{compute_reconstruction_loss(x * 1, targets, ReconstructionLossOptions().inplace(true)), x};
       }},
      {"head",
       [&] {
         const Tensor x = leaf(torch::zeros({512, 16}));
         return Held{compute_reconstruction_loss(LinearLogits(x, vocabulary), targets), x};
       }},
      {"latent kernel",
       [&] {
         const Tensor x = leaf(torch::zeros({512, 16}));
         return Held{compute_kl_divergence(x, KLDivergenceOptions().token_weight(weight)), x};
       }},
      {"latent operations", [&] {
         const Tensor x = leaf(torch::zeros({512, 16}, torch::kDouble));
         return Held{compute_kl_divergence(x, KLDivergenceOptions().token_weight(weight)), x};
       }}};
  for (const auto& [name, make] : losses) {
    INFO(name);
    const auto memory = std::make_shared<Memory>();
    const c10::DebugInfoGuard guard(c10::DebugInfoKind::PROFILER_STATE, memory);
    auto [loss, input] = make();
    const int64_t before = memory->now();
    loss.backward();
    input.mutable_grad().reset();
    const int64_t of_input = input.numel() * static_cast<int64_t>(input.element_size());  // the graph's leaf
    CHECK(before > of_input + 2048);
    CHECK(memory->now() <= of_input + 64);  // and the loss itself
    CHECK(loss.defined());
  }
}

TEST_CASE("A gradient holds the memory of its own type and no more", "[memory][half]") {
  const auto bytes_of_storage = [](const Tensor& tensor) { return static_cast<int64_t>(tensor.storage().nbytes()); };
  const Tensor targets = torch::arange(12) % 7;
  for (const auto type : all_types) {
    for (const int64_t classes : {7, 8}) {
      for (const int64_t width : {5, 6}) {
        for (const double scale : {1.0, 3.0}) {
          INFO(type << ", " << classes << " classes, width " << width << ", upstream " << scale);
          const Tensor hidden = leaf(eighths({12, width}, type)), weight = leaf(eighths({classes, width}, type));
          const Tensor bias = leaf(eighths({classes}, type)), logits = leaf(eighths({12, classes}, type));
          (compute_reconstruction_loss(LinearLogits(hidden, weight, bias), targets) * scale).backward();
          (compute_reconstruction_loss(logits, targets) * scale).backward();
          const Tensor z_logits = leaf(eighths({12, 16}, type)), prior = leaf(eighths({16}, type));
          (compute_kl_divergence(z_logits) * scale).backward();
          (compute_kl_divergence(z_logits, KLDivergenceOptions().prior_logits(prior)) * scale).backward();
          for (const Tensor& input : {hidden, weight, bias, logits, z_logits, prior}) {
            CHECK(input.grad().scalar_type() == type);
            CHECK(bytes_of_storage(input.grad()) == input.numel() * static_cast<int64_t>(input.element_size()));
          }
        }
      }
    }
  }
}
