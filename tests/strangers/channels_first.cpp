// A language model of convolutions: its head hands over logits [batch, classes, time], the order that F::cross_entropy takes.
// Here the classes come last: `logits.movedim(1, -1)`, which copies nothing. Without it the call is refused where shapes tell;
// where there are as many classes as times they do not.
#include <torch/csrc/autograd/autograd.h>

#include <string>

#include <free_transformer/reconstruction_loss.hpp>

#include "equations.hpp"
#include "expect.hpp"

namespace {

using free_transformer::compute_reconstruction_loss;
using free_transformer::ReconstructionLossOptions;
namespace F = torch::nn::functional;

struct Head {
  at::Tensor hidden, weight, targets;

  Head(int64_t classes, int64_t time)
      : hidden(at::randn({3, 24, time})),
        weight(at::randn({classes, 24, 1}).requires_grad_()),
        targets(at::randint(classes, {3, time}, at::kLong)) {
    targets.narrow(1, time - 2, 2).fill_(-100);  // the last are padding
  }

  at::Tensor logits() const { return at::conv1d(hidden, weight); }
};

/// One way to call, beside F::cross_entropy on the logits as they are.
template <typename Call>
void expect_what_libtorch_gives(const Head& head, const std::string& what, const Call& call,
                                const F::CrossEntropyFuncOptions& options = {}) {
  const at::Tensor logits = head.logits(), exact = exact_leaf(logits);
  const at::Tensor expected = F::cross_entropy(exact, head.targets, options);
  const at::Tensor loss = call(logits);
  expect_close(loss, expected, what);
  expect_close(torch::autograd::grad({loss}, {logits}, {}, /*retain_graph=*/true)[0],
               torch::autograd::grad({expected}, {exact})[0], what + ", gradient");
  loss.backward();
  expect(head.weight.grad().defined() && head.weight.grad().any().item<bool>(), what + ": the head learns nothing");
}

void train_a_head(int64_t classes, int64_t time) {
  const Head head(classes, time);
  const std::string shape = std::to_string(classes) + " classes, " + std::to_string(time) + " times: ";
  expect_what_libtorch_gives(head, shape + "a view", [&](const at::Tensor& logits) {
    return compute_reconstruction_loss(logits.movedim(1, -1), head.targets);
  });
  expect_what_libtorch_gives(head, shape + "a copy", [&](const at::Tensor& logits) {
    return compute_reconstruction_loss(logits.movedim(1, -1).contiguous(), head.targets);
  });
  expect_what_libtorch_gives(
      head, shape + "smoothed",
      [&](const at::Tensor& logits) {
        return compute_reconstruction_loss(logits.movedim(1, -1), head.targets,
                                           ReconstructionLossOptions().label_smoothing(0.1));
      },
      F::CrossEntropyFuncOptions().label_smoothing(0.1));
}

void forget_to_turn_the_logits() {
  const Head head(257, 20);
  try {
    compute_reconstruction_loss(head.logits(), head.targets);
    expect(false, "logits [batch, classes, time] are taken");
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    expect(text.find("movedim(1, -1)") != std::string::npos, "the error does not say what to do: " + text);
  }
}

}  // namespace

int main() {
  at::manual_seed(1);
  train_a_head(257, 20);
  train_a_head(20, 20);
  forget_to_turn_the_logits();
  return verdict("channels_first");
}
