#include "../numeric.hpp"
#include "free_transformer/losses.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

const auto inplace = ReconstructionLossOptions().inplace(true);

/// A linear head, so that the logits are in the middle of a graph.
struct Head {
  Tensor hidden = leaf(eighths({6, 8}, torch::kFloat)), weight = leaf(eighths({50, 8}, torch::kFloat, 2) / 4);
  Tensor targets = torch::arange(6) * 7;

  Tensor logits() const { return torch::linear(hidden, weight); }
  std::vector<Tensor> gradients(const Tensor& loss) const { return torch::autograd::grad({loss}, {hidden, weight}); }
};

void check_equal(const std::vector<Tensor>& found, const std::vector<Tensor>& expected) {
  for (size_t index = 0; index < expected.size(); ++index) CHECK(same_bits(found[index], expected[index]));
}

/// The gradient of a loss to logits that are no leaf.
Tensor gradient_inside_a_graph(const Tensor& values, const std::function<Tensor(const Tensor&)>& loss) {
  const Tensor logits = values * leaf(torch::ones({}, values.options()));
  Tensor gradient;
  logits.register_hook([&](const Tensor& flowing) { gradient = flowing.clone(); });
  loss(logits).backward();
  return gradient;
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

}  // namespace

TEST_CASE("In place the loss and the gradients have the bits of fresh memory", "[inplace][gradient]") {
  const Head head;
  for (const auto type : all_types) {
    INFO(type);
    const auto run = [&](const ReconstructionLossOptions& options) {
      return gradient_inside_a_graph(eighths({6, 50}, type), [&](const Tensor& logits) {
        return compute_reconstruction_loss(logits, head.targets, options);
      });
    };
    CHECK(same_bits(run(inplace), run({})));
  }
  CHECK(same_bits(compute_reconstruction_loss(head.logits(), head.targets, inplace),
                  compute_reconstruction_loss(head.logits(), head.targets)));
  check_equal(head.gradients(compute_reconstruction_loss(head.logits(), head.targets, inplace)),
              head.gradients(compute_reconstruction_loss(head.logits(), head.targets)));
}

TEST_CASE("In place takes an upstream gradient, ignored tokens and every option", "[inplace][gradient]") {
  const Head head;
  const auto options = [](bool overwrites) {
    return ReconstructionLossOptions()
        .ignore_index(14)
        .label_smoothing(0.125)
        .z_loss(0.25)
        .softcap(8)
        .token_weight(torch::arange(6, torch::kFloat))
        .normalizer(5)
        .reduction(torch::kSum)
        .inplace(overwrites);
  };
  check_equal(head.gradients(3 * compute_reconstruction_loss(head.logits(), head.targets, options(true))),
              head.gradients(3 * compute_reconstruction_loss(head.logits(), head.targets, options(false))));
}

TEST_CASE("In place keeps float16 gradients from underflow under a gradient scaler", "[inplace][half]") {
  const Tensor values = eighths({6, 50}, torch::kHalf), targets = torch::arange(6) * 7;
  const auto gradient_of = [&](bool overwrites) {
    const auto options = ReconstructionLossOptions().normalizer(1e5).inplace(overwrites);
    return gradient_inside_a_graph(
        values, [&](const Tensor& logits) { return compute_reconstruction_loss(logits, targets, options) * 65536; });
  };
  CHECK(gradient_of(true).count_nonzero().item<int64_t>() > 250);
  CHECK(same_bits(gradient_of(true), gradient_of(false)));
}

TEST_CASE("In place rounds a bfloat16 gradient again after an upstream factor, and no coarser", "[inplace][half]") {
  const Tensor values = eighths({6, 50}, torch::kBFloat16), targets = torch::arange(6) * 7;
  const auto gradient_of = [&](torch::ScalarType type, bool overwrites) {
    return gradient_inside_a_graph(values.to(type), [&](const Tensor& logits) {
      return compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().inplace(overwrites)) / 3;
    });
  };
  // half a step for each of the two roundings
  CHECK(difference(gradient_of(torch::kBFloat16, true), gradient_of(torch::kDouble, false),
                   epsilon(torch::kBFloat16) / 2 + 1e-6) == "");
}

TEST_CASE("In place is used on the logits' own memory", "[inplace][memory]") {
  const Head head;
  const Tensor logits = head.logits();
  const Tensor expected = torch::softmax(logits.detach(), -1) - torch::nn::functional::one_hot(head.targets, 50);
  compute_reconstruction_loss(logits, head.targets, inplace);
  CHECK(difference(logits.detach() * 6, expected, 4 * epsilon(torch::kFloat), 1) == "");
}

TEST_CASE("Shifted logits are written over where they lie in their tensor, and nowhere else", "[inplace][layout]") {
  const Head head;
  const auto targets = head.targets.slice(0, 0, 4).view({2, 2});
  const auto gradients = [&](const ReconstructionLossOptions& options) {
    const Tensor all = head.logits().view({2, 3, 50});
    return head.gradients(compute_reconstruction_loss(all.slice(1, 0, 2), targets, options));
  };
  check_equal(gradients(inplace), gradients({}));

  const Tensor all = head.logits().view({2, 3, 50});
  const Tensor last = all.detach().slice(1, 2, 3).clone();
  compute_reconstruction_loss(all.slice(1, 0, 2), targets, inplace);
  CHECK(same_bits(all.detach().slice(1, 2, 3), last));
}

TEST_CASE("Without a gradient, or with one for each position, in place leaves the logits as they are", "[inplace]") {
  const Head head;
  const Tensor logits = head.logits(), before = logits.detach().clone();
  {
    const torch::NoGradGuard no_grad;
    compute_reconstruction_loss(logits, head.targets, inplace);
  }
  compute_reconstruction_loss(logits, head.targets, ReconstructionLossOptions(inplace).reduction(torch::kNone));
  CHECK(same_bits(logits, before));
}

TEST_CASE("In place refuses logits whose value the user still owns, before it writes", "[inplace][errors]") {
  const Head head;
  const Tensor parameter = leaf(eighths({7, 50}, torch::kFloat)), before = parameter.detach().clone();
  const std::string leaf_error =
      "compute_reconstruction_loss: logits must not be a leaf that requires grad, or a view of one, with inplace: its "
      "value would be lost";
  const auto error = [&](const Tensor& logits, const Tensor& targets) {
    return error_of([&] { compute_reconstruction_loss(logits, targets, inplace); });
  };
  CHECK(error(parameter, torch::arange(7)) == leaf_error);
  CHECK(error(parameter.slice(0, 0, 6), head.targets) == leaf_error);
  CHECK(same_bits(parameter, before));
  CHECK(error(head.logits().slice(0, 0, 1).expand({3, 50}), torch::arange(3)) ==
        "compute_reconstruction_loss: logits must not be expanded with inplace, got strides [0, 1]");
  const Tensor chunk = head.logits().chunk(2)[0], chunk_before = chunk.detach().clone();
  CHECK(error(chunk, head.targets.slice(0, 0, 3)) ==
        "compute_reconstruction_loss: logits must not be one of several outputs of an operation (chunk, unbind), or a "
        "view that was made without grad mode, with inplace: autograd cannot follow a change of it");
  CHECK(same_bits(chunk, chunk_before));
}

TEST_CASE("A wrong use of logits that were written over is an error", "[inplace][errors][memcheck]") {
  const Head head;
  const Tensor logits = head.logits();
  const auto loss_of = [&](const Tensor& of) { return compute_reconstruction_loss(of, head.targets, inplace); };

  SECTION("a second backward") {
    const Tensor loss = loss_of(logits);
    loss.backward({}, /*retain_graph=*/true);
    CHECK(error_of([&] { loss.backward(); }) ==
          "compute_reconstruction_loss: inplace must be false for a second backward");
  }
  SECTION("a graph of the gradient") {
    const Tensor loss = loss_of(logits);
    CHECK(error_of([&] { loss.backward({}, /*retain_graph=*/true, /*create_graph=*/true); }) ==
          "compute_reconstruction_loss: inplace must be false for a double backward (create_graph)");
  }
  SECTION("a later read through the graph") {
    const Tensor loss = loss_of(logits);
    CHECK(error_of([&] { (loss + logits.sum()).backward(); }) ==
          "compute_reconstruction_loss: logits were read after inplace had overwritten them with their gradient");
  }
  SECTION("an operation that has saved them before") {
    const Tensor squares = logits.square().sum();
    const Tensor loss = loss_of(logits);
    CHECK(contains(error_of([&] { (loss + squares).backward(); }), "modified by an inplace operation"));
  }
  SECTION("an operation that has saved its result") {
    const Tensor loss = loss_of(logits.exp());
    CHECK(contains(error_of([&] { loss.backward(); }), "modified by an inplace operation"));
  }
  SECTION("a read of the tensor that they are a view of") {
    const Tensor all = logits.view({2, 3, 50});
    const Tensor loss =
        compute_reconstruction_loss(all.slice(1, 0, 2), head.targets.slice(0, 0, 4).view({2, 2}), inplace);
    CHECK(contains(error_of([&] { (loss + all.sum()).backward(); }), "logits were read after inplace"));
  }
  SECTION("their memory changed before backward") {
    const Tensor loss = loss_of(logits);
    logits.detach().zero_();
    CHECK(error_of([&] { loss.backward(); }) ==
          "compute_reconstruction_loss: logits were changed after inplace had overwritten them with their gradient");
  }
  SECTION("a second loss of the same logits") {
    const Tensor loss = loss_of(logits);
    CHECK(error_of([&] { (loss + loss_of(logits)).backward(); }) != "");
  }
}
