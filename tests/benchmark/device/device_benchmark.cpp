// What the losses take on a device beside F::cross_entropy, the KL's formula in tensor operations, and a copy.
//     device_benchmark [--device cuda] [--shrink 1] [--csv file]
// A time is the median of rounds of many calls, each round ended by reading one number back, which waits for all of it.
// Bytes a second are those that the task cannot do without: to read what is read once, and to write the gradient.
#include <torch/torch.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <string>
#include <vector>

#include "free_transformer/losses.hpp"

namespace {

using namespace free_transformer;
using torch::Tensor;
namespace F = torch::nn::functional;

struct Arguments {
  std::string device = "cuda", csv;
  int64_t shrink = 1;  ///< divides tokens and classes, to see whether it runs at all
};

Arguments arguments_of(int count, char** values) {
  Arguments arguments;
  for (int index = 1; index + 1 < count; index += 2) {
    const std::string name = values[index], value = values[index + 1];
    if (name == "--device") arguments.device = value;
    if (name == "--shrink") arguments.shrink = std::max<int64_t>(1, std::atoll(value.c_str()));
    if (name == "--csv") arguments.csv = value;
  }
  return arguments;
}

std::string first_line(const std::exception& error) {
  const std::string text = error.what();
  return text.substr(0, text.find('\n'));
}

/// One task: a call returns something whose first number is there when the work is done.
struct Row {
  std::string name;
  std::function<Tensor()> ours, eager, copy;
  double least_bytes, copied_bytes;
};

void wait_for(const Tensor& result) { result.reshape({-1}).narrow(0, 0, 1).item<float>(); }

/// Milliseconds of a call: the median of five rounds that take a fifth of a second each.
double milliseconds(const std::function<Tensor()>& call) {
  using Clock = std::chrono::steady_clock;
  const auto round = [&](int64_t calls) {
    const auto start = Clock::now();
    Tensor last;
    for (int64_t index = 0; index < calls; ++index) last = call();
    wait_for(last);
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count() / static_cast<double>(calls);
  };
  round(2);  // compiles, and fills the allocator's cache
  const double once = round(2);
  const int64_t calls = std::clamp<int64_t>(static_cast<int64_t>(200 / once), 1, 1000);
  std::vector<double> rounds;
  rounds.reserve(5);
  for (int index = 0; index < 5; ++index) rounds.push_back(round(calls));
  std::nth_element(rounds.begin(), rounds.begin() + 2, rounds.end());
  return rounds[2];
}

Tensor random_logits(at::IntArrayRef shape, const torch::TensorOptions& options) {
  return torch::randn(shape, torch::kFloat).mul_(3).to(options.dtype().toScalarType()).to(options.device());
}

Tensor gradient_of(const Tensor& loss, const Tensor& input) { return torch::autograd::grad({loss}, {input})[0]; }

std::function<Tensor()> copy_of(const Tensor& source) {
  const Tensor target = torch::empty_like(source);
  return [=] { return target.copy_(source); };
}

std::vector<Row> cross_entropy_rows(const torch::TensorOptions& options, int64_t tokens, int64_t classes) {
  const std::string type = c10::toString(options.dtype().toScalarType());
  const Tensor logits = random_logits({tokens, classes}, options);
  const Tensor targets = torch::arange(tokens).remainder(classes).to(options.device());
  const Tensor leaf = logits.detach().requires_grad_();
  const auto bytes = static_cast<double>(logits.nbytes());
  const auto eager = [=] { return gradient_of(F::cross_entropy(leaf, targets), leaf); };
  const auto fresh = [=] { return gradient_of(compute_reconstruction_loss(leaf, targets), leaf); };
  const auto inplace = [=] {  // the logits are written over, and so copied first
    const Tensor given = leaf * 1;
    return gradient_of(compute_reconstruction_loss(given, targets, ReconstructionLossOptions().inplace(true)), given);
  };
  const auto without_gradient = [=](bool is_ours) {
    const torch::NoGradGuard no_grad;
    return is_ours ? compute_reconstruction_loss(logits, targets) : F::cross_entropy(logits, targets);
  };
  const std::string shape = std::to_string(tokens) + " x " + std::to_string(classes) + " " + type;
  return {{"cross entropy, in place (and a copy), " + shape, inplace, eager, copy_of(logits), 5 * bytes, 2 * bytes},
          {"cross entropy, default, " + shape, fresh, eager, copy_of(logits), 3 * bytes, 2 * bytes},
          {"cross entropy, forward, " + shape, [=] { return without_gradient(true); },
           [=] { return without_gradient(false); }, copy_of(logits), bytes, 2 * bytes}};
}

Row latent_row(const torch::TensorOptions& options, int64_t tokens) {
  const Tensor leaf = random_logits({tokens, 16}, options).requires_grad_();
  const auto formula = [=] {
    const Tensor p = leaf.to(torch::kFloat).sigmoid();
    const Tensor kl = (p * (2 * p).log() + (1 - p) * (2 * (1 - p)).log()).sum(-1);
    return gradient_of((kl - 0.3466).clamp_min(0).mean(), leaf);
  };
  const auto bytes = static_cast<double>(leaf.nbytes());
  return {"latent KL, " + std::to_string(tokens) + " x 16 " + c10::toString(options.dtype().toScalarType()),
          [=] { return gradient_of(compute_kl_divergence(leaf), leaf); },
          formula,
          copy_of(leaf.detach()),
          2 * bytes,
          2 * bytes};
}

/// Bytes of the weight's gradient alone: here the arithmetic of the products is the limit.
Row head_row(const torch::TensorOptions& options, int64_t tokens, int64_t classes, int64_t width) {
  const Tensor hidden = (random_logits({tokens, width}, options) / 3).requires_grad_();
  const Tensor weight = (random_logits({classes, width}, options) / 96).requires_grad_();
  const Tensor targets = torch::arange(tokens).remainder(classes).to(options.device());
  const auto step = [=](const Tensor& loss) { return torch::autograd::grad({loss}, {hidden, weight})[1]; };
  const auto bytes = static_cast<double>(weight.nbytes());
  return {"head and products, " + std::to_string(tokens) + " x " + std::to_string(classes) + ", width " +
              std::to_string(width) + " " + c10::toString(options.dtype().toScalarType()),
          [=] { return step(compute_reconstruction_loss(LinearLogits(hidden, weight), targets)); },
          [=] { return step(F::cross_entropy(torch::linear(hidden, weight), targets)); },
          copy_of(weight.detach()),
          2 * bytes,
          2 * bytes};
}

void print(const Row& row, std::ofstream& csv) {
  const auto time = [](const std::function<Tensor()>& call) {
    try {
      return milliseconds(call);
    } catch (const c10::Error& error) {  // of memory, most likely: the other columns are worth something without it
      std::cerr << first_line(error) << '\n';
      return std::nan("");
    }
  };
  const double ours = time(row.ours), eager = time(row.eager), copy = time(row.copy);
  const auto gigabytes = [](double bytes, double ms) { return bytes / ms / 1e6; };
  std::printf("%-64s %9.3f %9.3f %7.2f %9.3f %8.0f %8.0f\n", row.name.c_str(), ours, eager, eager / ours, copy,
              gigabytes(row.least_bytes, ours), gigabytes(row.copied_bytes, copy));
  std::fflush(stdout);
  if (csv) {
    csv << '"' << row.name << "\"," << ours << ',' << eager << ',' << copy << ',' << gigabytes(row.least_bytes, ours)
        << ',' << gigabytes(row.copied_bytes, copy) << std::endl;
  }
}

}  // namespace

int main(int count, char** values) {
  const Arguments arguments = arguments_of(count, values);
  torch::TensorOptions options;
  try {
    options = options.device(torch::Device(arguments.device));
    wait_for(torch::ones({1}).to(options.device()).add_(1));
  } catch (const std::exception& error) {
    std::cout << "skipped: no device (" << first_line(error) << ")" << std::endl;
    return 0;
  }
  std::ofstream csv;
  if (!arguments.csv.empty()) csv.open(arguments.csv);
  if (csv) csv << "row,ms,eager ms,copy ms,GB/s,copy GB/s\n";
  std::printf("%-64s %9s %9s %7s %9s %8s %8s\n", "", "ms", "eager ms", "ratio", "copy ms", "GB/s", "copy GB/s");
  const auto less = [&](int64_t size) { return std::max<int64_t>(2, size / arguments.shrink); };
  for (const auto type : {torch::kFloat, torch::kBFloat16}) {
    const auto of_type = options.dtype(type);
    for (const auto& row : cross_entropy_rows(of_type, less(8192), less(32768))) print(row, csv);
    print(latent_row(of_type, less(64 * 2048)), csv);
  }
  const auto half = options.dtype(torch::kBFloat16);
  print(head_row(half, less(1024), less(32768), less(512)), csv);
  try {
    print(head_row(half, less(8192), less(128256), less(4096)), csv);
  } catch (const c10::Error& error) {
    std::cout << "a head of 128256 classes does not fit" << std::endl;
  }
  return 0;
}
