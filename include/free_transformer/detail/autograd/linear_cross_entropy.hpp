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
#include "free_transformer/detail/cross_entropy_terms.hpp"
#include "free_transformer/detail/kernels/cross_entropy_of_tensors.hpp"
#include "free_transformer/detail/kernels/large_pages.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/optional_tensor.hpp"
#include "free_transformer/detail/plain/cross_entropy.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::detail {

struct LinearInputs {
  at::Tensor hidden;  ///< [..., D]
  at::Tensor weight;  ///< [V, D]
  at::Tensor bias;    ///< [V], or undefined
  int64_t block_bytes = 0;

  at::ScalarType arithmetic() const { return arithmetic_type(hidden.scalar_type()); }
  int64_t classes() const { return weight.size(0); }
};

/// Gradients of the inputs; undefined where none is wanted.
struct LinearGradients {
  at::Tensor hidden, weight, bias;

  void multiply(const at::Tensor& factor) {
    for (at::Tensor* gradient : {&hidden, &weight, &bias}) {
      if (gradient->defined()) gradient->mul_(factor);
    }
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
/// a core's cache: a float32 copy of all of it would be twice as large as itself.
template <typename Visit>
void for_each_part_of_weight(const LinearInputs& inputs, const Visit& visit) {
  const at::Tensor& weight = inputs.weight;
  const bool converts = weight.scalar_type() != inputs.arithmetic();
  const int64_t rows = converts ? std::max<int64_t>(1, (int64_t{1} << 17) / weight.size(1)) : inputs.classes();
  for (int64_t first = 0; first < inputs.classes(); first += rows) {
    const at::Tensor part = weight.narrow(0, first, std::min(rows, inputs.classes() - first));
    visit(part.to(inputs.arithmetic()), first);
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
    if (gradients.weight.defined()) gradients.weight.narrow(0, first, count).addmm_(part.t(), hidden, beta);
  });
  if (gradients.bias.defined())
    gradients.bias.addmv_(of_logits.t(), at::ones({hidden.size(0)}, hidden.options()), beta);
}

/// The part of the terms that belongs to positions [first, first + count), or to those of an index.
template <typename Select>
CrossEntropyTerms select_terms(const CrossEntropyTerms& terms, const Select& select) {
  CrossEntropyTerms selected = terms;
  selected.targets = select(terms.targets);
  if (terms.token_weight.defined()) selected.token_weight = select(terms.token_weight);
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
inline CrossEntropyRows process_block(at::Tensor& logits, const CrossEntropyTerms& terms, const LinearBackward& wants,
                                      const at::Tensor& upstream, bool predict) {
  if (kernels::takes_cross_entropy(logits, terms)) {
    kernels::CrossEntropyScales scales;
    if (wants.any()) scales = {host_value(wants.likelihood_scale), host_value(wants.z_scale)};
    return kernels::cross_entropy_rows(logits, terms, scales, wants.any() ? logits : at::Tensor(), upstream, predict);
  }
  const auto positions = plain::cross_entropy_positions(terms, logits.size(1), logits.scalar_type());
  const auto rows = plain::cross_entropy_rows(logits, terms, positions);
  if (wants.any()) {
    const auto scaled = [&](const at::Tensor& scale) {
      const at::Tensor narrow = scale.to(logits.scalar_type());
      return upstream.defined() ? upstream * narrow : narrow;
    };
    logits = plain::cross_entropy_gradient(logits, terms, positions, rows, scaled(wants.likelihood_scale),
                                           scaled(wants.z_scale));
  }
  return rows;
}

/// All blocks of hidden [N, D], every position of which counts or may be computed in vain.
inline LinearPass linear_pass_of_rows(const LinearInputs& inputs, const at::Tensor& hidden,
                                      const CrossEntropyTerms& terms, const LinearBackward& wants, bool predict) {
  const auto type = inputs.arithmetic();
  const auto options = hidden.options().dtype(type);
  const int64_t rows = hidden.size(0), tokens = tokens_of_block(inputs, rows);
  const auto empty = [&](at::ScalarType of_type) { return at::empty({rows}, options.dtype(of_type)); };
  LinearPass pass{{empty(type), empty(type), empty(type), predict ? empty(at::kLong) : at::Tensor()}, {}};
  if (wants.hidden) pass.gradients.hidden = at::empty(hidden.sizes(), options);
  if (wants.weight) pass.gradients.weight = kernels::empty_on_large_pages(inputs.weight.sizes(), options);
  if (wants.bias) pass.gradients.bias = at::empty({inputs.classes()}, options);
  if (rows == 0 && wants.weight) pass.gradients.weight.zero_();  // no block gives it a value
  if (rows == 0 && wants.bias) pass.gradients.bias.zero_();
  const at::Tensor buffer = kernels::empty_on_large_pages({tokens, inputs.classes()}, options);

  for (int64_t first = 0; first < rows; first += tokens) {
    const int64_t count = std::min(tokens, rows - first);
    const auto part = [&](const at::Tensor& all) { return all.defined() ? all.narrow(0, first, count) : all; };
    const at::Tensor block = part(hidden).to(type);
    at::Tensor logits = buffer.narrow(0, 0, count);
    make_logits(inputs, block, logits);
    const auto of_block = process_block(logits, select_terms(terms, part), wants, part(wants.upstream), predict);
    part(pass.rows.nll).copy_(of_block.nll);
    part(pass.rows.likelihood_loss).copy_(of_block.likelihood_loss);
    part(pass.rows.log_sum_exp).copy_(of_block.log_sum_exp);
    if (predict) part(pass.rows.prediction).copy_(of_block.prediction);
    if (!wants.any()) continue;
    add_to_gradients(inputs, block, logits, part(pass.gradients.hidden), pass.gradients, first == 0);
  }
  return pass;
}

/// The pass over the positions that count alone: the others' rows and gradients are 0 without a product. On other
/// devices than the CPU all are computed, as the number of those that count is not known there without a stall.
inline LinearPass linear_pass(const LinearInputs& inputs, const CrossEntropyTerms& terms, const at::Tensor& counted,
                              const LinearBackward& wants, bool predict) {
  const at::Tensor hidden = inputs.hidden.detach().reshape({-1, inputs.hidden.size(-1)});
  const at::Tensor index = hidden.device().is_cpu() ? counted.nonzero().squeeze(1) : at::Tensor();
  if (!index.defined() || index.size(0) == hidden.size(0)) {
    return linear_pass_of_rows(inputs, hidden, terms, wants, predict);
  }
  const auto select = [&](const at::Tensor& all) { return all.defined() ? all.index_select(0, index) : all; };
  LinearBackward of_selected = wants;
  of_selected.upstream = select(wants.upstream);
  LinearPass pass = linear_pass_of_rows(inputs, select(hidden), select_terms(terms, select), of_selected, predict);
  const auto spread = [&](at::Tensor& values) {
    if (!values.defined()) return;
    auto shape = values.sizes().vec();
    shape[0] = hidden.size(0);
    values = at::zeros(shape, values.options()).index_copy_(0, index, values);
  };
  for (at::Tensor* values : {&pass.rows.nll, &pass.rows.likelihood_loss, &pass.rows.log_sum_exp, &pass.rows.prediction,
                             &pass.gradients.hidden}) {
    spread(*values);
  }
  return pass;
}

struct LinearState : torch::CustomClassHolder {
  CrossEntropyTerms terms;
  int64_t block_bytes = 0;
  at::Tensor likelihood_scale, z_scale;  ///< 0-dim, in the widest type
  LinearGradients gradients;             ///< what forward has summed up, in the type of arithmetic: half types would
                                         ///< underflow before a gradient scaler's factor arrives
  bool has_gradients = false;
};

inline LinearBackward wanted_gradients(const LinearInputs& inputs, const LinearState& state,
                                       const at::Tensor& upstream) {
  return {state.likelihood_scale,
          state.z_scale,
          upstream,
          inputs.hidden.requires_grad(),
          inputs.weight.requires_grad(),
          inputs.bias.defined() && inputs.bias.requires_grad()};
}

/// The same numbers in the type, rounded into the front of their own memory: each is read before it is overwritten.
inline at::Tensor rounded_in_place(const at::Tensor& values, at::ScalarType type) {
  if (values.scalar_type() == type || values.numel() == 0) return values.to(type);
  constexpr int64_t part = int64_t{1} << 20;
  const at::Tensor source = values.flatten(), target = values.view(type).flatten().narrow(0, 0, values.numel());
  for (int64_t first = 0; first < source.size(0); first += part) {
    const int64_t count = std::min(part, source.size(0) - first);
    target.narrow(0, first, count).copy_(source.narrow(0, first, count).to(type));
  }
  return target.view(values.sizes());
}

/// In the inputs' own shapes and types, rounded once.
inline LinearGradients finished(LinearGradients gradients, const LinearInputs& inputs) {
  if (gradients.hidden.defined()) {
    gradients.hidden = gradients.hidden.to(inputs.hidden.scalar_type()).reshape(inputs.hidden.sizes());
  }
  if (gradients.weight.defined()) {
    gradients.weight = rounded_in_place(gradients.weight, inputs.weight.scalar_type());
  }
  if (gradients.bias.defined()) gradients.bias = gradients.bias.to(inputs.bias.scalar_type());
  return gradients;
}

inline CrossEntropyResult linear_cross_entropy_forward(const LinearInputs& inputs, const Normalization& normalization,
                                                       bool count_hits, bool needs_gradient, LinearState& state) {
  const auto& terms = state.terms;
  const auto type = inputs.arithmetic();
  const auto positions = plain::cross_entropy_positions(terms, inputs.classes(), type);
  const auto scales = plain::loss_scales(positions, normalization);
  state.likelihood_scale = scales.likelihood;
  state.z_scale = scales.z;
  const bool for_each = normalization.reduction == ReductionKind::none;
  LinearBackward wants;
  if (needs_gradient && !for_each) wants = wanted_gradients(inputs, state, /*upstream=*/{});
  LinearPass pass = linear_pass(inputs, terms, positions.counted, wants, count_hits);
  state.gradients = std::move(pass.gradients);
  state.has_gradients = wants.any();
  const auto losses = plain::cross_entropy_losses(pass.rows, terms, positions);
  const at::Tensor sums = plain::reconstruction_sums(pass.rows, losses, terms, positions, count_hits);
  if (for_each) return {losses.sum().reshape(shape_of_positions(inputs.hidden)), sums};
  return {plain::reduced_loss(sums, normalization).to(type), sums};
}

inline LinearGradients linear_cross_entropy_gradients(const LinearInputs& inputs, LinearState& state,
                                                      const at::Tensor& upstream) {
  if (state.has_gradients) {
    state.has_gradients = false;
    LinearGradients gradients = std::exchange(state.gradients, LinearGradients{});
    if (!upstream.device().is_cpu() || host_value(upstream) != 1) gradients.multiply(upstream);
    return finished(std::move(gradients), inputs);
  }
  const auto positions = plain::cross_entropy_positions(state.terms, inputs.classes(), inputs.arithmetic());
  const auto wants = wanted_gradients(inputs, state, upstream.expand({state.terms.targets.size(0)}).contiguous());
  return finished(linear_pass(inputs, state.terms, positions.counted, wants, /*predict=*/false).gradients, inputs);
}

struct LinearCrossEntropyFunction : torch::autograd::Function<LinearCrossEntropyFunction> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& hidden,
                            const at::Tensor& weight, const OptionalTensor& bias, int64_t block_bytes,
                            const CrossEntropyTerms& terms, const Normalization& normalization, bool count_hits,
                            at::Tensor* sums) {
    auto state = c10::make_intrusive<LinearState>();
    state->terms = kept_terms(terms);
    state->block_bytes = block_bytes;
    const LinearInputs inputs{hidden, weight, bias.value_or(at::Tensor()), block_bytes};
    auto result = linear_cross_entropy_forward(inputs, normalization, count_hits, /*needs_gradient=*/true, *state);
    *sums = std::move(result.sums);
    context->save_for_backward({hidden, weight, inputs.bias});
    context->saved_data["state"] = c10::IValue::make_capsule(std::move(state));
    return result.loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 const torch::autograd::variable_list& upstream) {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "compute_reconstruction_loss: LinearLogits must not be differentiated twice ",
                "(create_graph); pass dense logits for that");
    const auto saved = context->get_saved_variables();
    const auto capsule = context->saved_data["state"].toCapsule();
    auto& state = static_cast<LinearState&>(*capsule);
    const LinearInputs inputs{saved[0], saved[1], saved[2], state.block_bytes};
    const at::Tensor flat = (upstream[0].dim() == 0 ? upstream[0] : upstream[0].reshape({-1})).to(inputs.arithmetic());
    auto gradients = linear_cross_entropy_gradients(inputs, state, flat);
    return {gradients.hidden, gradients.weight, gradients.bias, {}, {}, {}, {}, {}};
  }
};

inline CrossEntropyResult linear_cross_entropy(const LinearInputs& inputs, const CrossEntropyTerms& terms,
                                               const Normalization& normalization, bool count_hits) {
  const bool needs_gradient = inputs.hidden.requires_grad() || inputs.weight.requires_grad() ||
                              (inputs.bias.defined() && inputs.bias.requires_grad());
  if (at::GradMode::is_enabled() && needs_gradient) {
    CrossEntropyResult result;
    result.loss = LinearCrossEntropyFunction::apply(inputs.hidden, inputs.weight, optional_tensor(inputs.bias),
                                                    inputs.block_bytes, terms, normalization, count_hits, &result.sums);
    return result;
  }
  const at::NoGradGuard no_grad;
  LinearState state;
  state.terms = terms;
  return linear_cross_entropy_forward(inputs, normalization, count_hits, /*needs_gradient=*/false, state);
}

inline CrossEntropyValues linear_cross_entropy_values(const LinearInputs& inputs, const CrossEntropyTerms& terms) {
  const auto positions = plain::cross_entropy_positions(terms, inputs.classes(), inputs.arithmetic());
  const auto pass = linear_pass(inputs, terms, positions.counted, {}, /*predict=*/true);
  return cross_entropy_values(pass.rows, terms, positions);
}

}  // namespace free_transformer::detail
