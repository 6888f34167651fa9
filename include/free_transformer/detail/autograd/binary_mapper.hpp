/// The binary mapper as a node of the graph: forward looks rows up, backward also tells the logits of the code's bits what
/// every other row would have done.
///
/// Saved for backward: z_logits, the codes, the codebook.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>

#include "free_transformer/detail/arithmetic.hpp"
#include "free_transformer/detail/autograd/graph_node.hpp"
#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/kernels/vector/large_pages.hpp"
#include "free_transformer/detail/plain/code_expectation.hpp"
#include "free_transformer/detail/plain/row_blocks.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Rows [N, D] added up by code in the widest type: [code_count, D], in their type. In the order of their codes they are
/// walked through in blocks, the sum of a block's last code goes on in the next: each row of the result is rounded once,
/// and no wide tensor is larger than a block.
inline at::Tensor rows_summed_by_code(const at::Tensor& rows, const at::Tensor& codes, int64_t code_count) {
  at::Tensor result = kernels::empty_on_large_pages({code_count, rows.size(1)}, rows.options()).zero_();
  const int64_t count = codes.numel(), rows_of_block = std::max<int64_t>(
                                           1, block_elements(rows.device()) / std::max<int64_t>(1, rows.size(1)));
  if (count == 0) return result;
  const auto [sorted, order] = codes.sort();
  const auto wide = widest_type(rows.device());
  at::Tensor open_code = sorted.narrow(0, 0, 1), open_sum = at::zeros({1, rows.size(1)}, rows.options().dtype(wide));
  for (int64_t first = 0; first < count; first += rows_of_block) {
    const int64_t size = std::min(rows_of_block, count - first);
    const at::Tensor block = rows.index_select(0, order.narrow(0, first, size)).to(wide);
    const at::Tensor code = at::cat({open_code, sorted.narrow(0, first, size)});
    const at::Tensor group = at::cat({at::zeros({1}, code.options()), code.diff() != 0}).cumsum(0);
    const at::Tensor sums = at::zeros({size + 1, rows.size(1)}, block.options());
    sums.index_add_(0, group, at::cat({open_sum, block}));
    const at::Tensor last = group.narrow(0, size, 1);
    open_code = code.narrow(0, size, 1);
    open_sum = sums.index_select(0, last);
    sums.index_fill_(0, last, 0);
    // Groups that do not exist have sum 0, and are added to code 0.
    const at::Tensor code_of_group = at::zeros_like(code).index_put_({group}, code);
    result.index_add_(0, code_of_group, sums.to(rows.scalar_type()));
  }
  return result.index_add_(0, open_code, open_sum.to(rows.scalar_type()));
}

struct BinaryMapper final : GraphOperation {
  Tensors node_forward(GraphNode& node, const Tensors& inputs) override {
    node.save_for_backward(inputs);
    const at::Tensor &codes = inputs[1], &codebook = inputs[2];
    auto shape = codes.sizes().vec();
    shape.push_back(codebook.size(1));
    if (codebook.is_meta()) return {at::empty(shape, codebook.options())};  // LibTorch 1.13 has no index_select there
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
