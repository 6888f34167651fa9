/// The device kernels of cross entropy, emulated: every combination of type and options, around every size of vector
/// and block, against the equation.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "../../reference/references.hpp"
#include "cross_entropy_reference.hpp"
#include "numbers.hpp"

namespace emulation {
namespace {

Findings findings;
long checked = 0;

struct Input {
  std::string name;
  size_t rows = 1, columns = 1;
  std::vector<std::vector<float>> logits;
  std::vector<int64_t> targets;
  int64_t ignore_index = -100;
  std::vector<float> token_weight, class_weight, upstream;
  double label_smoothing = 0, z_loss = 0, softcap = 0;
  device::Divisor divisor{device::Divisor::weight_sum, 0, nullptr};

  size_t offset = 0, gradient_offset = 0;  ///< of the first row from an address that 16 divides, in elements
  size_t gap = 0;                          ///< between rows of logits
  size_t rows_of_group = 0;                ///< with another gap between groups; 0: one group
  bool in_place = false, wants_gradient = true;
  unsigned threads = 0;  ///< of a block; 0: what the library takes
};

struct Output {
  Memory gradient, logits;
  std::vector<float> loss, nll, likelihood_loss, log_sum_exp, entropy;
  std::vector<int64_t> prediction;
  std::vector<double> scales, sums;
  float total = 0;

  bool operator==(const Output& other) const {
    const auto same = [](const auto& a, const auto& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
    };
    return gradient == other.gradient && logits == other.logits && same(loss, other.loss) && same(nll, other.nll) &&
           same(likelihood_loss, other.likelihood_loss) && same(log_sum_exp, other.log_sum_exp) &&
           same(entropy, other.entropy) && same(prediction, other.prediction) && same(scales, other.scales) &&
           same(sums, other.sums);
  }
};

size_t offset_of(const device::RowLayout& layout, size_t row) {
  const auto of_group = static_cast<size_t>(layout.rows_of_group);
  return row / of_group * static_cast<size_t>(layout.group_stride) +
         row % of_group * static_cast<size_t>(layout.row_stride);
}

device::RowLayout layout_of(const Input& input) {
  const auto stride = static_cast<int64_t>(input.columns + input.gap);
  const auto of_group = static_cast<int64_t>(input.rows_of_group ? input.rows_of_group : input.rows);
  return {of_group, of_group * stride + 3, stride};
}

/// Scales, rows and sums as the library launches them.
Output run(const Input& input, const RowsKernel& kernel, Order order) {
  const device::RowLayout layout = layout_of(input), contiguous = {int64_t(input.rows), 0, int64_t(input.columns)};
  const size_t extent = offset_of(layout, input.rows - 1) + input.columns, rows = input.rows;
  Output out{{kernel.element, input.rows * input.columns, input.gradient_offset},
             {kernel.element, extent, input.offset},
             std::vector<float>(rows, -1.0f),
             std::vector<float>(rows),
             std::vector<float>(rows),
             std::vector<float>(rows),
             std::vector<float>(rows),
             std::vector<int64_t>(rows),
             std::vector<double>(4),
             std::vector<double>(6)};
  for (size_t row = 0; row < rows; ++row) {
    for (size_t c = 0; c < input.columns; ++c) out.logits.write(offset_of(layout, row) + c, input.logits[row][c]);
  }
  const auto pointer = [](const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); };
  unsigned ticket = 0;
  std::vector<double> partial(static_cast<size_t>(device::partial_sums_of_batch(int64_t(rows))));
  device::CrossEntropyBatchJob batch{};
  batch.targets = input.targets.data();
  batch.ignore_index = input.ignore_index;
  batch.token_weight = pointer(input.token_weight);
  batch.class_weight = pointer(input.class_weight);
  batch.rows = int64_t(rows);
  batch.columns = int64_t(input.columns);
  batch.divisor = input.divisor;
  batch.z_loss = input.z_loss;
  batch.scales = out.scales.data();
  batch.ticket = &ticket;
  batch.partial = partial.data();
  device::Grid of_batch = device::grid_of_batch(int64_t(rows));
  if (rows < 64 && input.offset != 0) of_batch.threads = 64;  // the others would only cost time
  block.launch(of_batch.blocks, of_batch.threads, order, [&] { batch_kernels.scales(batch); });

  device::CrossEntropyJob job{};
  job.logits = out.logits.data();
  job.logit_rows = layout;
  if (input.wants_gradient) {
    job.gradient = input.in_place ? out.logits.data() : out.gradient.data();
    job.gradient_rows = input.in_place ? layout : contiguous;
  }
  job.columns = int64_t(input.columns);
  job.targets = batch.targets;
  job.ignore_index = batch.ignore_index;
  job.token_weight = batch.token_weight;
  job.class_weight = batch.class_weight;
  job.likelihood_scale = out.scales.data();
  job.z_scale = out.scales.data() + 1;
  job.upstream = pointer(input.upstream);
  job.upstream_stride = input.upstream.size() > 1;
  job.label_smoothing = input.label_smoothing;
  job.z_loss = input.z_loss;
  job.softcap = input.softcap;
  job.loss = out.loss.data();
  job.nll = out.nll.data();
  job.likelihood_loss = out.likelihood_loss.data();
  job.log_sum_exp = out.log_sum_exp.data();
  job.entropy = kernel.entropy ? out.entropy.data() : nullptr;
  job.prediction = out.prediction.data();
  const device::Grid grid = device::grid_of_rows(int64_t(rows), int64_t(input.columns), kernel.element);
  block.launch(grid.blocks, input.threads ? input.threads : grid.threads, order, [&] { kernel.run(job); });

  batch.nll = job.nll;
  batch.likelihood_loss = job.likelihood_loss;
  batch.log_sum_exp = job.log_sum_exp;
  batch.prediction = job.prediction;
  batch.sums = out.sums.data();
  batch.loss = &out.total;
  block.launch(of_batch.blocks, of_batch.threads, order, [&] { batch_kernels.sums(batch); });
  findings.expect(ticket == 0, input.name, "the ticket is left as", ticket);
  return out;
}

Real scale_of(const device::Divisor& divisor, Real weight_sum, Real counted) {
  if (divisor.kind == device::Divisor::one) return 1;
  if (divisor.kind == device::Divisor::weight_sum) return weight_sum == 0 ? 0 : 1 / weight_sum;
  const Real number = divisor.kind == device::Divisor::given_number ? divisor.number : *divisor.tensor;
  return number == 0 && counted == 0 ? 0 : 1 / number;
}

Real weight_of_row(const Input& input, size_t row) {
  if (input.targets[row] == input.ignore_index) return 0;
  return input.token_weight.empty() ? 1 : Real(input.token_weight[row]);
}

void compare_row(const Input& input, const RowsKernel& kernel, const Output& out, size_t row, const RowResult& wanted) {
  const std::string name = input.name + ", row " + std::to_string(row);
  const Real subnormal = 0x1p-149L;
  findings.expect_near(out.nll[row], wanted.nll, wanted.nll_tolerance + subnormal, name, "nll");
  findings.expect_near(out.loss[row], wanted.loss, wanted.loss_tolerance + subnormal, name, "loss");
  findings.expect_near(out.likelihood_loss[row], wanted.likelihood_loss, wanted.likelihood_tolerance + subnormal, name,
                       "likelihood loss");
  findings.expect_near(out.log_sum_exp[row], wanted.log_sum_exp, wanted.log_sum_tolerance + subnormal, name,
                       "log-sum-exp");
  if (kernel.entropy) {
    findings.expect_near(out.entropy[row], wanted.entropy, wanted.entropy_tolerance + subnormal, name, "entropy");
  }
  if (!std::isnan(wanted.nll) && wanted.prediction != out.prediction[row]) {  // a cap's rounding may decide a tie
    const float* logits = input.logits[row].data();
    const auto got = size_t(out.prediction[row]), lowest = size_t(wanted.prediction);
    const bool is_tie = input.softcap > 0 && got < input.columns &&
                        std::fabs(std::tanh(logits[got] / input.softcap) - std::tanh(logits[lowest] / input.softcap)) <
                            4 * double(epsilon);
    findings.expect(is_tie, name, "prediction", got, lowest);
  }
  if (!input.wants_gradient) return;
  const size_t first = input.in_place ? offset_of(layout_of(input), row) : row * input.columns;
  for (size_t c = 0; c < input.columns; ++c) {
    const float got = (input.in_place ? out.logits : out.gradient).read(first + c);
    if (kernel.element == device::Element::float16 && std::fabs(wanted.gradient[c]) > 60000) continue;
    const Real rounding =
        wanted.tolerance[c] == 0 ? 0 : rounding_of(std::fabs(wanted.gradient[c]) + wanted.tolerance[c], kernel.element);
    findings.expect_near(got, wanted.gradient[c], wanted.tolerance[c] + rounding, name, "gradient", c);
  }
}

/// One order of threads against the equation, and every other time against the other order.
void check(const Input& given, const RowsKernel& kernel) {
  Input input = given;
  for (auto& row : input.logits) {
    for (float& x : row) {
      if (kernel.element != device::Element::float32) x = widened(narrowed(x, kernel.element), kernel.element);
    }
  }
  const Output out = run(input, kernel, Order::ascending);
  if (++checked % 2) {
    findings.expect(out == run(input, kernel, Order::descending), input.name, "the order of threads has a say");
  }
  findings.expect(out.gradient.is_guarded() && out.logits.is_guarded(), input.name, "written beside the rows");

  Real likelihood_weight = 0, token_weight = 0;
  for (size_t row = 0; row < input.rows; ++row) {
    const Real weight = weight_of_row(input, row);
    const bool in_range = input.targets[row] >= 0 && input.targets[row] < int64_t(input.columns);
    if (weight == 0) continue;
    const bool has_class = in_range && !input.class_weight.empty();
    likelihood_weight +=
        (in_range ? weight : Real(quiet_nan)) * (has_class ? Real(input.class_weight[size_t(input.targets[row])]) : 1);
    token_weight += in_range ? weight : Real(quiet_nan);
  }
  RowSettings settings;
  settings.class_weight = input.class_weight;
  settings.label_smoothing = input.label_smoothing;
  settings.z_loss = input.z_loss;
  settings.softcap = input.softcap;
  settings.likelihood_scale = scale_of(input.divisor, likelihood_weight, token_weight);
  settings.z_scale = scale_of(input.divisor, token_weight, token_weight);
  Real sums[6] = {0, likelihood_weight, 0, token_weight, 0, 0}, tolerances[6] = {0, 0, 0, 0, 0, 0};
  for (size_t row = 0; row < input.rows; ++row) {
    settings.target = input.targets[row];
    settings.token_weight = weight_of_row(input, row);
    if (!input.upstream.empty()) settings.upstream = input.upstream[input.upstream.size() > 1 ? row : 0];
    const RowResult wanted = reference_row(input.logits[row], settings);
    compare_row(input, kernel, out, row, wanted);
    if (settings.token_weight == 0) continue;
    const Real u = settings.token_weight, lse = wanted.log_sum_exp;
    sums[0] += u * wanted.likelihood_loss;
    tolerances[0] += u * wanted.likelihood_tolerance;
    if (input.z_loss > 0) sums[2] += u * input.z_loss * lse * lse;
    if (input.z_loss > 0)
      tolerances[2] += u * input.z_loss * (2 * std::fabs(lse) * wanted.log_sum_tolerance + 4 * epsilon * lse * lse);
    sums[4] += u * wanted.nll;
    tolerances[4] += u * wanted.nll_tolerance;
    if (out.prediction[row] == settings.target) sums[5] += u;
  }
  for (size_t k = 0; k < 6; ++k) {
    if (k == 5 && std::isnan(sums[3] + sums[4])) continue;
    findings.expect_near(out.sums[k], sums[k], tolerances[k] + 1e-14L * std::fabs(sums[k]) + 0x1p-149L, input.name,
                         "sum", k);
  }
  const Real total = sums[0] * settings.likelihood_scale + sums[2] * settings.z_scale;
  const Real tolerance = tolerances[0] * settings.likelihood_scale + tolerances[2] * settings.z_scale;
  findings.expect_near(out.total, total, tolerance + 2 * epsilon * std::fabs(total) + 0x1p-149L, input.name, "total");
}

std::mt19937 generator(7);

float normal(float deviation) { return std::normal_distribution<float>(0, deviation)(generator); }

/// Rows as they come: flat, confident and right, confident and wrong, masked, far from 0, without weight, ignored.
void add_row(Input& input, size_t kind) {
  std::vector<float> row(input.columns);
  const size_t target = generator() % input.columns, other = generator() % input.columns;
  for (float& x : row) x = normal(3);
  if (kind == 1) row[target] += 40;
  if (kind == 2) row[other] += 30;
  if (kind == 3) {
    for (size_t c = 0; c < input.columns; ++c) row[c] = c != target && generator() % 2 ? -infinite : row[c];
  }
  if (kind == 4) {
    for (float& x : row) x += 500;
  }
  if (kind == 5) row[generator() % input.columns] = quiet_nan;
  input.logits.push_back(std::move(row));
  input.targets.push_back(kind == 6 ? input.ignore_index : int64_t(target));
  if (!input.token_weight.empty() && kind == 5) input.token_weight[input.rows] = 0;
  if (kind == 5 && input.token_weight.empty()) input.targets.back() = input.ignore_index;
  ++input.rows;
}

/// Options that a kernel was compiled for, and by turns those that it is told.
Input input_of(const RowsKernel& kernel, size_t columns, size_t rows, size_t turn) {
  Input input;
  input.rows = 0;
  input.columns = columns;
  if (turn % 2) input.token_weight.assign(rows, 1.0f);
  for (float& weight : input.token_weight) weight = 0.25f * static_cast<float>(1 + generator() % 8);
  for (size_t row = 0; row < rows; ++row) add_row(input, (row + turn) % 7);
  if (kernel.softcap) input.softcap = turn % 3 ? 30.0 : 5.0;
  if (kernel.smoothing) input.label_smoothing = turn % 2 ? 0.1 : 0.6;
  if (kernel.smoothing == 2 || (kernel.smoothing == 0 && turn % 3 == 0)) {
    for (size_t c = 0; c < columns; ++c) input.class_weight.push_back(0.5f * static_cast<float>(generator() % 4));
  }
  if (turn % 4 == 2) input.z_loss = 0.01;
  if (turn % 5 == 3) {
    for (size_t row = 0; row < rows; ++row) input.upstream.push_back(normal(2));
  }
  if (turn % 5 == 4) input.upstream = {3.0f};
  static const double device_number = 12.5;
  if (turn % 6 == 1) input.divisor = {device::Divisor::one, 0, nullptr};
  if (turn % 6 == 2) input.divisor = {device::Divisor::given_number, 7.0, nullptr};
  if (turn % 6 == 3) input.divisor = {device::Divisor::given_tensor, 0, &device_number};
  input.offset = turn % 9;
  input.gradient_offset = turn % 4 == 0 ? turn % 9 : turn % 5;
  input.gap = turn % 3 == 0 ? 0 : turn % 11;
  input.rows_of_group = turn % 7 == 5 ? 2 : 0;
  input.in_place = turn % 3 == 1;
  input.wants_gradient = turn % 8 != 7;
  input.name = "element " + std::to_string(int(kernel.element)) + " softcap " + std::to_string(kernel.softcap) +
               " smoothing " + std::to_string(kernel.smoothing) + " entropy " + std::to_string(kernel.entropy) +
               ", columns " + std::to_string(columns) + ", turn " + std::to_string(turn);
  return input;
}

void check_sizes(const std::vector<RowsKernel>& kernels) {
  const size_t every_columns[] = {1,    2,    3,    4,    5,    7,    8,    9,    15,   16,   17,   31,   32,   33,
                                  63,   64,   65,   127,  128,  129,  255,  256,  257,  260,  511,  512,  513,  1000,
                                  1023, 1024, 1025, 1031, 2047, 2048, 2049, 4095, 4096, 4097, 8191, 8193, 16400};
  size_t turn = 0;
  for (const RowsKernel& kernel : kernels) {
    for (size_t columns : every_columns) {
      if (columns > 2049 && turn % 4) continue;
      check(input_of(kernel, columns, columns > 1100 ? 2 : 5, turn++), kernel);
    }
    ++turn;  // so that the next kernel takes another turn at each size
  }
}

/// Blocks of many warps on rows of all small sizes: most warps have nothing to do.
void check_blocks(const std::vector<RowsKernel>& kernels) {
  size_t turn = 3;
  for (const RowsKernel& kernel : kernels) {
    for (unsigned threads : {64u, 512u}) {
      for (size_t columns : {6, 300}) {
        Input input = input_of(kernel, columns, 3, turn++);
        input.threads = threads;
        check(input, kernel);
      }
    }
  }
}

/// NaN and infinity at the start, within and at the end of a row, and at its target.
void check_special_values(const std::vector<RowsKernel>& kernels) {
  for (const RowsKernel& kernel : kernels) {
    for (float special : {quiet_nan, infinite, -infinite}) {
      for (size_t columns : {1, 2, 21, 150}) {
        for (size_t place : {size_t{0}, size_t{1}, columns / 2, columns - 1}) {
          if (place >= columns) continue;
          Input input = input_of(kernel, columns, 0, 6 + place % 2);
          input.wants_gradient = true;
          input.divisor = {device::Divisor::one, 0, nullptr};
          for (size_t at_target : {0, 1}) {
            add_row(input, 0);
            input.logits.back()[place] = special;
            input.targets.back() = int64_t(at_target || columns == 1 ? place : (place + 1) % columns);
          }
          add_row(input, 0);
          for (float& x : input.logits.back()) x = special;
          for (int64_t wrong : {int64_t{-1}, int64_t(columns), INT64_MIN, INT64_MAX}) {
            add_row(input, 0);
            input.targets.back() = wrong;
          }
          input.token_weight.clear();
          input.upstream.clear();
          input.name += ", special " + std::to_string(special) + " at " + std::to_string(place);
          check(input, kernel);
        }
      }
    }
  }
}

/// Nothing counted: a mean is 0; and one wrong target makes a mean NaN, all of it.
void check_nothing_counted(const std::vector<RowsKernel>& kernels) {
  for (const RowsKernel& kernel : kernels) {
    Input input = input_of(kernel, 20, 4, 0);
    std::fill(input.targets.begin(), input.targets.end(), input.ignore_index);
    check(input, kernel);
    input = input_of(kernel, 20, 4, 0);
    input.targets[2] = 20;
    check(input, kernel);
  }
}

/// More rows than one block of the sums reads.
void check_many_rows(const std::vector<RowsKernel>& kernels) {
  for (size_t rows : {2047, 2049, 6000}) {
    const RowsKernel& kernel = kernels.front();
    Input input = input_of(kernel, 3, rows, 1);
    input.offset = 0;
    check(input, kernel);
  }
}

/// The lowest of equal logits is the prediction, wherever they lie.
void check_ties(const std::vector<RowsKernel>& kernels) {
  for (const RowsKernel& kernel : kernels) {
    if (kernel.smoothing != 0) continue;
    for (size_t columns : {2, 40, 700, 5000}) {
      Input input = input_of(kernel, columns, 0, 0);
      for (int k = 0; k < 6; ++k) {
        add_row(input, 0);
        for (float& x : input.logits.back()) x = std::floor(x / 2);
        if (k == 5) std::fill(input.logits.back().begin(), input.logits.back().end(), 1.0f);
      }
      input.softcap = kernel.softcap ? 50 : 0;
      check(input, kernel);
    }
  }
}

/// The values that an independent script computed in 50 digits.
void check_references(const std::vector<RowsKernel>& kernels) {
  for (const RowsKernel& kernel : kernels) {
    for (const auto& of : reference::option_cases) {
      const int smoothing = of.label_smoothing > 0 ? of.class_weight.empty() ? 1 : 2 : 0;
      const bool fits = kernel.element == device::Element::float32 ? of.exact != reference::Exact::in_float64
                                                                   : of.exact == reference::Exact::in_half;
      if (!fits || of.targets.empty() || smoothing != kernel.smoothing || (of.softcap > 0) != (kernel.softcap > 0))
        continue;
      Input input;
      input.rows = of.targets.size();
      input.columns = size_t(of.classes);
      input.targets = of.targets;
      input.ignore_index = of.ignore_index;
      input.token_weight.assign(of.token_weight.begin(), of.token_weight.end());
      input.class_weight.assign(of.class_weight.begin(), of.class_weight.end());
      input.label_smoothing = of.label_smoothing;
      input.z_loss = of.z_loss;
      input.softcap = of.softcap;
      if (of.normalizer > 0) input.divisor = {device::Divisor::given_number, of.normalizer, nullptr};
      for (size_t row = 0; row < input.rows; ++row) {
        const auto first = of.logits.begin() + std::ptrdiff_t(row * input.columns);
        input.logits.emplace_back(first, first + of.classes);
      }
      input.name = of.name;
      check(input, kernel);
      const Output out = run(input, kernel, Order::ascending);
      const Real units = 8 * epsilon;
      findings.expect_near(out.total, of.mean, units * (std::fabs(of.mean) + of.mean_condition), of.name, "mean");
      for (size_t row = 0; row < input.rows; ++row) {
        findings.expect_near(out.loss[row], of.losses[row],
                             units * (std::fabs(of.losses[row]) + of.loss_conditions[row]), of.name, "loss", row);
      }
      for (size_t index = 0; index < of.gradient.size(); ++index) {
        const Real size = std::fabs(of.gradient[index]);
        findings.expect_near(out.gradient.read(index), of.gradient[index],
                             units * (size + of.gradient_conditions[index]) + rounding_of(size, kernel.element),
                             of.name, "gradient", index);
      }
    }
  }
}

}  // namespace
}  // namespace emulation

int main() {
  using namespace emulation;
  const std::vector<RowsKernel> kernels = all_rows_kernels();
  check_sizes(kernels);
  check_blocks(kernels);
  check_special_values(kernels);
  check_nothing_counted(kernels);
  check_ties(kernels);
  check_many_rows(kernels);
  check_references(kernels);
  return findings.report("cross entropy, emulated");
}
