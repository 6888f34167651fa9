/// Trains a Free Transformer on real text, evaluates it on files that it has not seen, and lets it write.
#include <torch/torch.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <filesystem>

#include <free_transformer/losses.hpp>

#include "generation.hpp"
#include "latent_warnings.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "plot.hpp"
#include "progress.hpp"
#include "settings.hpp"
#include "text.hpp"
#include "text_files.hpp"

namespace example {

using free_transformer::FreeTransformerLoss;
using free_transformer::LossMetrics;

FreeTransformerLoss make_criterion(const Settings& settings) {
  return FreeTransformerLoss(
      free_transformer::VAELossOptions().latent_dim(settings.model.latent_dim).kl_of_each_bit(settings.kl_of_each_bit));
}

/// Gives the loss what the schedules have for a step, 0 being the first.
Balance set_balance(FreeTransformerLoss& criterion, const Settings& settings, int64_t step) {
  const Balance balance{settings.beta(step), settings.free_bits(step)};
  criterion->options.beta_kl(balance.beta).free_bits(free_transformer::bits(balance.free_bits));
  return balance;
}

/// The head fused with the loss gives the numbers of dense logits, to rounding.
free_transformer::VAELossOutput loss_of(FreeTransformer& model, FreeTransformerLoss& criterion, const Batch& batch,
                                        bool fused_head) {
  const auto output = model(batch.tokens);
  return fused_head ? criterion(model->fused_logits(output.hidden), batch.targets, output.z_logits)
                    : criterion(model->logits(output.hidden), batch.targets, output.z_logits);
}

/// Part of the training that is done: of the steps, or of the minutes if they run out sooner.
double part_done(const Settings& settings, int64_t step, double seconds) {
  const auto of_steps = static_cast<double>(step) / static_cast<double>(settings.steps);
  return settings.minutes > 0.0 ? std::min(1.0, std::max(of_steps, seconds / (60.0 * settings.minutes))) : of_steps;
}

void train(FreeTransformer& model, const Text& text, const Settings& settings, TrainingLog& log) {
  constexpr int64_t steps_a_report = 10;
  auto criterion = make_criterion(settings);
  Optimizer optimizer(*model, settings.learning_rate);
  ProgressLine line;
  LatentWatch watch;
  LossMetrics metrics;
  const Stopwatch stopwatch;
  double done = 0.0;
  for (int64_t step = 1; done < 1.0; ++step) {
    const auto balance = set_balance(criterion, settings, step - 1);
    const auto batch = text.random_batch(settings.batch_size);
    const auto [loss, step_metrics] = loss_of(model, criterion, batch, settings.fused_head);
    loss.backward();
    optimizer.step(done);

    metrics += step_metrics;
    done = part_done(settings, step, stopwatch.seconds());
    if (step % steps_a_report == 0 || done >= 1.0) {
      const Progress progress{step, settings.steps, step * batch.tokens.numel(), stopwatch.seconds(), done};
      log.write(progress, metrics, balance);
      line.show(progress, metrics);
      watch.look(metrics, balance.free_bits, step);
      metrics = LossMetrics();
    }
  }
}

LossMetrics evaluate(FreeTransformer& model, const Text& text, const Settings& settings) {
  torch::NoGradGuard no_grad;
  auto criterion = make_criterion(settings);
  LossMetrics metrics;
  for (int64_t index = 0; index < settings.evaluation_batches; ++index) {
    const auto batch = text.even_batch(settings.batch_size, index, settings.evaluation_batches);
    metrics += loss_of(model, criterion, batch, settings.fused_head).metrics;
  }
  return metrics;
}

void report_evaluation(const LossMetrics& metrics) {
  std::printf(
      "held-out files: bound/elbo %.4f nats a byte (%.4f bits), reconstruction %.4f nats, latent KL %.4f bits\n",
      metrics.at("bound/elbo"), metrics.at("bound/elbo_bits"), metrics.at("loss/reconstruction"),
      metrics.at("latent/kl_bits"));
}

void draw(const std::filesystem::path& log, const std::filesystem::path& picture) {
  if (draw_training(log, picture)) {
    std::printf("curves: %s, drawn from %s\n", picture.c_str(), log.c_str());
  } else {
    std::printf("no picture, as gnuplot is missing or failed; the curves are in %s\n", log.c_str());
  }
}

void announce_length(const Settings& settings) {
  std::printf("%lld steps", static_cast<long long>(settings.steps));
  if (settings.minutes > 0.0) {
    std::printf(", or as many as fit into %g minutes", settings.minutes);
  }
  std::printf("; the evaluation and a sample of %lld bytes follow\n", static_cast<long long>(settings.sample_bytes));
  std::fflush(stdout);
}

void run(const Settings& settings) {
  at::set_num_threads(settings.threads);
  torch::manual_seed(settings.seed);
  const auto files = find_text_files(settings.text);
  const Text training_text(files.training, settings.model.context);
  const Text held_out_text(files.held_out, settings.model.context);
  FreeTransformer model(settings.model);
  std::printf("%zu files to learn from, %lld bytes; %zu held out, %lld bytes; %lld parameters; %d threads\n",
              files.training.size(), static_cast<long long>(training_text.size()), files.held_out.size(),
              static_cast<long long>(held_out_text.size()), static_cast<long long>(parameter_count(*model)),
              at::get_num_threads());
  announce_length(settings);

  std::filesystem::create_directories(settings.output_folder);
  const auto log_file = settings.output_folder / "training_log.csv";
  TrainingLog log(log_file);
  train(model, training_text, settings, log);
  report_evaluation(evaluate(model, held_out_text, settings));
  draw(log_file, settings.output_folder / "training.svg");
  const auto sample = continue_text(model, settings.prompt, settings.sample_bytes);
  std::printf("\nA sample, its codes drawn from the prior:\n%s\n", without_control_characters(sample).c_str());
}

}  // namespace example

int main(int argument_count, char** arguments) {
  CLI::App app("Trains a small Free Transformer on real text");
  app.option_defaults()->always_capture_default();
  example::Settings settings;
  example::add_text_options(app, settings);
  example::add_model_options(app, settings.model);
  example::add_training_options(app, settings);
  CLI11_PARSE(app, argument_count, arguments);
  try {
    example::run(settings);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
  return 0;
}
