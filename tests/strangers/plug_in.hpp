/// What a plug-in offers: the loss of one batch, with its graph. All else in it is hidden.
#pragma once

#include <ATen/ATen.h>

#include <string>

struct PlugInLoss {
  at::Tensor loss;
  double elbo = 0;
};

using ComputeLoss = void (*)(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& z_logits,
                             bool inplace, PlugInLoss& result);
