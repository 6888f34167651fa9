/// The names that the C++ blocks of README.md and docs/ take for granted.
#pragma once

#include <torch/torch.h>

#include <tuple>
#include <utility>
#include <vector>

#include <free_transformer/losses.hpp>

namespace F = torch::nn::functional;
using namespace free_transformer;

struct Model {
  torch::Tensor forward(const torch::Tensor& tokens);
  std::pair<torch::Tensor, torch::Tensor> forward_with_latents(const torch::Tensor& tokens);
  torch::Tensor decode(const torch::Tensor& tokens, const torch::Tensor& codes);
};

struct Batch {
  torch::Tensor tokens, targets;
};

extern Model* model;
extern Model* decoder;
extern std::vector<Batch> micro_batches;
extern torch::Tensor logits, targets, z_logits, tokens, mask, codebook;
extern VAELossOptions options;
extern int64_t padding, step, bytes;
extern double beta, kappa;
