/// The binary mapper as a node of the graph: forward looks rows up, backward also tells the logits of the code's bits what
/// every other row would have done.
///
/// Saved for backward: z_logits, the codes, the codebook.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/graph_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/plain/code_expectation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Rows [N, D] added up by code: [code_count, D], in their type. Rows of a half type are summed in float32 first, in as many
/// sums as there are rows: a codebook in float32 could be far larger.
inline at::Tensor rows_summed_by_code(const at::Tensor& rows, const at::Tensor& codes, int64_t code_count) {
  const at::Tensor result = kernels::empty_on_large_pages({code_count, rows.size(1)}, rows.options()).zero_();
  const auto type = arithmetic_type(rows.scalar_type());
  if (type == rows.scalar_type() || codes.numel() == 0) return result.index_add_(0, codes, rows);
  const auto [sorted, order] = codes.sort();
  const at::Tensor is_first = at::cat({at::zeros({1}, codes.options()), (sorted.diff() != 0).to(at::kLong)});
  const at::Tensor group = is_first.cumsum(0);
  const at::Tensor sums = at::zeros(rows.sizes(), rows.options().dtype(type));
  sums.index_add_(0, group, rows.index_select(0, order).to(type));
  // Groups that do not exist have sum 0, and are added to code 0.
  const at::Tensor code_of_group = at::zeros_like(codes).index_put_({group}, sorted);
  return result.index_add_(0, code_of_group, sums.to(rows.scalar_type()));
}

struct BinaryMapper final : GraphOperation {
  Tensors node_forward(GraphNode& node, const Tensors& inputs) override {
    node.save_for_backward(inputs);
    const at::Tensor &codes = inputs[1], &codebook = inputs[2];
    auto shape = codes.sizes().vec();
    shape.push_back(codebook.size(1));
    return {codebook.index_select(0, codes.reshape({-1})).view(shape)};
  }

  Tensors node_backward(GraphNode& node, const at::Tensor& upstream) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "map_latent_codes: must not be differentiated twice (create_graph): its gradient has no graph");
    const auto saved = node.saved_tensors();
    const at::Tensor &z_logits = saved[0], &codes = saved[1], &codebook = saved[2];
    Tensors gradients(3);
    const at::Tensor rows = upstream.reshape({-1, codebook.size(1)});
    if (z_logits.requires_grad()) {
      const at::Tensor flat = z_logits.detach().reshape({-1, z_logits.size(-1)});
      gradients[0] = plain::code_expectation_gradient(flat, codebook.detach(), rows).view(z_logits.sizes());
    }
    if (codebook.requires_grad()) gradients[2] = rows_summed_by_code(rows, codes.reshape({-1}), codebook.size(0));
    return gradients;
  }
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
