// The losses on a device that is not the CPU: the numbers of float64 on the CPU, no look at a value, and how many
// operations each takes, which is what a GPU's launches are.
#include <cmath>
#include <iostream>
#include <map>

#include "../unit/numeric.hpp"
#include "../unit/operations.hpp"
#include "free_transformer/losses.hpp"
#include "pretend_device.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

constexpr int64_t classes = 19, width = 8, bits_of_latent = 5;

/// Where a test puts its constants: as they are, or on the device.
using Place = std::function<Tensor(const Tensor&)>;

Tensor stay(const Tensor& tensor) { return tensor; }

Tensor on_device(const Tensor& tensor) {
  return tensor.defined() ? tensor.detach().to(pretend_device::device()) : Tensor();
}

Tensor on_host(const Tensor& tensor) { return tensor.detach().cpu(); }

/// What the function returns, and what it did on the device: no operation may make the host wait.
template <typename Function>
auto without_waiting(const Function& function, std::vector<std::string>* operations = nullptr) {
  pretend_device::take_operations();
  auto result = function();
  const auto names = pretend_device::take_operations();
  CHECK_FALSE(names.empty());
  std::string waiting;
  for (const auto& name : names) {
    const bool waits = name == pretend_device::copy_to_host || reads_a_value(name.substr(0, name.find('.')));
    if (waits) waiting += name + " ";
  }
  CHECK(waiting == "");
  if (operations != nullptr) *operations = names;
  return result;
}

/// A sum over n terms is off by n steps at most in any order, and its terms by a step for each of the about eight
/// functions and factors on their way; two of these sums (softmax, smoothing or class probabilities) meet in a number.
/// Terms are at most 8 + 8 + log(classes) = 19 for a loss, 1 for a gradient.
double steps(int64_t terms, torch::ScalarType type) {
  return 2 * static_cast<double>(terms + 8) * epsilon(arithmetic(type));
}

/// A device multiplies half types in themselves. Logits of at most 8 are off by 4 epsilon then, the loss by as much as two
/// of them, a probability by twice that in proportion; the gradient's terms, the operands' products and the sums of the
/// blocks are rounded by half an epsilon each. Losses are sums of up to 6 positions of weight 2 or less.
double steps_of_head(torch::ScalarType type) {
  const double of_arithmetic = steps(classes + width + 6, type);
  return arithmetic(type) == type ? of_arithmetic : of_arithmetic + 12 * epsilon(type);
}

struct LossAndGradients {
  Tensor loss;
  std::vector<Tensor> gradients;
};

/// A loss of leaves on the CPU in float64 and on the device in this type. `upstream` is what the gradients start from,
/// of the shape of the loss; a half gradient may be rounded once more than that of the CPU.
void check_same(const std::function<Tensor(const std::vector<Tensor>&, const Place&)>& loss,
                const std::vector<Tensor>& inputs, torch::ScalarType type, double relative, double largest_term) {
  const auto run = [&](const Place& place, torch::ScalarType of_inputs) {
    std::vector<Tensor> leaves;
    leaves.reserve(inputs.size());
    for (const auto& input : inputs) leaves.push_back(leaf(place(input.to(of_inputs))));
    const Tensor value = loss(leaves, place);
    const Tensor upstream = value.dim() == 0 ? torch::tensor(0.5) : eighths(value.sizes(), torch::kFloat, 5) / 8;
    return LossAndGradients{value, torch::autograd::grad({value}, leaves, {place(upstream.to(value.scalar_type()))})};
  };
  const auto expected = run(stay, torch::kDouble);
  const auto actual = without_waiting([&] { return run(on_device, type); });
  CHECK(actual.loss.device() == pretend_device::device());
  CHECK(actual.loss.scalar_type() == arithmetic(type));
  CHECK(actual.loss.sizes() == expected.loss.sizes());
  CHECK(difference(on_host(actual.loss), expected.loss, relative, largest_term) == "");
  for (size_t index = 0; index < inputs.size(); ++index) {
    INFO("input " << index);
    const Tensor& gradient = actual.gradients[index];
    CHECK(gradient.device() == pretend_device::device());
    CHECK(gradient.scalar_type() == type);
    CHECK(gradient.sizes() == expected.gradients[index].sizes());
    CHECK(difference(on_host(gradient), expected.gradients[index], relative, 1, /*roundings=*/2) == "");
  }
}

const Tensor logits = eighths({2, 3, classes});
const Tensor targets = tensor(std::vector<int64_t>{0, 18, 7, 3, 7, 11}, {2, 3});
const Tensor token_weight = tensor(std::vector<double>{0.5, 1, 2, 0, 0.25, 1}, {2, 3});

Tensor class_weight() { return eighths({classes}, torch::kDouble, 2).abs() / 8; }

Tensor probabilities() {  // multiples of 1/64 that add up to 1
  Tensor values = torch::zeros({2, 3, classes}, torch::kDouble);
  values.select(-1, 2).fill_(0.25);
  values.select(-1, 5).fill_(0.6875);
  values.select(-1, 18).fill_(0.0625);
  return values;
}

struct ReconstructionCase {
  const char* name;
  std::function<void(ReconstructionLossOptions&, const Place&)> set;
  bool has_probabilities = false;
};

const std::vector<ReconstructionCase> reconstruction_cases{
    {"plain", [](auto&, const Place&) {}},
    {"label_smoothing", [](auto& options, const Place&) { options.label_smoothing(0.25); }},
    {"z_loss", [](auto& options, const Place&) { options.z_loss(0.0078125); }},
    {"softcap", [](auto& options, const Place&) { options.softcap(4); }},
    {"weight", [](auto& options, const Place& place) { options.weight(place(class_weight())); }},
    {"token_weight", [](auto& options, const Place& place) { options.token_weight(place(token_weight)); }},
    {"bool token_weight",
     [](auto& options, const Place& place) { options.token_weight(place(token_weight.to(torch::kBool))); }},
    {"ignore_index", [](auto& options, const Place&) { options.ignore_index(7); }},
    {"kNone", [](auto& options, const Place&) { options.reduction(torch::kNone); }},
    {"kSum", [](auto& options, const Place&) { options.reduction(torch::kSum); }},
    {"normalizer", [](auto& options, const Place&) { options.normalizer(4); }},
    {"normalizer tensor", [](auto& options, const Place& place) { options.normalizer(place(torch::tensor(4.0))); }},
    {"class probabilities", [](auto&, const Place&) {}, true},
    {"class probabilities, all options",
     [](auto& options, const Place& place) {
       options.label_smoothing(0.25).z_loss(0.0078125).softcap(4).weight(place(class_weight()));
       options.token_weight(place(token_weight));
     },
     true},
    {"all options",
     [](auto& options, const Place& place) {
       options.label_smoothing(0.25).z_loss(0.0078125).softcap(4).weight(place(class_weight()));
       options.token_weight(place(token_weight)).ignore_index(7);
     }},
};

ReconstructionLossOptions options_of(const ReconstructionCase& option, const Place& place) {
  ReconstructionLossOptions options;
  option.set(options, place);
  return options;
}

Tensor targets_of(const ReconstructionCase& option, const Place& place) {
  return place(option.has_probabilities ? probabilities() : targets);
}

Tensor hidden() { return eighths({2, 3, width}, torch::kDouble, 4) / 8; }
Tensor head_weight() { return eighths({classes, width}, torch::kDouble, 5) / 8; }
Tensor head_bias() { return eighths({classes}, torch::kDouble, 6) / 8; }

/// Bytes of so many tokens of the fused head's buffer.
int64_t bytes_of(int64_t tokens, torch::ScalarType type) {
  return tokens * classes * static_cast<int64_t>(c10::elementSize(arithmetic(type)));
}

void print(const std::string& title, const std::vector<std::string>& operations) {
  std::cout << title << ": " << operations.size() << " operations";
  for (const auto& name : operations) std::cout << "\n  " << name;
  std::cout << std::endl;
}

}  // namespace

TEST_CASE("The pretend device computes, counts, and keeps its memory to itself", "[device]") {
  const Tensor there = on_device(eighths({3, 4}));
  CHECK(pretend_device::is_out_of_reach(there));
  CHECK_FALSE(pretend_device::is_out_of_reach(eighths({3, 4})));
  pretend_device::take_operations();
  const Tensor twice = there.t().narrow(0, 1, 2) * 2;
  CHECK(pretend_device::take_operations().size() == 1);
  CHECK(twice.to(torch::kFloat).dtype() == torch::kFloat);
  CHECK(pretend_device::take_operations() == std::vector<std::string>{"aten::_copy_from"});
  CHECK(same_bits(on_host(twice), eighths({3, 4}).t().narrow(0, 1, 2) * 2));
  CHECK(pretend_device::take_operations() == std::vector<std::string>{pretend_device::copy_to_host});
  twice.sum().item<double>();
  CHECK(reads_a_value(pretend_device::take_operations().back()));
}

TEST_CASE("Cross entropy on a device has the numbers of the CPU", "[device]") {
  for (const auto& option : reconstruction_cases) {
    for (const auto type : all_types) {
      INFO(option.name << ", " << type);
      const auto loss = [&](const std::vector<Tensor>& inputs, const Place& place) {
        return compute_reconstruction_loss(inputs[0], targets_of(option, place), options_of(option, place));
      };
      check_same(loss, {logits}, type, steps(classes, type), 19);
    }
  }
}

TEST_CASE("On a device inplace changes nothing, as there is no kernel that could", "[device]") {
  const Tensor input = leaf(on_device(logits.to(torch::kFloat))), beside = on_device(targets);
  const Tensor given = input * 1;  // no leaf, which would be refused where inplace does something
  const auto options = ReconstructionLossOptions().inplace(true);
  const Tensor found =
      without_waiting([&] { return gradient(compute_reconstruction_loss(given, beside, options), given); });
  CHECK(same_bits(on_host(given), logits.to(torch::kFloat)));
  CHECK(same_bits(on_host(found), on_host(gradient(compute_reconstruction_loss(input, beside), input))));
}

TEST_CASE("A NaN in an ignored row stays there on a device, too", "[device]") {
  Tensor with_nan = logits.clone();
  with_nan[0][2].fill_(not_a_number);
  for (const auto type : all_types) {
    INFO(type);
    const auto loss = [](const std::vector<Tensor>& inputs, const Place& place) {
      return compute_reconstruction_loss(inputs[0], place(targets), /*ignore_index=*/7);
    };
    check_same(loss, {with_nan}, type, steps(classes, type), 19);
  }
}

TEST_CASE("A target out of range makes the loss on a device NaN", "[device]") {
  for (const auto type : all_types) {
    for (const int64_t wrong : {int64_t{-1}, classes, int64_t{1} << 40}) {
      INFO(type << ", " << wrong);
      Tensor with_wrong = targets.clone();
      with_wrong[1][1] = wrong;
      const Tensor input = on_device(logits.to(type)), beside = on_device(with_wrong);
      const Tensor loss = without_waiting([&] { return compute_reconstruction_loss(input, beside); });
      CHECK(std::isnan(on_host(loss).item<double>()));
      const LinearLogits head(on_device(hidden().to(type)), on_device(head_weight().to(type)));
      CHECK(std::isnan(on_host(compute_reconstruction_loss(head, beside)).item<double>()));
    }
  }
}

TEMPLATE_TEST_CASE("The KL on a device has the numbers of the CPU", "[device]", PerPosition, PerBit, BatchMean) {
  // Computed in float64 whatever the type: sums of 6 positions of 5 bits.
  const double relative = steps(6 * bits_of_latent, torch::kDouble);
  const Tensor z = eighths({2, 3, bits_of_latent}, torch::kDouble, 2);
  const Tensor prior_of_all = eighths({bits_of_latent}, torch::kDouble, 3) / 8;
  const Tensor prior_of_each = eighths({2, 3, bits_of_latent}, torch::kDouble, 4) / 8;
  for (const bool is_weighted : {false, true}) {
    for (const Reduction& reduction : {Reduction(torch::kMean), Reduction(torch::kSum), Reduction(torch::kNone)}) {
      for (const Tensor& prior : {Tensor(), prior_of_all, prior_of_each}) {
        for (const auto type : all_types) {
          INFO(type << ", weighted " << is_weighted << ", reduction " << reduction.index() << ", prior of "
                    << (prior.defined() ? prior.dim() : 0) << " dimensions");
          const auto loss = [&](const std::vector<Tensor>& inputs, const Place& place) {
            auto options = KLDivergenceOptions().latent_dim(bits_of_latent).free_bits(0.5).reduction(reduction);
            if (is_weighted) options.token_weight(place(token_weight));
            if (inputs.size() > 1) options.prior_logits(inputs[1]);
            return compute_kl_divergence<TestType>(inputs[0], options);
          };
          check_same(loss, prior.defined() ? std::vector<Tensor>{z, prior} : std::vector<Tensor>{z}, type, relative,
                     19);
        }
      }
    }
  }
}

TEST_CASE("The whole loss and its metrics on a device are those of the CPU", "[device]") {
  const Tensor z = eighths({2, 3, bits_of_latent}, torch::kDouble, 2);
  for (const bool is_masked : {false, true}) {
    for (const auto type : all_types) {
      INFO(type << ", masked " << is_masked);
      std::vector<LossMetrics> metrics;
      const auto loss = [&](const std::vector<Tensor>& inputs, const Place& place) {
        const auto reconstruction =
            ReconstructionLossOptions().ignore_index(7).token_weight(place(token_weight)).z_loss(0.0078125);
        auto result = compute_vae_loss(inputs[0], place(targets), inputs[1],
                                       VAELossOptions()
                                           .reconstruction(reconstruction)
                                           .latent_dim(bits_of_latent)
                                           .accuracy(true)
                                           .beta_kl(0.5)
                                           .mask_ignored_latents(is_masked));
        metrics.push_back(result.metrics);
        return result.loss;
      };
      check_same(loss, {logits, z}, type, steps(classes, type), 38);
      REQUIRE(metrics.size() == 2);
      for (const auto& [name, expected] : metrics[0]) {
        INFO(name);
        // Perplexity is exp of a mean, so that what is added to the mean multiplies it.
        const double largest = name == "metrics/perplexity" ? 19 * expected : 38;
        CHECK(difference(torch::tensor(metrics[1].at(name), torch::kDouble), {expected}, steps(classes, type),
                         largest) == "");
      }
      CHECK(metrics[0].size() == metrics[1].size());
    }
  }
}

TEST_CASE("The fused head on a device has the numbers of the CPU", "[device]") {
  for (const int64_t tokens : {0, 2}) {
    for (const bool has_bias : {true, false}) {
      for (const auto& option : reconstruction_cases) {
        for (const auto type : all_types) {
          INFO(option.name << ", " << type << ", bias " << has_bias << ", tokens of a block " << tokens);
          const auto loss = [&](const std::vector<Tensor>& inputs, const Place& place) {
            const auto head = LinearLogits(inputs[0], inputs[1], has_bias ? inputs[2] : Tensor())
                                  .block_bytes(bytes_of(tokens, inputs[0].scalar_type()));
            return compute_reconstruction_loss(head, targets_of(option, place), options_of(option, place));
          };
          std::vector<Tensor> inputs{hidden(), head_weight()};
          if (has_bias) inputs.push_back(head_bias());
          check_same(loss, inputs, type, steps_of_head(type), 19);
        }
      }
    }
  }
}

TEST_CASE("Statistics of tokens on a device are those of the CPU", "[device]") {
  for (const auto& option : reconstruction_cases) {
    for (const auto type : all_types) {
      for (const bool is_fused : {false, true}) {
        INFO(option.name << ", " << type << ", fused " << is_fused);
        const auto statistics = [&](const Place& place, torch::ScalarType of_inputs) {
          const auto put = [&](const Tensor& tensor) { return place(tensor.to(of_inputs)); };
          const Tensor beside = targets_of(option, place);
          const auto options = options_of(option, place);
          return is_fused ? compute_token_statistics(LinearLogits(put(hidden()), put(head_weight()), put(head_bias())),
                                                     beside, options)
                          : compute_token_statistics(put(logits), beside, options);
        };
        const auto expected = statistics(stay, torch::kDouble);
        const auto actual = without_waiting([&] { return statistics(on_device, type); });
        const double relative = is_fused ? steps_of_head(type) : steps(classes, type);
        CHECK(difference(on_host(actual.loss), expected.loss, relative, 19) == "");
        CHECK(difference(on_host(actual.log_sum_exp), expected.log_sum_exp, relative, 19) == "");
        CHECK(difference(on_host(actual.target_log_probability), expected.target_log_probability, relative, 19) == "");
        CHECK(difference(on_host(actual.entropy), expected.entropy, relative, 19) == "");
        CHECK(torch::equal(on_host(actual.prediction), expected.prediction));
        CHECK(torch::equal(on_host(actual.hit), expected.hit));
      }
    }
  }
}

TEST_CASE("The fused head on a device takes a mix of types, each gradient in its own", "[device]") {
  const std::vector<torch::ScalarType> below_float64{torch::kFloat, torch::kHalf, torch::kBFloat16};
  for (const auto of_hidden : below_float64) {
    for (const auto of_weight : below_float64) {
      INFO(of_hidden << " hidden, " << of_weight << " weight");
      const std::vector<Tensor> inputs{leaf(on_device(hidden().to(of_hidden))),
                                       leaf(on_device(head_weight().to(of_weight))),
                                       leaf(on_device(head_bias().to(of_hidden)))};
      const Tensor beside = on_device(targets);
      const Tensor loss = compute_reconstruction_loss(LinearLogits(inputs[0], inputs[1], inputs[2]), beside);
      const auto gradients = without_waiting([&] { return torch::autograd::grad({loss}, inputs); });
      std::vector<Tensor> leaves;
      leaves.reserve(inputs.size());
      for (const Tensor& input : inputs) leaves.push_back(leaf(on_host(input).to(torch::kDouble)));
      const Tensor expected = compute_reconstruction_loss(LinearLogits(leaves[0], leaves[1], leaves[2]), targets);
      const auto expected_gradients = torch::autograd::grad({expected}, leaves);
      CHECK(difference(on_host(loss), expected, steps_of_head(of_weight), 19) == "");
      for (size_t index = 0; index < inputs.size(); ++index) {
        CHECK(gradients[index].scalar_type() == inputs[index].scalar_type());
        CHECK(difference(on_host(gradients[index]), expected_gradients[index],
                         std::max(steps_of_head(of_weight), steps_of_head(of_hidden)), 1, 2) == "");
      }
    }
  }
}

TEST_CASE("An ignored position reaches no gradient of the fused head on a device, whatever its hidden state",
          "[device]") {
  for (const auto type : all_types) {
    for (const bool has_options : {false, true}) {
      INFO(type << ", options " << has_options);
      Tensor wrong = hidden(), zero = hidden();  // target 7 stands at these two
      wrong[0][2].fill_(not_a_number);
      wrong[1][1].fill_(reference::inf);
      zero[0][2].fill_(0);
      zero[1][1].fill_(0);
      auto options = ReconstructionLossOptions().ignore_index(7);
      if (has_options) options.z_loss(0.0078125);
      const Tensor beside = on_device(targets);
      const auto results = [&](const Tensor& states) {
        const std::vector<Tensor> inputs{leaf(on_device(states.to(type))), leaf(on_device(head_weight().to(type))),
                                         leaf(on_device(head_bias().to(type)))};
        const Tensor loss = compute_reconstruction_loss(LinearLogits(inputs[0], inputs[1], inputs[2]), beside, options);
        auto all = torch::autograd::grad({loss}, inputs);
        all.push_back(loss);
        return all;
      };
      const auto found = results(wrong), expected = results(zero);
      for (size_t index = 0; index < found.size(); ++index) {
        CHECK(same_bits(on_host(found[index]), on_host(expected[index])));
      }
      CHECK(on_host(found[0])[0][2].eq(0).all().item<bool>());
      CHECK(on_host(found[0])[1][1].eq(0).all().item<bool>());
    }
  }
}

TEST_CASE("A confident head on a device keeps the relative accuracy of loss and gradient", "[device]") {
  // Logits 24, 0 and 4, and then the same with 2^20 added to each: exp(-24) + exp(-20) is what is left to the others.
  const double others = std::exp(-24.0) + std::exp(-20.0), left = others / (1 + others);
  for (const auto type : {torch::kFloat, torch::kDouble}) {
    for (const double offset : {0.0, 1048576.0}) {
      const std::vector<Tensor> inputs{leaf(on_device(torch::ones({1, 1}, type))),
                                       leaf(on_device(tensor(std::vector<double>{24, 0, 4}, {3, 1}, type) + offset))};
      const Tensor loss = compute_reconstruction_loss(LinearLogits(inputs[0], inputs[1]),
                                                      on_device(tensor(std::vector<int64_t>{0}, {1})));
      const Tensor of_weight = on_host(torch::autograd::grad({loss}, inputs)[1]);
      // An exponential of 24 is off by 24 half steps, and a dozen follow.
      CHECK(difference(on_host(loss), {std::log1p(others)}, 24 * epsilon(type)) == "");
      CHECK(difference(of_weight.select(0, 0), {-left}, 24 * epsilon(type)) == "");
    }
  }
}

TEST_CASE("Sums of float16 gradients beyond the type's largest number are none on the way", "[device]") {
  // 4096 tokens, each of which moves the weights of the target by 63/64 hidden, and a mean that divides by their number.
  constexpr int64_t tokens = 4096, all_classes = 64;
  for (const int64_t blocks : {1, 3}) {
    const std::vector<Tensor> inputs{leaf(on_device(torch::full({tokens, 8}, 32, torch::kHalf))),
                                     leaf(on_device(torch::zeros({all_classes, 8}, torch::kHalf)))};
    const auto head = LinearLogits(inputs[0], inputs[1]).block_bytes((tokens + blocks - 1) / blocks * all_classes * 4);
    const Tensor loss = compute_reconstruction_loss(head, on_device(torch::zeros({tokens}, torch::kLong)));
    const Tensor of_weight = on_host(torch::autograd::grad({loss}, inputs)[1]);
    CHECK(difference(of_weight.select(0, 0), std::vector<double>(8, -31.5), 2 * epsilon(torch::kHalf)) == "");
    CHECK(difference(of_weight.select(0, 1), std::vector<double>(8, 0.5), 2 * epsilon(torch::kHalf)) == "");
  }
}

TEST_CASE("A gradient scaler's factor comes before float16 gradients of a head on a device are rounded", "[device]") {
  // A normalizer of 2^30 makes gradients of less than 2^-25, half of float16's least number; the upstream undoes it.
  const double factor = 1 << 30;
  const Tensor states = hidden().to(torch::kHalf), weight = head_weight().to(torch::kHalf), beside = on_device(targets);
  const auto options = ReconstructionLossOptions().normalizer(factor);
  for (const int64_t tokens : {0, 2}) {
    const std::vector<Tensor> inputs{leaf(on_device(states)), leaf(on_device(weight))};
    const std::vector<Tensor> wide{leaf(states.to(torch::kDouble)), leaf(weight.to(torch::kDouble))};
    const auto head = LinearLogits(inputs[0], inputs[1]).block_bytes(bytes_of(tokens, torch::kHalf));
    const auto found = torch::autograd::grad({compute_reconstruction_loss(head, beside, options)}, inputs,
                                             {on_device(torch::full({}, factor, torch::kFloat))});
    const auto exact = torch::autograd::grad({compute_reconstruction_loss(LinearLogits(wide[0], wide[1]), targets,
                                                                          ReconstructionLossOptions().normalizer(1))},
                                             wide);
    for (size_t index = 0; index < found.size(); ++index) {
      CHECK(difference(on_host(found[index]), exact[index], steps_of_head(torch::kHalf), 1) == "");
    }
  }
}

TEST_CASE("Where half matrices have a float32 product the fused head loses nothing to its logits' type", "[device]") {
  const auto products = pretend_device::with_float_products();
  if (products == nullptr) return;  // not in this LibTorch
  for (const auto type : {torch::kHalf, torch::kBFloat16}) {
    const Tensor states = hidden().to(type), weight = head_weight().to(type), bias = head_bias().to(type);
    const Tensor beside = on_device(targets);
    std::vector<std::string> operations;
    const auto loss_of = [&](int64_t tokens) {
      const std::vector<Tensor> inputs{leaf(on_device(states)), leaf(on_device(weight)), leaf(on_device(bias))};
      const auto head = LinearLogits(inputs[0], inputs[1], inputs[2]).block_bytes(bytes_of(tokens, type));
      const Tensor loss = compute_reconstruction_loss(head, beside);
      pretend_device::take_operations();
      torch::autograd::grad({loss}, inputs);
      return on_host(loss);
    };
    const Tensor exact = compute_reconstruction_loss(
        LinearLogits(states.to(torch::kDouble), weight.to(torch::kDouble), bias.to(torch::kDouble)), targets);
    CHECK(difference(loss_of(0), exact, steps(classes + width + 6, type), 19) == "");
    pretend_device::take_operations();
    CHECK(difference(loss_of(2), exact, steps(classes + width + 6, type), 19) == "");
  }
}

TEMPLATE_TEST_CASE("On meta tensors the shapes come out right", "[device][meta]", PerPosition, PerBit, BatchMean) {
  for (const auto type : all_types) {
    const auto empty = [&](torch::IntArrayRef shape, torch::ScalarType of) {
      return torch::empty(shape, torch::TensorOptions().device(torch::kMeta).dtype(of));
    };
    const auto place = [&](const Tensor& tensor) { return empty(tensor.sizes(), tensor.scalar_type()); };
    const Tensor x = leaf(empty({2, 3, classes}, type)), z = leaf(empty({2, 3, bits_of_latent}, type));
    const Tensor prior = leaf(empty({bits_of_latent}, type));
    const std::vector<Tensor> head{leaf(empty({2, 3, width}, type)), leaf(empty({classes, width}, type)),
                                   leaf(empty({classes}, type))};
    for (const auto& option : reconstruction_cases) {
      INFO(option.name << ", " << type);
      const Tensor beside = targets_of(option, place);
      const auto options = options_of(option, place);
      const bool is_each = options.reduction().index() == Reduction(torch::kNone).index();
      const auto expected = is_each ? std::vector<int64_t>{2, 3} : std::vector<int64_t>{};
      const auto check = [&](const Tensor& loss, const std::vector<Tensor>& inputs) {
        CHECK(loss.sizes() == expected);
        CHECK(loss.scalar_type() == arithmetic(type));
        const auto gradients = torch::autograd::grad({loss}, inputs, {torch::ones_like(loss)});
        for (size_t index = 0; index < inputs.size(); ++index) {
          CHECK(gradients[index].sizes() == inputs[index].sizes());
          CHECK(gradients[index].scalar_type() == type);
          CHECK(gradients[index].is_meta());
        }
      };
      check(compute_reconstruction_loss(x, beside, options), {x});
      check(compute_reconstruction_loss(LinearLogits(head[0], head[1], head[2]), beside, options), head);
      check(compute_reconstruction_loss(LinearLogits(head[0], head[1], head[2]).block_bytes(1), beside, options), head);
      CHECK(compute_token_statistics(x, beside, options).entropy.sizes() == std::vector<int64_t>{2, 3});
      const auto of_latents = KLDivergenceOptions().latent_dim(bits_of_latent).reduction(options.reduction());
      check(compute_kl_divergence<TestType>(z, of_latents), {z});
      check(compute_kl_divergence<TestType>(z, KLDivergenceOptions(of_latents).prior_logits(prior)), {z, prior});
    }
  }
}

TEST_CASE("A device's blocks have thousands of tokens where the classes are few enough", "[device]") {
  const auto tokens = [](int64_t all_classes, int64_t positions, int64_t block_bytes) {
    const free_transformer::detail::LinearInputs inputs{
        {}, torch::empty({all_classes, 1}, torch::kBFloat16), {}, block_bytes};
    return free_transformer::detail::tokens_of_device_block(inputs, positions);
  };
  CHECK(tokens(32768, 8192, 0) == 8192);
  CHECK(tokens(128256, 8192, 0) == 2048);        // four alike, where 2092 would leave 1916 for the last
  CHECK(tokens(1 << 20, 8192, 0) == 1024);       // however many the classes are
  CHECK(tokens(128256, 8192, 128256 * 4) == 1);  // what the user sets
  CHECK(tokens(128256, 8192, int64_t{1} << 40) == 8192);
  CHECK(tokens(128256, 0, 0) == 1);
}

TEST_CASE("The latent code's tools on a device have the numbers of the CPU", "[device]") {
  const Tensor z = eighths({2, 3, bits_of_latent}, torch::kDouble, 2) / 4;
  const Tensor bits = eighths({2, 3, bits_of_latent}, torch::kDouble, 3) > 0, codes = pack_latent_bits(bits);
  const Tensor of_device = on_device(bits);
  CHECK(torch::equal(on_host(without_waiting([&] { return pack_latent_bits(of_device); })), codes));
  CHECK(torch::equal(on_host(without_waiting([&] { return pack_latent_bits(of_device.to(torch::kInt)); })), codes));
  const Tensor codes_of_device = on_device(codes);
  const auto unpack = [&] { return unpack_latent_codes(codes_of_device, bits_of_latent); };
  CHECK(torch::equal(on_host(without_waiting(unpack)), bits));
  const Tensor sure = on_device((bits.to(torch::kFloat) * 2 - 1) * 50);
  CHECK(torch::equal(on_host(without_waiting([&] { return sample_latent_bits(sure); })), bits));
  // What is wrong is asserted by the device; this one does so at once.
  CHECK(error_of([&] { sample_latent_bits(sure * not_a_number); }) != "");
  CHECK(error_of([&] { pack_latent_bits(codes_of_device + 2); }) != "");
  CHECK(error_of([&] { unpack_latent_codes(codes_of_device, 2); }) != "");

  for (const auto type : all_types) {
    INFO(type);
    const auto log_probability = [&](const std::vector<Tensor>& inputs, const Place& place) {
      return compute_latent_log_probability(inputs[0], place(bits));
    };
    check_same(log_probability, {z}, type, steps(bits_of_latent, type), 19);
    const auto mapped = [&](const std::vector<Tensor>& inputs, const Place& place) {
      return map_latent_codes(inputs[0], place(codes), inputs[1]).to(arithmetic(type));
    };
    const Tensor codebook = eighths({1 << bits_of_latent, width}, torch::kDouble, 4) / 8;
    check_same(mapped, {z, codebook}, type, steps(32 + width, type), 19);
  }
}

TEST_CASE("The bounds on the evidence on a device are those of the CPU", "[device]") {
  const Tensor z = eighths({2, 3, bits_of_latent}, torch::kDouble, 2) / 4, likelihood = -eighths({4, 2, 3}).abs();
  const Tensor bits = eighths({4, 2, 3, bits_of_latent}, torch::kDouble, 3) > 0, mask = token_weight > 0;
  for (const auto type : all_types) {
    INFO(type);
    const auto bounds = [&](const Place& place, torch::ScalarType of_inputs) {
      const auto put = [&](const Tensor& tensor) { return place(tensor.to(of_inputs)); };
      const auto options = EvidenceBoundOptions().token_mask(place(mask)).latent_mask(place(mask));
      return compute_evidence_lower_bound(put(likelihood[0]), put(z), options) +
             compute_importance_weighted_bound(put(likelihood), put(z), place(bits), options);
    };
    const EvidenceBound expected = bounds(stay, torch::kDouble);
    const EvidenceBound actual = without_waiting([&] { return bounds(on_device, type); });
    CHECK(difference(on_host(actual.nats), expected.nats, 1e-14, 40) == "");
    CHECK(torch::equal(on_host(actual.tokens), expected.tokens));
    CHECK(std::abs(actual.nats_per_token() - expected.nats_per_token()) < 1e-13);
  }
}

// Each bound is what is counted today, on LibTorch 1.13 and 2.15 alike, and one more: the ones that autograd starts a
// backward from. The aims are 30 for cross entropy, 20 for the KL, and for the fused head 12 a block and 30 beside.
constexpr size_t start_of_backward = 1;

TEST_CASE("Dense cross entropy takes so many operations", "[device][count]") {
  const std::map<torch::ScalarType, size_t> bounds{
      {torch::kDouble, 29}, {torch::kFloat, 29}, {torch::kHalf, 30}, {torch::kBFloat16, 30}};
  for (const auto& [type, bound] : bounds) {
    INFO(type);
    const Tensor input = leaf(on_device(logits.to(type))), beside = on_device(targets);
    std::vector<std::string> operations;
    without_waiting([&] { return gradient(compute_reconstruction_loss(input, beside), input); }, &operations);
    print(std::string("cross entropy, ") + c10::toString(type), operations);
    CHECK(operations.size() <= bound + start_of_backward);
  }
}

TEST_CASE("Dense cross entropy moves one pass more than F::cross_entropy", "[device][count]") {
  constexpr int64_t tokens = 32, all_classes = 4096;
  const Tensor input = leaf(on_device(eighths({tokens, all_classes}, torch::kFloat)));
  const Tensor beside = on_device(torch::arange(tokens));
  const auto bytes_of_element = [&](const auto& loss) {
    pretend_device::take_bytes();
    gradient(loss(), input);
    return static_cast<double>(pretend_device::take_bytes()) / static_cast<double>(input.numel());
  };
  const double eager = bytes_of_element([&] { return torch::nn::functional::cross_entropy(input, beside); });
  const double ours = bytes_of_element([&] { return compute_reconstruction_loss(input, beside); });
  std::cout << "bytes an element: F::cross_entropy " << eager << ", this " << ours << std::endl;
  CHECK(std::abs(eager - 36) < 0.1);  // the bytes of single numbers a row are what is left over
  CHECK(ours <= eager + 4 + 0.1);
}

TEST_CASE("The KL takes so many operations", "[device][count]") {
  const std::map<torch::ScalarType, size_t> bounds{
      {torch::kDouble, 20}, {torch::kFloat, 20}, {torch::kHalf, 20}, {torch::kBFloat16, 20}};
  for (const auto& [type, bound] : bounds) {
    INFO(type);
    const Tensor z = leaf(on_device(eighths({2, 3, bits_of_latent}, type)));
    std::vector<std::string> operations;
    without_waiting([&] { return gradient(compute_kl_divergence(z, bits_of_latent), z); }, &operations);
    print(std::string("KL, ") + c10::toString(type), operations);
    CHECK(operations.size() <= bound + start_of_backward);
  }
}

TEST_CASE("The fused head takes so many operations a block, and beside", "[device][count]") {
  struct Bounds {
    size_t of_block, beside;
  };
  const std::map<torch::ScalarType, Bounds> bounds{
      {torch::kDouble, {10, 27}}, {torch::kFloat, {10, 27}}, {torch::kHalf, {12, 29}}, {torch::kBFloat16, {12, 29}}};
  for (const auto& [type, bound] : bounds) {
    INFO(type);
    const std::vector<Tensor> inputs{leaf(on_device(hidden().to(type))), leaf(on_device(head_weight().to(type))),
                                     leaf(on_device(head_bias().to(type)))};
    const Tensor beside = on_device(targets);
    const auto operations_of_blocks = [&](int64_t blocks) {
      std::vector<std::string> operations;
      const auto head = LinearLogits(inputs[0], inputs[1], inputs[2])
                            .block_bytes(bytes_of(targets.numel() / blocks, inputs[0].scalar_type()));
      without_waiting([&] { return torch::autograd::grad({compute_reconstruction_loss(head, beside)}, inputs); },
                      &operations);
      return operations;
    };
    const auto of_two = operations_of_blocks(2), of_three = operations_of_blocks(3);
    const size_t of_block = of_three.size() - of_two.size();
    print(std::string("fused head of two blocks, ") + c10::toString(type), of_two);
    std::cout << "  " << of_block << " a block, " << of_two.size() - 2 * of_block << " beside" << std::endl;
    CHECK(of_block <= bound.of_block);
    CHECK(of_two.size() - 2 * of_block <= bound.beside + start_of_backward);
  }
}
