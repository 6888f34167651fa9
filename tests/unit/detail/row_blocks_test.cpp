#include "free_transformer/detail/plain/row_blocks.hpp"

#include "../numeric.hpp"

namespace {

using namespace numeric;
namespace rows = free_transformer::detail;

/// The rows in the order in which they are visited, and the index that each block was given.
Tensor visited(const Tensor& tensor) {
  std::vector<Tensor> blocks;
  int64_t next = 0;
  rows::for_each_row_block(tensor, 0, [&](const Tensor& block, int64_t first) {
    CHECK(block.dim() == 2);
    CHECK(first == next);
    next += block.size(0);
    blocks.push_back(block);
  });
  return blocks.empty() ? tensor.reshape({0, tensor.size(-1)}) : torch::cat(blocks);
}

}  // namespace

TEST_CASE("Blocks are all rows of a tensor, in order, whatever its layout", "[row_blocks]") {
  const Tensor base = torch::arange(2 * 3 * 4 * 5, torch::kDouble).reshape({2, 3, 4, 5});
  for (const std::vector<int64_t>& order :
       {std::vector<int64_t>{0, 1, 2, 3}, {1, 0, 2, 3}, {2, 1, 0, 3}, {3, 2, 1, 0}, {0, 3, 1, 2}}) {
    const Tensor permuted = base.permute(order);
    for (const Tensor& tensor : {permuted, permuted.slice(1, 1), permuted.slice(2, 0, 1), permuted.slice(0, 0, 1),
                                 permuted.select(0, 1), permuted.select(1, 0).select(0, 0), permuted.slice(0, 0, 0),
                                 permuted.select(0, 0).unsqueeze(0).expand({3, -1, -1, -1})}) {
      INFO(tensor.sizes() << ", strides " << tensor.strides());
      CHECK(same_bits(visited(tensor), tensor.reshape({-1, tensor.size(-1)})));
    }
  }
}

TEST_CASE("A block of the CPU holds 2^18 elements, and one row at least", "[row_blocks]") {
  for (const auto& [shape, expected] : std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>{
           {{1000, 1000}, {262, 262, 262, 214}}, {{3, 300000}, {1, 1, 1}}, {{262145, 1}, {262144, 1}}}) {
    std::vector<int64_t> sizes;
    rows::for_each_row_block(torch::empty(shape), 0,
                             [&](const Tensor& block, int64_t) { sizes.push_back(block.size(0)); });
    CHECK(sizes == expected);
  }
}

TEST_CASE("Rows that can be viewed as a matrix are not walked one by one", "[row_blocks]") {
  const Tensor base = torch::empty({64, 9, 16});
  for (const Tensor& tensor : {base, base.slice(1, 0, 1), base.transpose(0, 1).slice(0, 0, 1)}) {
    int64_t blocks = 0;
    rows::for_each_row_block(tensor, 0, [&](const Tensor&, int64_t) { ++blocks; });
    INFO(tensor.sizes() << ", strides " << tensor.strides());
    CHECK(blocks == 1);
  }
}

TEST_CASE("Ordered sums are right at every length, and the same for any number of threads", "[row_blocks][threads]") {
  for (const int64_t length : {0, 1, 2, 1023, 1024, 1025, 4097, 1048576, 1048577}) {
    const Tensor counts = torch::arange(2 * length, torch::kDouble).reshape({2, length});
    INFO(length);
    const auto size = static_cast<double>(length);  // every partial sum is an integer below 2^53
    CHECK(values(rows::ordered_sum(counts, torch::kDouble)) ==
          std::vector<double>{size * (size - 1) / 2, size * (3 * size - 1) / 2});
  }
  torch::manual_seed(1);
  const Tensor noise = torch::randn({300001});
  const auto sums = [&] {
    return torch::stack({rows::ordered_sum(noise, torch::kFloat), rows::sum_of_rows(noise.unsqueeze(0))[0],
                         rows::sum_of_rows(noise.narrow(0, 0, 300000).view({3, 100000})).sum()});
  };
  CHECK(same_bits(with_threads(1, sums), with_threads(2, sums)));
}
