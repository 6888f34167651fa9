/// The parts of a transformer block: RMSNorm, attention with rotary positions, SwiGLU.
#pragma once

#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace example {

/// Without bias; weights are normal. A scale of 1 keeps the size of the input.
inline torch::nn::Linear linear(int64_t inputs, int64_t outputs, double scale = 1.0) {
  torch::nn::Linear layer(torch::nn::LinearOptions(inputs, outputs).bias(false));
  torch::nn::init::normal_(layer->weight, 0.0, scale / std::sqrt(static_cast<double>(inputs)));
  return layer;
}

/// y = gain · x / √(mean x² + ε)
class RMSNormImpl : public torch::nn::Module {
 public:
  explicit RMSNormImpl(int64_t width) { gain_ = register_parameter("gain", torch::ones(width)); }

  torch::Tensor forward(const torch::Tensor& x) const {
    constexpr double epsilon = 1e-5;
    return x * (x.square().mean(-1, /*keepdim=*/true) + epsilon).rsqrt() * gain_;
  }

 private:
  torch::Tensor gain_;
};
TORCH_MODULE(RMSNorm);

/// e^(i·t·θ_j) for position t and pair j of each head, θ_j = context^(−j / pairs), complex [context, width / 2]. The
/// slowest pair turns by a radian or two over the context; with the usual 10000 half of them would hardly turn at all.
/// The angles repeat from head to head, so that all heads turn in one product.
inline torch::Tensor rotary_table(int64_t context, int64_t width, int64_t heads) {
  TORCH_CHECK(width % (2 * heads) == 0, "rotary_table: width must be a multiple of twice the heads, got width ", width,
              " and ", heads, " heads");
  const auto pairs = width / heads / 2;
  const auto slowest = static_cast<double>(context);
  const auto frequencies = torch::pow(slowest, torch::arange(pairs, torch::kFloat64) / -static_cast<double>(pairs));
  const auto angles = torch::outer(torch::arange(context, torch::kFloat64), frequencies).repeat({1, heads});
  return torch::polar(torch::ones_like(angles), angles).to(torch::kComplexFloat);
}

/// x [..., positions, width] turned by the first rows of a rotary table.
inline torch::Tensor rotate(const torch::Tensor& x, const torch::Tensor& rotary) {
  const auto pairs = torch::view_as_complex(x.reshape({x.size(0), x.size(1), -1, 2}));
  return torch::view_as_real(pairs * rotary.slice(0, 0, x.size(1))).flatten(-2);
}

/// 0 where a position may look, −∞ at those that come after it: [context, context].
inline torch::Tensor causal_mask(int64_t context) {
  return torch::full({context, context}, -std::numeric_limits<float>::infinity()).triu(1);
}

/// Attention whose keys and values may come from another tensor than its queries.
class AttentionImpl : public torch::nn::Module {
 public:
  AttentionImpl(int64_t width, int64_t heads, int64_t context, bool causal)
      : heads_(heads),
        query_(register_module("query", linear(width, width))),
        key_value_(register_module("key_value", linear(width, 2 * width))),
        output_(register_module("output", linear(width, width, /*scale=*/0.5))),
        rotary_(register_buffer("rotary", rotary_table(context, width, heads))) {
    if (causal) {
      mask_ = register_buffer("mask", causal_mask(context));
    }
  }

  /// queries [batch or 1, positions, width], memory [batch, positions, width]
  torch::Tensor forward(const torch::Tensor& queries, const torch::Tensor& memory) {
    const auto key_value = key_value_(memory).chunk(2, -1);
    const auto query = split_heads(rotate(query_(queries), rotary_));
    const auto key = split_heads(rotate(key_value[0], rotary_));
    const auto value = split_heads(key_value[1]);
    const auto mixed = torch::matmul(attention_weights(query, key), value);
    return output_(mixed.transpose(1, 2).flatten(-2));
  }

 private:
  torch::Tensor split_heads(const torch::Tensor& x) const {
    return x.reshape({x.size(0), x.size(1), heads_, -1}).transpose(1, 2);
  }

  torch::Tensor attention_weights(const torch::Tensor& query, const torch::Tensor& key) const {
    const auto positions = key.size(-2);
    const auto scale = 1.0 / std::sqrt(static_cast<double>(key.size(-1)));
    auto scores = torch::matmul(query * scale, key.transpose(-2, -1));
    if (mask_.defined()) {
      scores += mask_.slice(0, 0, positions).slice(1, 0, positions);
    }
    return scores.softmax(-1);
  }

  int64_t heads_;
  torch::nn::Linear query_, key_value_, output_;
  torch::Tensor rotary_, mask_;
};
TORCH_MODULE(Attention);

/// down(silu(gate(x)) · up(x)). ⅔ of the usual 4·width make its three matrices as large as the usual two; a multiple of
/// 32 fills whole vectors.
class SwiGLUImpl : public torch::nn::Module {
 public:
  explicit SwiGLUImpl(int64_t width) : SwiGLUImpl(width, (width * 8 / 3 + 31) / 32 * 32) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto gate_up = gate_up_(x).chunk(2, -1);
    return down_(torch::silu(gate_up[0]) * gate_up[1]);
  }

 private:
  SwiGLUImpl(int64_t width, int64_t hidden)
      : gate_up_(register_module("gate_up", linear(width, 2 * hidden))),
        down_(register_module("down", linear(hidden, width, /*scale=*/0.5))) {}

  torch::nn::Linear gate_up_, down_;
};
TORCH_MODULE(SwiGLU);

/// x + attention, then + SwiGLU, each behind its RMSNorm. Both add something from the first step. If they began with 0,
/// as is often done, the encoder would have no gradient until the decoder reads Z, and the decoder no reason to read it
/// until the encoder has learnt.
class BlockImpl : public torch::nn::Module {
 public:
  BlockImpl(int64_t width, int64_t heads, int64_t context, bool causal)
      : attention_norm_(register_module("attention_norm", RMSNorm(width))),
        attention_(register_module("attention", Attention(width, heads, context, causal))),
        feed_forward_norm_(register_module("feed_forward_norm", RMSNorm(width))),
        feed_forward_(register_module("feed_forward", SwiGLU(width))) {}

  torch::Tensor forward(const torch::Tensor& x) {
    const auto normalized = attention_norm_(x);
    return feed_forward(x + attention_(normalized, normalized));
  }

  /// Keys and values come from memory instead of x.
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& memory) {
    return feed_forward(x + attention_(attention_norm_(x), attention_norm_(memory)));
  }

 private:
  torch::Tensor feed_forward(const torch::Tensor& x) { return x + feed_forward_(feed_forward_norm_(x)); }

  RMSNorm attention_norm_;
  Attention attention_;
  RMSNorm feed_forward_norm_;
  SwiGLU feed_forward_;
};
TORCH_MODULE(Block);

}  // namespace example
