#!/usr/bin/env python3
"""Expected values and gradients of the losses, from their equations alone. Writes references.hpp beside itself.

    pip install mpmath && python3 generate_references.py

Nothing here knows how the library computes: sums are taken as they are written in the paper, in so many digits (250) that at
least 50 survive every cancellation, and a gradient is a central difference of the loss in those digits. The step 1e-60
leaves an error of 1e-120, relative to gradients that are never below 1e-40.
"""

import dataclasses
import pathlib
import random

import mpmath
from mpmath import mp, mpf

mp.dps = 250
STEP = mpf(10) ** -60
SMALLEST = 1e-150  # what is left of a zero after the sums; no true value lies between it and the smallest double
INF = float("inf")


def central_difference(function, values):
    """Gradient of function(values), 0 at infinite values: there it is a limit."""
    gradient = []
    for index, value in enumerate(values):
        if mpmath.isinf(value):
            gradient.append(mpf(0))
            continue
        up, down = list(values), list(values)
        up[index] += STEP
        down[index] -= STEP
        gradient.append((function(up) - function(down)) / (2 * STEP))
    return gradient


def rows_of(values, columns):
    return [values[first:first + columns] for first in range(0, len(values), columns)]


def is_exact(values, significant_bits, smallest_exponent, largest):
    """Whether a binary type with so many significant bits holds the values exactly (subnormals not counted)."""
    for value in values:
        if value == 0 or abs(value) == INF:
            continue
        mantissa, exponent = mpmath.frexp(mpf(value))
        if abs(value) > largest or exponent - 1 < smallest_exponent:
            return False
        if not mpmath.isint(mantissa * 2 ** significant_bits):
            return False
    return True


def smallest_type(*groups):
    """The least precise types that hold all inputs: `half` means both float16 and bfloat16."""
    values = [value for group in groups for value in group]
    if is_exact(values, 11, -14, 65504.0) and is_exact(values, 8, -126, 3e38):
        return "Exact::in_half"
    return "Exact::in_float32" if is_exact(values, 24, -126, 3e38) else "Exact::in_float64"


# ---- cross entropy -------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class CrossEntropy:
    """One call; logits [N * V], targets [N]."""
    name: str
    classes: int
    logits: list
    targets: list
    ignore_index: int = -100

    def counted(self, target):
        return target != self.ignore_index

    def loss_of_row(self, row, target):
        """nll = log sum_j exp(x_j) - x_y; 0 where the position is left out."""
        if not self.counted(target):
            return mpf(0)
        return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in row)) - row[target]

    def weight_of_row(self, target):
        return mpf(1) if self.counted(target) else mpf(0)

    def result(self):
        rows = rows_of([mpf(x) for x in self.logits], self.classes)
        losses = [self.loss_of_row(row, target) for row, target in zip(rows, self.targets)]
        weight = mpmath.fsum(self.weight_of_row(target) for target in self.targets)
        scale = 1 / weight if weight != 0 else mpf(0)
        gradient = []
        for row, target in zip(rows, self.targets):
            gradient += [scale * g for g in central_difference(lambda x, y=target: self.loss_of_row(x, y), row)]
        total = mpmath.fsum(losses)
        return dict(losses=losses, sum=total, mean=total * scale, gradient=gradient, weight=weight)

    def written(self):
        result = self.result()
        return [text(self.name), smallest_type(self.logits), text(self.classes), text(self.ignore_index),
                text(self.logits), text(self.targets), text(result["losses"]), text(result["sum"]),
                text(result["mean"]), text(result["gradient"])]


def eighths(generator, count, largest):
    """Multiples of 1/8 with |x| <= largest <= 16: exact in all four types, and so are their differences in float32."""
    return [generator.randint(-int(8 * largest), int(8 * largest)) / 8 for _ in range(count)]


def cross_entropy_cases():
    random_numbers = random.Random(20251017)
    eight = lambda count, largest=8.0: eighths(random_numbers, count, largest)
    masked = eight(5 * 6)
    for row, classes in enumerate([(0, 3), (5,), (), (0, 1, 2, 3, 4), (2, 4)]):
        for c in classes:
            masked[6 * row + c] = -INF
    confident = []
    for margin in (30.0, 45.5, 60.25, 80.0):
        confident += [margin / 2, -margin / 2, -margin / 2 - 1, -margin / 2 + 0.5, -margin / 2 - 3.25]
    wrong = []
    for margin in (12.0, 30.0, 80.0):
        wrong += [-margin / 2, margin / 2, 1.0, -2.5]
    return [
        CrossEntropy("all positions count", 7, eight(5 * 7), [0, 6, 3, 2, 5]),
        CrossEntropy("ignored targets", 5, eight(6 * 5), [4, -100, 0, -100, -100, 2]),
        CrossEntropy("ignore_index inside the vocabulary", 4, eight(5 * 4), [2, 0, 2, 3, 1], ignore_index=2),
        CrossEntropy("everything ignored", 3, eight(2 * 3), [-1, -1], ignore_index=-1),
        CrossEntropy("masked vocabulary", 6, masked, [1, 0, 3, 5, 3]),
        CrossEntropy("more classes than two vectors hold", 67, eight(3 * 67, 4.0), [66, 0, 31]),
        CrossEntropy("one class", 1, [0.0, -3.5, 15.875], [0, 0, 0]),
        CrossEntropy("single row", 9, eight(9), [4]),
        CrossEntropy("equal logits", 8, [2.5] * 16, [0, 7]),
        CrossEntropy("confident model", 5, confident, [0, 0, 0, 0]),
        CrossEntropy("confidently wrong model", 4, wrong, [0, 0, 3]),
        CrossEntropy("large offset", 6, [x + 1e4 for x in eight(2 * 6)] + [x - 1e4 for x in eight(2 * 6)], [0, 5, 2, 3]),
        CrossEntropy("huge logits", 4, [1e4, -1e4, 0.0, 9990.0, -1e4, 1e4, 9999.5, 9999.0], [3, 2]),
        CrossEntropy("tiny logits", 4, [2.0 ** -100, -2.0 ** -60, 2.0 ** -27, 0.0, 2.0 ** -13, -2.0 ** -13, 0.0, 2.0 ** -40],
                     [0, 3]),
    ]


# ---- latent KL -----------------------------------------------------------------------------------------------------

def bernoulli_kl(logit):
    """KL(Bernoulli(p) || Bernoulli(1/2)) = log 2 + p log p + (1-p) log(1-p), p = 1 / (1 + exp(-l)), 0 log 0 = 0."""
    if mpmath.isinf(logit):
        return mpmath.log(2)
    p, q = 1 / (1 + mpmath.exp(-logit)), 1 / (1 + mpmath.exp(logit))
    return mpmath.log(2) + p * mpmath.log(p) + q * mpmath.log(q)


def hinge(x):
    return max(mpf(0), x)


@dataclasses.dataclass
class LatentKL:
    """One call with each policy; z_logits [N * H]."""
    name: str
    latent_dim: int
    z_logits: list
    free_bits: float

    POLICIES = ("PerPosition", "PerBit", "BatchMean")

    def bit_kl(self, z_logits):
        return rows_of([bernoulli_kl(z) for z in z_logits], self.latent_dim)

    def penalties(self, policy, z_logits):
        kl, kappa = self.bit_kl(z_logits), mpf(self.free_bits)
        if policy == "PerPosition":
            return [hinge(mpmath.fsum(row) - kappa) for row in kl]
        if policy == "PerBit":
            return [mpmath.fsum(hinge(bit - kappa) for bit in row) for row in kl]
        mean = mpmath.fsum(mpmath.fsum(row) for row in kl) / len(kl)
        return [mpmath.fsum(row) - kappa if mean > kappa else mpf(0) for row in kl]

    def mean(self, policy, z_logits):
        """BatchMean by its own equation, max(0, mean_t KL_t - kappa)."""
        if policy == "BatchMean":
            kl = self.bit_kl(z_logits)
            return hinge(mpmath.fsum(mpmath.fsum(row) for row in kl) / len(kl) - mpf(self.free_bits))
        penalties = self.penalties(policy, z_logits)
        return mpmath.fsum(penalties) / len(penalties)

    def result(self, policy):
        z_logits = [mpf(z) for z in self.z_logits]
        return dict(penalties=self.penalties(policy, z_logits), mean=self.mean(policy, z_logits),
                    gradient=central_difference(lambda z: self.mean(policy, z), z_logits))

    def written(self):
        policies = []
        for policy in self.POLICIES:
            result = self.result(policy)
            policies.append(braces([text(result["penalties"]), text(result["mean"]), text(result["gradient"])]))
        return [text(self.name), smallest_type(self.z_logits), text(self.latent_dim), text(self.free_bits),
                text(self.z_logits)] + policies


def latent_cases():
    random_numbers = random.Random(20251018)
    eight = lambda count, largest=6.0: eighths(random_numbers, count, largest)
    moderate = eight(6 * 4)
    quiet_and_loud = [0.125, 0.25, -0.125, 0.0, 4.0, -6.5, 3.25, 5.0, 1.0, -1.5, 0.5, 0.875]
    return [
        LatentKL("no budget", 4, moderate, 0.0),
        LatentKL("budget between the positions", 4, quiet_and_loud, 0.25),
        LatentKL("half a bit, sixteen bits", 16, eight(3 * 16, 2.0), 0.3466),
        LatentKL("budget above every position", 4, moderate, 3.0),
        LatentKL("sure bits", 4, [INF, -INF, 0.0, 1.0, INF, INF, INF, -INF, -INF, 0.5, 2.0, -0.25], 0.125),
        LatentKL("zero", 3, [0.0] * 6, 0.0),
        LatentKL("one bit", 1, [1.5, -0.75, 0.0], 0.0625),
        LatentKL("small", 4, [2.0 ** -13, -2.0 ** -10, 2.0 ** -7, -2.0 ** -14], 0.0),
        LatentKL("tiny", 4, [2.0 ** -100, -2.0 ** -27, 2.0 ** -13, 0.0, 2.0 ** -60, 2.0 ** -50, 2.0 ** -55, -2.0 ** -58], 0.0),
        LatentKL("around the change of formula", 4, [1.984375, 2.0, -1.9921875, 2.015625], 0.0),
        LatentKL("large", 4, [20.0, -30.0, 40.0, -50.0, 15.875, -18.0, 60.0, 85.0], 0.0),
        LatentKL("huge", 4, [1e4, -1e4, 300.0, -800.0], 0.5),
        LatentKL("decimal fractions", 3, [0.1, -0.2, 0.3, 1e-8, -1e-4, 1e-30], 0.0),
    ]


# ---- the whole loss ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class VAELoss:
    name: str
    policy: str
    beta_kl: float
    reconstruction: CrossEntropy
    latent: LatentKL

    def metrics(self):
        """In the order of LossMetrics."""
        reconstruction, latent = self.reconstruction.result(), self.latent.result(self.policy)
        kappa, two = mpf(self.latent.free_bits), mpf(2)
        kl = self.latent.bit_kl([mpf(z) for z in self.latent.z_logits])
        positions = len(kl)
        raw_kl = mpmath.fsum(mpmath.fsum(row) for row in kl) / positions
        above = {"PerPosition": lambda row: mpmath.fsum(row) > kappa, "PerBit": lambda row: max(row) > kappa,
                 "BatchMean": lambda row: mpmath.fsum(row) > kappa}[self.policy]
        bit_means = [mpmath.fsum(row[bit] for row in kl) / positions for bit in range(self.latent.latent_dim)]
        kl_weighted = mpf(self.beta_kl) * latent["mean"]
        bound = reconstruction["mean"] + raw_kl
        return [reconstruction["mean"] + kl_weighted, reconstruction["mean"], latent["mean"], kl_weighted,
                mpmath.exp(reconstruction["mean"]), raw_kl / mpmath.log(two),
                mpf(sum(above(row) for row in kl)) / positions, mpf(sum(mean > mpf("0.01") for mean in bit_means)),
                bound, bound / mpmath.log(two)]

    def written(self):
        logits_gradient = self.reconstruction.result()["gradient"]
        z_gradient = [mpf(self.beta_kl) * g for g in self.latent.result(self.policy)["gradient"]]
        return [text(self.name), smallest_type(self.reconstruction.logits, self.latent.z_logits), "Policy::" + self.policy,
                text(self.reconstruction.classes), text(self.latent.latent_dim), text(self.beta_kl),
                text(self.latent.free_bits), text(self.reconstruction.ignore_index), text(self.reconstruction.logits),
                text(self.reconstruction.targets), text(self.latent.z_logits), text(self.metrics()),
                text(logits_gradient), text(z_gradient)]


def vae_cases():
    random_numbers = random.Random(20251019)
    eight = lambda count, largest: eighths(random_numbers, count, largest)

    def case(name, policy, beta_kl, free_bits, targets, ignore_index=-100, latent_dim=4, z=None, largest=3.0):
        classes = 5
        return VAELoss(name, policy, beta_kl,
                       CrossEntropy(name, classes, eight(classes * len(targets), 4.0), targets, ignore_index),
                       LatentKL(name, latent_dim, z or eight(latent_dim * len(targets), largest), free_bits))

    a_bit_below_its_share = [0.125, 3.0, -0.25, 1.0, 0.25, -2.0, 0.125, -0.5, -0.125, 4.0, 0.25, 0.75, 0.0, 0.0, 0.125, 0.0]
    return [
        case("defaults", "PerPosition", 1.0, 0.3466, [0, 4, 2, 3], latent_dim=16, largest=0.75),
        case("some positions above the budget", "PerPosition", 0.5, 0.25, [0, -100, 2, -100], z=a_bit_below_its_share),
        case("a budget for each bit", "PerBit", 2.0, 0.125, [1, 3, 3, 0], ignore_index=3, z=a_bit_below_its_share),
        case("a budget for the batch", "BatchMean", 0.25, 0.25, [4, 0, -100, 1], z=a_bit_below_its_share),
        case("a budget for the batch that is not reached", "BatchMean", 1.5, 2.0, [4, 0, 2, 1], z=a_bit_below_its_share),
        case("no weight on the latent term", "PerPosition", 0.0, 0.0, [4, 0, 2], largest=5.0),
        case("everything ignored", "PerPosition", 1.0, 0.0, [-100, -100], largest=5.0),
    ]


# ---- output --------------------------------------------------------------------------------------------------------

def text(value):
    """A C++ literal. repr is the shortest text that reads back as the same double: never more than 17 digits."""
    if isinstance(value, list):
        return braces([text(element) for element in value])
    if isinstance(value, str):
        return '"' + value + '"'
    if isinstance(value, int):
        return str(value)
    number = float(value)
    if abs(number) < SMALLEST:
        return "0"
    if abs(number) == INF:
        return "inf" if number > 0 else "-inf"
    return repr(number).removesuffix(".0")


def braces(parts):
    return "{" + ", ".join(parts) + "}"


def wrapped(line, width=120):
    """The literal of a case, broken at spaces."""
    words, lines, current = line.split(" "), [], ""
    for word in words:
        if current and len(current) + 1 + len(word) > width - 6:
            lines.append(current)
            current = word
        else:
            current = current + " " + word if current else word
    return "\n     ".join(lines + [current])


def array(struct, name, cases):
    body = ",\n    ".join(wrapped(braces(case.written())) for case in cases)
    return f"inline const std::vector<{struct}> {name}{{\n    {body}}};\n"


HEADER = """\
// Written by generate_references.py: values from the equations in 50 digits, rounded once to float64. Do not edit.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

inline constexpr double inf = std::numeric_limits<double>::infinity();

/// The least precise type that holds the inputs exactly; in_half: float16 and bfloat16.
enum class Exact { in_half, in_float32, in_float64 };

enum class Policy { PerPosition, PerBit, BatchMean };

struct CrossEntropyCase {
  const char* name;
  Exact exact;
  int64_t classes, ignore_index;
  std::vector<double> logits;    ///< [N, classes]
  std::vector<int64_t> targets;  ///< [N]
  std::vector<double> losses;    ///< [N]
  double sum, mean;
  std::vector<double> gradient;  ///< of the mean, [N, classes]
};

struct LatentExpectation {
  std::vector<double> penalties;  ///< [N]
  double mean;
  std::vector<double> gradient;  ///< of the mean, [N, latent_dim]
};

struct LatentCase {
  const char* name;
  Exact exact;
  int64_t latent_dim;
  double free_bits;
  std::vector<double> z_logits;  ///< [N, latent_dim]
  LatentExpectation per_position, per_bit, batch_mean;
};

struct VAECase {
  const char* name;
  Exact exact;
  Policy policy;
  int64_t classes, latent_dim;
  double beta_kl, free_bits;
  int64_t ignore_index;
  std::vector<double> logits;
  std::vector<int64_t> targets;
  std::vector<double> z_logits;
  std::vector<double> metrics;  ///< in the order of LossMetrics; the first is the loss
  std::vector<double> logits_gradient, z_gradient;
};

"""


def main():
    path = pathlib.Path(__file__).with_name("references.hpp")
    path.write_text(HEADER + "\n".join([
        array("CrossEntropyCase", "cross_entropy_cases", cross_entropy_cases()),
        array("LatentCase", "latent_cases", latent_cases()),
        array("VAECase", "vae_cases", vae_cases()),
    ]) + "\n}  // namespace reference\n")


if __name__ == "__main__":
    main()
