/// Cross entropy by the vector kernels, from tensors to tensors.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <cstdint>

#include "free_transformer/detail/cross_entropy_terms.hpp"
#include "free_transformer/detail/kernels/cross_entropy.hpp"
#include "free_transformer/detail/kernels/pairwise_sum.hpp"
#include "free_transformer/detail/kernels/row_offsets.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::detail::kernels {

/// True if the kernels can take these logits; the others go the way of LibTorch operations.
inline bool takes_cross_entropy(const at::Tensor& logits, const CrossEntropyTerms& terms) {
  return compiler_has_vector_types && logits.device().is_cpu() && !terms.has_probabilities() &&
         (logits.stride(-1) == 1 || logits.size(-1) == 1) &&
         !(logits.scalar_type() == at::kDouble && terms.softcap > 0);
}

/// What the loss of each position is multiplied by on its way to the final value.
struct CrossEntropyScales {
  double likelihood = 1, z = 1;
  double likelihood_weight_sum = 0, token_weight_sum = 0;
};

/// The weight u of a position, 0 where it is ignored.
template <typename Real>
struct PositionWeight {
  explicit PositionWeight(const CrossEntropyTerms& terms)
      : targets(terms.targets.data_ptr<int64_t>()),
        token_weight(terms.token_weight.defined() ? terms.token_weight.data_ptr<Real>() : nullptr),
        ignore_index(terms.ignore_index) {}

  double operator()(int64_t position) const {
    if (targets[position] == ignore_index) return 0;
    return token_weight ? static_cast<double>(token_weight[position]) : 1.0;
  }

  const int64_t* targets;
  const Real* token_weight;
  int64_t ignore_index;
};

/// The scales follow from the targets and weights alone, so that the gradient can be finished in the forward pass.
inline CrossEntropyScales cross_entropy_scales(const CrossEntropyTerms& terms, const Normalization& normalization,
                                               at::ScalarType type) {
  CrossEntropyScales scales;
  AT_DISPATCH_FLOATING_TYPES(type, "cross_entropy_scales", [&] {
    const auto* class_weight = terms.class_weight.defined() ? terms.class_weight.data_ptr<scalar_t>() : nullptr;
    const int64_t rows = terms.targets.numel();
    const PositionWeight<scalar_t> u(terms);
    scales.token_weight_sum = pairwise_sum(0, rows, u);
    scales.likelihood_weight_sum = !class_weight ? scales.token_weight_sum : pairwise_sum(0, rows, [&](int64_t row) {
      const double weight = u(row);
      return weight == 0 ? 0 : weight * static_cast<double>(class_weight[u.targets[row]]);
    });
  });
  scales.likelihood = loss_scale(normalization, scales.likelihood_weight_sum);
  scales.z = loss_scale(normalization, scales.token_weight_sum);
  return scales;
}

/// All rows, and their gradient if `gradient` is defined (of the logits' shape and type; it may be the logits).
/// upstream is [N] in the type of arithmetic and multiplies the scales, or undefined.
inline CrossEntropyRows cross_entropy_rows(const at::Tensor& logits, const CrossEntropyTerms& terms,
                                           const CrossEntropyScales& scales, const at::Tensor& gradient,
                                           const at::Tensor& upstream, bool predict) {
  const int64_t rows = terms.targets.numel(), columns = logits.size(-1);
  const auto real_type = arithmetic_type(logits.scalar_type());
  const at::Tensor results = at::empty({3, rows}, logits.options().dtype(real_type));
  CrossEntropyRows of_rows{results[0], results[1], results[2], {}};
  if (predict) of_rows.prediction = at::empty({rows}, terms.targets.options());
  const RowOffsets logit_rows(logits), gradient_rows(gradient.defined() ? gradient : logits);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, logits.scalar_type(), "cross_entropy_rows", [&] {
    using Real = RealOf<scalar_t>;
    const auto pointer = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<Real>() : nullptr; };
    CrossEntropyJob<scalar_t> job{};
    job.logits = logits.data_ptr<scalar_t>();
    job.logit_rows = &logit_rows;
    job.columns = columns;
    job.targets = terms.targets.data_ptr<int64_t>();
    job.ignore_index = terms.ignore_index;
    job.token_weight = pointer(terms.token_weight);
    job.class_weight = pointer(terms.class_weight);
    job.class_weight_sum = !job.class_weight ? static_cast<double>(columns) : pairwise_sum(0, columns, [&](int64_t c) {
      return static_cast<double>(job.class_weight[c]);
    });
    job.label_smoothing = terms.label_smoothing;
    job.z_loss = terms.z_loss;
    job.softcap = terms.softcap;
    job.gradient = gradient.defined() ? gradient.data_ptr<scalar_t>() : nullptr;
    job.gradient_rows = &gradient_rows;
    job.upstream = pointer(upstream);
    job.likelihood_scale = scales.likelihood;
    job.z_scale = scales.z;
    job.nll = results.data_ptr<Real>();
    job.likelihood_loss = job.nll + rows;
    job.log_sum_exp = job.likelihood_loss + rows;
    job.prediction = predict ? of_rows.prediction.data_ptr<int64_t>() : nullptr;
    cross_entropy<scalar_t>(job, rows);
  });
  return of_rows;
}

/// Loss of each position, all weights applied, [N].
inline at::Tensor cross_entropy_losses(const CrossEntropyRows& rows, const CrossEntropyTerms& terms) {
  at::Tensor loss =
      terms.z_loss > 0 ? rows.likelihood_loss + terms.z_loss * rows.log_sum_exp.square() : rows.likelihood_loss;
  return terms.token_weight.defined() ? (loss * terms.token_weight).masked_fill_(terms.token_weight == 0, 0) : loss;
}

/// The sums of `ReconstructionSum`, in its order.
inline at::Tensor reconstruction_sums(const CrossEntropyRows& rows, const CrossEntropyTerms& terms,
                                      const CrossEntropyScales& scales) {
  const at::Tensor sums = at::zeros({reconstruction_sum_count}, rows.nll.options().dtype(at::kDouble));
  AT_DISPATCH_FLOATING_TYPES(rows.nll.scalar_type(), "reconstruction_sums", [&] {
    const auto* likelihood_loss = rows.likelihood_loss.data_ptr<scalar_t>();
    const auto* nll = rows.nll.data_ptr<scalar_t>();
    const auto* log_sum_exp = rows.log_sum_exp.data_ptr<scalar_t>();
    const int64_t count = terms.targets.numel();
    const PositionWeight<scalar_t> u(terms);
    double* sum = sums.data_ptr<double>();
    sum[likelihood_loss_sum] =
        pairwise_sum(0, count, [&](int64_t row) { return u(row) * double{likelihood_loss[row]}; });
    sum[likelihood_weight_sum] = scales.likelihood_weight_sum;
    sum[token_weight_sum] = scales.token_weight_sum;
    sum[nll_sum] = pairwise_sum(0, count, [&](int64_t row) { return u(row) * double{nll[row]}; });
    if (terms.z_loss > 0) {
      sum[z_loss_sum] = terms.z_loss * pairwise_sum(0, count, [&](int64_t row) {
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

}  // namespace free_transformer::detail::kernels
