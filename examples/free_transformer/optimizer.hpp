/// AdamW with the usual trimmings: decay on matrices alone, clipped gradients, warm-up and cosine.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <limits>
#include <memory>
#include <vector>

namespace example {

struct OptimizerOptions {
  double learning_rate = 3e-3;  // at its highest
  double warm_up = 0.05;        // share of the training in which it rises
  double largest_norm = 1.0;    // of the gradient; 0 sets no limit
};

/// Rises linearly over the share warm_up of the training, then falls along a cosine to 0. progress is in [0, 1].
inline double learning_rate_factor(double progress, double warm_up) {
  constexpr double pi = 3.14159265358979323846;
  if (progress < warm_up) {
    return progress / warm_up;
  }
  return 0.5 * (1.0 + std::cos(pi * (progress - warm_up) / (1.0 - warm_up)));
}

class Optimizer {
 public:
  Optimizer(const torch::nn::Module& model, const OptimizerOptions& options)
      : parameters_(model.parameters()), options_(options), adam_(groups(parameters_, options.learning_rate)) {}

  /// One step along the gradients, which are 0 afterwards. Returns their norm before it was clipped.
  double step(double progress) {
    const auto limit = options_.largest_norm > 0.0 ? options_.largest_norm : std::numeric_limits<double>::infinity();
    const auto norm = torch::nn::utils::clip_grad_norm_(parameters_, limit);
    for (auto& group : adam_.param_groups()) {
      group.options().set_lr(options_.learning_rate * learning_rate_factor(progress, options_.warm_up));
    }
    adam_.step();
    adam_.zero_grad();
    return norm;
  }

  void save(torch::serialize::OutputArchive& archive) const { adam_.save(archive); }
  void load(torch::serialize::InputArchive& archive) { adam_.load(archive); }

 private:
  /// Gains and biases have no reason to be small: weight decay is for matrices.
  static std::vector<torch::optim::OptimizerParamGroup> groups(const std::vector<torch::Tensor>& parameters,
                                                               double learning_rate) {
    std::vector<torch::Tensor> matrices, vectors;
    for (const auto& parameter : parameters) {
      (parameter.dim() > 1 ? matrices : vectors).push_back(parameter);
    }
    const auto options = [&](double weight_decay) {
      return std::make_unique<torch::optim::AdamWOptions>(
          torch::optim::AdamWOptions(learning_rate).betas({0.9, 0.99}).weight_decay(weight_decay));
    };
    return {{matrices, options(0.1)}, {vectors, options(0.0)}};
  }

  std::vector<torch::Tensor> parameters_;
  OptimizerOptions options_;
  torch::optim::AdamW adam_;
};

}  // namespace example
