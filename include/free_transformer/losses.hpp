/// Everything that needs LibTorch alone.
#pragma once

#include "free_transformer/device_kernels.hpp"
#include "free_transformer/evidence_bound.hpp"
#include "free_transformer/free_transformer_loss.hpp"
#include "free_transformer/kl_divergence.hpp"
#include "free_transformer/latent_code.hpp"
#include "free_transformer/linear_logits.hpp"
#include "free_transformer/loss_metrics.hpp"
#include "free_transformer/reconstruction_loss.hpp"
#include "free_transformer/reduction.hpp"
#include "free_transformer/schedules.hpp"
#include "free_transformer/token_statistics.hpp"
#include "free_transformer/vae_loss.hpp"
#include "free_transformer/version.hpp"
