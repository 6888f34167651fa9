/// Cross entropy of hidden weight^T + bias on a device other than the CPU: few large blocks of tokens, few operations.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/cross_entropy.hpp"
#include "free_transformer/detail/linear_head/device_gradients.hpp"
#include "free_transformer/detail/linear_head/device_products.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/softmax_minus_target.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Tokens of a block, all of nearly the same size. Beside its 6 D V operations a token, a block reads the weight twice and
/// adds to its gradient, 16 D V bytes at most: a GPU that does 300 operations while it moves a byte spends as long on
/// that as on 800 tokens. 1 GiB of float32 logits are 2092 tokens of 128256 classes, and 8192 of 32768.
inline int64_t tokens_of_device_block(const LinearInputs& inputs, int64_t tokens) {
  const int64_t bytes_of_token =
      inputs.classes() * static_cast<int64_t>(at::elementSize(arithmetic_type(inputs.weight.scalar_type())));
  const int64_t most = inputs.block_bytes > 0 ? std::max<int64_t>(1, inputs.block_bytes / bytes_of_token)
                                              : std::max<int64_t>(1024, (int64_t{1} << 30) / bytes_of_token);
  const int64_t blocks = std::max<int64_t>(1, (tokens + most - 1) / most);
  return std::max<int64_t>(1, (tokens + blocks - 1) / blocks);
}

struct DeviceLinearRows {
  CrossEntropyRows rows;
  DeviceGradients gradients;
};

/// One walk over all positions: those that do not count, too, as their number is not known without a stall. Their hidden
/// state is read as 0, so that a NaN there reaches no product.
class DeviceBlocks {
 public:
  /// upstream is [N] in the type of arithmetic and multiplies the scales, or undefined.
  DeviceBlocks(const LinearInputs& inputs, const CrossEntropySettings& settings, const CrossEntropyPositions& positions,
               const at::Tensor& upstream, const WantedOfHead& gradients, const WantedOfRows& wanted)
      : inputs_(inputs),
        settings_(settings),
        positions_(positions),
        upstream_(upstream),
        gradients_(gradients),
        wanted_(wanted),
        products_(inputs.weight),
        type_(arithmetic_type(inputs.weight.scalar_type())) {
    hidden_ = inputs.hidden.detach().reshape({-1, inputs.hidden.size(-1)}).to(products_.type());
    if (positions.left_out.defined()) hidden_ = hidden_.masked_fill(positions.left_out.unsqueeze(1), 0);
    rows_ = hidden_.size(0);
    tokens_ = tokens_of_device_block(inputs, rows_);
    if (inputs.bias.defined()) bias_ = inputs.bias.detach().to(products_.result_type());
    logits_ = at::empty({std::min(tokens_, rows_), inputs.classes()}, options(products_.result_type()));
    weighs_rows_ = can_weigh_rows();
  }

  DeviceLinearRows run() {
    prepare();
    for (int64_t first = 0; first < rows_; first += tokens_) {
      const int64_t count = std::min(tokens_, rows_ - first);
      const at::Tensor logits = logits_.narrow(0, 0, count);
      make_logits(part(hidden_, first, count), logits);
      const at::Tensor gradient = weighs_rows_ ? softmax_of(logits, first, count) : gradient_of(logits, first, count);
      if (gradients_.any()) multiply_on(gradient, first, count);
    }
    result_.rows = weighs_rows_ ? rows_of_softmax() : plain::joined(rows_of_blocks_, options(type_));
    return std::move(result_);
  }

 private:
  at::TensorOptions options(at::ScalarType type) const { return hidden_.options().dtype(type); }

  static at::Tensor part(const at::Tensor& all, int64_t first, int64_t count) {
    return all.defined() ? all.narrow(0, first, count) : all;
  }

  /// True if a position's gradient is its weight times softmax minus one-hot, and nothing else is wanted: then the weight
  /// may multiply the rows of hidden, which are shorter than those of the logits.
  bool can_weigh_rows() const {
    return plain::takes_few_operations(logits_, settings_, wanted_) && rows_ > 0 &&
           !device::takes_cross_entropy(logits_, settings_);
  }

  void prepare() {
    DeviceGradients& results = result_.gradients;
    if (gradients_.hidden) results.hidden = at::empty(hidden_.sizes(), hidden_.options());
    if (rows_ == 0 && gradients_.weight) results.weight = at::zeros(inputs_.weight.sizes(), options(type_));
    if (rows_ == 0 && gradients_.bias) results.bias = at::zeros({inputs_.classes()}, options(type_));
    // The weights of classes may divide the parts of the loss by different numbers; else one factor is left for the end.
    const bool has_factor = !positions_.target_weight.defined();
    if (has_factor) results.factor = positions_.scales.select(0, scale_of_likelihood);
    hidden_of_weight_ = hidden_;
    if (weighs_rows_) {
      minus_ones_ = at::full({inputs_.classes()}, -1, options(type_));
      log_probability_ = at::empty({rows_, 1}, options(type_));
      minus_others_ = at::empty({rows_}, options(type_));
      weigh_hidden();
    } else {
      positions_in_block_ = positions_;
      if (has_factor) positions_in_block_.scales = at::ones_like(positions_.scales);
    }
  }

  /// The weight's gradient is a product with the weighted hidden. In half types the bias is the weight of one more column
  /// that is 1 before it is weighted; there are eight, as products of a multiple of eight are fast.
  void weigh_hidden() {
    if (!gradients_.any()) return;
    const at::Tensor weight = upstream_.defined() ? positions_.token_weight * upstream_ : positions_.token_weight;
    result_.gradients.row_factor = weight;
    if (!gradients_.weight) return;
    const int64_t width = hidden_.size(1);
    has_bias_column_ = gradients_.bias && products_.type() != type_;
    hidden_of_weight_ = at::empty({rows_, width + (has_bias_column_ ? 8 : 0)}, hidden_.options());
    at::Tensor weighted = hidden_of_weight_.narrow(1, 0, width);
    at::mul_out(weighted, hidden_, weight.unsqueeze(1));
    if (has_bias_column_) hidden_of_weight_.narrow(1, width, 8).copy_(weight.unsqueeze(1).expand({rows_, 8}));
  }

  void make_logits(const at::Tensor& hidden, at::Tensor logits) const {
    if (bias_.defined() && products_.result_type() == products_.type()) {
      at::addmm_out(logits, bias_, hidden, inputs_.weight.t());
      return;
    }
    products_.multiply(hidden, inputs_.weight.t(), logits);
    if (bias_.defined()) logits.add_(bias_);
  }

  /// Softmax minus one-hot in the type of the products. The target's entry is minus the sum of the others, which keeps
  /// the relative accuracy of a confident model, as does the loss that is made of it.
  at::Tensor softmax_of(const at::Tensor& logits, int64_t first, int64_t count) {
    const at::Tensor target = part(positions_.class_index, first, count).unsqueeze(1);
    at::Tensor log_probability = part(log_probability_, first, count), minus_others = part(minus_others_, first, count);
    if (wanted_.prediction) predictions_.push_back(std::get<1>(logits.max(-1)));
    at::Tensor softmax = at::log_softmax(logits, -1, type_);
    at::gather_out(log_probability, softmax, 1, target);
    softmax.exp_().scatter_(1, target, 0);
    at::mv_out(minus_others, softmax, minus_ones_);
    if (!gradients_.any()) return {};
    softmax.scatter_(1, target, minus_others.unsqueeze(1));
    if (gradients_.bias && !has_bias_column_) {
      add_to_bias(softmax, part(result_.gradients.row_factor, first, count));
    }
    return in_type_of_products(softmax, logits);
  }

  CrossEntropyRows rows_of_softmax() {
    const at::Tensor log_odds = minus_others_.neg().log_().sub_(log_probability_.squeeze(1));
    CrossEntropyRows rows;
    rows.nll = plain::loss_of_log_odds(log_odds).masked_fill_(positions_.left_out, 0);
    rows.likelihood_loss = rows.nll;
    if (wanted_.prediction) rows.prediction = at::cat(predictions_);
    return rows;
  }

  /// With all options, by whoever computes dense rows on this device, over the logits.
  at::Tensor gradient_of(const at::Tensor& logits, int64_t first, int64_t count) {
    const auto part_of_rows = [&](const at::Tensor& all) { return part(all, first, count); };
    const at::Tensor gradient = gradients_.any() ? logits : at::Tensor();
    rows_of_blocks_.push_back(cross_entropy_rows(logits, part_of(settings_, part_of_rows),
                                                 part_of(positions_in_block_, part_of_rows), gradient,
                                                 part_of_rows(upstream_), wanted_)
                                  .rows);
    if (!gradients_.any()) return {};
    if (gradients_.bias) add_to_bias(logits, {});
    return in_type_of_products(logits, {});
  }

  /// `room` is a block of the products' type, perhaps, whose values are not needed any more.
  at::Tensor in_type_of_products(const at::Tensor& gradient, const at::Tensor& room) const {
    if (gradient.scalar_type() == products_.type()) return gradient;
    if (room.defined() && room.scalar_type() == products_.type()) return room.copy_(gradient);
    return gradient.to(products_.type());
  }

  void add_to_bias(const at::Tensor& of_logits, const at::Tensor& weight) {
    at::Tensor& bias = result_.gradients.bias;
    if (weight.defined()) {
      const bool is_first = !bias.defined();
      if (is_first) bias = at::empty({inputs_.classes()}, options(type_));
      bias.addmv_(of_logits.t(), weight, /*beta=*/is_first ? 0 : 1);
      return;
    }
    const at::Tensor sum = of_logits.sum(0, /*keepdim=*/false, type_);
    bias = bias.defined() ? bias.add_(sum) : sum;
  }

  void multiply_on(const at::Tensor& of_logits, int64_t first, int64_t count) {
    DeviceGradients& results = result_.gradients;
    if (gradients_.hidden) {
      at::Tensor hidden = part(results.hidden, first, count);
      at::mm_out(hidden, of_logits, inputs_.weight);
    }
    if (!gradients_.weight) return;
    const at::Tensor left = of_logits.t(), right = part(hidden_of_weight_, first, count);
    if (count < rows_) return products_.add(left, right, results.weight);
    results.weight = products_.product(left, right);  // of a single block
    results.weight_factor = 1 / products_.share();
  }

  const LinearInputs& inputs_;
  const CrossEntropySettings& settings_;
  const CrossEntropyPositions& positions_;
  const at::Tensor& upstream_;
  const WantedOfHead gradients_;
  const WantedOfRows wanted_;
  const DeviceProducts products_;
  const at::ScalarType type_;  ///< of arithmetic
  int64_t rows_ = 0, tokens_ = 0;
  at::Tensor hidden_;            ///< [N, D] in the type of the products, 0 where a position does not count
  at::Tensor hidden_of_weight_;  ///< the same, times what the weight's gradient is to be multiplied by
  at::Tensor bias_, logits_;     ///< logits_ is one block
  bool weighs_rows_ = false, has_bias_column_ = false;
  at::Tensor minus_ones_, log_probability_, minus_others_;  ///< [V], [N, 1], [N]
  std::vector<at::Tensor> predictions_;
  CrossEntropyPositions positions_in_block_;
  std::vector<CrossEntropyRows> rows_of_blocks_;
  DeviceLinearRows result_;
};

inline DeviceLinearRows device_linear_rows(const LinearInputs& inputs, const CrossEntropySettings& settings,
                                           const CrossEntropyPositions& positions, const at::Tensor& upstream,
                                           const WantedOfHead& gradients, const WantedOfRows& wanted) {
  return DeviceBlocks(inputs, settings, positions, upstream, gradients, wanted).run();
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
