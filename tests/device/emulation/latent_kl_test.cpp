/// The device kernels of the free-bits KL, emulated: every hinge and type, for numbers of bits around the lanes of a
/// warp, against the equation; and the KL of single logits over all of float32.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../../reference/references.hpp"
#include "numbers.hpp"

namespace emulation {
namespace {

using kernels::Hinge;

Findings findings;

/// KL(Bernoulli(sigmoid(l)) || Bernoulli(1/2)): log 2 less the entropy, and its series where that cancels.
Real bernoulli_kl(Real logit) {
  const Real x = std::fabs(logit), s = std::exp(-x), square = x * x;
  if (x < 1e-3L) return square / 8 - square * square / 64 + square * square * square / 576;
  return std::log(2.0L) - (std::isinf(x) ? 0 : x * s / (1 + s)) - std::log1p(s);
}

Real derivative(Real logit) {
  const Real s = std::exp(-std::fabs(logit));
  return std::isinf(logit) ? 0 : logit * s / ((1 + s) * (1 + s));
}

struct Input {
  std::string name;
  size_t rows = 1;
  std::vector<float> logits;
  double free_bits = 0;
  std::vector<double> token_weight, upstream;
  device::Divisor divisor{device::Divisor::weight_sum, 0, nullptr};
  size_t offset = 0, gap = 0, rows_of_group = 0;
};

struct Output {
  Memory gradient;
  std::vector<float> penalty;
  std::vector<double> sums, totals;
  float loss = 0;

  bool operator==(const Output& other) const {
    return gradient == other.gradient && std::memcmp(penalty.data(), other.penalty.data(), penalty.size() * 4) == 0 &&
           std::memcmp(sums.data(), other.sums.data(), sums.size() * 8) == 0 &&
           std::memcmp(totals.data(), other.totals.data(), 16) == 0;
  }
};

size_t offset_of(const device::RowLayout& layout, size_t row) {
  const auto of_group = static_cast<size_t>(layout.rows_of_group);
  return row / of_group * static_cast<size_t>(layout.group_stride) +
         row % of_group * static_cast<size_t>(layout.row_stride);
}

/// As `launch_latent_kl` does it: for the batch's hinge the sums first, then what they decide.
Output run(const Input& input, const LatentKernel& kernel, Order order) {
  const auto bits = static_cast<size_t>(kernel.bits);
  const auto stride = int64_t(bits + input.gap),
             of_group = int64_t(input.rows_of_group ? input.rows_of_group : input.rows);
  const device::RowLayout layout{of_group, of_group * stride + 5, stride};
  Memory z(kernel.element, offset_of(layout, input.rows - 1) + bits, input.offset);
  for (size_t row = 0; row < input.rows; ++row) {
    for (size_t bit = 0; bit < bits; ++bit) z.write(offset_of(layout, row) + bit, input.logits[row * bits + bit]);
  }
  Output out{{kernel.element, input.rows * bits, 1},
             std::vector<float>(input.rows),
             std::vector<double>(3 + bits),
             std::vector<double>(2)};
  std::vector<double> partial(size_t(device::partial_sums_of_positions(int64_t(input.rows), int64_t(bits))));
  unsigned ticket = 0;
  device::LatentJob job{};
  job.z_logits = z.data();
  job.z_rows = layout;
  job.rows = int64_t(input.rows);
  job.free_bits = input.free_bits;
  job.token_weight = input.token_weight.empty() ? nullptr : input.token_weight.data();
  job.upstream = input.upstream.empty() ? nullptr : input.upstream.data();
  job.upstream_stride = input.upstream.size() > 1;
  job.divisor = input.divisor;
  job.sums = out.sums.data();
  job.totals = out.totals.data();
  job.loss = &out.loss;
  job.ticket = &ticket;
  job.partial = partial.data();
  const device::Grid grid = device::grid_of_positions(job.rows, int64_t(bits)), batch = device::grid_of_batch(job.rows);
  if (kernel.hinge == Hinge::batch_mean) {
    block.launch(grid.blocks, grid.threads, order, [&] { kernel.positions(job); });
    job.sums = nullptr;
    job.mean_kl = job.totals + 1;
  } else {
    block.launch(batch.blocks, batch.threads, order, [&] { kernel.scale(job); });
  }
  job.scale = job.totals;
  job.gradient = out.gradient.data();
  job.penalty = out.penalty.data();
  block.launch(grid.blocks, grid.threads, order, [&] { kernel.positions(job); });
  findings.expect(ticket == 0, input.name, "the ticket is left as", ticket);
  return out;
}

struct Position {
  Real kl = 0, kl_tolerance = 0, excess = 0;
  std::vector<Real> bit_kl;
};

Position position_of(const float* logits, size_t bits, const LatentKernel& kernel, double free_bits) {
  Position of;
  for (size_t bit = 0; bit < bits; ++bit) {
    const Real kl = bernoulli_kl(logits[bit]), above = kl - free_bits;
    of.bit_kl.push_back(kl);
    of.kl += kl;
    if (kernel.hinge == Hinge::per_bit) of.excess += above < 0 ? 0 : above;
  }
  of.kl_tolerance = of.kl * epsilon * (8 + static_cast<Real>(std::min<size_t>(bits, 40)));
  if (kernel.hinge != Hinge::per_bit) of.excess = of.kl - free_bits;
  return of;
}

void check(const Input& given, const LatentKernel& kernel) {
  const auto bits = static_cast<size_t>(kernel.bits);
  Input input = given;
  for (float& x : input.logits) {
    if (kernel.element != device::Element::float32) x = widened(narrowed(x, kernel.element), kernel.element);
  }
  const Output out = run(input, kernel, Order::ascending);
  findings.expect(out == run(input, kernel, Order::descending), input.name, "the order of threads has a say");
  findings.expect(out.gradient.is_guarded(), input.name, "written beside the gradient");

  std::vector<Position> positions;
  std::vector<Real> sums(3 + bits);
  const auto weight_of = [&](size_t row) {
    return input.token_weight.empty() ? Real(1) : Real(input.token_weight[row]);
  };
  Real kl_sum = 0, tolerance = 0;
  for (size_t row = 0; row < input.rows; ++row) {
    positions.push_back(position_of(input.logits.data() + row * bits, bits, kernel, input.free_bits));
    const Position& of = positions.back();
    const Real u = weight_of(row);
    sums[1] += u;
    if (u == 0) continue;
    if (of.excess > 0) sums[2] += u;
    for (size_t bit = 0; bit < bits; ++bit) sums[3 + bit] += u * of.bit_kl[bit];
    kl_sum += u * of.kl;
    tolerance += u * (of.kl_tolerance + epsilon * std::fabs(of.excess));
  }
  const bool is_closed = kernel.hinge == Hinge::batch_mean && kl_sum / sums[1] < input.free_bits;
  const Real number =
      input.divisor.kind == device::Divisor::given_tensor ? *input.divisor.tensor : input.divisor.number;
  Real scale = 1;
  if (input.divisor.kind == device::Divisor::weight_sum) scale = sums[1] == 0 ? 0 : 1 / sums[1];
  if (input.divisor.kind >= device::Divisor::given_number)
    scale = sums[1] == 0 ? 0 : 1 / number;  // a mean of nothing is 0
  for (size_t row = 0; row < input.rows; ++row) {
    const Position& of = positions[row];
    const Real u = weight_of(row);
    const bool passes = kernel.hinge == Hinge::batch_mean ? !is_closed : !(of.excess < 0);
    const Real penalty = u == 0 || !passes ? 0 : u * of.excess;
    if (u != 0) sums[0] += penalty;
    const std::string name = input.name + ", row " + std::to_string(row);
    findings.expect_near(out.penalty[row], penalty,
                         u == 0 ? 0 : u * of.kl_tolerance + 3 * epsilon * std::fabs(penalty) + 0x1p-149L, name,
                         "penalty");
    Real factor = scale;
    if (!input.upstream.empty()) factor *= input.upstream[input.upstream.size() > 1 ? row : 0];
    for (size_t bit = 0; bit < bits; ++bit) {
      const float logit = input.logits[row * bits + bit];
      const bool of_bit = kernel.hinge == Hinge::per_bit ? !(of.bit_kl[bit] < input.free_bits) : passes;
      const Real wanted = u == 0 || !of_bit ? 0 : u * factor * derivative(logit);
      const Real size = std::fabs(wanted);
      findings.expect_near(
          out.gradient.read(row * bits + bit), wanted,
          wanted == 0 ? 0 : 10 * epsilon * size + std::fabs(u * factor) * 0x1p-149L + rounding_of(size, kernel.element),
          name, "gradient", bit);
    }
  }
  for (size_t k = 0; k < sums.size(); ++k) {
    Real allowed = 1e-13L * std::fabs(sums[k]);
    if (k == 0) allowed = tolerance + epsilon * std::fabs(sums[0]);
    if (k == 1 || k == 2) allowed = epsilon * std::fabs(sums[k]);
    if (k > 2) allowed = 4 * epsilon * sums[k];
    findings.expect_near(out.sums[k], sums[k], allowed, input.name, "sum", k);
  }
  findings.expect_near(out.totals[0], scale, 2 * epsilon * std::fabs(scale), input.name, "scale");
  findings.expect_near(out.totals[1], kl_sum / sums[1], 2 * tolerance / sums[1], input.name, "mean KL");
  findings.expect_near(out.loss, sums[0] * scale, scale * tolerance + 3 * epsilon * std::fabs(sums[0] * scale),
                       input.name, "loss");
}

std::mt19937 generator(11);

/// Logits of all sizes, and what must not be looked at where a position has no weight.
Input input_of(const LatentKernel& kernel, size_t rows, size_t turn) {
  Input input;
  input.rows = rows;
  const auto bits = static_cast<size_t>(kernel.bits);
  for (size_t index = 0; index < rows * bits; ++index) {
    const float deviation = std::pow(10.0f, static_cast<float>(generator() % 4) - 2.0f);
    input.logits.push_back(std::normal_distribution<float>(0, deviation)(generator));
    if (generator() % 97 == 0) input.logits.back() = generator() % 2 ? infinite : -infinite;
  }
  if (turn % 2) {
    for (size_t row = 0; row < rows; ++row) {
      input.token_weight.push_back(0.125 * static_cast<double>(generator() % 9));
      if (input.token_weight[row] == 0) input.logits[row * bits] = quiet_nan;
    }
  }
  const Real mean = 0.2L;  // near that of such logits: some positions and bits lie above and some below
  input.free_bits =
      double(kernel.hinge == Hinge::per_bit ? mean : mean * static_cast<Real>(bits) * (turn % 4 < 2 ? 1.0L : 0.5L));
  if (turn % 7 == 6) input.free_bits = 0;
  if (turn % 5 == 3) {
    for (size_t row = 0; row < rows; ++row) input.upstream.push_back(std::normal_distribution<double>()(generator));
  }
  if (turn % 5 == 4) input.upstream = {1024.0};
  static const double device_number = 12.5;
  if (turn % 6 == 1) input.divisor = {device::Divisor::one, 0, nullptr};
  if (turn % 6 == 2) input.divisor = {device::Divisor::given_number, 7.0, nullptr};
  if (turn % 6 == 3) input.divisor = {device::Divisor::given_tensor, 0, &device_number};
  input.offset = turn % 9;
  input.gap = turn % 3 == 0 ? 0 : turn % 11;
  input.rows_of_group = turn % 4 == 1 ? 3 : 0;
  input.name = "element " + std::to_string(int(kernel.element)) + " bits " + std::to_string(bits) + " hinge " +
               std::to_string(int(kernel.hinge)) + ", rows " + std::to_string(rows) + ", turn " + std::to_string(turn);
  return input;
}

void check_sizes(const std::vector<LatentKernel>& kernels) {
  size_t turn = 0;
  for (const LatentKernel& kernel : kernels) {
    for (size_t rows : {1, 2, 7, 8, 9, 33, 150}) check(input_of(kernel, rows, turn++), kernel);
    if (kernel.bits <= 16) check(input_of(kernel, 5000 / size_t(kernel.bits), turn++), kernel);
    Input input = input_of(kernel, 5, 1);  // nothing counts
    input.token_weight.assign(5, 0.0);
    input.divisor = {device::Divisor::one, 0, nullptr};
    check(input, kernel);
  }
}

/// A NaN that counts is seen in the loss, in its position and in its gradient.
void check_nan(const std::vector<LatentKernel>& kernels) {
  for (const LatentKernel& kernel : kernels) {
    Input input = input_of(kernel, 4, 0);
    for (float& x : input.logits) x = 0.5f;
    const auto bits = size_t(kernel.bits);
    input.logits[2 * bits + bits / 2] = quiet_nan;
    input.upstream.clear();
    const Output out = run(input, kernel, Order::ascending);
    findings.expect(std::isnan(out.loss), input.name, "loss of a NaN", out.loss);
    findings.expect(std::isnan(out.penalty[2]), input.name, "penalty of a NaN", out.penalty[2]);
    findings.expect(std::isnan(out.gradient.read(2 * bits + bits / 2)), input.name, "gradient of a NaN");
  }
}

/// The widest errors over float32, in units of the last digit.
void check_every_size_of_logit(const std::vector<LatentKernel>& kernels) {
  for (const LatentKernel& kernel : kernels) {
    if (kernel.bits != 1 || kernel.hinge != Hinge::per_position || kernel.element != device::Element::float32) continue;
    Input input;
    for (uint32_t bits = 1; bits < 0x7f800000; bits += 10007) {
      input.logits.push_back(__uint_as_float(bits));
      if (input.logits.size() % 2) input.logits.back() *= -1;
    }
    for (int step = 0; step < 200000; ++step) {  // from 1.5 to 5, around the polynomials' ends
      input.logits.push_back(1.5f + 1.75e-5f * static_cast<float>(step));
    }
    input.rows = input.logits.size();
    input.divisor = {device::Divisor::one, 0, nullptr};
    const Output out = run(input, kernel, Order::ascending);
    Real worst[2] = {0, 0};
    for (size_t row = 0; row < input.rows; ++row) {
      const Real wanted[2] = {bernoulli_kl(input.logits[row]), derivative(input.logits[row])};
      const float got[2] = {out.penalty[row], out.gradient.read(row)};
      for (size_t k = 0; k < 2; ++k) {
        const float near = std::fabs(static_cast<float>(wanted[k]));
        const Real digit = std::max(Real(std::nextafter(near, infinite)) - near, 0x1p-149L);
        worst[k] = std::max(worst[k], std::fabs(got[k] - wanted[k]) / digit);
      }
    }
    std::printf("KL within %.2Lf ulp, its derivative within %.2Lf\n", worst[0], worst[1]);
    findings.expect(worst[0] <= 2 && worst[1] <= 4, "single logits", "errors in ulp", worst[0], worst[1]);
  }
}

/// The values that an independent script computed in 50 digits.
void check_references(const std::vector<LatentKernel>& kernels) {
  for (const LatentKernel& kernel : kernels) {
    for (const auto& of : reference::latent_cases) {
      const bool fits = kernel.element == device::Element::float32 ? of.exact != reference::Exact::in_float64
                                                                   : of.exact == reference::Exact::in_half;
      if (!fits || of.latent_dim != kernel.bits) continue;
      Input input;
      input.logits.assign(of.z_logits.begin(), of.z_logits.end());
      input.rows = of.z_logits.size() / size_t(of.latent_dim);
      input.free_bits = of.free_bits;
      input.name = of.name;
      const auto& wanted = kernel.hinge == Hinge::per_position ? of.per_position
                           : kernel.hinge == Hinge::per_bit    ? of.per_bit
                                                               : of.batch_mean;
      const Output out = run(input, kernel, Order::ascending);
      const Real units = 16 * epsilon;
      findings.expect_near(out.loss, wanted.mean, units * (std::fabs(wanted.mean) + of.free_bits), of.name, "mean");
      for (size_t row = 0; row < input.rows; ++row) {
        findings.expect_near(out.penalty[row], wanted.penalties[row],
                             units * (std::fabs(wanted.penalties[row]) + of.free_bits), of.name, "penalty", row);
      }
      for (size_t index = 0; index < wanted.gradient.size(); ++index) {
        const Real size = std::fabs(wanted.gradient[index]);
        findings.expect_near(out.gradient.read(index), wanted.gradient[index],
                             units * size + rounding_of(size, kernel.element), of.name, "gradient", index);
      }
    }
  }
}

}  // namespace
}  // namespace emulation

int main() {
  using namespace emulation;
  const std::vector<LatentKernel> kernels = all_latent_kernels();
  check_sizes(kernels);
  check_nan(kernels);
  check_every_size_of_logit(kernels);
  check_references(kernels);
  return findings.report("latent KL, emulated");
}
