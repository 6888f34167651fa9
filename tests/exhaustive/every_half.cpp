/// Tries `compute_kl_divergence` and its gradient on all float16 and bfloat16 numbers, and on 65536 of float32, with each
/// instruction set of this machine. Prints the worst errors and where they are; fails if the KL is off by more than 2 ulp
/// of float32, or a NaN gets lost. A gradient is rounded to the logits' type after at most 4 ulp of float32.
#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include <free_transformer/kl_divergence.hpp>

#include "../unit/instruction_sets.hpp"
#include "exact.hpp"

namespace exhaustive {

struct HalfType {
  const char* name;
  at::ScalarType type;
  int fraction_bits, smallest_exponent;
  double permitted_gradient_ulp;
};

constexpr HalfType types[] = {
    {"float16", at::kHalf, 10, -14, 0.5 + 4.0 / (1 << 13)},
    {"bfloat16", at::kBFloat16, 7, -126, 0.5 + 4.0 / (1 << 16)},
    {"float32", at::kFloat, 23, -126, 4.0},
};

/// All numbers of a half type. Of float32, those of bfloat16 with other last bits.
at::Tensor numbers(const HalfType& of) {
  const at::Tensor index = at::arange(65536, at::kInt);
  if (of.type != at::kFloat) return index.to(at::kShort).view(of.type);
  return (index * 65536 + index * 40503 % 65536).view(at::kFloat);
}

struct Worst {
  long double error = 0;
  double logit = 0;
  int64_t lost_nans = 0;

  void take(const at::Tensor& computed_, const at::Tensor& logits_, bool is_odd, long double (*exact)(long double),
            int fraction_bits, int smallest_exponent) {
    const at::Tensor computed = computed_.to(at::kDouble).contiguous(), logits = logits_.to(at::kDouble).contiguous();
    for (int64_t i = 0; i < logits.numel(); ++i) {
      const double number = logits.data_ptr<double>()[i], value = computed.data_ptr<double>()[i];
      if (std::isnan(number)) {
        lost_nans += !std::isnan(value);
        continue;
      }
      const long double expected = exact(std::abs(static_cast<long double>(number)));
      const long double sign = is_odd && number < 0 ? -1 : 1;
      const long double off = std::abs(sign * static_cast<long double>(value) - expected) *
                              steps_in_one(expected, fraction_bits, smallest_exponent);
      if (!(off <= error)) error = off, logit = number;
    }
  }
};

bool try_type(const HalfType& of) {
  const at::Tensor logits = numbers(of).unsqueeze(1).requires_grad_();
  const auto options =
      free_transformer::KLDivergenceOptions().latent_dim(1).free_bits(0).reduction(torch::enumtype::kNone{});
  const at::Tensor kl_of_each = free_transformer::compute_kl_divergence(logits, options);
  const at::Tensor gradient = torch::autograd::grad({kl_of_each}, {logits}, {at::ones_like(kl_of_each)})[0];
  Worst value, slope;
  value.take(kl_of_each, logits.detach(), /*is_odd=*/false, kl<long double>, 23, -126);
  slope.take(gradient, logits.detach(), /*is_odd=*/true, kl_derivative<long double>, of.fraction_bits,
             of.smallest_exponent);
  std::printf(
      "  %-8s  KL %.4Lf ulp of float32 at %.9g, permitted 2; gradient %.4Lf ulp of %s at %.9g, permitted %.4f\n",
      of.name, value.error, value.logit, slope.error, of.name, slope.logit, of.permitted_gradient_ulp);
  const int64_t lost_nans = value.lost_nans + slope.lost_nans;
  if (lost_nans != 0) std::printf("  %lld NaNs are lost\n", static_cast<long long>(lost_nans));
  return value.error <= 2 && slope.error <= static_cast<long double>(of.permitted_gradient_ulp) && lost_nans == 0;
}

}  // namespace exhaustive

int main() {
  constexpr const char* names[] = {"baseline", "AVX2", "AVX-512"};
  bool is_good = true;
  for (const auto set : numeric::available_instruction_sets()) {
    const numeric::Forced forced(set);
    std::puts(names[static_cast<int>(set)]);
    for (const auto& type : exhaustive::types) is_good = exhaustive::try_type(type) && is_good;
  }
  return is_good ? 0 : 1;
}
