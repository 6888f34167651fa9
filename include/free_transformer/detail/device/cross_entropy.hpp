/// Cross entropy of float32, float16 and bfloat16 logits on a device by kernels that are compiled at run time, from
/// tensors to tensors. No value comes to the host and nothing waits.
///
/// With gradient and sums it is four launches: a workspace is zeroed, the scales follow from targets and weights, each
/// row is read, and the sums are taken. Each function returns why it could not launch, or an empty string.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/launch.hpp"
#include "free_transformer/detail/device/tensor_arguments.hpp"
#include "free_transformer/detail/normalization.hpp"
#include "free_transformer/detail/settings.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

/// True for logits and settings of the kind that the kernels read; whether the device has kernels is another question.
inline bool can_read(const at::Tensor& logits, const CrossEntropySettings& settings) {
  return element_of(logits.scalar_type()) && !settings.has_probabilities() && is_plain_memory(logits) &&
         logits.dim() > 0 && can_take_rows(settings.targets.numel(), logits.size(-1)) && row_layout_of(logits);
}

/// What all rows of a cross entropy share between its parts, on the logits' device.
struct CrossEntropyBatch {
  at::Tensor workspace, divisor;
  at::Tensor scales;  ///< [4] float64: of the likelihood, of the z-loss, then the sums of u w_y and of u

  at::Tensor likelihood_scale() const { return scales.select(0, 0); }
  at::Tensor z_scale() const { return scales.select(0, 1); }
};

inline CrossEntropyBatchJob batch_job_of(const CrossEntropySettings& settings, int64_t classes,
                                         const CrossEntropyBatch& batch) {
  CrossEntropyBatchJob job{};
  job.targets = settings.targets.data_ptr<int64_t>();
  job.ignore_index = settings.ignore_index;
  job.token_weight = floats_of(settings.token_weight);
  job.class_weight = floats_of(settings.class_weight);
  job.rows = settings.targets.numel();
  job.columns = classes;
  job.z_loss = settings.z_loss;
  job.scales = batch.scales.data_ptr<double>();
  job.ticket = ticket_of(batch.workspace);
  job.partial = partial_of(batch.workspace);
  return job;
}

/// Two launches.
inline std::string launch_scales(const CrossEntropySettings& settings, int64_t classes,
                                 const Normalization& normalization, const Place& place, CrossEntropyBatch& batch,
                                 KernelCache& cache = kernel_cache()) {
  const auto options = settings.targets.options().dtype(at::kDouble);
  batch.workspace = workspace_of(options, partial_sums_of_batch(settings.targets.numel()));
  batch.divisor = divisor_on(settings.targets.device(), normalization);
  batch.scales = at::empty({4}, options);
  CrossEntropyBatchJob job = batch_job_of(settings, classes, batch);
  job.divisor = divisor_of(normalization, batch.divisor);
  return launch_cross_entropy_scales(job, place, cache);
}

/// What is written of each row, [N]; undefined is not wanted. All float32 but the int64 predictions.
struct CrossEntropyRowResults : CrossEntropyRows {
  at::Tensor loss;  ///< with all weights, z-loss too
};

/// nll, likelihood_loss and log_sum_exp, which the sums need.
inline CrossEntropyRowResults empty_rows(const at::Tensor& targets, bool wants_prediction) {
  const auto floats = targets.options().dtype(at::kFloat);
  CrossEntropyRowResults rows;
  for (at::Tensor* tensor : {&rows.nll, &rows.likelihood_loss, &rows.log_sum_exp})
    *tensor = at::empty({targets.numel()}, floats);
  if (wants_prediction) rows.prediction = at::empty({targets.numel()}, targets.options());
  return rows;
}

/// One launch. The scales are 0-dim float64, or undefined for 1; upstream is 0-dim or [N] float32, or undefined. The
/// gradient has the logits' shape and type and may be the logits; undefined, none is computed.
inline std::string launch_rows(const at::Tensor& logits, const CrossEntropySettings& settings,
                               const at::Tensor& likelihood_scale, const at::Tensor& z_scale,
                               const at::Tensor& gradient, const at::Tensor& upstream,
                               const CrossEntropyRowResults& rows, const Place& place,
                               KernelCache& cache = kernel_cache()) {
  CrossEntropyJob job{};
  job.logits = logits.data_ptr();
  job.logit_rows = *row_layout_of(logits);
  if (gradient.defined()) {
    const auto layout = row_layout_of(gradient);
    if (!layout) return "the gradient's rows do not lie in groups of equal strides";
    job.gradient = gradient.data_ptr();
    job.gradient_rows = *layout;
  }
  job.columns = logits.size(-1);
  job.targets = settings.targets.data_ptr<int64_t>();
  job.ignore_index = settings.ignore_index;
  job.token_weight = floats_of(settings.token_weight);
  job.class_weight = floats_of(settings.class_weight);
  job.likelihood_scale = doubles_of(likelihood_scale);
  job.z_scale = doubles_of(z_scale);
  job.upstream = floats_of(upstream);
  job.upstream_stride = stride_of_upstream(upstream);
  job.label_smoothing = settings.label_smoothing;
  job.z_loss = settings.z_loss;
  job.softcap = settings.softcap;
  const auto written = [](const at::Tensor& tensor) { return tensor.defined() ? tensor.data_ptr<float>() : nullptr; };
  job.loss = written(rows.loss);
  job.nll = written(rows.nll);
  job.likelihood_loss = written(rows.likelihood_loss);
  job.log_sum_exp = written(rows.log_sum_exp);
  job.entropy = written(rows.entropy);
  job.prediction = rows.prediction.defined() ? rows.prediction.data_ptr<int64_t>() : nullptr;
  return launch_cross_entropy_rows(job, *element_of(logits.scalar_type()), settings.targets.numel(), place, cache);
}

/// One launch: `sums` [6] float64 (see `ReconstructionSum`) and the reduced loss, 0-dim float32, of rows that
/// `launch_rows` has written. Without predictions no hits are counted.
inline std::string launch_sums(const CrossEntropySettings& settings, int64_t classes, const CrossEntropyBatch& batch,
                               const CrossEntropyRowResults& rows, const Place& place, at::Tensor& sums,
                               at::Tensor& loss, KernelCache& cache = kernel_cache()) {
  sums = at::empty({reconstruction_sum_count}, batch.scales.options());
  loss = at::empty({}, batch.scales.options().dtype(at::kFloat));
  CrossEntropyBatchJob job = batch_job_of(settings, classes, batch);
  job.nll = rows.nll.data_ptr<float>();
  job.likelihood_loss = rows.likelihood_loss.data_ptr<float>();
  job.log_sum_exp = rows.log_sum_exp.data_ptr<float>();
  job.prediction = rows.prediction.defined() ? rows.prediction.data_ptr<int64_t>() : nullptr;
  job.sums = sums.data_ptr<double>();
  job.loss = loss.data_ptr<float>();
  return launch_cross_entropy_sums(job, place, cache);
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
