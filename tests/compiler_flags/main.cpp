// Runs every unit on the same inputs and compares it with the equations in LibTorch's operations in float64. Compiled
// without flags, so that a NaN is seen here.
#include <algorithm>
#include <cmath>
#include <iostream>
#include <limits>

#include "losses.hpp"

std::vector<Unit>& units() {
  static std::vector<Unit> all;
  return all;
}

namespace {

at::Tensor mean_nll(const at::Tensor& x, const at::Tensor& targets) {
  return -x.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean();
}

at::Tensor bit_kl(const at::Tensor& z) {
  const at::Tensor p = z.sigmoid(), q = (-z).sigmoid();
  return (p * (2 * p).log()).masked_fill(p == 0, 0) + (q * (2 * q).log()).masked_fill(q == 0, 0);
}

at::Tensor hinge(const at::Tensor& excess) { return excess.masked_fill(excess < 0, 0); }

/// The numbers of a unit, in its order, from their equations.
std::vector<at::Tensor> from_equations(const Inputs& inputs) {
  const auto leaf = [](const at::Tensor& values) { return values.to(at::kDouble).clone().requires_grad_(); };
  const at::Tensor x = leaf(inputs.logits), z = leaf(inputs.z_logits), h = leaf(inputs.hidden), w = leaf(inputs.weight);
  std::vector<at::Tensor> numbers;
  const auto add = [&](const at::Tensor& loss, const std::vector<at::Tensor>& of) {
    numbers.push_back(loss.detach());
    for (const at::Tensor& input : of) input.mutable_grad().reset();
    loss.backward();
    for (const at::Tensor& input : of) numbers.push_back(input.grad().clone());
  };
  add(mean_nll(x, inputs.targets), {x});
  add(mean_nll(x, inputs.targets), {x});
  const at::Tensor capped = 8 * (x / 8).tanh();
  add(0.875 * mean_nll(capped, inputs.targets) - 0.125 * capped.log_softmax(-1).mean() +
          0.25 * capped.logsumexp(-1).square().mean(),
      {x});
  add(mean_nll(h.matmul(w.t()), inputs.targets), {h, w});
  const at::Tensor kl = bit_kl(z), batch = hinge(kl.sum(-1).mean() - 0.3466), nll = mean_nll(x, inputs.targets);
  add(hinge(bit_kl(z).sum(-1) - 0.3466).mean(), {z});
  add(hinge(bit_kl(z) - 0.01).sum(-1).mean(), {z});
  add(nll + batch, {x, z});
  const at::Tensor log_p = x.detach().log_softmax(-1);
  numbers.push_back(-log_p.gather(-1, inputs.targets.unsqueeze(-1)).squeeze(-1));
  numbers.push_back(-(log_p.exp() * log_p).masked_fill(log_p.exp() == 0, 0).sum(-1));
  numbers.push_back(x.detach().logsumexp(-1));
  const at::Tensor raw_kl = kl.sum(-1).mean();
  for (const at::Tensor& metric : {nll + batch, batch, raw_kl / std::log(2.0), nll + raw_kl}) {
    numbers.push_back(metric.detach());
  }
  return numbers;
}

int failures = 0;

void expect(bool holds, const Unit& unit, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cout << "[" << unit.flags << "] " << what << '\n';
}

Inputs inputs_of(at::ScalarType type) {
  const auto values = [&](at::IntArrayRef shape, int64_t seed) {
    const at::Tensor index = at::arange(c10::multiply_integers(shape), at::kLong) + seed;
    return (index * 2654435761 % 1021).remainder(1021).to(at::kDouble).sub(510).div(73).reshape(shape).to(type);
  };
  return {values({6, 333}, 1), at::arange(6) * 50, values({40, 16}, 2) / 2, values({6, 8}, 3) / 4,
          values({333, 8}, 4) / 4};
}

void check_numbers(const Unit& unit, at::ScalarType type) {
  const Inputs inputs = inputs_of(type);
  const auto found = unit.run(inputs).numbers, expected = from_equations(inputs);
  expect(found.size() == expected.size(), unit, "other numbers than expected");
  // Eight steps of the arithmetic, one of the type that a gradient is rounded to, of the largest number of a tensor.
  const bool is_double = type == at::kDouble;
  for (size_t index = 0; index < expected.size(); ++index) {
    const at::Tensor off = (found[index].to(at::kDouble) - expected[index]).abs().max();
    const double step = found[index].scalar_type() == at::kBFloat16 ? 0x1p-8 : is_double ? 1e-13 : 1e-6;
    const double bound = step * (expected[index].abs().max().item<double>() + 1e-3);
    const double error = off.item<double>();
    expect(error <= bound, unit,
           std::string(c10::toString(type)) + ", number " + std::to_string(index) + " is off by " +
               std::to_string(error) + " of at most " + std::to_string(bound));
  }
}

/// A NaN or an infinite loss is seen, and a tiny number keeps its digits.
void check_special_values(const Unit& unit, at::ScalarType type) {
  const double inf = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const auto with = [&](const char* what, double value, bool expect_nan) {
    Inputs inputs = inputs_of(type);
    inputs.logits[2][100] = at::full({}, value, type);  // the target's
    inputs.z_logits[3][1] = at::full({}, value, type);
    const auto numbers = unit.run(inputs).numbers;
    const auto found = [&](Number number) { return numbers[number].item<double>(); };
    if (expect_nan) {
      for (const Number number : {reconstruction, inplace, options, kl, per_bit, vae, metric_total, metric_kl}) {
        expect(std::isnan(found(number)), unit, "number " + std::to_string(number) + " hides " + what);
      }
      for (const Number number : {of_logits, of_z, vae_of_logits, vae_of_z}) {
        expect(numbers[number].isnan().any().item<bool>(), unit,
               "gradient " + std::to_string(number) + " hides " + what);
      }
    } else {
      expect(std::isinf(found(reconstruction)) && std::isfinite(found(kl)), unit,
             std::string("a wrong loss of ") + what);
    }
  };
  with("a NaN", nan, true);
  with("an impossible target", -inf, false);
  Inputs inputs = inputs_of(type);
  inputs.z_logits.fill_(1e-4);
  inputs.logits.fill_(-30);
  inputs.logits.scatter_(1, inputs.targets.unsqueeze(1), 0);  // a confident model
  const auto numbers = unit.run(inputs).numbers;
  const double z = inputs.z_logits[0][0].item<double>();
  const double confident = std::log1p(332 * std::exp(-30.0));
  const double raw_kl = numbers[metric_kl_bits].item<double>() * std::log(2.0);
  expect(std::abs(numbers[reconstruction].item<double>() / confident - 1) < 1e-5, unit,
         "a confident loss loses its digits");
  expect(std::abs(raw_kl / (16 * z * z / 8) - 1) < 1e-5, unit, "a small KL loses its digits");
}

}  // namespace

int main() {
  std::sort(units().begin(), units().end(), [](const Unit& a, const Unit& b) { return a.flags < b.flags; });
  for (const Unit& unit : units()) {
    std::cout << unit.flags << std::endl;
    for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16}) {
      check_numbers(unit, type);
      check_special_values(unit, type);
    }
    const auto refusals = unit.run(inputs_of(at::kFloat)).refusals;
    for (size_t index = 0; index < refusals.size(); ++index) {
      expect(!refusals[index].empty(), unit, "bad setting " + std::to_string(index) + " is taken");
    }
  }
  std::cout << units().size() << " units, " << failures << " failures\n";
  return failures == 0 && units().size() >= 4 ? 0 : 1;
}
