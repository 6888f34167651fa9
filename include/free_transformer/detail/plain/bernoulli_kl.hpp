/// KL of independent latent bits in LibTorch operations, computed in float64 and so exact to the last digit of float32.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/intrusive_ptr.h>

#include <cmath>

#include "free_transformer/detail/autograd/graph_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/plain/elementwise.hpp"

FREE_TRANSFORMER_SMALL_CODE_BEGIN
namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain {

/// -|x| with the derivative of one side at 0, where that of at::abs is 0: smooth functions made of it keep all of
/// theirs.
inline at::Tensor minus_abs(const at::Tensor& x) { return x * at::ones_like(x).masked_fill_(x >= 0, -1); }

/// 1/(1 + exp(-x)), by at::exp: at::sigmoid rounds elements at the end of a thread's share in another way.
inline at::Tensor logistic(const at::Tensor& x) {
  const at::Tensor s = minus_abs(x).exp();
  return choose(x < 0, s, at::ones_like(s)) / (1 + s);
}

/// log P(bits) of each row, to be differentiated. Meta tensors, for which LibTorch 1.13 has no at::where and no
/// log_sigmoid, have a sum's shape.
inline at::Tensor log_probability_of_bits(const at::Tensor& logits, const at::Tensor& is_one) {
  if (logits.is_meta()) return logits.sum(-1);
  return at::log_sigmoid(at::where(is_one, logits, -logits)).sum(-1);
}

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)) of each element, in nats. With u = |l|/2 it is u tanh u - log cosh u,
/// written for small u as u t + log1p(-t^2)/2, t = tanh u, and for large u as log 2 - 2u s/(1+s) - log1p(s), s =
/// exp(-2u): each loses at most a factor of 3 to cancellation on its side of u = 1, and neither overflows.
inline at::Tensor bernoulli_kl_uniform(const at::Tensor& logits) {
  const at::Tensor u = magnitude(logits) / 2;
  const at::Tensor t = u.tanh();
  const at::Tensor near = u * t + (-t.square()).log1p() / 2;
  const at::Tensor s = (-2 * u).exp();
  const at::Tensor entropy = (2 * u * s / (1 + s)).masked_fill_(s == 0, 0) + s.log1p();
  return choose(u < 1, near, std::log(2.0) - entropy);
}

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(sigmoid(r))) = p (l-r) + softplus(r) - softplus(l), p = sigmoid(l). Both signs
/// are flipped where l > 0, which leaves the KL as it is and p <= 1/2. Near each other the softplus terms would cancel:
/// there softplus(r) - softplus(l) = log1p(p expm1(r-l)). Closer still, that cancels p (l-r): there the series in r-l
/// is taken, whose next term is below 1e-11 of it.
inline at::Tensor bernoulli_kl_prior(const at::Tensor& logits, const at::Tensor& prior_logits) {
  const at::Tensor flip = at::ones_like(logits).masked_fill_(logits > 0, -1);
  const at::Tensor l = logits * flip, r = prior_logits * flip;
  const at::Tensor p = logistic(l);
  const at::Tensor difference = l - r;
  const at::Tensor near = p * difference + (p * (-difference).expm1()).log1p();
  const at::Tensor variance = p * (1 - p);
  const at::Tensor close =
      variance * difference.square() * (0.5 - difference * ((1 - 2 * p) / 6 - difference * ((1 - 6 * variance) / 24)));
  const auto product = [](const at::Tensor& factor, const at::Tensor& value) {
    return (factor * value).masked_fill_(factor == 0, 0);  // a sure bit does not see an infinite logit
  };
  const auto softplus = [](const at::Tensor& x) { return x.clamp_min(0) + (-magnitude(x)).exp().log1p(); };
  const at::Tensor cross = choose(r > 0, (1 - p) * r + (-r).exp().log1p(), softplus(r) - product(p, r));
  const at::Tensor far = product(p, l) - softplus(l) + cross;
  const at::Tensor distance = magnitude(difference);
  return choose(distance < 1.0 / 2048, close, choose(distance < 1, near, far));
}

inline at::Tensor bernoulli_kl(const at::Tensor& logits, const at::Tensor& prior_logits) {
  return prior_logits.defined() ? bernoulli_kl_prior(logits, prior_logits) : bernoulli_kl_uniform(logits);
}

/// d KL / d l = (l - r) sigmoid(l) sigmoid(-l), 0 at l = +-inf.
inline at::Tensor bernoulli_kl_gradient(const at::Tensor& logits, const at::Tensor& prior_logits) {
  const at::Tensor s = minus_abs(logits).exp();
  const at::Tensor variance = s / (1 + s).square();
  const at::Tensor difference = prior_logits.defined() ? logits - prior_logits : logits;
  return difference.masked_fill(variance == 0, 0) * variance;  // also in its own derivative
}

/// d KL / d r = sigmoid(r) - sigmoid(l).
inline at::Tensor bernoulli_kl_prior_gradient(const at::Tensor& logits, const at::Tensor& prior_logits) {
  return logistic(prior_logits) - logistic(logits);
}

/// The KL of each bit for a graph of any order: its gradient is again made of differentiable operations, and smooth at
/// 0.
struct DifferentiableKL final : GraphOperation {
  Tensors node_forward(GraphNode& node, const Tensors& inputs) override {
    node.save_for_backward({inputs[0], inputs[1]});
    return {bernoulli_kl(inputs[0], inputs[1])};
  }

  Tensors node_backward(GraphNode& node, const at::Tensor& upstream) override {
    const auto saved = node.saved_tensors();
    at::Tensor prior_gradient;
    if (saved[1].defined()) prior_gradient = upstream * bernoulli_kl_prior_gradient(saved[0], saved[1]);
    return {upstream * bernoulli_kl_gradient(saved[0], saved[1]), prior_gradient};
  }
};

inline at::Tensor differentiable_bernoulli_kl(const at::Tensor& logits, const at::Tensor& prior_logits) {
  return apply_in_graph(c10::make_intrusive<DifferentiableKL>(), {logits, prior_logits})[0];
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::plain
FREE_TRANSFORMER_SMALL_CODE_END
