/// Calls the losses with shapes, strides, types, options, infinities and NaN made from bytes: on each path, vector kernel
/// and LibTorch's operations, loss and gradient must be those of the equations, and nothing beside what is asked for may
/// be written. An argument that must be refused is refused with a c10::Error of this library's, before any write.
#include <ATen/ATen.h>
#include <c10/util/Logging.h>
#include <torch/csrc/autograd/autograd.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <free_transformer/kl_divergence.hpp>
#include <free_transformer/reconstruction_loss.hpp>
#include <free_transformer/vae_loss.hpp>

#include "../unit/instruction_sets.hpp"
#include "bytes.hpp"
#include "cross_entropy_equations.hpp"
#include "expected.hpp"
#include "latent_equations.hpp"
#include "tensors.hpp"

namespace fuzz {

using namespace free_transformer;

/// A tensor of positions as it is handed over, and what it stands for.
struct Input {
  at::Tensor buffer;  ///< without a graph
  Geometry geometry;
  at::Tensor values;  ///< contiguous

  at::ScalarType type() const { return buffer.scalar_type(); }
  int64_t width() const { return geometry.sizes.back(); }
  int64_t rows() const { return c10::multiply_integers(positions()); }
  std::vector<int64_t> positions() const { return {geometry.sizes.begin(), geometry.sizes.end() - 1}; }
  Reals row(int64_t index) const { return reals(values.reshape({-1, width()})[index]); }
};

Input some_input(Bytes& bytes, const std::vector<int64_t>& positions, int64_t width, at::ScalarType type) {
  auto sizes = positions;
  sizes.push_back(width);
  const Geometry geometry = some_geometry(bytes, sizes);
  const at::Tensor buffer = some_numbers(bytes, geometry.buffer_size, type, bytes.seldom(2));
  return {buffer, geometry, view_of(buffer, geometry).clone(at::MemoryFormat::Contiguous)};
}

/// The same values where no kernel takes them.
Input with_strided_rows(const Input& input) {
  Geometry geometry = input.geometry;
  int64_t stride = 2;
  for (size_t dim = geometry.sizes.size(); dim-- > 0;) {
    geometry.strides[dim] = stride;
    stride *= std::max<int64_t>(1, geometry.sizes[dim]);
  }
  geometry.offset = 0;
  geometry.buffer_size = std::max<int64_t>(1, stride);
  const at::Tensor buffer = at::zeros({geometry.buffer_size}, input.values.options());
  view_of(buffer, geometry).copy_(input.values);
  return {buffer, geometry, input.values};
}

std::vector<int64_t> some_positions(Bytes& bytes, int64_t width) {
  if (width <= 72 && bytes.seldom(4)) return {bytes.below(130)};  // enough rows for a vector of them
  std::vector<int64_t> positions(static_cast<size_t>(bytes.below(4)));
  for (auto& size : positions) size = bytes.one_of({2, 1, 3, 4, 2, 0, 1, 5});
  return positions;
}

at::ScalarType some_type(Bytes& bytes) { return bytes.one_of({at::kFloat, at::kBFloat16, at::kHalf, at::kDouble}); }

at::Tensor some_weights(Bytes& bytes, at::IntArrayRef sizes) {
  const bool is_mask = bytes.seldom(3);
  const at::Tensor weights = at::empty(sizes, at::kDouble);
  uint32_t state = static_cast<uint32_t>(bytes.byte());
  for (int64_t i = 0; i < weights.numel(); ++i) {
    state = state * 1664525u + 1013904223u;
    weights.data_ptr<double>()[i] = is_mask ? double(state >> 31) : double(state >> 29) / 2;
  }
  return is_mask ? weights.to(at::kBool)
                 : weights.to(bytes.one_of({at::kFloat, at::kDouble, at::kHalf, at::kBFloat16}));
}

Reduction some_reduction(Bytes& bytes) {
  switch (bytes.below(3)) {
    case 0:
      return torch::enumtype::kMean{};
    case 1:
      return torch::enumtype::kSum{};
    default:
      return torch::enumtype::kNone{};
  }
}

bool is_none(const Reduction& reduction) { return std::holds_alternative<torch::enumtype::kNone>(reduction); }

template <typename Options>
void set_normalizer(Bytes& bytes, Options& options) {
  const double number = bytes.one_of({8.0, 3.0, 0.5});
  if (bytes.below(2) == 0) {
    options.normalizer(number);
  } else {
    options.normalizer(at::full({}, number, bytes.one_of({at::kFloat, at::kDouble})));
  }
}

template <typename Options>
Real normalizer_of(const Options& options, Real weight) {
  if (!std::holds_alternative<torch::enumtype::kMean>(options.reduction())) return 1;
  const auto& normalizer = options.normalizer();
  if (normalizer.number()) return *normalizer.number();
  if (normalizer.tensor()) return normalizer.tensor()->template item<double>();
  return weight;
}

/// What a call is made of.
struct Call {
  int function = 0;  ///< 0: cross entropy, 1: KL, 2: both
  numeric::InstructionSet instruction_set{};
  Input logits, z_logits;
  at::Tensor targets;
  VAELossOptions options;
  int policy = 0;
  double upstream = 1;
  bool is_faulty = false, may_share_memory = false;

  bool has_tokens() const { return function != 1; }
  bool has_latents() const { return function != 0; }
  bool is_unreduced() const {
    return is_none(has_tokens() ? options.reconstruction().reduction() : options.kl().reduction());
  }
};

at::Tensor some_targets(Bytes& bytes, const Input& logits, int64_t ignore_index) {
  if (bytes.seldom(6)) {
    const at::Tensor q = some_weights(bytes, logits.geometry.sizes).to(at::kDouble);
    return (q / (q.sum(-1, /*keepdim=*/true) + 0.5)).to(bytes.one_of({logits.type(), at::kFloat}));
  }
  const at::Tensor targets = at::empty(logits.positions(), at::kLong);
  uint32_t state = static_cast<uint32_t>(bytes.large());
  const bool ignores = bytes.below(2) == 0;
  const auto type = bytes.one_of({at::kLong, at::kInt, at::kShort});
  for (int64_t i = 0; i < targets.numel(); ++i) {
    state = state * 1664525u + 1013904223u;
    const bool is_ignored = ignores && (state >> 8) % 4 == 0;
    targets.data_ptr<int64_t>()[i] = is_ignored ? ignore_index : static_cast<int64_t>(state >> 12) % logits.width();
  }
  return targets.to(type);
}

void choose_tokens(Bytes& bytes, Call& call) {
  const int64_t classes = bytes.below(3) < 2 ? 1 + bytes.below(80)
                                             : bytes.one_of<int64_t>({127, 128, 129, 511, 512, 513, 1000, 1025, 1537});
  call.logits = some_input(bytes, some_positions(bytes, classes), classes, some_type(bytes));
  ReconstructionLossOptions options;
  const int64_t ignore_index = bytes.one_of<int64_t>({-100, -1, 0, classes});
  call.targets = some_targets(bytes, call.logits, ignore_index);
  if (!call.targets.is_floating_point()) options.ignore_index(ignore_index);
  options.reduction(some_reduction(bytes));
  if (bytes.seldom(3)) options.token_weight(some_weights(bytes, call.logits.positions()));
  if (bytes.seldom(4)) options.weight(some_weights(bytes, {classes}).to(at::kFloat));
  if (bytes.seldom(4)) options.label_smoothing(bytes.one_of({0.125, 0.1, 1.0}));
  if (bytes.seldom(4)) options.z_loss(bytes.one_of({0.25, 1e-4}));
  if (bytes.seldom(4)) options.softcap(bytes.one_of({30.0, 1.0, 1e4, 0.01}));
  if (bytes.seldom(4)) set_normalizer(bytes, options);
  options.inplace(bytes.seldom(3)).accuracy(bytes.seldom(4));
  call.options.reconstruction(options);
}

void choose_latents(Bytes& bytes, Call& call) {
  const int64_t bits = bytes.one_of<int64_t>({16, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33});
  const bool are_same_positions = call.has_tokens() && (call.is_unreduced() || bytes.below(2) == 0);
  const auto positions = are_same_positions ? call.logits.positions() : some_positions(bytes, bits);
  call.z_logits = some_input(bytes, positions, bits, some_type(bytes));
  KLDivergenceOptions options;
  options.latent_dim(bits).free_bits(bytes.one_of({0.3466, 0.0, 1.0, 0.01}));
  if (call.has_tokens()) {
    options.reduction(call.options.reconstruction().reduction());
  } else {
    options.reduction(some_reduction(bytes));
  }
  if (bytes.seldom(3)) options.token_weight(some_weights(bytes, positions));
  if (bytes.seldom(4)) {
    const bool is_one_for_all = bytes.below(2) == 0;
    const at::Tensor prior = some_numbers(bytes, is_one_for_all ? bits : call.z_logits.values.numel(),
                                          bytes.one_of({at::kFloat, at::kDouble, at::kHalf}), bytes.seldom(3));
    options.prior_logits(is_one_for_all ? prior : prior.reshape(call.z_logits.geometry.sizes));
  }
  if (bytes.seldom(4)) set_normalizer(bytes, options);
  call.options.kl(options);
  call.options.beta_kl(bytes.one_of({1.0, 0.5, 0.0, 3.0}));
  call.policy = static_cast<int>(bytes.below(3));
  if (are_same_positions) call.options.mask_ignored_latents(bytes.seldom(2));
}

/// One argument that must be refused.
void spoil_tokens(Bytes& bytes, Call& call) {
  auto options = call.options.reconstruction();
  const double bad = bytes.one_of({-1.0, double{NAN}, double{INFINITY}});
  const auto choice = bytes.below(8);
  if (choice == 0 && call.targets.numel() > 0 && !call.targets.is_floating_point()) {
    call.targets = call.targets.to(at::kLong).contiguous();
    call.targets.view({-1})[bytes.byte() % call.targets.numel()] = bytes.one_of<int64_t>({call.logits.width() + 1, -7});
  } else if (choice == 1 && call.logits.rows() > 0) {
    const at::Tensor weights = at::ones(call.logits.positions(), at::kFloat);
    weights.view({-1})[bytes.byte() % weights.numel()] = bad;
    options.token_weight(weights);
  } else if (choice == 2) {
    options.weight(at::full({call.logits.width()}, bad));
  } else if (choice == 3) {
    options.label_smoothing(bad);
  } else if (choice == 4) {
    options.z_loss(bad);
  } else if (choice == 5) {
    options.softcap(bad);
  } else if (choice == 6) {
    options.normalizer(bytes.one_of({bad, 0.0}));
  } else {
    call.targets = bytes.below(2) == 0 ? at::Tensor() : at::zeros({3, 1, 4, 1, 5}, at::kLong);
  }
  call.options.reconstruction(options);
  call.is_faulty = true;
}

void spoil_latents(Bytes& bytes, Call& call) {
  auto options = call.options.kl();
  const double bad = bytes.one_of({-1.0, double{NAN}, double{INFINITY}});
  switch (bytes.below(6)) {
    case 0:
      options.latent_dim(options.latent_dim() + 1);
      break;
    case 1:
      options.free_bits(bad);
      break;
    case 2:
      options.token_weight(at::ones({2, 7, 1, 8}));
      break;
    case 3:
      options.prior_logits(at::zeros({options.latent_dim() + 1}));
      break;
    case 4:
      options.normalizer(bytes.one_of({bad, 0.0}));
      break;
    default:
      options.prior_logits(at::zeros({options.latent_dim()}, at::kLong));
  }
  call.options.kl(options);
  call.is_faulty = true;
}

Call some_call(Bytes& bytes) {
  Call call;
  call.function = static_cast<int>(bytes.below(3));
  const auto sets = numeric::available_instruction_sets();
  call.instruction_set = sets[static_cast<size_t>(bytes.byte()) % sets.size()];
  call.upstream = bytes.one_of({1.0, 0.5, -2.0});
  const auto fault = bytes.below(8);
  if (call.has_tokens()) choose_tokens(bytes, call);
  if (call.has_latents()) choose_latents(bytes, call);
  if (fault == 7 && call.has_tokens()) spoil_tokens(bytes, call);
  if (fault >= 6 && !call.is_faulty && call.has_latents()) spoil_latents(bytes, call);
  return call;
}

/// Loss of each position with its gradient, times its weight, before the reduction.
struct Term {
  AllExpected losses;  ///< [N]; all there is for a reduced loss: one
  AllExpected gradient, prior_gradient;
  std::vector<bool> counts;  ///< [N]
};

/// Adds up losses of positions; a NaN or infinity stays one.
AllExpected reduced(const AllExpected& losses) {
  Expected sum;
  for (const Expected& loss : losses) sum.add(loss);
  return {sum};
}

Real weight_at(const Reals& weights, int64_t row) { return weights.empty() ? 1 : weights[static_cast<size_t>(row)]; }

Term expected_cross_entropy(const Call& call) {
  const auto& options = call.options.reconstruction();
  const Input& logits = call.logits;
  const auto type = arithmetic(logits.type());
  CrossEntropyTerms terms;
  terms.label_smoothing = options.label_smoothing();
  terms.z_loss = options.z_loss();
  terms.softcap = options.softcap();
  if (options.weight().defined()) terms.class_weight = reals(options.weight());
  const bool has_probabilities = call.targets.is_floating_point();
  const Reals targets = reals(call.targets);
  const Reals weights = options.token_weight().defined() ? reals(options.token_weight()) : Reals();
  Term term;
  Real weight_of_likelihood = 0, weight_of_tokens = 0;
  std::vector<Real> weight_of(static_cast<size_t>(logits.rows()));
  for (int64_t row = 0; row < logits.rows(); ++row) {
    const auto index = static_cast<size_t>(row);
    const bool is_ignored = !has_probabilities && static_cast<int64_t>(targets[index]) == options.ignore_index();
    weight_of[index] = is_ignored ? 0 : weight_at(weights, row);
    term.counts.push_back(weight_of[index] > 0);
    if (!term.counts.back()) continue;
    weight_of_tokens += weight_of[index];
    weight_of_likelihood +=
        weight_of[index] * (has_probabilities ? 1 : terms.weight_of(static_cast<size_t>(targets[index])));
  }
  const Real likelihood_scale = weight_of_likelihood > 0 || !(weight_of_tokens > 0) || normalizer_of(options, 0) > 0
                                    ? 1 / normalizer_of(options, weight_of_likelihood)
                                    : 0;
  const Real z_scale = 1 / normalizer_of(options, weight_of_tokens);
  for (int64_t row = 0; row < logits.rows(); ++row) {
    const Real weight = weight_of[static_cast<size_t>(row)];
    if (!(weight > 0)) {
      term.losses.emplace_back();
      term.gradient.resize(term.gradient.size() + static_cast<size_t>(logits.width()));
      continue;
    }
    const auto first = targets.begin() + row * logits.width();
    const Reals probabilities = has_probabilities ? Reals(first, first + logits.width()) : Reals();
    const int64_t target = has_probabilities ? -1 : static_cast<int64_t>(targets[static_cast<size_t>(row)]);
    const CrossEntropyRow of = cross_entropy_of_row(logits.row(row), target, probabilities, terms, type);
    Expected loss = of.likelihood.times(weight * likelihood_scale);
    if (terms.z_loss > 0) loss.add(of.z.times(weight * z_scale));
    loss.is_known = loss.is_known && !(std::isinf(of.likelihood.value) && !(likelihood_scale > 0));
    term.losses.push_back(loss);
    for (size_t column = 0; column < of.likelihood_gradient.size(); ++column) {
      Expected gradient = of.likelihood_gradient[column].times(weight * likelihood_scale);
      gradient.add(of.z_gradient[column].times(weight * z_scale));
      gradient.tolerance += 4 * epsilon(type) * std::abs(gradient.value);
      term.gradient.push_back(gradient);
    }
  }
  return term;
}

/// Whether max(0, excess) is open; unknown where rounding decides.
struct Gate {
  bool is_open, is_known;
};
Gate gate(const Expected& kl, Real budget, at::ScalarType type) {
  const Real excess = kl.value - budget;
  return {!(excess < 0), !(std::abs(excess) <= 2 * (kl.tolerance + epsilon(type) * (std::abs(kl.value) + budget)))};
}

Expected minus(const Expected& kl, Real budget, at::ScalarType type) {
  return {kl.value - budget, kl.tolerance + epsilon(type) * (std::abs(kl.value) + budget), kl.is_known};
}

/// `counts_of_tokens` masks, where it is not empty.
Term expected_kl(const Call& call, const std::vector<bool>& counts_of_tokens) {
  const auto& options = call.options.kl();
  const Input& z_logits = call.z_logits;
  const auto type = arithmetic(z_logits.type());
  const auto bits = static_cast<size_t>(z_logits.width());
  const Reals weights = options.token_weight().defined() ? reals(options.token_weight()) : Reals();
  const Reals prior = options.prior_logits().defined() ? reals(options.prior_logits()) : Reals();
  const Real budget = options.free_bits();
  Term term;
  std::vector<Real> weight_of;
  std::vector<std::vector<BitKL>> of_bits;
  AllExpected of_positions;
  Expected mean;
  Real total_weight = 0;
  for (int64_t row = 0; row < z_logits.rows(); ++row) {
    const bool is_masked = !counts_of_tokens.empty() && !counts_of_tokens[static_cast<size_t>(row)];
    weight_of.push_back(is_masked ? 0 : weight_at(weights, row));
    total_weight += weight_of.back();
    const Reals z = z_logits.row(row);
    Expected sum;
    std::vector<BitKL> of_row;
    for (size_t bit = 0; bit < bits; ++bit) {
      const size_t place = prior.size() == bits ? bit : static_cast<size_t>(row) * bits + bit;
      of_row.push_back(prior.empty() ? kl_of_bit(z[bit], type) : kl_of_bit(z[bit], prior[place], type));
      sum.add(of_row.back().value);
    }
    sum.tolerance += 20 * epsilon(type) * std::abs(sum.value);
    if (weight_of.back() > 0) mean.add(sum.times(weight_of.back()));
    of_bits.push_back(std::move(of_row));
    of_positions.push_back(sum);
  }
  if (total_weight > 0) mean = mean.times(1 / total_weight);
  const Gate of_batch = gate(mean, budget, type);
  const Real divisor = normalizer_of(options, total_weight);
  for (size_t row = 0; row < of_positions.size(); ++row) {
    const Real factor = weight_of[row] > 0 ? weight_of[row] / divisor : 0;
    Expected penalty;
    const Gate of_position = call.policy == 2 ? of_batch : gate(of_positions[row], budget, type);
    for (size_t bit = 0; bit < bits; ++bit) {
      const BitKL& of = of_bits[row][bit];
      const Gate open = call.policy == 1 ? gate(of.value, budget, type) : of_position;
      if (call.policy == 1 && (open.is_open || !open.is_known)) {
        Expected excess = minus(of.value, budget, type);
        if (excess.value < 0) excess.value = 0;
        excess.tolerance += 20 * epsilon(type) * std::abs(excess.value);
        penalty.add(excess);
      }
      for (auto [gradient, all] :
           {std::pair(of.gradient, &term.gradient), std::pair(of.prior_gradient, &term.prior_gradient)}) {
        Expected scaled = open.is_open ? gradient.times(factor) : Expected{0, 0, true};
        scaled.tolerance += 6 * epsilon(type) * std::abs(scaled.value);
        scaled.is_known = (open.is_known && gradient.is_known) || !(factor > 0);
        // a NaN or an infinity of another bit reaches all of a position's gate, and of a batch's
        if (!std::isfinite(of_positions[row].value) && factor > 0) scaled.is_known = false;
        if (call.policy == 2 && !std::isfinite(mean.value) && factor > 0) scaled.is_known = false;
        if (!(factor > 0)) scaled = {0, 0, true};
        all->push_back(scaled);
      }
    }
    if (call.policy != 1 && (of_position.is_open || !of_position.is_known)) {
      penalty = minus(of_positions[row], budget, type);
      if (call.policy == 0 && penalty.value < 0) penalty.value = 0;
    }
    penalty.is_known = penalty.is_known && (call.policy != 2 || of_batch.is_known);
    term.losses.push_back(factor > 0 ? penalty.times(factor) : Expected{0, 0, true});
  }
  return term;
}

/// What the graph ends in, and the tensors that are handed over.
struct Leaves {
  at::Tensor logits_buffer, z_buffer, prior;
  at::Tensor logits, z_logits;
  VAELossOptions options;
};

Leaves leaves_of(const Call& call) {
  Leaves leaves;
  leaves.options = call.options;
  if (call.has_tokens()) {
    leaves.logits_buffer = call.logits.buffer.clone().requires_grad_();
    leaves.logits = view_of(leaves.logits_buffer.clone(), call.logits.geometry);
  }
  if (call.has_latents()) {
    leaves.z_buffer = call.z_logits.buffer.clone().requires_grad_();
    leaves.z_logits = view_of(leaves.z_buffer, call.z_logits.geometry);
    if (call.options.kl().prior_logits().defined()) {
      leaves.prior = call.options.kl().prior_logits().clone().requires_grad_();
      auto kl = leaves.options.kl();
      leaves.options.kl(kl.prior_logits(leaves.prior));
    }
  }
  return leaves;
}

template <typename Policy>
at::Tensor loss_with(const Call& call, const Leaves& leaves) {
  if (call.function == 0) {
    return compute_reconstruction_loss(leaves.logits, call.targets, leaves.options.reconstruction());
  }
  if (call.function == 1) return compute_kl_divergence<Policy>(leaves.z_logits, leaves.options.kl());
  auto [loss, metrics] = compute_vae_loss<Policy>(leaves.logits, call.targets, leaves.z_logits, leaves.options);
  metrics.at("loss/total");
  return loss;
}

at::Tensor loss_of(const Call& call, const Leaves& leaves) {
  const numeric::Forced forced(call.instruction_set);
  switch (call.policy) {
    case 0:
      return loss_with<PerPosition>(call, leaves);
    case 1:
      return loss_with<PerBit>(call, leaves);
    default:
      return loss_with<BatchMean>(call, leaves);
  }
}

/// The memory behind logits, where no call but one in place may write, and that one nowhere else.
void check_memory(const Call& call, const Leaves& leaves, bool was_overwritten) {
  if (!call.has_tokens()) return;
  const at::Tensor now = at::empty({0}, call.logits.buffer.options())
                             .set_(leaves.logits.storage(), 0, {call.logits.geometry.buffer_size}, {1});
  if (!was_overwritten) {
    if (!same_bytes(now, call.logits.buffer)) fail("the logits' memory was written to");
    return;
  }
  const at::Tensor left = now.clone(), right = call.logits.buffer.clone();
  view_of(left, call.logits.geometry).zero_();
  view_of(right, call.logits.geometry).zero_();
  if (!same_bytes(left, right)) fail("memory beside the logits was written to");
}

/// A refusal is one of this library's, and comes before any write.
void check_refusal(const Call& call, const Leaves& leaves, const c10::Error& error) {
  const std::string what = error.what_without_backtrace();
  if (what.rfind("compute_", 0) != 0) fail("an error that is not this library's: " + what);
  const bool is_overlap = call.options.reconstruction().inplace() && call.has_tokens() &&
                          !free_transformer::detail::elements_lie_apart(leaves.logits);
  if (!call.is_faulty && !is_overlap) fail("refused for no reason: " + what);
  check_memory(call, leaves, /*was_overwritten=*/false);
}

AllExpected scaled(AllExpected all, Real factor) {
  for (Expected& of : all) of = of.times(factor);
  return all;
}

void check_path(const char* path, const Call& call, const Term& tokens, const Term& latents) {
  const Leaves leaves = leaves_of(call);
  at::Tensor loss;
  try {
    loss = loss_of(call, leaves);
  } catch (const c10::Error& error) {
    return check_refusal(call, leaves, error);
  }
  if (call.is_faulty) fail("a bad argument was taken");
  const Real beta = call.function == 2 ? call.options.beta_kl() : 1;
  const auto type = loss.scalar_type();
  const auto reduced_if = [&](const AllExpected& all) { return call.is_unreduced() ? all : reduced(all); };
  AllExpected expected;
  if (call.has_tokens()) expected = reduced_if(tokens.losses);
  if (call.has_latents()) {
    const auto of_latents = reduced_if(scaled(latents.losses, beta));
    if (expected.empty())
      expected = of_latents;
    else {
      for (size_t i = 0; i < expected.size(); ++i) expected[i].add(of_latents[i]);
    }
    if (call.function == 2) {  // each term was rounded to its own type, and their sum
      for (size_t i = 0; i < expected.size(); ++i) {
        expected[i].tolerance +=
            4 * epsilon(at::kFloat) * (std::abs(expected[i].value) + 2 * std::abs(of_latents[i].value));
      }
    }
  }
  for (Expected& of : expected) of.tolerance += 8 * epsilon(arithmetic(type)) * std::abs(of.value);
  const std::string name = path;
  check((name + ", loss").c_str(), loss, expected, 2);

  std::vector<at::Tensor> inputs;
  if (call.has_tokens()) inputs.push_back(leaves.logits_buffer);
  if (call.has_latents()) inputs.push_back(leaves.z_buffer);
  if (leaves.prior.defined()) inputs.push_back(leaves.prior);
  const auto gradients = torch::autograd::grad({loss}, inputs, {at::full_like(loss, call.upstream)});
  const Real growth = 2 * std::max<Real>(1, std::abs(static_cast<Real>(call.upstream)));
  size_t next = 0;
  if (call.has_tokens()) {
    check((name + ", gradient of logits").c_str(), gradients[next++],
          of_buffer(scaled(tokens.gradient, call.upstream), call.logits.geometry, call.logits.type()), growth);
    check_memory(call, leaves, call.options.reconstruction().inplace());
  }
  if (call.has_latents()) {
    check((name + ", gradient of z_logits").c_str(), gradients[next++],
          of_buffer(scaled(latents.gradient, call.upstream * beta), call.z_logits.geometry, call.z_logits.type()),
          growth);
  }
  if (leaves.prior.defined()) {
    Geometry geometry;
    geometry.buffer_size = leaves.prior.numel();
    geometry.sizes = call.z_logits.geometry.sizes;
    geometry.strides.assign(geometry.sizes.size(), 0);
    int64_t stride = 1;
    for (size_t dim = geometry.sizes.size(); dim-- > 0 && stride < geometry.buffer_size;) {
      geometry.strides[dim] = stride;
      stride *= geometry.sizes[dim];
    }
    check((name + ", gradient of prior_logits").c_str(), gradients[next],
          of_buffer(scaled(latents.prior_gradient, call.upstream * beta), geometry, leaves.prior.scalar_type()),
          growth);
  }
}

/// LibTorch's own cross entropy in float64, where it has the options and no infinity or NaN is at hand.
void check_eager(const Call& call, const Term& tokens) {
  const auto& options = call.options.reconstruction();
  if (call.targets.is_floating_point() || options.token_weight().defined() || options.z_loss() > 0 ||
      options.softcap() > 0 || options.normalizer().number() || options.normalizer().tensor() ||
      !call.logits.values.isfinite().all().item<bool>() || call.logits.rows() == 0) {
    return;
  }
  const at::Tensor weight = options.weight().defined() ? options.weight().to(at::kDouble) : at::Tensor();
  const at::Tensor logits = call.logits.values.to(at::kDouble).reshape({-1, call.logits.width()});
  const int64_t reduction = call.is_unreduced()                                                  ? 0
                            : std::holds_alternative<torch::enumtype::kSum>(options.reduction()) ? 2
                                                                                                 : 1;
  const at::Tensor loss = at::cross_entropy_loss(logits, call.targets.to(at::kLong).reshape({-1}), weight, reduction,
                                                 options.ignore_index(), options.label_smoothing());
  const auto expected = call.is_unreduced() ? tokens.losses : reduced(tokens.losses);
  for (const double number : std::vector<double>(loss.data_ptr<double>(), loss.data_ptr<double>() + loss.numel())) {
    if (!std::isfinite(number)) return;  // nothing counts
  }
  AllExpected in_float64;
  const double size = call.logits.values.numel() == 0 ? 0 : logits.abs().max().item<double>();
  for (const Expected& of : expected) {  // lse - x_y loses what is common to both
    in_float64.push_back(
        {of.value, 1e-12L * (std::abs(of.value) + size * static_cast<double>(1 + 4 * tokens.losses.size())), of.is_known});
  }
  check("eager in float64", loss, in_float64);
}

void run(Bytes bytes) {
  Call call = some_call(bytes);
  Term tokens, latents;
  if (!call.is_faulty) {
    if (call.has_tokens()) {
      tokens = expected_cross_entropy(call);
      check_eager(call, tokens);
    }
    if (call.has_latents()) {
      latents = expected_kl(call, call.options.mask_ignored_latents() ? tokens.counts : std::vector<bool>());
    }
  }
  check_path("as given", call, tokens, latents);
  if (call.has_tokens()) call.logits = with_strided_rows(call.logits);
  if (call.has_latents()) call.z_logits = with_strided_rows(call.z_logits);
  auto reconstruction = call.options.reconstruction();
  call.options.reconstruction(reconstruction.inplace(false));
  check_path("in LibTorch's operations", call, tokens, latents);
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool is_prepared = [] {
    c10::SetStackTraceFetcher([] { return std::string(); });  // a refusal is not to cost a look at all symbols
    at::set_num_threads(1);
    return true;
  }();
  if (is_prepared) fuzz::run(fuzz::Bytes(data, size));
  return 0;
}
