/// Cross entropy of hidden weight^T + bias as a node of the graph, one block of tokens after another.
///
/// Saved for backward: hidden, weight, bias, and (but for kNone) their gradients in the type of arithmetic, until
/// backward hands them out.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/custom_class.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "free_transformer/detail/autograd/cross_entropy.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/cross_entropy.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/optional_tensor.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

struct LinearInputs {
  at::Tensor hidden;  ///< [..., D]
  at::Tensor weight;  ///< [V, D]
  at::Tensor bias;    ///< [V], or undefined
  int64_t block_bytes = 0;

  at::ScalarType arithmetic() const { return arithmetic_type(hidden.scalar_type()); }
  bool converts_weight() const { return weight.scalar_type() != arithmetic(); }
  int64_t classes() const { return weight.size(0); }
};

/// The weight's gradient while it is summed up, in the type of arithmetic. That of a half weight takes twice the memory of
/// the result: its front rows are summed in the memory of the result itself, the other rows beside it, and `finished`
/// rounds the front into the front half of that memory before the others take the back half.
struct WeightGradient {
  WeightGradient() = default;
  explicit WeightGradient(const LinearInputs& inputs)
      : result_(kernels::empty_on_large_pages(inputs.weight.sizes(), inputs.weight.options())), front_(result_) {
    if (!inputs.converts_weight()) return;
    const int64_t rows = inputs.classes(), width = inputs.weight.size(1), front_rows = rows / 2;
    front_ =
        result_.view({-1}).narrow(0, 0, 2 * front_rows * width).view(inputs.arithmetic()).view({front_rows, width});
    back_ =
        kernels::empty_on_large_pages({rows - front_rows, width}, inputs.weight.options().dtype(inputs.arithmetic()));
  }

  bool defined() const { return result_.defined(); }
  int64_t front_rows() const { return front_.size(0); }

  /// Rows that lie on one side of `front_rows`.
  at::Tensor rows(int64_t first, int64_t count) const {
    return first < front_rows() ? front_.narrow(0, first, count) : back_.narrow(0, first - front_rows(), count);
  }
  void zero() {
    front_.zero_();
    if (back_.defined()) back_.zero_();
  }
  void multiply(const at::Tensor& factor) {
    front_.mul_(factor);
    if (back_.defined()) back_.mul_(factor);
  }

  /// In the weight's type, rounded once; this object is empty then.
  at::Tensor finished() {
    if (back_.defined()) {
      const at::Tensor target = result_.view({-1}), source = front_.view({-1});
      constexpr int64_t part = int64_t{1} << 20;
      for (int64_t first = 0; first < source.size(0); first += part) {  // each is read before it is overwritten
        const int64_t count = std::min(part, source.size(0) - first);
        target.narrow(0, first, count).copy_(source.narrow(0, first, count).to(target.scalar_type()));
      }
      result_.narrow(0, front_rows(), back_.size(0)).copy_(back_);
    }
    front_.reset();
    back_.reset();
    return std::move(result_);
  }

 private:
  at::Tensor result_, front_, back_;
};

/// Gradients of the inputs; undefined where none is wanted.
struct LinearGradients {
  at::Tensor hidden, bias;
  WeightGradient weight;

  void multiply(const at::Tensor& factor) {
    for (at::Tensor* gradient : {&hidden, &bias}) {
      if (gradient->defined()) gradient->mul_(factor);
    }
    if (weight.defined()) weight.multiply(factor);
  }
};

/// Tokens of a block, all of nearly the same size. A block reads the weight for each product, and reads and writes its
/// gradient; that costs as much as the arithmetic of about 16 tokens. Hence 56 tokens at least, and more if they fit into
/// 15 MiB; half of both for half types, whose logits would take half the memory. The threads have no say, so that their
/// number does not change the order of the sums.
inline int64_t tokens_of_block(const LinearInputs& inputs, int64_t tokens) {
  const int64_t share = inputs.hidden.scalar_type() == inputs.arithmetic() ? 1 : 2;
  const int64_t fewest_tokens = 56 / share, default_bytes = (int64_t{15} << 20) / share;
  const int64_t bytes_of_token = inputs.classes() * static_cast<int64_t>(at::elementSize(inputs.arithmetic()));
  const int64_t most = inputs.block_bytes > 0 ? std::max<int64_t>(1, inputs.block_bytes / bytes_of_token)
                                              : std::max(fewest_tokens, default_bytes / bytes_of_token);
  const int64_t blocks = std::max<int64_t>(1, (tokens + most - 1) / most);
  return std::max<int64_t>(1, (tokens + blocks - 1) / blocks);
}

/// Calls visit(rows of the weight in the type of arithmetic, first row). A half weight is converted in parts that fit into
/// a core's cache: a float32 copy of all of it would be twice as large as itself. No part crosses the middle.
template <typename Visit>
void for_each_part_of_weight(const LinearInputs& inputs, const Visit& visit) {
  const at::Tensor& weight = inputs.weight;
  if (!inputs.converts_weight()) return visit(weight, int64_t{0});
  const int64_t rows = std::max<int64_t>(1, (int64_t{1} << 17) / weight.size(1)), middle = inputs.classes() / 2;
  for (int64_t first = 0, end = 0; first < inputs.classes(); first = end) {
    end = std::min(first + rows, first < middle ? middle : inputs.classes());
    visit(weight.narrow(0, first, end - first).to(inputs.arithmetic()), first);
  }
}

inline void make_logits(const LinearInputs& inputs, const at::Tensor& hidden, at::Tensor& logits) {
  for_each_part_of_weight(inputs, [&](const at::Tensor& weight, int64_t first) {
    at::Tensor part = logits.narrow(1, first, weight.size(0));
    if (inputs.bias.defined()) {
      at::addmm_out(part, inputs.bias.narrow(0, first, weight.size(0)).to(weight.scalar_type()), hidden, weight.t());
    } else {
      at::mm_out(part, hidden, weight.t());
    }
  });
}

/// Adds what the gradient of a block's logits gives to the inputs' gradients, which have no value before the first block;
/// `hidden_gradient` is the block's own part.
inline void add_to_gradients(const LinearInputs& inputs, const at::Tensor& hidden, const at::Tensor& of_logits,
                             const at::Tensor& hidden_gradient, const LinearGradients& gradients, bool is_first_block) {
  const int beta = is_first_block ? 0 : 1;
  for_each_part_of_weight(inputs, [&](const at::Tensor& weight, int64_t first) {
    const int64_t count = weight.size(0);
    const at::Tensor part = of_logits.narrow(1, first, count);
    if (hidden_gradient.defined()) hidden_gradient.addmm_(part, weight, /*beta=*/first == 0 ? 0 : 1);
    if (gradients.weight.defined()) gradients.weight.rows(first, count).addmm_(part.t(), hidden, beta);
  });
  if (gradients.bias.defined())
    gradients.bias.addmv_(of_logits.t(), at::ones({hidden.size(0)}, hidden.options()), beta);
}

/// The part of the settings that belongs to positions [first, first + count), or to those of an index.
template <typename Select>
CrossEntropySettings select_settings(const CrossEntropySettings& settings, const Select& select) {
  CrossEntropySettings selected = settings;
  selected.targets = select(settings.targets);
  if (settings.token_weight.defined()) selected.token_weight = select(settings.token_weight);
  return selected;
}

/// Which gradients are wanted, and what each position's part of them is multiplied by.
struct LinearBackward {
  at::Tensor likelihood_scale, z_scale;  ///< 0-dim, in the widest type
  at::Tensor upstream;                   ///< [N], or undefined for 1
  bool hidden = false, weight = false, bias = false;

  bool any() const { return hidden || weight || bias; }
};

struct LinearPass {
  CrossEntropyRows rows;
  LinearGradients gradients;
};

/// The rows of one block of logits; the logits become their gradient if one is wanted.
inline CrossEntropyRows process_block(at::Tensor& logits, const CrossEntropySettings& settings,
                                      const LinearBackward& wants, const at::Tensor& upstream,
                                      kernels::WantedOfRows wanted) {
  if (kernels::takes_cross_entropy(logits, settings)) {
    kernels::CrossEntropyScales scales;
    if (wants.any()) scales = {host_value(wants.likelihood_scale), host_value(wants.z_scale)};
    return kernels::cross_entropy_rows(logits, settings, scales, wants.any() ? logits : at::Tensor(), upstream, wanted)
        .rows;
  }
  const auto positions = plain::cross_entropy_positions(settings, logits.size(1), logits.scalar_type());
  const auto rows = plain::cross_entropy_rows(logits, settings, positions, wanted.entropy);
  if (wants.any()) {
    const auto scaled = [&](const at::Tensor& scale) {
      const at::Tensor narrow = scale.to(logits.scalar_type());
      return upstream.defined() ? upstream * narrow : narrow;
    };
    logits = plain::cross_entropy_gradient(logits, settings, positions, rows, scaled(wants.likelihood_scale),
                                           scaled(wants.z_scale));
  }
  return rows;
}

/// All blocks of hidden [N, D], every position of which counts or may be computed in vain.
inline LinearPass linear_pass_of_rows(const LinearInputs& inputs, const at::Tensor& hidden,
                                      const CrossEntropySettings& settings, const LinearBackward& wants,
                                      kernels::WantedOfRows wanted) {
  const auto type = inputs.arithmetic();
  const auto options = hidden.options().dtype(type);
  const int64_t rows = hidden.size(0), tokens = tokens_of_block(inputs, rows);
  const auto empty = [&](at::ScalarType of_type) { return at::empty({rows}, options.dtype(of_type)); };
  LinearPass pass{{empty(type), empty(type), empty(type), wanted.prediction ? empty(at::kLong) : at::Tensor(),
                   wanted.entropy ? empty(type) : at::Tensor()},
                  {}};
  if (wants.hidden) pass.gradients.hidden = at::empty(hidden.sizes(), options);
  if (wants.weight) pass.gradients.weight = WeightGradient(inputs);
  if (wants.bias) pass.gradients.bias = at::empty({inputs.classes()}, options);
  if (rows == 0 && wants.weight) pass.gradients.weight.zero();  // no block gives it a value
  if (rows == 0 && wants.bias) pass.gradients.bias.zero_();
  const at::Tensor buffer = kernels::empty_on_large_pages({tokens, inputs.classes()}, options);

  for (int64_t first = 0; first < rows; first += tokens) {
    const int64_t count = std::min(tokens, rows - first);
    const auto part = [&](const at::Tensor& all) { return all.defined() ? all.narrow(0, first, count) : all; };
    const at::Tensor block = part(hidden).to(type);
    at::Tensor logits = buffer.narrow(0, 0, count);
    make_logits(inputs, block, logits);
    const auto of_block = process_block(logits, select_settings(settings, part), wants, part(wants.upstream), wanted);
    part(pass.rows.nll).copy_(of_block.nll);
    part(pass.rows.likelihood_loss).copy_(of_block.likelihood_loss);
    part(pass.rows.log_sum_exp).copy_(of_block.log_sum_exp);
    if (wanted.prediction) part(pass.rows.prediction).copy_(of_block.prediction);
    if (wanted.entropy) part(pass.rows.entropy).copy_(of_block.entropy);
    if (!wants.any()) continue;
    add_to_gradients(inputs, block, logits, part(pass.gradients.hidden), pass.gradients, first == 0);
  }
  return pass;
}

/// The pass over the positions that count alone: the others' rows and gradients are 0 without a product. On other
/// devices than the CPU all are computed, as the number of those that count is not known there without a stall.
inline LinearPass linear_pass(const LinearInputs& inputs, const CrossEntropySettings& settings,
                              const at::Tensor& counted, const LinearBackward& wants, kernels::WantedOfRows wanted) {
  const at::Tensor hidden = inputs.hidden.detach().reshape({-1, inputs.hidden.size(-1)});
  const at::Tensor index = hidden.device().is_cpu() ? counted.nonzero().squeeze(1) : at::Tensor();
  if (!index.defined() || index.size(0) == hidden.size(0)) {
    return linear_pass_of_rows(inputs, hidden, settings, wants, wanted);
  }
  const auto select = [&](const at::Tensor& all) { return all.defined() ? all.index_select(0, index) : all; };
  LinearBackward of_selected = wants;
  of_selected.upstream = select(wants.upstream);
  LinearPass pass = linear_pass_of_rows(inputs, select(hidden), select_settings(settings, select), of_selected, wanted);
  const auto spread = [&](at::Tensor& values) {
    if (!values.defined()) return;
    auto shape = values.sizes().vec();
    shape[0] = hidden.size(0);
    values = at::zeros(shape, values.options()).index_copy_(0, index, values);
  };
  for (at::Tensor* values : {&pass.rows.nll, &pass.rows.likelihood_loss, &pass.rows.log_sum_exp, &pass.rows.prediction,
                             &pass.rows.entropy, &pass.gradients.hidden}) {
    spread(*values);
  }
  return pass;
}

/// What forward leaves for backward.
struct LinearLossPass {
  CrossEntropySettings settings;
  plain::LossScales scales;   ///< factors of every position's loss
  LinearGradients gradients;  ///< what forward has summed up, in the type of arithmetic: half types would underflow
                              ///< before a gradient scaler's factor arrives
  int64_t block_bytes = 0;
  bool has_gradients = false;

  /// All tensors but the gradients, for the graph to keep; `restore` puts them back.
  torch::autograd::variable_list tensors() const {
    return {settings.targets, settings.token_weight, settings.class_weight, scales.likelihood, scales.z};
  }
  void restore(const at::Tensor* saved) {
    for (at::Tensor* tensor :
         {&settings.targets, &settings.token_weight, &settings.class_weight, &scales.likelihood, &scales.z}) {
      *tensor = *saved++;
    }
  }
};

inline LinearBackward wanted_gradients(const LinearInputs& inputs, const LinearLossPass& pass,
                                       const at::Tensor& upstream) {
  return {pass.scales.likelihood,
          pass.scales.z,
          upstream,
          inputs.hidden.requires_grad(),
          inputs.weight.requires_grad(),
          inputs.bias.defined() && inputs.bias.requires_grad()};
}

/// In the inputs' own shapes and types, rounded once, in the order of the inputs.
inline torch::autograd::variable_list finished(LinearGradients gradients, const LinearInputs& inputs) {
  torch::autograd::variable_list result(3);
  if (gradients.hidden.defined()) {
    result[0] = gradients.hidden.to(inputs.hidden.scalar_type()).reshape(inputs.hidden.sizes());
  }
  if (gradients.weight.defined()) result[1] = gradients.weight.finished();
  if (gradients.bias.defined()) result[2] = gradients.bias.to(inputs.bias.scalar_type());
  return result;
}

inline CrossEntropyResult linear_cross_entropy_forward(const LinearInputs& inputs, const Normalization& normalization,
                                                       bool count_hits, bool needs_gradient, LinearLossPass& pass) {
  const auto& settings = pass.settings;
  const auto type = inputs.arithmetic();
  const auto positions = plain::cross_entropy_positions(settings, inputs.classes(), type);
  pass.scales = plain::loss_scales(positions, normalization);
  const bool for_each = normalization.reduction == ReductionKind::none;
  LinearBackward wants;
  if (needs_gradient && !for_each) wants = wanted_gradients(inputs, pass, /*upstream=*/{});
  LinearPass of_blocks = linear_pass(inputs, settings, positions.counted, wants,
                                     {/*each=*/true, /*prediction=*/count_hits, /*entropy=*/false});
  pass.gradients = std::move(of_blocks.gradients);
  pass.has_gradients = wants.any();
  const auto losses = plain::cross_entropy_losses(of_blocks.rows, settings, positions);
  const at::Tensor sums = plain::reconstruction_sums(of_blocks.rows, losses, settings, positions, count_hits);
  if (for_each) return {losses.sum().reshape(shape_of_positions(inputs.hidden)), sums};
  return {plain::reduced_loss(sums, normalization).to(type), sums};
}

inline torch::autograd::variable_list linear_cross_entropy_gradients(const LinearInputs& inputs, LinearLossPass& pass,
                                                                     const at::Tensor& upstream) {
  if (pass.has_gradients) {
    if (!upstream.device().is_cpu() || !is_one(host_value(upstream))) pass.gradients.multiply(upstream);
    return finished(std::move(pass.gradients), inputs);
  }
  const auto positions = plain::cross_entropy_positions(pass.settings, inputs.classes(), inputs.arithmetic());
  const auto wants = wanted_gradients(inputs, pass, upstream.expand({pass.settings.targets.size(0)}).contiguous());
  return finished(linear_pass(inputs, pass.settings, positions.counted, wants, {/*each=*/true}).gradients, inputs);
}

/// A pass that a node of the graph holds. Its tensors are saved variables of the node, which releases those.
struct HeldLinearLossPass : torch::CustomClassHolder {
  LinearLossPass pass;
};

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& hidden,
                            const at::Tensor& weight, const OptionalTensor& bias, int64_t block_bytes,
                            const CrossEntropySettings& settings, const Normalization& normalization, bool count_hits,
                            at::Tensor* sums) {
    auto held = c10::make_intrusive<HeldLinearLossPass>();
    LinearLossPass& pass = held->pass;
    pass.settings = kept_settings(settings);
    pass.block_bytes = block_bytes;
    const LinearInputs inputs{hidden, weight, bias.value_or(at::Tensor()), block_bytes};
    auto result = linear_cross_entropy_forward(inputs, normalization, count_hits, /*needs_gradient=*/true, pass);
    *sums = std::move(result.sums);
    auto saved = pass.tensors();
    pass.restore(torch::autograd::variable_list(saved.size()).data());
    saved.insert(saved.end(), {hidden, weight, inputs.bias});
    context->save_for_backward(std::move(saved));
    context->saved_data["pass"] = c10::IValue::make_capsule(std::move(held));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "compute_reconstruction_loss: LinearLogits must not be differentiated twice ",
                "(create_graph); pass dense logits for that");
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["pass"].toCapsule();
    auto& held = static_cast<HeldLinearLossPass&>(*capsule).pass;
    LinearLossPass pass = held;
    held.gradients = LinearGradients{};
    held.has_gradients = false;
    pass.restore(saved.data());
    const at::Tensor* const of_inputs = saved.data() + pass.tensors().size();
    const LinearInputs inputs{of_inputs[0], of_inputs[1], of_inputs[2], pass.block_bytes};
    const at::Tensor flat = (upstream[0].dim() == 0 ? upstream[0] : upstream[0].reshape({-1})).to(inputs.arithmetic());
    auto gradients = linear_cross_entropy_gradients(inputs, pass, flat);
    gradients.resize(8);
    return gradients;
  }
};

inline CrossEntropyResult linear_cross_entropy(const LinearInputs& inputs, const CrossEntropySettings& settings,
                                               const Normalization& normalization, bool count_hits) {
  const bool needs_gradient = inputs.hidden.requires_grad() || inputs.weight.requires_grad() ||
                              (inputs.bias.defined() && inputs.bias.requires_grad());
  if (at::GradMode::is_enabled() && needs_gradient) {
    CrossEntropyResult result;
    result.loss =
        LinearCrossEntropyFunction::apply(inputs.hidden, inputs.weight, optional_tensor(inputs.bias),
                                          inputs.block_bytes, settings, normalization, count_hits, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  LinearLossPass pass;
  pass.settings = settings;
  return linear_cross_entropy_forward(inputs, normalization, count_hits, /*needs_gradient=*/false, pass);
}

inline CrossEntropyValues linear_cross_entropy_values(const LinearInputs& inputs,
                                                      const CrossEntropySettings& settings) {
  const auto positions = plain::cross_entropy_positions(settings, inputs.classes(), inputs.arithmetic());
  const auto pass =
      linear_pass(inputs, settings, positions.counted, {}, {/*each=*/true, /*prediction=*/true, /*entropy=*/true});
  return cross_entropy_values(pass.rows, settings, positions);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
