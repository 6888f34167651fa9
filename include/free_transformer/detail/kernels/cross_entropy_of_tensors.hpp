/// Cross entropy by the vector kernels, from tensors to tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cstdint>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/settings.hpp"
#if FREE_TRANSFORMER_VECTOR_KERNELS
#include "free_transformer/detail/kernels/cross_entropy.hpp"
#endif
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels {

/// True if the kernels can take these logits; the others go the way of LibTorch operations.
inline bool takes_cross_entropy(const at::Tensor& logits, const CrossEntropySettings& settings) {
  return FREE_TRANSFORMER_VECTOR_KERNELS && logits.device().is_cpu() && !settings.has_probabilities() &&
         !logits.is_neg() && !logits._is_zerotensor() && (logits.stride(-1) == 1 || logits.size(-1) == 1) &&
         !(logits.scalar_type() == at::kDouble && settings.softcap > 0);
}

/// What the loss of each position is multiplied by on its way to the final value.
struct CrossEntropyScales {
  double likelihood = 1, z = 1;
  double likelihood_weight_sum = 0, token_weight_sum = 0;
};

/// The weight u of a position, 0 where it is ignored.
template <typename Real>
struct PositionWeight {
  explicit PositionWeight(const CrossEntropySettings& settings)
      : targets(settings.targets.data_ptr<int64_t>()),
        token_weight(settings.token_weight.defined() ? settings.token_weight.data_ptr<Real>() : nullptr),
        ignore_index(settings.ignore_index) {}

  double operator()(int64_t position) const {
    if (targets[position] == ignore_index) return 0;
    return token_weight ? static_cast<double>(token_weight[position]) : 1.0;
  }

  const int64_t* targets;
  const Real* token_weight;
  int64_t ignore_index;
};

/// The scales follow from the targets and weights alone, so that the gradient can be finished in the forward pass.
inline CrossEntropyScales cross_entropy_scales(const CrossEntropySettings& settings, const Normalization& normalization,
                                               at::ScalarType type) {
  CrossEntropyScales scales;
  AT_DISPATCH_FLOATING_TYPES(type, "cross_entropy_scales", [&] {
    const auto* class_weight = settings.class_weight.defined() ? settings.class_weight.data_ptr<scalar_t>() : nullptr;
    const int64_t rows = settings.targets.numel();
    const PositionWeight<scalar_t> u(settings);
    scales.token_weight_sum = pairwise_sum(0, rows, u);
    scales.likelihood_weight_sum = !class_weight ? scales.token_weight_sum : pairwise_sum(0, rows, [&](int64_t row) {
      const double weight = u(row);
      return !(weight > 0) ? 0 : weight * static_cast<double>(class_weight[u.targets[row]]);
    });
  });
  scales.likelihood = loss_scale(normalization, scales.likelihood_weight_sum, scales.token_weight_sum);
  scales.z = loss_scale(normalization, scales.token_weight_sum, scales.token_weight_sum);
  return scales;
}

/// What is to be said of each row beside its loss.
struct WantedOfRows {
  bool prediction = false, entropy = false;
};

/// All rows, and their gradient if `gradient` is defined (of the logits' shape and type; it may be the logits).
/// upstream is [N] in the type of arithmetic and multiplies the scales, or undefined.
inline CrossEntropyRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                                           const CrossEntropyScales& scales, const at::Tensor& gradient,
                                           const at::Tensor& upstream, WantedOfRows wanted) {
#if FREE_TRANSFORMER_VECTOR_KERNELS
  const int64_t rows = settings.targets.numel(), columns = logits.size(-1);
  const auto real_type = arithmetic_type(logits.scalar_type());
  const at::Tensor results = at::empty({wanted.entropy ? 4 : 3, rows}, logits.options().dtype(real_type));
  CrossEntropyRows of_rows{results[0], results[1], results[2], {}, wanted.entropy ? results[3] : at::Tensor()};
  if (wanted.prediction) of_rows.prediction = at::empty({rows}, settings.targets.options());
  const RowOffsets logit_rows(logits), gradient_rows(gradient.defined() ? gradient : logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "cross_entropy_rows", [&] {
    using Real = RealOf<scalar_t>;
    const auto pointer = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<Real>() : nullptr; };
    CrossEntropyJob<scalar_t> job{};
    job.logits = logits.data_ptr<scalar_t>();
    job.logit_rows = &logit_rows;
    job.columns = columns;
    job.targets = settings.targets.data_ptr<int64_t>();
    job.ignore_index = settings.ignore_index;
    job.token_weight = pointer(settings.token_weight);
    job.class_weight = pointer(settings.class_weight);
    job.class_weight_sum = !job.class_weight ? static_cast<double>(columns) : pairwise_sum(0, columns, [&](int64_t c) {
      return static_cast<double>(job.class_weight[c]);
    });
    job.label_smoothing = settings.label_smoothing;
    job.z_loss = settings.z_loss;
    job.softcap = settings.softcap;
    job.gradient = gradient.defined() ? gradient.data_ptr<scalar_t>() : nullptr;
    job.gradient_rows = &gradient_rows;
    job.upstream = pointer(upstream);
    job.likelihood_scale = scales.likelihood;
    job.z_scale = scales.z;
    job.nll = results.data_ptr<Real>();
    job.likelihood_loss = job.nll + rows;
    job.log_sum_exp = job.likelihood_loss + rows;
    job.entropy = wanted.entropy ? job.log_sum_exp + rows : nullptr;
    job.prediction = wanted.prediction ? of_rows.prediction.data_ptr<int64_t>() : nullptr;
    cross_entropy<scalar_t>(job, rows);
  });
  return of_rows;
#else
  TORCH_INTERNAL_ASSERT(false, logits, settings.targets, scales.z, gradient, upstream, wanted.entropy);
#endif
}

/// Loss of each position, all weights applied, [N].
inline at::Tensor cross_entropy_losses(const CrossEntropyRows& rows, const CrossEntropySettings& settings) {
  at::Tensor loss =
      settings.z_loss > 0 ? rows.likelihood_loss + settings.z_loss * rows.log_sum_exp.square() : rows.likelihood_loss;
  return settings.token_weight.defined() ? (loss * settings.token_weight).masked_fill_(settings.token_weight == 0, 0)
                                         : loss;
}

/// The sums of `ReconstructionSum`, in its order.
inline at::Tensor reconstruction_sums(const CrossEntropyRows& rows, const CrossEntropySettings& settings,
                                      const CrossEntropyScales& scales) {
  const at::Tensor sums = at::zeros({reconstruction_sum_count}, rows.nll.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(rows.nll.scalar_type(), "reconstruction_sums", [&] {
    const auto* likelihood_loss = rows.likelihood_loss.data_ptr<scalar_t>();
    const auto* nll = rows.nll.data_ptr<scalar_t>();
    const auto* log_sum_exp = rows.log_sum_exp.data_ptr<scalar_t>();
    const int64_t count = settings.targets.numel();
    const PositionWeight<scalar_t> u(settings);
    double* sum = sums.data_ptr<double>();
    sum[likelihood_loss_sum] =
        pairwise_sum(0, count, [&](int64_t row) { return u(row) * double{likelihood_loss[row]}; });
    sum[likelihood_weight_sum] = scales.likelihood_weight_sum;
    sum[token_weight_sum] = scales.token_weight_sum;
    sum[nll_sum] = pairwise_sum(0, count, [&](int64_t row) { return u(row) * double{nll[row]}; });
    if (settings.z_loss > 0) {
      sum[z_loss_sum] = settings.z_loss * pairwise_sum(0, count, [&](int64_t row) {
                          return u(row) * double{log_sum_exp[row]} * double{log_sum_exp[row]};
                        });
    }
    if (rows.prediction.defined()) {
      const int64_t* prediction = rows.prediction.data_ptr<int64_t>();
      sum[hit_sum] =
          pairwise_sum(0, count, [&](int64_t row) { return prediction[row] == u.targets[row] ? u(row) : 0.0; });
    }
  });
  return sums;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::kernels
