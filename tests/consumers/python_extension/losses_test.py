"""The extension as Python sees it: signatures, numbers, autograd, errors, and other threads while a loss computes."""

import inspect
import math
import sys
import threading
import time
import unittest

import torch  # first: it loads the libraries that the extension is linked to

import free_transformer_losses as losses


def some_batch(positions=6, vocab_size=11, latent_dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, positions, vocab_size, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(vocab_size, (2, positions), generator=generator)
    z_logits = (3 * torch.randn(2, positions, latent_dim, generator=generator)).to(dtype).requires_grad_()
    return logits, targets, z_logits


class Signatures(unittest.TestCase):
    def test_defaults_are_those_of_the_paper(self):
        logits, targets, z_logits = some_batch()
        targets[0, 0] = -100
        self.assertEqual(
            losses.compute_reconstruction_loss(logits, targets),
            losses.compute_reconstruction_loss(logits=logits, targets=targets, ignore_index=-100),
        )
        self.assertEqual(
            losses.compute_kl_divergence(z_logits),
            losses.compute_kl_divergence(z_logits=z_logits, latent_dim=16, free_bits=0.3466),
        )
        loss, metrics = losses.compute_vae_loss(logits, targets, z_logits)
        settings = {"latent_dim": 16, "beta_kl": 1.0, "free_bits": 0.3466, "ignore_index": -100}
        for other in (
            losses.compute_vae_loss(logits=logits, targets=targets, z_logits=z_logits, **settings),
            losses.FreeTransformerLoss()(logits, targets, z_logits),
            losses.FreeTransformerLoss(**settings)(logits=logits, targets=targets, z_logits=z_logits),
        ):
            self.assertEqual(loss, other[0])
            self.assertEqual(metrics, other[1])

    def test_positional_arguments_are_in_the_order_of_the_python_package(self):
        logits, targets, z_logits = some_batch(latent_dim=5)
        reconstruction = losses.compute_reconstruction_loss(logits, targets, 3)
        kl = losses.compute_kl_divergence(z_logits, 5, 0.25)
        expected = (reconstruction + 0.5 * kl).item()
        for loss, metrics in (
            losses.compute_vae_loss(logits, targets, z_logits, 5, 0.5, 0.25, 3),
            losses.FreeTransformerLoss(5, 0.5, 0.25, 3)(logits, targets, z_logits),
        ):
            self.assertAlmostEqual(loss.item(), expected, delta=expected * 2**-22)  # one product, one sum, two means
            self.assertAlmostEqual(metrics["loss/kl_weighted"], 0.5 * kl.item(), delta=kl.item() * 2**-22)

    def test_metrics_are_a_dict_of_floats_in_the_documented_order(self):
        _, metrics = losses.compute_vae_loss(*some_batch())
        self.assertIs(type(metrics), dict)
        self.assertEqual({type(value) for value in metrics.values()}, {float})
        self.assertEqual(
            list(metrics)[:5],
            ["loss/total", "loss/reconstruction", "loss/kl", "loss/kl_weighted", "metrics/perplexity"],
        )

    def test_the_module_is_a_module_of_python(self):
        model = torch.nn.ModuleDict({"head": torch.nn.Linear(3, 3), "criterion": losses.FreeTransformerLoss()})
        self.assertIsInstance(model["criterion"], torch.nn.Module)
        self.assertEqual(sorted(model.state_dict()), ["head.bias", "head.weight"])
        model.to(torch.float64).eval()
        self.assertFalse(model["criterion"].training)


class Numbers(unittest.TestCase):
    def test_no_preference_among_the_classes_costs_their_logarithm(self):
        targets = torch.zeros(2, 8, dtype=torch.long)
        loss, metrics = losses.compute_vae_loss(torch.zeros(2, 8, 32), targets, torch.zeros(2, 8, 16))
        self.assertAlmostEqual(loss.item(), math.log(32), delta=math.log(32) * 2**-23)
        self.assertAlmostEqual(metrics["metrics/perplexity"], 32, delta=32e-6)

    def test_a_small_latent_logit_keeps_its_kl(self):
        # z^2/8 (1 - z^2/8 ...) for each bit: 1e-10 inside a float32 logarithm leaves nothing of it.
        z_logits = torch.full((1, 4, 16), 1e-4)
        expected = 16 * z_logits[0, 0, 0].item() ** 2 / 8
        self.assertAlmostEqual(losses.compute_kl_divergence(z_logits, 16, 0.0).item(), expected, delta=expected * 1e-6)

    def test_saturated_bits_cost_log_two_each(self):
        kl = losses.compute_kl_divergence(torch.full((1, 4, 16), math.inf))
        self.assertAlmostEqual(kl.item(), 16 * math.log(2) - 0.3466, delta=11 * 2**-23)


class Autograd(unittest.TestCase):
    def test_gradients_are_those_of_finite_differences(self):
        logits, targets, z_logits = some_batch(dtype=torch.float64)
        self.assertTrue(
            torch.autograd.gradcheck(lambda x, z: losses.compute_vae_loss(x, targets, z)[0], (logits, z_logits))
        )

    def test_a_loss_is_part_of_a_graph_that_python_made(self):
        logits, targets, _ = some_batch()
        losses.compute_reconstruction_loss(2 * logits, targets).mul(3).backward()
        expected = (2 * logits.detach()).softmax(-1)
        expected.scatter_add_(-1, targets.unsqueeze(-1), torch.full((*targets.shape, 1), -1.0))
        torch.testing.assert_close(logits.grad, 6 * expected / targets.numel(), rtol=1e-5, atol=1e-7)

    def test_without_grad_there_is_no_graph(self):
        with torch.no_grad():
            self.assertFalse(losses.compute_vae_loss(*some_batch())[0].requires_grad)


class Errors(unittest.TestCase):
    def test_a_wrong_argument_is_named(self):
        logits, targets, z_logits = some_batch()
        with self.assertRaisesRegex(RuntimeError, "compute_kl_divergence: z_logits must .* got"):
            losses.compute_vae_loss(logits, targets, z_logits, 5)
        with self.assertRaisesRegex(RuntimeError, "FreeTransformerLoss: beta_kl must .* got"):
            losses.FreeTransformerLoss(beta_kl=-1.0)
        with self.assertRaisesRegex(TypeError, "incompatible function arguments"):
            losses.compute_kl_divergence([0.0] * 16)


class Threads(unittest.TestCase):
    def assert_another_thread_runs_during(self, compute):
        """Python takes the lock from this thread only where it is given away: `compute` alone can do that."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1000)
        try:
            go, ran = threading.Event(), []
            thread = threading.Thread(target=lambda: (go.wait(), ran.append(True)))
            thread.start()
            kept = []  # what is destroyed might give the lock away, too
            go.set()
            give_up = time.monotonic() + 10
            while not ran and time.monotonic() < give_up:
                kept.append(compute())
            released = bool(ran)
        finally:
            sys.setswitchinterval(interval)
        thread.join()
        self.assertTrue(released)

    def test_losses_release_the_lock_of_python(self):
        # Milliseconds of work each: the other thread must wake up meanwhile.
        logits, targets, z_logits = torch.zeros(500, 20000), torch.zeros(500, dtype=torch.long), torch.zeros(500000, 16)
        criterion = losses.FreeTransformerLoss()
        for compute in (
            lambda: losses.compute_reconstruction_loss(logits, targets),
            lambda: losses.compute_kl_divergence(z_logits),
            lambda: losses.compute_vae_loss(logits, targets, z_logits),
            lambda: criterion.forward(logits, targets, z_logits),
        ):
            with self.subTest(inspect.getsource(compute).strip()):
                self.assert_another_thread_runs_during(compute)


if __name__ == "__main__":
    unittest.main()
