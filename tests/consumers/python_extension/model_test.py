"""Trains the model of PyPI's package free-transformer with the extension, beside the package's own losses."""

import math
import unittest

import torch  # first: it loads the libraries that the extension is linked to

import free_transformer_losses as losses
from free_transformer import FreeTransformer, ModelConfig, SyntheticDataGenerator
from free_transformer import losses as package

ROUNDING = 2.0**-24  # of float32
CONFIG = ModelConfig(
    vocab_size=64, hidden_dim=32, num_layers=2, num_heads=4, ffn_hidden_dim=64, max_seq_len=32, latent_dim=8
)
SETTINGS = (CONFIG.latent_dim, 0.5, 0.3466)  # latent_dim, beta_kl, free_bits


def model_and_batch():
    torch.manual_seed(1)
    model = FreeTransformer(CONFIG)
    with torch.no_grad():
        model.encoder.readout.weight *= 10  # so that positions lie on both sides of the free bits
    tokens = SyntheticDataGenerator(CONFIG.vocab_size, CONFIG.max_seq_len + 1, seed=1).generate_batch(4)
    return model, tokens[:, :-1], tokens[:, 1:]


def outputs_as_leaves(model, inputs):
    return [output.detach().requires_grad_() for output in model(inputs)]


def kl_of_position_rounding(z_logits):
    """What float32 may cost the package for the KL of a position: of each bit, with |log 2p| <= |z| + log 2, the
    roundings of sigmoid, 2p + 1e-10, logarithm, product and sum in both terms; and 1e-10 in each logarithm."""
    return (6 * (z_logits.abs() + 1) * ROUNDING + 1e-10).sum(-1)


class PackageModel(unittest.TestCase):
    def test_losses_and_gradients_are_those_of_the_package_to_its_accuracy(self):
        model, inputs, targets = model_and_batch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        targets = targets.clone()
        targets[:, -3:] = -100
        sides = set()
        for _ in range(8):
            ours = outputs_as_leaves(model, inputs)
            theirs = [output.detach().clone().requires_grad_() for output in ours]
            loss, metrics = losses.compute_vae_loss(ours[0], targets, ours[1], *SETTINGS)
            package_loss, package_metrics = package.compute_vae_loss(theirs[0], targets, theirs[1], *SETTINGS)
            loss.backward()
            package_loss.backward()

            logits, z_logits = ours[0].detach(), ours[1].detach()
            range_of_logits = (logits.amax(-1) - logits.amin(-1)).max().item()
            # x - max, exp, their sum, log, and the mean over the positions; the same in ours
            log_likelihood = 2 * (2 * range_of_logits + 2 * math.log(CONFIG.vocab_size) + 8) * ROUNDING
            position = kl_of_position_rounding(z_logits)
            kl = 2 * position.max().item()
            for name, delta in (("loss/reconstruction", log_likelihood), ("loss/kl", kl)):
                self.assertAlmostEqual(metrics[name], package_metrics[name], delta=delta)
            self.assertAlmostEqual(loss.item(), package_loss.item(), delta=log_likelihood + kl)
            for name, value in package_metrics.items():
                scale = value if name == "metrics/perplexity" else 1
                self.assertAlmostEqual(metrics[name], value, delta=scale * (log_likelihood + kl), msg=name)

            counted = (targets != -100).sum().item()
            self.assertLessEqual((ours[0].grad - theirs[0].grad).abs().max().item() * counted, log_likelihood)

            # d KL / dz = p (1 - p) (log 2p - log 2(1 - p)), p (1 - p) <= 1/4; a position that rounding may put on the
            # other side of the free bits is left out.
            bits = torch.nn.functional.logsigmoid(z_logits.double())
            complement = torch.nn.functional.logsigmoid(-z_logits.double())
            raw = (bits.exp() * (bits + math.log(2)) + complement.exp() * (complement + math.log(2))).sum(-1)
            clear = (raw - SETTINGS[2]).abs() > position
            self.assertGreater(clear.float().mean().item(), 0.9)
            sides |= set((raw > SETTINGS[2])[clear].tolist())
            difference = (ours[1].grad - theirs[1].grad).abs() * targets.numel() / SETTINGS[1]
            bound = 4 * (z_logits.abs() + 2) * ROUNDING + 1e-10
            self.assertTrue((difference <= bound)[clear].all())

            logits, z_logits = model(inputs)
            optimizer.zero_grad()
            losses.compute_vae_loss(logits, targets, z_logits, *SETTINGS)[0].backward()
            optimizer.step()
        self.assertEqual(sides, {False, True})

    def test_the_loss_falls(self):
        model, inputs, targets = model_and_batch()
        criterion = losses.FreeTransformerLoss(*SETTINGS)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        totals = []
        for _ in range(40):
            logits, z_logits = model(inputs)
            loss, metrics = criterion(logits, targets, z_logits)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.append(metrics["loss/total"])
        self.assertGreater(totals[0], math.log(CONFIG.vocab_size) - 0.5)
        self.assertLess(totals[-1], totals[0] - 1)  # random tokens by heart


if __name__ == "__main__":
    unittest.main()
