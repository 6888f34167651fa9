/// Logits whose columns are split among the ranks of a test, and random problems that all ranks make alike.
#pragma once

#include <cstdint>
#include <random>
#include <vector>

#include "../unit/numeric.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"

namespace ranks {

using namespace free_transformer;
using numeric::not_a_number;
using torch::Tensor;

/// Float64 against all columns at once. The rows' sums are scaled by exp(m - c) with |m - c| <= 1250, whose argument is
/// rounded by 2^-43 = 1.1e-13 at most, and so are the logarithms that come of them. A coefficient of the gradient (at
/// most 43, see linear_logits_test.cpp) moves by a few times that, as does a loss to which up to 50 rows of weight 2
/// add.
inline constexpr double relative = 2e-12;

/// The columns of this rank, by the contract's own formula.
struct Columns {
  int64_t begin, end;
  explicit Columns(int64_t padded_size)
      : begin(padded_size * rank() / size()), end(padded_size * (rank() + 1) / size()) {}

  /// Of all columns [..., P]; dim is the one that is split.
  Tensor of(const Tensor& all, int64_t dim = -1) const {
    return all.defined() ? all.narrow(dim, begin, end - begin) : all;
  }
};

/// With columns that no class has behind those that one has.
inline Tensor padded(const Tensor& all, int64_t padded_size, double value, int64_t dim = -1) {
  if (!all.defined()) return all;
  auto shape = all.sizes().vec();
  shape[static_cast<size_t>(dim < 0 ? dim + all.dim() : dim)] = padded_size - all.size(dim);
  return torch::cat({all, torch::full(shape, value, all.options())}, dim);
}

/// A random problem, the same on all ranks: its shape, options and upstream gradient follow from the seed.
struct Problem {
  std::vector<int64_t> positions;
  int64_t classes = 0, padded_size = 0;
  Tensor logits, targets, upstream;
  ReconstructionLossOptions options;

  explicit Problem(uint64_t seed) : engine(seed) {
    torch::manual_seed(seed);
    positions.resize(static_cast<size_t>(below(4)));
    for (auto& size : positions) size = 1 + below(positions.size() == 1 ? 50 : positions.size() == 2 ? 7 : 3);
    if (!positions.empty() && below(12) == 0) positions[0] = 0;
    classes = 1 + below(maybe() ? 8 : 70);
    padded_size = classes + (maybe() ? below(9) : 0);
    auto shape = positions;
    shape.push_back(classes);
    logits = torch::randn(shape, torch::kDouble) * (maybe() ? 1 : 8);
    if (maybe()) logits = logits + torch::randn(positions, torch::kDouble).unsqueeze(-1) * 40;  // an offset of each row
    targets = torch::randint(classes, positions, torch::kLong);
    if (maybe()) {
      options.ignore_index(maybe() ? -100 : below(classes));
      targets.masked_fill_(torch::rand(positions) < 0.3, options.ignore_index());
    }
    if (maybe()) options.token_weight(torch::randint(3, positions, torch::kDouble));
    if (maybe()) options.weight(torch::randint(3, {classes}, torch::kDouble));
    if (maybe()) options.label_smoothing(0.125);
    if (maybe()) options.z_loss(0.1);
    if (maybe()) options.softcap(1.5);
    if (maybe()) options.normalizer(maybe() ? Normalizer(7.0) : Normalizer(torch::tensor(7.0)));
    if (maybe()) options.accuracy(true);
    const int64_t kind = below(3);
    options.reduction(kind == 0   ? Reduction(torch::kMean)
                      : kind == 1 ? Reduction(torch::kSum)
                                  : Reduction(torch::kNone));
    if (kind == 2 || maybe()) {
      upstream = torch::rand(kind == 2 ? positions : std::vector<int64_t>{}, torch::kDouble) * 4 - 2;
    }
  }

  ReconstructionLossOptions shard_options() const {
    auto of_shard = options;
    return of_shard.weight(Columns(padded_size).of(padded(options.weight(), padded_size, 1)));
  }

  /// What is under the padding must not matter.
  Tensor shard() const { return Columns(padded_size).of(padded(logits, padded_size, not_a_number)); }

  int64_t below(int64_t bound) { return static_cast<int64_t>(engine() % static_cast<uint64_t>(bound)); }
  bool maybe() { return below(2) == 0; }

  std::mt19937_64 engine;
};

inline double largest_of(const Tensor& values) { return values.numel() == 0 ? 0 : values.abs().max().item<double>(); }

}  // namespace ranks
