// Ranks that refuse, disagree or die: an error on every other rank, and never a hang.
#include "../unit/numeric.hpp"
#include "free_transformer/distributed.hpp"
#include "free_transformer/losses.hpp"
#include "group.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;
using ranks::group;

/// What one rank has otherwise than the others.
struct Case {
  int64_t positions = 6, vocab_size = 24, padded_size = 24, columns = 0;
  Tensor targets = torch::arange(6);
  ReconstructionLossOptions options;
  torch::ScalarType type = torch::kDouble;
};

std::string error_of_case(const Case& with) {
  const int64_t rank = ranks::rank(), size = ranks::size();
  const int64_t columns = with.padded_size * (rank + 1) / size - with.padded_size * rank / size + with.columns;
  const Tensor shard = eighths({with.positions, columns}, with.type);
  return error_of([&] {
    compute_reconstruction_loss(VocabParallelLogits(shard, group(), with.vocab_size).padded_size(with.padded_size),
                                with.targets, with.options);
  });
}

/// This rank's error where only the last rank has `other`.
std::string error_where_last_has(const Case& other) {
  return error_of_case(ranks::rank() == ranks::size() - 1 ? other : Case());
}

bool contains(const std::string& text, const std::string& part) {
  if (text.find(part) == std::string::npos) WARN("'" << text << "' lacks '" << part << "'");
  return text.find(part) != std::string::npos;
}

/// A refusal is the last rank's own error, and names it on the others.
void check_refusal(const Case& other, const std::string& own) {
  const bool is_last = ranks::rank() == ranks::size() - 1;
  const auto text = after_name("compute_reconstruction_loss", error_where_last_has(other));
  CHECK(contains(text, is_last ? own : "got a refusal from rank " + std::to_string(ranks::size() - 1)));
  CHECK(error_of_case(Case()) == "");  // all are in step
}

/// The same text for all, or for one rank no error.
void check_disagreement(const Case& other, const std::string& name) {
  const auto text = error_where_last_has(other);
  if (ranks::size() == 1) {
    CHECK(text == "");
  } else {
    CHECK(contains(after_name("compute_reconstruction_loss", text),
                   name + " must be the same on all ranks of the group"));
  }
  CHECK(error_of_case(Case()) == "");
}

template <typename Change>
Case changed(const Change& change) {
  Case with;
  change(with);
  return with;
}

}  // namespace

TEST_CASE("What one rank refuses is an error on every rank", "[vocabulary][failure]") {
  check_refusal(changed([](Case& with) { with.targets[3] = 24; }), "targets must lie in [0, 24)");
  check_refusal(changed([](Case& with) { with.targets[3] = -1; }), "got -1 at position 3");
  check_refusal(changed([](Case& with) { with.targets = Tensor(); }), "targets must be a defined tensor");
  check_refusal(changed([](Case& with) { with.targets = torch::arange(5); }), "targets must have the shape");
  check_refusal(changed([](Case& with) {
                  with.targets = torch::rand({6, 24}, torch::kDouble);
                }),
                "got class probabilities");
  check_refusal(changed([](Case& with) { with.options.inplace(true); }), "inplace must be false");
  check_refusal(changed([](Case& with) { with.options.z_loss(-1); }), "z_loss must be finite and >= 0");
  check_refusal(changed([](Case& with) { with.options.normalizer(0.0); }), "normalizer must be finite and > 0");
  check_refusal(changed([](Case& with) { with.options.weight(torch::ones({2})); }),
                "weight must have the part of this rank's columns");
  check_refusal(changed([](Case& with) { with.columns = 1; }), "logits must have the columns [");
  check_refusal(changed([](Case& with) { with.vocab_size = 25; }), "padded_size must be at least vocab_size = 25");
  check_refusal(changed([](Case& with) { with.vocab_size = 0; }), "vocab_size must be at least 1");
  check_refusal(changed([](Case& with) { with.type = torch::kInt; }), "logits must be of type");
}

TEST_CASE("What one rank refuses of the whole loss is an error on every rank", "[vocabulary][failure]") {
  const int64_t last = ranks::size() - 1;
  const auto error_where_last_has = [&](const VAELossOptions& options, const Tensor& z_logits, bool is_head) {
    const bool is_last = ranks::rank() == last;
    const auto loss_of = [&](const auto& own_columns) {
      const VocabParallelLogits<std::decay_t<decltype(own_columns)>> logits(own_columns, group(), 4 * ranks::size());
      return error_of([&] {
        compute_vae_loss(logits, torch::arange(6) % 4, is_last ? z_logits : eighths({6, 5}),
                         is_last ? options : VAELossOptions().latent_dim(5));
      });
    };
    return is_head ? loss_of(LinearLogits(eighths({6, 3}), eighths({4, 3}))) : loss_of(eighths({6, 4}));
  };
  const auto fitting = VAELossOptions().latent_dim(5);
  for (const bool is_head : {false, true}) {
    const auto check = [&](const VAELossOptions& options, const Tensor& z_logits, const std::string& own) {
      const auto text = error_where_last_has(options, z_logits, is_head);
      CHECK(contains(text, ranks::rank() == last ? own : "got a refusal from rank " + std::to_string(last)));
      CHECK(error_where_last_has(fitting, eighths({6, 5}), is_head) == "");  // all are in step
    };
    check(fitting, Tensor(), "z_logits must be a defined tensor");
    check(fitting, eighths({6, 4}), "z_logits must have latent_dim = 5");
    check(fitting, torch::ones({6, 5}, torch::kInt), "z_logits must be of type");
    check(VAELossOptions(fitting).mask_ignored_latents(true), eighths({7, 5}), "z_logits must have the positions");
    check(VAELossOptions(fitting).beta_kl(-1), eighths({6, 5}), "beta_kl must be finite and >= 0");
    check(VAELossOptions(fitting).kl(KLDivergenceOptions(fitting.kl()).normalizer(0.0)), eighths({6, 5}),
          "normalizer must be finite and > 0");
  }
}

TEST_CASE("Ranks that disagree are an error on every rank", "[vocabulary][failure]") {
  check_disagreement(changed([](Case& with) { with.positions = 7, with.targets = torch::arange(7); }),
                     "the number of positions");
  check_disagreement(changed([](Case& with) { with.vocab_size = 23; }), "vocab_size");
  check_disagreement(changed([](Case& with) { with.padded_size = 48; }), "padded_size");
  check_disagreement(changed([](Case& with) { with.type = torch::kFloat; }),
                     "the type of the logits (its number in LibTorch)");
  check_disagreement(changed([](Case& with) { with.targets[2] = 7; }), "targets (a checksum)");
  check_disagreement(changed([](Case& with) { with.options.ignore_index(-1); }), "ignore_index");
  check_disagreement(changed([](Case& with) { with.options.label_smoothing(0.1); }), "label_smoothing");
  check_disagreement(changed([](Case& with) { with.options.z_loss(0.1); }), "z_loss");
  check_disagreement(changed([](Case& with) { with.options.softcap(9); }), "softcap");
  check_disagreement(changed([](Case& with) { with.options.reduction(torch::kSum); }),
                     "reduction (kMean 0, kSum 1, kNone 2)");
  check_disagreement(changed([](Case& with) { with.options.normalizer(3); }), "normalizer (0 for none)");
  check_disagreement(changed([](Case& with) { with.options.normalizer(torch::ones({})); }),
                     "normalizer (a tensor, 0 for none)");
  check_disagreement(changed([](Case& with) { with.options.accuracy(true); }), "accuracy (1, or 2 for statistics)");
  check_disagreement(changed([](Case& with) { with.options.token_weight(torch::ones({6})); }),
                     "token_weight (1 if there is one)");
  check_disagreement(changed([](Case& with) {
                       const int64_t rank = ranks::rank(), size = ranks::size();
                       with.options.weight(torch::ones({24 * (rank + 1) / size - 24 * rank / size}));
                     }),
                     "weight (1 if there is one)");
}

TEST_CASE("Hidden states that want a gradient on some ranks only are an error on every rank",
          "[vocabulary][linear][failure]") {
  const auto loss = [&](bool wants) {
    const Tensor hidden = eighths({6, 3}).requires_grad_(wants), weight = leaf(eighths({4, 3}));
    const LinearLogits head(hidden, weight);
    return error_of([&] {
      compute_reconstruction_loss(VocabParallelLogits(head, group(), 4 * ranks::size()), torch::arange(6) % 4);
    });
  };
  const auto text = loss(/*wants=*/ranks::rank() == 0);
  CHECK(contains(text, ranks::size() == 1 ? "" : "hidden.requires_grad must be the same on all ranks"));
  CHECK(loss(true) == "");
}

TEST_CASE("one rank is gone: the others get an error that names them and c10d's reason", "[killed]") {
  REQUIRE(ranks::size() == 3);
  REQUIRE(error_of_case(Case()) == "");
  if (ranks::rank() == 2) std::raise(SIGKILL);
  const auto text = error_of_case(Case());
  WARN(text);
  CHECK(contains(text, "all ranks of the group must take part within its time-out, but rank " +
                           std::to_string(ranks::rank()) + " of 3 got from c10d: "));
}

TEST_CASE("one rank goes between the messages: the others get an error", "[killed]") {
  REQUIRE(ranks::size() == 3);
  ranks::WatchedGroup watched;
  if (ranks::rank() == 2) watched.killed_before = 1;
  const auto text = error_of([&] {
    compute_reconstruction_loss(VocabParallelLogits(eighths({6, 8}), &watched, 24), torch::arange(6));
  });
  WARN(text);
  CHECK(contains(text, "all ranks of the group must take part within its time-out, but rank "));
}

TEST_CASE("one rank hangs: the others get an error once the time-out of the group is over", "[killed]") {
  REQUIRE(ranks::size() == 3);
  REQUIRE(error_of_case(Case()) == "");
  if (ranks::rank() == 2) std::raise(SIGSTOP);
  const auto start = std::chrono::steady_clock::now();
  const auto text = error_of_case(Case());
  const std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
  WARN(text);
  CHECK(contains(text, "all ranks of the group must take part within its time-out, but rank " +
                           std::to_string(ranks::rank()) + " of 3 got from c10d: "));
  const double timeout = ranks::number("SECONDS_OF_GROUP", 20);
  CHECK(waited.count() > 0.5 * timeout);  // the connections are whole: what ends the wait is the time
  CHECK(waited.count() < 2 * timeout + 5);
}
