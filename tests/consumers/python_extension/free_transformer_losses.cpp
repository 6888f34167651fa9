// The losses for Python, with the names, argument order and defaults of PyPI's package free-transformer.
#include <torch/extension.h>

#include <utility>
#include <vector>

#include <free_transformer/losses.hpp>

namespace {

using free_transformer::FreeTransformerLossImpl;
using free_transformer::LossMetrics;
using free_transformer::VAELossOutput;

/// The result of `compute()` as Python's (loss, dict). Other Python threads run while it computes, and while the
/// metrics, which Python gets as plain numbers, come from the device.
template <typename Compute>
std::pair<at::Tensor, py::dict> loss_and_metrics(Compute compute) {
  at::Tensor loss;
  std::vector<LossMetrics::value_type> figures;
  {
    py::gil_scoped_release released;
    const VAELossOutput output = compute();
    loss = output.loss;
    figures.assign(output.metrics.begin(), output.metrics.end());
  }
  py::dict metrics;
  for (const auto& [name, value] : figures) metrics[name.c_str()] = value;
  return {loss, metrics};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, extension) {
  using at::Tensor;
  using Released = py::call_guard<py::gil_scoped_release>;

  extension.def(
      "compute_reconstruction_loss",
      [](const Tensor& logits, const Tensor& targets, int64_t ignore_index) {
        return free_transformer::compute_reconstruction_loss(logits, targets, ignore_index);
      },
      py::arg("logits"), py::arg("targets"), py::arg("ignore_index") = -100, Released());

  extension.def(
      "compute_kl_divergence",
      [](const Tensor& z_logits, int64_t latent_dim, double free_bits) {
        return free_transformer::compute_kl_divergence(z_logits, latent_dim, free_bits);
      },
      py::arg("z_logits"), py::arg("latent_dim") = 16, py::arg("free_bits") = 0.3466, Released());

  extension.def(
      "compute_vae_loss",
      [](const Tensor& logits, const Tensor& targets, const Tensor& z_logits, int64_t latent_dim, double beta_kl,
         double free_bits, int64_t ignore_index) {
        return loss_and_metrics([&] {
          return free_transformer::compute_vae_loss(logits, targets, z_logits, latent_dim, beta_kl, free_bits,
                                                    ignore_index);
        });
      },
      py::arg("logits"), py::arg("targets"), py::arg("z_logits"), py::arg("latent_dim") = 16, py::arg("beta_kl") = 1.0,
      py::arg("free_bits") = 0.3466, py::arg("ignore_index") = -100);

  torch::python::bind_module<FreeTransformerLossImpl>(extension, "FreeTransformerLoss")
      .def(py::init<int64_t, double, double, int64_t>(), py::arg("latent_dim") = 16, py::arg("beta_kl") = 1.0,
           py::arg("free_bits") = 0.3466, py::arg("ignore_index") = -100)
      .def(
          "forward",
          [](FreeTransformerLossImpl& criterion, const Tensor& logits, const Tensor& targets, const Tensor& z_logits) {
            return loss_and_metrics([&] { return criterion.forward(logits, targets, z_logits); });
          },
          py::arg("logits"), py::arg("targets"), py::arg("z_logits"));
}
