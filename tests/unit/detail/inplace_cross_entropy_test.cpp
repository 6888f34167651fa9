#include "../numeric.hpp"
#include "free_transformer/losses.hpp"

namespace {

using namespace free_transformer;
using namespace numeric;

const auto inplace = ReconstructionLossOptions().inplace(true);

/// A linear head, so that the logits are in the middle of a graph.
struct DenseHead {
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
  const DenseHead head;
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
  const DenseHead head;
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

TEST_CASE("In place what does not count keeps its 0 under an upstream that is infinite or NaN", "[inplace][gradient]") {
  for (const auto type : all_types) {
    for (const double factor : {reference::inf, not_a_number}) {
      INFO(type << ", upstream " << factor);
      const Tensor found = gradient_inside_a_graph(eighths({3, 50}, type), [&](const Tensor& logits) {
        const auto options = ReconstructionLossOptions().inplace(true);
        return compute_reconstruction_loss(logits, torch::tensor({-100, 7, -100}), options) * factor;
      });
      CHECK(found[0].count_nonzero().item<int64_t>() == 0);
      CHECK(found[1].isfinite().sum().item<int64_t>() == 0);
      CHECK(found[2].count_nonzero().item<int64_t>() == 0);
    }
  }
}

TEST_CASE("In place keeps float16 gradients from underflow under a gradient scaler", "[inplace][half]") {
  const Tensor values = eighths({6, 50}, torch::kHalf), targets = torch::arange(6) * 7;
  const auto gradient_of = [&](bool overwrites) {
    const auto options = ReconstructionLossOptions().normalizer(1e5).inplace(overwrites);
    return gradient_inside_a_graph(
        values, [&](const Tensor& logits) { return compute_reconstruction_loss(logits, targets, options) * 65536; });
  };
  CHECK((gradient_of(true).abs() > 0).sum().item<int64_t>() > 250);  // of 300; a NaN is not
  CHECK(same_bits(gradient_of(true), gradient_of(false)));
}

TEST_CASE("In place rounds a bfloat16 gradient again after an upstream factor, and no coarser", "[inplace][half]") {
  const Tensor values = eighths({6, 50}, torch::kBFloat16), targets = torch::arange(6) * 7;
  const auto gradient_of = [&](torch::ScalarType type, bool overwrites) {
    return gradient_inside_a_graph(values.to(type), [&](const Tensor& logits) {
      return compute_reconstruction_loss(logits, targets, ReconstructionLossOptions().inplace(overwrites)) / 3;
    });
  };
  // half a step for each of the two roundings, and the 8 of a float32 gradient
  CHECK(difference(gradient_of(torch::kBFloat16, true), gradient_of(torch::kDouble, false),
                   epsilon(torch::kBFloat16) / 2 + 8 * epsilon(torch::kFloat)) == "");
}

TEST_CASE("In place is used on the logits' own memory", "[inplace][memory]") {
  const DenseHead head;
  const Tensor logits = head.logits();
  const Tensor expected = torch::softmax(logits.detach(), -1) - torch::nn::functional::one_hot(head.targets, 50);
  compute_reconstruction_loss(logits, head.targets, inplace);
  CHECK(difference(logits.detach() * 6, expected, 4 * epsilon(torch::kFloat), 1) == "");
}

TEST_CASE("Shifted logits are written over where they lie in their tensor, and nowhere else", "[inplace][layout]") {
  const DenseHead head;
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
  const DenseHead head;
  const Tensor logits = head.logits(), before = logits.detach().clone();
  {
    const torch::NoGradGuard no_grad;
    compute_reconstruction_loss(logits, head.targets, inplace);
  }
  compute_reconstruction_loss(logits, head.targets, ReconstructionLossOptions(inplace).reduction(torch::kNone));
  CHECK(same_bits(logits, before));
}

TEST_CASE("In place refuses logits whose value the user still owns, before it writes", "[inplace][errors]") {
  const DenseHead head;
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
  const Tensor chunk = head.logits().chunk(2)[0], chunk_before = chunk.detach().clone();
  CHECK(error(chunk, head.targets.slice(0, 0, 3)) ==
        "compute_reconstruction_loss: logits must not be one of several outputs of an operation (chunk, unbind), or a "
        "view that was made without grad mode, with inplace: autograd cannot follow a change of it");
  CHECK(same_bits(chunk, chunk_before));
}

TEST_CASE("In place refuses elements that share memory, in every way that tensors can", "[inplace][errors]") {
  const Tensor source = leaf(eighths({64}, torch::kFloat));
  const auto refused = [&](const std::function<Tensor(const Tensor&)>& view) {
    const Tensor base = source * 1, before = base.detach().clone();
    const Tensor logits = view(base);
    const auto positions = logits.sizes().slice(0, static_cast<size_t>(logits.dim() - 1));
    const std::string text =
        error_of([&] { compute_reconstruction_loss(logits, torch::zeros(positions, torch::kLong), inplace); });
    CHECK(same_bits(base, before) != text.empty());  // an error comes before the first write
    return contains(text, "logits must not share memory among their own elements");
  };
  const auto strided = [](const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
    return [=](const Tensor& base) { return base.as_strided(sizes, strides, /*storage_offset=*/0); };
  };
  CHECK(refused([](const Tensor& base) { return base.unfold(0, 5, 1); }));
  CHECK(refused([](const Tensor& base) { return base.unfold(0, 5, 4); }));
  CHECK_FALSE(refused([](const Tensor& base) { return base.unfold(0, 5, 5); }));
  CHECK_FALSE(refused([](const Tensor& base) { return base.unfold(0, 5, 7); }));
  CHECK(refused([](const Tensor& base) { return base.slice(0, 0, 8).expand({3, 8}); }));
  CHECK(refused([](const Tensor& base) { return base.view({4, 1, 16}).expand({4, 2, 16}); }));
  CHECK_FALSE(refused([](const Tensor& base) { return base.view({1, 64}).expand({1, 64}); }));
  CHECK(refused(strided({4, 4}, {3, 1})));
  CHECK_FALSE(refused(strided({4, 4}, {4, 1})));
  CHECK(refused(strided({2, 3, 4}, {7, 4, 1})));
  CHECK_FALSE(refused(strided({2, 3, 4}, {4, 8, 1})));
  CHECK(refused(strided({3, 1}, {0, 1})));
  CHECK_FALSE(refused([](const Tensor& base) { return base.view({4, 16}).slice(1, 3, 9); }));
  CHECK_FALSE(refused([](const Tensor& base) { return base.view({4, 2, 8}).transpose(0, 1); }));
}

TEST_CASE("In place refuses what it reads in the logits' memory, and takes what lies beside it", "[inplace][errors]") {
  const Tensor source = leaf(eighths({6, 66}, torch::kFloat).abs());
  const std::string reason = " must not lie in the memory of logits that are given inplace";
  const auto error = [&](const Tensor& all, const Tensor& logits, const ReconstructionLossOptions& options,
                         const Tensor& targets = torch::arange(6)) {
    const Tensor before = all.detach().clone();
    const auto overwriting = ReconstructionLossOptions(options).inplace(true);
    std::string text = error_of([&] { compute_reconstruction_loss(logits, targets, overwriting); });
    CHECK(same_bits(all, before) != text.empty());
    if (!text.empty()) {
      CHECK(error_of([&] {
              compute_vae_loss(logits, targets, eighths({6, 16}), VAELossOptions().reconstruction(overwriting));
            }) == text);
      CHECK(same_bits(all, before));
    }
    return text;
  };
  const auto part = [](const Tensor& all) { return all.detach().view({-1}); };
  const Tensor all = source * 1;
  const auto weights = ReconstructionLossOptions().token_weight(part(all).slice(0, 3, 9));
  CHECK(contains(error(all, all, weights), "token_weight" + reason));
  CHECK(contains(error(all, all, ReconstructionLossOptions().weight(all.detach()[2])), "weight" + reason));
  const Tensor own = source * 1, labels = part(own).view(torch::kLong).slice(0, 3, 9);
  labels.zero_();
  CHECK(contains(error(own, own, {}, labels), "targets" + reason));
  const auto weights_beside = ReconstructionLossOptions().token_weight(part(all).slice(0, 57, 63));
  CHECK(error(all, all.slice(1, 0, 50), weights_beside).empty());
}

TEST_CASE("What the latent term reads may lie in the logits' memory, or in columns of the same projection",
          "[inplace][vae][gradient][cpu]") {
  using Arguments = std::function<void(const Tensor& all, VAELossOptions&, Tensor& targets, Tensor& z_logits)>;
  const std::vector<std::pair<std::string, Arguments>> cases{
      {"z_logits beside them", [](const Tensor& all, auto&, auto&, Tensor& z) { z = all.slice(1, 50, 66); }},
      {"z_logits among them", [](const Tensor& all, auto&, auto&, Tensor& z) { z = all.slice(1, 40, 56); }},
      {"a prior beside them",
       [](const Tensor& all, VAELossOptions& options, auto&, Tensor& z) {
         z = all.slice(1, 50, 66);
         options.kl().prior_logits(all.slice(1, 60, 76));
       }},
      {"a constant prior among them", [](const Tensor& all, VAELossOptions& options, auto&,
                                         auto&) { options.kl().prior_logits(all.detach()[1].slice(0, 1, 17)); }},
      {"the weight of z_logits", [](const Tensor& all, VAELossOptions& options, auto&,
                                    auto&) { options.kl().token_weight(all.detach().select(1, 3)); }},
      {"the normalizer of z_logits",
       [](const Tensor& all, VAELossOptions& options, auto&, auto&) { options.kl().normalizer(all.detach()[2][4]); }},
      {"targets that mask z_logits",
       [](const Tensor& all, VAELossOptions& options, Tensor& targets, auto&) {
         targets = all.detach().view({-1}).view(torch::kInt).slice(0, 3, 9);
         targets.copy_(torch::tensor({7, 0, 7, 1, 0, 2}));
         options.ignore_index(7).mask_ignored_latents(true);
       }},
      {"weights of the targets that mask z_logits",  // in steps of a row, so that both terms have a copy
       [](const Tensor& all, VAELossOptions& options, auto&, auto&) {
         all.detach().select(1, 3).slice(0, 1, 3).zero_();
         options.reconstruction().token_weight(all.detach().select(1, 3));
         options.mask_ignored_latents(true);
       }},
  };
  for (const auto& of_case : cases) {
    const auto& name = of_case.first;
    const auto& arguments = of_case.second;
    for (const auto type : all_types) {
      for (const bool strided : {false, true}) {
        INFO(name << ", " << type << (strided ? ", strided" : ""));
        const Tensor source = leaf(eighths({6, 76}, type).abs() + 0.125);
        const auto run = [&](bool overwrites) {
          const Tensor all = strided ? torch::stack({source, source}, -1).select(-1, 1) : source * 1;
          VAELossOptions options;
          options.beta_kl(0.5).free_bits(0.0);
          options.reconstruction().inplace(overwrites);
          Tensor targets = torch::arange(6), own_z = leaf(eighths({6, 16}, type)), z_logits = own_z;
          if (strided && contains(name, "targets")) return std::vector<Tensor>();  // have no view of another type
          arguments(all, options, targets, z_logits);
          if (!overwrites) z_logits = z_logits.clone();  // whose rows then take the same way
          const auto [loss, metrics] = compute_vae_loss(all.slice(1, 0, 50), targets, z_logits, options);
          auto found = torch::autograd::grad({loss}, {source, own_z}, {}, {}, false, /*allow_unused=*/true);
          for (Tensor& gradient : found) gradient = gradient.defined() ? gradient : torch::zeros({});
          found.push_back(loss);
          for (const auto& [metric, value] : metrics) found.push_back(torch::tensor(value));
          return found;
        };
        check_equal(run(true), run(false));
      }
    }
  }
}

TEST_CASE("Logits that nothing is written over may share their memory with all arguments", "[inplace][vae][cpu]") {
  for (const auto& device : {torch::kCPU, torch::kMeta}) {
    for (const auto type : all_types) {
      for (const bool unreduced : {false, true}) {
        if (device == torch::kCPU && type != torch::kDouble && !unreduced) continue;
        const Tensor source = torch::ones({6, 50}, torch::dtype(type).device(device)).requires_grad_();
        const Tensor logits = source * 1, z_logits = logits.slice(1, 0, 16);
        VAELossOptions options;
        options.reconstruction().inplace(true).token_weight(logits.detach().select(1, 0));
        if (unreduced) options.reconstruction().reduction(torch::kNone), options.kl().reduction(torch::kNone);
        const Tensor targets = torch::zeros({6}, torch::dtype(torch::kLong).device(device));
        const Tensor loss = compute_vae_loss(logits, targets, z_logits, options).loss;
        CHECK(loss.device() == device);
        loss.sum().backward();
        CHECK(source.grad().sizes() == source.sizes());
        CHECK(error_of([&] { compute_vae_loss(logits, targets, z_logits.detach().clone(), options); }).empty());
      }
    }
  }
}

TEST_CASE("A gradient that the caller wants kept at the logits is refused in place", "[inplace][errors]") {
  const DenseHead head;
  const auto loss_of = [&](const Tensor& logits) { return compute_reconstruction_loss(logits, head.targets, inplace); };
  const std::string refusal = "logits must not retain_grad()";
  const auto ask_before = [&](const Tensor& asked, const Tensor& logits) {
    asked.retain_grad();
    return error_of([&] { loss_of(logits).backward(); });
  };
  const auto ask_after = [&](const Tensor& asked, const Tensor& logits) {
    const Tensor loss = loss_of(logits);
    asked.retain_grad();
    return error_of([&] { loss.backward(); });
  };
  for (const auto& run : {std::function<std::string(Tensor, Tensor)>(ask_before),
                          std::function<std::string(Tensor, Tensor)>(ask_after)}) {
    const Tensor logits = head.logits();
    CHECK(contains(run(logits, logits), refusal));
    const Tensor base = head.logits();
    CHECK(contains(run(base, base.view({6, 50})), refusal));
    const Tensor hidden = head.hidden * 1;
    CHECK(run(hidden, torch::linear(hidden, head.weight)).empty());  // what is not written over may keep its own
  }
}

TEST_CASE("Logits that hold their gradient are refused wherever they are given again", "[inplace][errors]") {
  const DenseHead head;
  const Tensor logits = head.logits();
  const Tensor alias = logits.detach(), part = alias.slice(0, 0, 2);
  const Tensor loss = compute_reconstruction_loss(logits, head.targets, inplace);
  const std::string refusal = "logits must not be used again after inplace";
  const auto check_refused = [&](const Tensor& again) {
    const Tensor targets = head.targets.slice(0, 0, again.size(0));
    CHECK(contains(error_of([&] { compute_reconstruction_loss(again, targets, inplace); }), refusal));
    CHECK(contains(error_of([&] { compute_reconstruction_loss(again, targets); }), refusal));
    CHECK(contains(error_of([&] { compute_token_statistics(again, targets); }), refusal));
    CHECK(contains(error_of([&] { compute_vae_loss(again, targets, eighths({again.size(0), 16})); }), refusal));
  };
  for (const Tensor& again : {logits, alias, part, logits.view({6, 50}), logits.detach()}) check_refused(again);
  loss.backward();
  check_refused(alias);
  alias.copy_(eighths({6, 50}, torch::kFloat));  // new numbers in the same memory are logits again
  CHECK(same_bits(compute_reconstruction_loss(alias, head.targets),
                  compute_reconstruction_loss(eighths({6, 50}, torch::kFloat), head.targets)));
  const Tensor both = torch::linear(head.hidden, torch::cat({head.weight, head.weight}));
  compute_reconstruction_loss(both.slice(1, 0, 50), head.targets, inplace);  // and the columns beside them still are
  CHECK(error_of([&] { compute_token_statistics(both.detach().slice(1, 50), head.targets); }).empty());
}

TEST_CASE("Logits that hold their gradient are refused after backward, too, whatever it was multiplied by",
          "[inplace][errors][cpu]") {
  const Tensor source = leaf(eighths({6, 58}, torch::kFloat)), targets = torch::arange(6) * 7;
  for (const auto type : {torch::kFloat, torch::kHalf, torch::kBFloat16}) {
    for (const double factor : {1.0, 0.5}) {
      for (const bool whole_loss : {false, true}) {
        for (const bool shifted : {false, true}) {
          INFO(type << ", times " << factor << (whole_loss ? ", whole loss" : "") << (shifted ? ", shifted" : ""));
          const Tensor all = source.to(type) * 1, logits = shifted ? all.slice(1, 4, 54) : all.view({-1, 58});
          const Tensor alias = logits.detach();
          const Tensor loss =
              whole_loss
                  ? compute_vae_loss(logits, targets, eighths({6, 16}), VAELossOptions().reconstruction(inplace)).loss
                  : compute_reconstruction_loss(logits, targets, inplace);
          (loss * factor).backward();
          const torch::NoGradGuard no_grad;
          for (const Tensor& again : {logits, alias, logits.detach(), alias.slice(0, 0, 2), alias.slice(1, 3, 50)}) {
            const Tensor labels = targets.slice(0, 0, again.size(0));
            const std::string refusal = "logits must not be used again after inplace";
            CHECK(contains(error_of([&] { compute_token_statistics(again, labels); }), refusal));
            CHECK(contains(error_of([&] { compute_reconstruction_loss(again, labels); }), refusal));
            CHECK(contains(error_of([&] { compute_vae_loss(again, labels, eighths({labels.size(0), 16})); }), refusal));
          }
          if (shifted) CHECK(error_of([&] { compute_token_statistics(all.slice(1, 0, 4), targets % 4); }).empty());
          alias.copy_(eighths({6, logits.size(1)}, type));
          CHECK(error_of([&] { compute_token_statistics(alias, targets); }).empty());
        }
      }
    }
  }
}

TEST_CASE("Memory that is filled with logits again and again is remembered once", "[inplace][cpu]") {
  const DenseHead head;
  const Tensor buffer = torch::empty({8, 50});
  const auto step = [&](int64_t first) {
    const Tensor part = buffer.detach().slice(0, first, first + 6);
    const Tensor logits = part.copy_(head.logits());
    compute_reconstruction_loss(logits, head.targets, inplace).backward();
  };
  auto& all = free_transformer::detail::OverwrittenLogits::instance();
  const auto before = all.size();
  for (int64_t index = 0; index < 100; ++index) step(index % 3);
  CHECK(all.size() == before + 1);
  CHECK(contains(error_of([&] { compute_token_statistics(buffer.detach().slice(0, 0, 6), head.targets); }), "again"));
}

TEST_CASE("What was made in InferenceMode is taken beside what requires a gradient", "[inplace][gradient][vae]") {
  using Copy = std::function<Tensor(const Tensor&)>;
  const Copy frozen = [](const Tensor& values) {
    const c10::InferenceMode inference;
    return values.clone();
  };
  for (const auto type : all_types) {
    INFO(type);
    const Tensor values = eighths({6, 50}, type), z_values = eighths({6, 16}, type, 2),
                 prior = eighths({16}, type, 3) / 4;
    const Tensor targets = torch::arange(6) * 7;
    const Tensor probabilities = torch::softmax(eighths({6, 50}, torch::kDouble, 4), -1).to(type);
    const Tensor weight = torch::arange(6, torch::kFloat), class_weight = eighths({50}, torch::kFloat).abs();
    const auto run = [&](bool learns_z, bool learns_prior, bool overwrites, bool soft, const Copy& copy) {
      const Tensor source = leaf(values), z = learns_z ? leaf(z_values) : copy(z_values);
      const Tensor own_prior = learns_prior ? leaf(prior) : copy(prior);
      VAELossOptions options;
      options.free_bits(0.0).mask_ignored_latents(true);
      options.kl().prior_logits(own_prior).token_weight(copy(weight)).normalizer(copy(torch::full({}, 3.0)));
      options.reconstruction().token_weight(copy(weight)).weight(copy(class_weight)).inplace(overwrites);
      const Tensor loss = compute_vae_loss(source * 1, copy(soft ? probabilities : targets), z, options).loss;
      std::vector<Tensor> found = torch::autograd::grad({loss}, {source});
      if (learns_z) found.push_back(gradient(compute_kl_divergence(z, options.kl()), z));
      if (learns_prior) found.push_back(gradient(compute_kl_divergence(z, options.kl()), own_prior));
      found.push_back(loss);
      return found;
    };
    for (const bool learns_z : {false, true}) {
      for (const bool learns_prior : {false, true}) {
        for (const bool overwrites : {false, true}) {
          for (const bool soft : {false, true}) {
            check_equal(run(learns_z, learns_prior, overwrites, soft, frozen),
                        run(learns_z, learns_prior, overwrites, soft, [](const Tensor& own) { return own; }));
          }
        }
      }
    }
  }
}

TEST_CASE("A leaf that was made in InferenceMode is refused by autograd before anything is written",
          "[inplace][errors][cpu]") {
  const Tensor z_logits = [] {
    const c10::InferenceMode inference;
    return eighths({6, 16}, torch::kFloat).clone().requires_grad_();
  }();
  const DenseHead head;
  const Tensor logits = head.logits(), before = logits.detach().clone();
  const std::string hint = "you can make a clone";  // LibTorch's words
  CHECK(contains(error_of([&] { compute_kl_divergence(z_logits); }), hint));
  const auto options = VAELossOptions().reconstruction(inplace);
  CHECK(contains(error_of([&] { compute_vae_loss(logits, head.targets, z_logits, options); }), hint));
  CHECK(same_bits(logits, before));
}

TEST_CASE("A wrong use of logits that were written over is an error", "[inplace][errors][memcheck]") {
  const DenseHead head;
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
    loss_of(logits);
    CHECK(error_of([&] { loss_of(logits); }) ==
          "compute_reconstruction_loss: logits must not be used again after inplace has overwritten them with their "
          "gradient; read what is needed of them before (accuracy(true) counts hits in the same call)");
  }
}
