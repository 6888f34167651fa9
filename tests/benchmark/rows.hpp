/// The rows of the benchmark: what is compared with what, and which ratio must be reached.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <free_transformer/losses.hpp>

#include "comparison.hpp"
#include "eager.hpp"
#include "environment.hpp"
#include "graph_input.hpp"

namespace benchmarks {

using free_transformer::ReconstructionLossOptions;
using Loss = std::function<Tensor(const Tensor& logits, const Tensor& targets)>;
using Requirements = std::vector<Requirement>;

inline constexpr double free_bits = 0.3466;
inline constexpr Shape large{1024, 32768}, tiny{32, 256};
inline constexpr torch::ScalarType both_types[] = {torch::kFloat, torch::kBFloat16};

inline std::string shape_name(Shape shape) { return std::to_string(shape.rows) + "x" + std::to_string(shape.columns); }

inline double limit_of_instruction_set(double avx512, double avx2) {
  const InstructionSet set = kernels::instruction_set();
  return set == InstructionSet::avx512 ? avx512 : set == InstructionSet::avx2 ? avx2 : 0;
}

inline Tensor eager_cross_entropy(const Tensor& logits, const Tensor& targets) {
  return eager::cross_entropy(logits, targets);
}

inline Loss our_loss(const ReconstructionLossOptions& options) {
  return [options](const Tensor& logits, const Tensor& targets) {
    return free_transformer::compute_reconstruction_loss(logits, targets, options);
  };
}

inline std::function<void()> copy_of(const Tensor& values) {
  return [values, destination = torch::empty_like(values)] { destination.copy_(values); };
}

/// Forward and backward of a loss of dense logits.
inline Comparison cross_entropy_row(std::string name, Shape shape, torch::ScalarType type, Requirements requirements,
                                    const Loss& ours, const Loss& baseline = eager_cross_entropy) {
  const auto prepare = [=] {
    const Tensor values = random_logits(shape, type), targets = random_targets(shape);
    const Tensor logits = graph_input(values);
    return Work{[=] { ours(logits, targets).backward(); }, [=] { baseline(logits, targets).backward(); },
                copy_of(values), values.nbytes()};
  };
  return {std::move(name), "F::cross_entropy", shape_name(shape), type, std::move(requirements), prepare};
}

/// The same where the gradient is written over the logits: each call needs a graph of its own. From the second call on
/// the logits are the last gradient, which changes no time.
inline Comparison in_place_row(std::string name, Shape shape, torch::ScalarType type, Requirements requirements) {
  const auto prepare = [=] {
    const Tensor values = random_logits(shape, type), targets = random_targets(shape);
    const Loss ours = our_loss(ReconstructionLossOptions().inplace(true));
    return Work{[=] { ours(graph_input(values), targets).backward(); },
                [=] { eager_cross_entropy(graph_input(values), targets).backward(); }, copy_of(values),
                values.nbytes()};
  };
  return {std::move(name), "F::cross_entropy", shape_name(shape), type, std::move(requirements), prepare};
}

inline Comparison forward_row(Shape shape, torch::ScalarType type, Requirements requirements) {
  const auto without_gradient = [](const Loss& loss, const Tensor& logits, const Tensor& targets) {
    return [=] {
      const torch::NoGradGuard no_grad;
      loss(logits, targets);
    };
  };
  const auto prepare = [=] {
    const Tensor logits = random_logits(shape, type), targets = random_targets(shape);
    return Work{without_gradient(our_loss({}), logits, targets), without_gradient(eager_cross_entropy, logits, targets),
                copy_of(logits), logits.nbytes()};
  };
  return {"cross entropy forward alone", "F::cross_entropy", shape_name(shape), type, std::move(requirements), prepare};
}

inline Comparison kl_row(torch::ScalarType type, Requirements requirements) {
  const auto prepare = [=] {
    const Tensor values = torch::randn({64, 2048, 16}, type);
    const Tensor z_logits = graph_input(values);
    return Work{[=] { free_transformer::compute_kl_divergence(z_logits, 16, free_bits).backward(); },
                [=] { eager::kl_divergence(z_logits, free_bits).backward(); }, copy_of(values), values.nbytes()};
  };
  return {"latent KL", "formula in tensor operations", "64x2048x16", type, std::move(requirements), prepare};
}

/// The whole loss with its metrics, compared with its two terms one after the other.
inline Comparison vae_row(Shape shape, torch::ScalarType type, Requirements requirements) {
  const auto prepare = [=] {
    const Tensor values = random_logits(shape, type), targets = random_targets(shape);
    const Tensor logits = graph_input(values), z_logits = graph_input(torch::randn({shape.rows, 16}, type));
    const auto terms = [=] {
      free_transformer::compute_reconstruction_loss(logits, targets).backward();
      free_transformer::compute_kl_divergence(z_logits).backward();
    };
    return Work{[=] { free_transformer::compute_vae_loss(logits, targets, z_logits).loss.backward(); }, terms,
                copy_of(values), values.nbytes()};
  };
  return {"VAE loss with metrics", "its two terms", shape_name(shape), type, std::move(requirements), prepare};
}

inline void add_plain_rows(std::vector<Comparison>& rows) {
  const Requirement eager{Ratio::baseline_to_ours}, copy{Ratio::ours_to_copy}, memory{Ratio::memory_to_logits};
  const auto at = [](Requirement requirement, double limit) { return requirement.limit = limit, requirement; };
  for (const auto type : both_types) {
    const bool is_float = type == torch::kFloat;
    rows.push_back(in_place_row(
        "cross entropy in place", large, type,
        {is_float ? at(copy, limit_of_instruction_set(2.0, 2.5)) : copy, at(eager, is_float ? 12 : 8), memory}));
    // The results of each position come on top of the gradient: five numbers beside 32768.
    rows.push_back(cross_entropy_row("cross entropy", large, type,
                                     {copy, at(eager, is_float ? 6 : 5), at(memory, 1.001)}, our_loss({})));
    rows.push_back(forward_row(large, type, {is_float ? at(eager, limit_of_instruction_set(5, 4)) : eager}));
    rows.push_back(cross_entropy_row("cross entropy tiny batch", tiny, type, {at(eager, 1)}, our_loss({})));
    rows.push_back(kl_row(type, {copy, at(eager, 10)}));
    rows.push_back(vae_row(large, type, {{Ratio::ours_to_baseline, 1.1}}));
    rows.push_back(vae_row(tiny, type, {{Ratio::ours_to_baseline}}));
  }
  rows.push_back(cross_entropy_row("cross entropy", large, torch::kDouble, {eager}, our_loss({})));
}

/// Character and byte models, two-class pixels: many rows of few classes.
inline void add_narrow_rows(std::vector<Comparison>& rows) {
  struct Narrow {
    Shape shape;
    double limit, forward_limit;
  };
  constexpr Narrow all[] = {
      {{400000, 2}, 1, 1}, {{400000, 16}, 1, 1}, {{400000, 27}, 1, 1}, {{120000, 65}, 1, 1}, {{30000, 256}, 2, 1.5}};
  for (const auto& [shape, limit, forward_limit] : all) {
    rows.push_back(cross_entropy_row("cross entropy of few classes", shape, torch::kFloat,
                                     {{Ratio::baseline_to_ours, limit}}, our_loss({})));
    rows.push_back(forward_row(shape, torch::kFloat, {{Ratio::baseline_to_ours, forward_limit}}));
  }
}

inline void add_option_rows(std::vector<Comparison>& rows) {
  constexpr double label_smoothing = 0.1, z_loss = 1e-4, softcap = 30;
  const Requirements four_times{{Ratio::baseline_to_ours, 4}};
  for (const auto type : both_types) {
    const Tensor weight = torch::rand({large.columns}).add_(0.5).to(type);
    const auto add = [&](const char* name, const ReconstructionLossOptions& options, const Loss& baseline) {
      rows.push_back(cross_entropy_row(name, large, type, four_times, our_loss(options), baseline));
    };
    const auto eager_with = [](const torch::nn::functional::CrossEntropyFuncOptions& options) {
      return [options](const Tensor& logits, const Tensor& targets) {
        return eager::cross_entropy(logits, targets, options);
      };
    };
    add("cross entropy with label_smoothing", ReconstructionLossOptions().label_smoothing(label_smoothing),
        eager_with(torch::nn::functional::CrossEntropyFuncOptions().label_smoothing(label_smoothing)));
    add("cross entropy with weight", ReconstructionLossOptions().weight(weight),
        eager_with(torch::nn::functional::CrossEntropyFuncOptions().weight(weight)));
    add("cross entropy with z_loss", ReconstructionLossOptions().z_loss(z_loss),
        [](const Tensor& logits, const Tensor& targets) {
          return eager::cross_entropy_with_z_loss(logits, targets, z_loss);
        });
    add("cross entropy with softcap", ReconstructionLossOptions().softcap(softcap),
        [](const Tensor& logits, const Tensor& targets) {
          return eager::capped_cross_entropy(logits, targets, softcap);
        });
  }
}

/// Vocabularies of real models, at 256 MB of float32 logits each. No limits: they show that the ratios hold.
inline void add_model_rows(std::vector<Comparison>& rows) {
  struct Model {
    const char* name;
    Shape shape;
  };
  constexpr Model models[] = {
      {"GPT-2", {1280, 50257}}, {"Llama 2", {2048, 32000}}, {"Llama 3", {512, 128256}}, {"Gemma", {256, 262144}}};
  const Requirements shown{{Ratio::ours_to_copy}, {Ratio::baseline_to_ours}};
  for (const auto type : both_types) {
    for (const auto& [name, shape] : models) {
      rows.push_back(cross_entropy_row(std::string(name) + " vocabulary", shape, type, shown, our_loss({})));
      rows.push_back(in_place_row(std::string(name) + " vocabulary in place", shape, type, shown));
    }
  }
}

/// The head's product and its loss; hidden and weight get gradients, which are summed in float32 and dropped.
struct Head {
  Head(Shape shape, int64_t width, torch::ScalarType type)
      : hidden(graph_input(torch::randn({shape.rows, width}, type))),
        weight(graph_input(torch::randn({shape.columns, width}, type).div_(std::sqrt(static_cast<double>(width))))),
        targets(random_targets(shape)) {}

  void fused_step() const {
    const free_transformer::LinearLogits logits(hidden, weight);
    free_transformer::compute_reconstruction_loss(logits, targets).backward();
  }
  void eager_step() const { eager_cross_entropy(torch::linear(hidden, weight), targets).backward(); }

  Tensor hidden, weight, targets;
};

/// The three products of a head's forward and backward pass. Like ours they return fresh tensors.
inline std::function<void()> three_products(const Head& head) {
  const Tensor hidden = head.hidden.detach(), weight = head.weight.detach();
  return [=] {
    const torch::NoGradGuard no_grad;
    const Tensor logits = torch::mm(hidden, weight.t());
    const Tensor of_hidden = torch::mm(logits, weight), of_weight = torch::mm(logits.t(), hidden);
  };
}

inline double logits_bytes(Shape shape, torch::ScalarType type) {
  return static_cast<double>(shape.rows * shape.columns) * static_cast<double>(elementSize(type));
}

inline void add_head_rows(std::vector<Comparison>& rows) {
  const auto add = [&](Shape shape, int64_t width, torch::ScalarType type, const char* baseline,
                       Requirements requirements) {
    const auto prepare = [=] {
      const Head head(shape, width, type);
      Work work{[=] { head.fused_step(); },
                {},
                {},
                static_cast<size_t>(logits_bytes(shape, type)),
                sizeof(float) * static_cast<size_t>(head.hidden.numel() + head.weight.numel())};
      if (baseline == std::string("three products")) work.baseline = three_products(head);
      if (baseline == std::string("linear and F::cross_entropy")) work.baseline = [=] { head.eager_step(); };
      return work;
    };
    // LibTorch 1.13 multiplies bfloat16 at a fiftieth of float32's speed where the processor has no instructions for it.
    const bool is_slow = type == torch::kBFloat16 || shape.rows * shape.columns * width > int64_t{1} << 36;
    rows.push_back({"LinearLogits width " + std::to_string(width), baseline, shape_name(shape), type,
                    std::move(requirements), prepare, is_slow});
  };
  constexpr Shape usual{1024, 32768}, huge{2048, 131072};
  constexpr double block_bytes = 64 << 20;  // what a head may take where an eighth of the logits is less
  for (const auto type : both_types) {
    add(usual, 512, type, "three products", {{Ratio::ours_to_baseline, 1.1}});
    add(usual, 512, type, "linear and F::cross_entropy",
        {{Ratio::baseline_to_ours, 1},
         {Ratio::memory_to_logits, std::max(1.0 / 8, block_bytes / logits_bytes(usual, type))},
         {Ratio::baseline_memory_to_logits}});
  }
  add(huge, 1024, torch::kFloat, "linear and F::cross_entropy",
      {{Ratio::memory_to_logits, 1.0 / 32}, {Ratio::baseline_to_ours}, {Ratio::baseline_memory_to_logits}});
  add(huge, 1024, torch::kBFloat16, "none", {{Ratio::memory_to_logits, 1.0 / 32}});
}

/// The binary mapper, forward and backward with both gradients, beside the one product that its backward cannot do without,
/// into memory that is there.
inline void add_mapper_row(std::vector<Comparison>& rows) {
  constexpr Shape shape{1024, 65536};
  constexpr int64_t latent_dim = 16, width = 512;
  const auto prepare = [=] {
    const Tensor z_logits = graph_input(torch::randn({shape.rows, latent_dim}));
    const Tensor codebook = graph_input(torch::randn({shape.columns, width}));
    const Tensor upstream = torch::randn({shape.rows, width});
    Tensor product = torch::empty({shape.rows, shape.columns});
    const auto ours = [=] {
      const Tensor codes = free_transformer::pack_latent_bits(free_transformer::sample_latent_bits(z_logits));
      free_transformer::map_latent_codes(z_logits, codes, codebook).backward(upstream);
    };
    const auto one_product = [=]() mutable {
      const torch::NoGradGuard no_grad;
      torch::mm_out(product, upstream, codebook.t());
    };
    return Work{ours, one_product, {}, product.nbytes(), codebook.nbytes() + z_logits.nbytes()};
  };
  rows.push_back({"binary mapper width 512", "one product", shape_name(shape), torch::kFloat,
                  Requirements{{Ratio::ours_to_baseline, 1.3}, {Ratio::memory_to_logits, 1.0 / 16}}, prepare});
}

inline std::vector<Comparison> all_rows() {
  std::vector<Comparison> rows;
  add_plain_rows(rows);
  add_narrow_rows(rows);
  add_option_rows(rows);
  add_model_rows(rows);
  add_head_rows(rows);
  add_mapper_row(rows);
  return rows;
}

}  // namespace benchmarks
