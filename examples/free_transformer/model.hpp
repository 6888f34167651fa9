/// The Free Transformer: a decoder that receives a latent code at its middle, and the encoder that infers the code.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <free_transformer/latent_code.hpp>
#include <free_transformer/linear_logits.hpp>

#include "layers.hpp"

namespace example {

struct ModelOptions {
  int64_t vocabulary = 256;  // one token for each byte
  int64_t width = 128;
  int64_t blocks = 4;
  int64_t heads = 4;
  int64_t context = 128;
  // As in the paper. The gradient passes through all 2^H codes: with 1024 tokens a step that is a product of 17 GFLOP,
  // twice as much as the rest of the model; with H = 8 it is 1 % of it.
  int64_t latent_dim = 16;
  bool baseline = false;  // the same decoder without Z and encoder

  /// Each option with its name: visit(name, option).
  template <typename Options, typename Visit>
  static void for_each(Options& options, const Visit& visit) {
    visit("vocabulary", options.vocabulary);
    visit("width", options.width);
    visit("blocks", options.blocks);
    visit("heads", options.heads);
    visit("context", options.context);
    visit("latent_dim", options.latent_dim);
    visit("baseline", options.baseline);
  }
};

struct ModelOutput {
  torch::Tensor hidden;    // [batch, positions, width], what the head makes logits of
  torch::Tensor z_logits;  // [batch, positions, latent_dim]
};

/// A codebook [2^H, width] to begin with: a row is the sum of a vector for each bit, plus or minus, and as large as an
/// embedding's. So a bit has one direction from the first step. Were each row drawn by itself, what a bit changes in the
/// mean of all codes, which is all that the encoder's gradient sees, would be smaller than a row by 2^(H/2 - 1).
inline torch::Tensor rows_of_bits(int64_t latent_dim, int64_t width) {
  const auto bits = free_transformer::unpack_latent_codes(torch::arange(int64_t{1} << latent_dim), latent_dim);
  const auto directions = torch::randn({latent_dim, width}) / std::sqrt(static_cast<double>(latent_dim));
  return (bits.to(torch::kFloat) * 2 - 1).matmul(directions);
}

class FreeTransformerImpl : public torch::nn::Module {
 public:
  explicit FreeTransformerImpl(const ModelOptions& options)
      : options_(options),
        embedding_(register_module("embedding", torch::nn::Embedding(options.vocabulary, options.width))),
        norm_(register_module("norm", RMSNorm(options.width))),
        head_(register_module("head", linear(options.width, options.vocabulary, /*scale=*/0.5))) {
    for (int64_t index = 0; index < options.blocks; ++index) {
      blocks_.push_back(register_module("block" + std::to_string(index), make_block(/*causal=*/true)));
    }
    if (!options.baseline) {  // last, so that the decoder begins with the baseline's weights
      encoder_ = register_module("encoder", make_block(/*causal=*/false));
      encoder_query_ = register_parameter("encoder_query", torch::randn({1, 1, options.width}));
      encoder_norm_ = register_module("encoder_norm", RMSNorm(options.width));
      encoder_head_ = register_module("encoder_head", linear(options.width, options.latent_dim, /*scale=*/0.5));
      codebook_ = register_module(
          "codebook", torch::nn::Embedding::from_pretrained(rows_of_bits(options.latent_dim, options.width),
                                                            torch::nn::EmbeddingFromPretrainedOptions().freeze(false)));
    }
  }

  /// tokens [batch, positions], int64; codes are sampled from the encoder's posterior. Where the tokens are those from row `first`
  /// on of a batch of `whole` rows, their codes are what that batch would have got with the same generator.
  ModelOutput forward(const torch::Tensor& tokens, int64_t first = 0, int64_t whole = 0) {
    const auto x = read(tokens);
    const auto z_logits = infer(x);
    if (options_.baseline) return {write(x, x), z_logits};
    const auto codes = whole > z_logits.size(0) ? sample_codes_of_part(z_logits, first, whole) : sample_codes(z_logits);
    return {write(x, x + free_transformer::map_latent_codes(z_logits, codes, codebook_->weight)), z_logits};
  }

  /// Logits of the next token at each position, [batch, positions, vocabulary].
  torch::Tensor logits(const torch::Tensor& hidden) { return head_(hidden); }

  /// The same logits for the loss, which makes them some tokens at a time and never holds them all.
  free_transformer::LinearLogits fused_logits(const torch::Tensor& hidden) const { return {hidden, head_->weight}; }

  /// The encoder's logits of the latent bits, [batch, positions, latent_dim].
  torch::Tensor posterior(const torch::Tensor& tokens) { return infer(read(tokens)); }

  /// Codes, int64 [batch, positions], sampled from the posterior: what a prompt is read with.
  torch::Tensor sample_posterior(const torch::Tensor& tokens) { return sample_codes(posterior(tokens)); }

  /// Codes, int64 [batch, positions], sampled from the prior, which is uniform.
  torch::Tensor sample_prior(at::IntArrayRef shape) const { return torch::randint(code_count(), shape, torch::kInt64); }

  /// Logits of the next token at each position when the codes are given; the baseline has no use for them.
  torch::Tensor predict(const torch::Tensor& tokens, const torch::Tensor& codes) {
    const auto x = read(tokens);
    return logits(write(x, options_.baseline ? x : x + codebook_(codes)));
  }

  const ModelOptions& options() const { return options_; }

 private:
  Block make_block(bool causal) const { return Block(options_.width, options_.heads, options_.context, causal); }

  size_t middle() const { return blocks_.size() / 2; }

  int64_t code_count() const { return int64_t{1} << options_.latent_dim; }

  static torch::Tensor sample_codes(const torch::Tensor& z_logits) {
    return free_transformer::pack_latent_bits(free_transformer::sample_latent_bits(z_logits));
  }

  /// Draws for the whole batch, whatever its other rows are.
  static torch::Tensor sample_codes_of_part(const torch::Tensor& z_logits, int64_t first, int64_t whole) {
    const auto of_all = z_logits.new_zeros({whole, z_logits.size(1), z_logits.size(2)});
    of_all.narrow(0, first, z_logits.size(0)).copy_(z_logits.detach());
    return sample_codes(of_all).narrow(0, first, z_logits.size(0));
  }

  torch::Tensor read(const torch::Tensor& tokens) {
    auto x = embedding_(tokens);
    for (size_t index = 0; index < middle(); ++index) {
      x = blocks_[index]->forward(x);
    }
    return x;
  }

  /// Without an encoder, the prior's logits: their KL is 0.
  torch::Tensor infer(const torch::Tensor& x) {
    if (options_.baseline) return torch::zeros({x.size(0), x.size(1), options_.latent_dim});
    // One row serves the whole batch: the queries differ by their rotary position alone.
    const auto queries = encoder_query_.expand({1, x.size(1), -1});
    return encoder_head_(encoder_norm_(encoder_->forward(queries, x)));
  }

  /// memory is what the keys and values of the middle block come from.
  torch::Tensor write(torch::Tensor x, const torch::Tensor& memory) {
    x = blocks_[middle()]->forward(x, memory);
    for (size_t index = middle() + 1; index < blocks_.size(); ++index) {
      x = blocks_[index]->forward(x);
    }
    return norm_(x);
  }

  ModelOptions options_;
  torch::nn::Embedding embedding_;
  std::vector<Block> blocks_;
  Block encoder_ = nullptr;
  torch::Tensor encoder_query_;
  RMSNorm encoder_norm_ = nullptr;
  torch::nn::Linear encoder_head_ = nullptr;
  torch::nn::Embedding codebook_ = nullptr;
  RMSNorm norm_;
  torch::nn::Linear head_;
};
TORCH_MODULE(FreeTransformer);

inline int64_t parameter_count(const torch::nn::Module& model) {
  int64_t count = 0;
  for (const auto& parameter : model.parameters()) {
    count += parameter.numel();
  }
  return count;
}

}  // namespace example
