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
    """Gradient of function(values), 0 at infinite values: there it is a limit.

    A slope that follows the step is what the third derivative leaves of a 0.
    """
    def slope(index, step):
        up, down = list(values), list(values)
        up[index] += step
        down[index] -= step
        return (function(up) - function(down)) / (2 * step)

    gradient = []
    for index, value in enumerate(values):
        if mpmath.isinf(value):
            gradient.append(mpf(0))
            continue
        fine, coarse = slope(index, STEP), slope(index, 2 * STEP)
        gradient.append(fine if abs(fine - coarse) <= abs(fine) * mpf(10) ** -50 else mpf(0))
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

    POLICIES = ("per_position", "per_bit", "batch_mean")

    def bit_kl(self, z_logits):
        return rows_of([bernoulli_kl(z) for z in z_logits], self.latent_dim)

    def penalties(self, policy, z_logits):
        kl, kappa = self.bit_kl(z_logits), mpf(self.free_bits)
        if policy == "per_position":
            return [hinge(mpmath.fsum(row) - kappa) for row in kl]
        if policy == "per_bit":
            return [mpmath.fsum(hinge(bit - kappa) for bit in row) for row in kl]
        mean = mpmath.fsum(mpmath.fsum(row) for row in kl) / len(kl)
        return [mpmath.fsum(row) - kappa if mean > kappa else mpf(0) for row in kl]

    def mean(self, policy, z_logits):
        """batch_mean by its own equation, max(0, mean_t KL_t - kappa)."""
        if policy == "batch_mean":
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


# ---- the options of the cross entropy ------------------------------------------------------------------------------

def times(weight, value):
    """weight value; a weight of 0 leaves the value out, also an infinite one."""
    return mpf(0) if weight == 0 else mpf(weight) * value


@dataclasses.dataclass
class CrossEntropyOptions:
    """One call; logits [N * V], and either targets [N] or class probabilities [N * V]. An empty list is the default."""
    name: str
    classes: int
    logits: list
    targets: list = dataclasses.field(default_factory=list)
    probabilities: list = dataclasses.field(default_factory=list)
    ignore_index: int = -100
    token_weight: list = dataclasses.field(default_factory=list)
    class_weight: list = dataclasses.field(default_factory=list)
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0
    normalizer: float = 0.0

    def u(self, t):
        if self.targets and self.targets[t] == self.ignore_index:
            return mpf(0)
        return mpf(self.token_weight[t]) if self.token_weight else mpf(1)

    def w(self, c):
        return mpf(self.class_weight[c]) if self.class_weight else mpf(1)

    def target_weight(self, t):
        """What a mean counts the likelihood of a position by: w_y, and 1 for probabilities."""
        return self.w(self.targets[t]) if self.targets and self.u(t) != 0 else mpf(1)

    def coefficients(self, t):
        """Of each lse - x_c: (1-epsilon) w_y [c = y] + epsilon/V w_c, and w_c ((1-epsilon) q_c + epsilon/V)."""
        epsilon = mpf(self.label_smoothing)
        q = (self.probabilities[t * self.classes:(t + 1) * self.classes] if self.probabilities
             else [1 if c == self.targets[t] else 0 for c in range(self.classes)])
        return [self.w(c) * ((1 - epsilon) * mpf(q[c]) + epsilon / self.classes) for c in range(self.classes)]

    def capped(self, row):
        cap = mpf(self.softcap)
        return [cap * mpmath.tanh(x / cap) for x in row] if cap != 0 else row

    def log_sum_exp(self, row):
        return mpmath.log(mpmath.fsum(mpmath.exp(x) for x in self.capped(row)))

    def likelihood(self, row, t):
        if self.u(t) == 0:
            return mpf(0)
        lse = self.log_sum_exp(row)
        return self.u(t) * mpmath.fsum(times(a, lse - x) for a, x in zip(self.coefficients(t), self.capped(row)))

    def z(self, row, t):
        return times(self.u(t), mpf(self.z_loss) * self.log_sum_exp(row) ** 2) if self.u(t) != 0 else mpf(0)

    def scales(self, positions):
        if self.normalizer != 0:
            return 1 / mpf(self.normalizer), 1 / mpf(self.normalizer)
        weights = (mpmath.fsum(self.u(t) * self.target_weight(t) for t in range(positions)),
                   mpmath.fsum(self.u(t) for t in range(positions)))
        return tuple(1 / weight if weight != 0 else mpf(0) for weight in weights)

    def conditions(self, row, t, scale):
        """What rounding by 1 part in its inputs and steps may add to the loss of a position and to its gradient.

        The terms of a loss are not negative, so their rounding is relative to it. More comes from lse, which rounds by |m|
        for the largest logit m, and from the cap, which rounds every logit by as much as c and its slope by 2|x|/c. The terms
        of a gradient do cancel: total p_c - coefficient_c."""
        if self.u(t) == 0:
            return mpf(0), [mpf(0)] * len(row)
        capped, lse = self.capped(row), self.log_sum_exp(row)
        cap, largest = mpf(self.softcap), abs(max(capped))
        coefficients = self.coefficients(t)
        total = mpmath.fsum(coefficients)
        loss = self.u(t) * (2 * cap * total + 2 * self.z_loss * abs(lse) * (largest + 2 * cap))
        gradient = []
        for x, y, a in zip(row, capped, coefficients):
            terms = (total + 2 * self.z_loss * (abs(lse) + largest)) * mpmath.exp(y - lse) + a
            slope, steepness = (1 - mpmath.tanh(x / cap) ** 2, 1 + 2 * cap + 2 * abs(x) / cap) if cap != 0 else (1, 1)
            gradient.append(scale * self.u(t) * terms * slope * steepness)
        return loss, gradient

    def result(self):
        rows = rows_of([mpf(x) for x in self.logits], self.classes)
        likelihood_scale, z_scale = self.scales(len(rows))
        mean_of_row = lambda row, t: likelihood_scale * self.likelihood(row, t) + z_scale * self.z(row, t)
        losses, gradient, loss_conditions, gradient_conditions = [], [], [], []
        for t, row in enumerate(rows):
            losses.append(self.likelihood(row, t) + self.z(row, t))
            gradient += central_difference(lambda x: mean_of_row(x, t), row)
            loss_condition, gradient_condition = self.conditions(row, t, max(likelihood_scale, z_scale))
            loss_conditions.append(loss_condition)
            gradient_conditions += gradient_condition
        mean = mpmath.fsum(mean_of_row(row, t) for t, row in enumerate(rows))
        mean_condition = mpmath.fsum(loss_conditions) * max(likelihood_scale, z_scale)
        return [losses, loss_conditions, mpmath.fsum(losses), mean, mean_condition, gradient, gradient_conditions]

    def written(self):
        exact = smallest_type(self.logits, self.probabilities, self.token_weight, self.class_weight)
        settings = [self.classes, self.ignore_index, self.logits, self.targets, self.probabilities, self.token_weight,
                    self.class_weight, self.label_smoothing, self.z_loss, self.softcap, self.normalizer]
        return [text(self.name), exact] + [text(value) for value in settings + self.result()]


def option_cases():
    random_numbers = random.Random(20251020)
    eight = lambda count, largest=8.0: eighths(random_numbers, count, largest)
    weights = lambda count: [random_numbers.choice([0.125, 0.25, 0.5, 1.0, 1.5, 2.0]) for _ in range(count)]

    def probabilities(rows, classes):
        """Sixteenths that sum to 1, some of them 0."""
        result = []
        for _ in range(rows):
            shares = [0] * classes
            for _ in range(16):
                shares[random_numbers.randrange(classes)] += 1
            result += [share / 16 for share in shares]
        return result

    masked = eight(3 * 6)
    for row in range(3):
        masked[6 * row + 2] = masked[6 * row + 5] = -INF
    everything = dict(label_smoothing=0.1, z_loss=0.25, softcap=5.0)
    case = CrossEntropyOptions
    return [
        case("z-loss", 6, eight(4 * 6), [5, 0, -100, 3], z_loss=0.01),
        case("z-loss at log-sum-exps on both sides of 0", 4, [x - 1.5 for x in eight(5 * 4, 2.0)], [3, 1, 1, 0, 2], z_loss=2.0),
        case("softcap", 6, eight(4 * 6), [5, 0, -100, 3], softcap=3.0),
        case("softcap far outside", 5, eight(3 * 5, 15.0), [4, 0, 2], softcap=1.5),
        case("softcap that hardly bends", 5, eight(3 * 5), [4, 0, 2], softcap=50.0),
        case("label smoothing", 6, eight(4 * 6), [5, 0, -100, 3], label_smoothing=0.1),
        case("label smoothing of 1", 5, eight(3 * 5), [4, 0, 2], label_smoothing=1.0),
        case("class weights, one of them 0 and a target", 5, eight(4 * 5), [4, 0, -100, 2],
             class_weight=[1.5, 0.25, 0.0, 1.0, 2.0]),
        case("class weights and label smoothing", 5, eight(4 * 5), [4, 2, 0, 2], class_weight=[1.5, 0.25, 0.0, 1.0, 2.0],
             label_smoothing=0.3),
        case("every target of weight 0", 4, eight(2 * 4), [1, 1], class_weight=[1.0, 0.0, 1.0, 1.0]),
        case("token weights", 6, eight(5 * 6), [5, 0, -100, 3, 1], token_weight=[0.25, 2.0, 1.0, 0.0, 1.5]),
        case("every token of weight 0", 4, eight(2 * 4), [1, 3], token_weight=[0.0, 0.0], **everything),
        case("token and class weights", 5, eight(4 * 5), [4, 0, 1, 3], token_weight=weights(4), class_weight=weights(5)),
        case("a normalizer", 6, eight(3 * 6), [5, -100, 3], normalizer=7.0),
        case("a normalizer for both divisors", 5, eight(4 * 5), [4, 0, 1, 3], token_weight=weights(4), class_weight=weights(5),
             z_loss=0.125, normalizer=0.75),
        case("a masked vocabulary and z-loss", 6, masked, [1, 0, 4], z_loss=0.125, token_weight=[1.0, 0.5, 2.0]),
        case("a masked vocabulary of weight 0 and label smoothing", 6, masked, [1, 0, 4], label_smoothing=0.2,
             class_weight=[1.0, 0.5, 0.0, 1.0, 2.0, 0.0]),
        case("a large offset and label smoothing", 6, [x + 1e4 for x in eight(2 * 6)] + [x - 1e4 for x in eight(2 * 6)],
             [0, 5, 2, 3], label_smoothing=0.1, class_weight=weights(6)),
        case("all options", 7, eight(5 * 7), [6, 0, -100, 3, 2], token_weight=[1.0, 0.5, 2.0, 0.0, 1.5],
             class_weight=weights(7), **everything),
        case("all options, a normalizer and ignore_index inside the vocabulary", 7, eight(4 * 7), [6, 0, 3, 2], ignore_index=3,
             token_weight=weights(4), class_weight=weights(7), normalizer=3.0, **everything),
        case("all options, more classes than two vectors hold", 67, eight(3 * 67, 4.0), [66, 0, 31], token_weight=weights(3),
             class_weight=weights(67), **everything),
        case("all options, one class", 1, [0.5, -3.5], [0, 0], token_weight=[1.0, 0.25], class_weight=[2.0], **everything),
        case("probabilities", 6, eight(4 * 6), probabilities=probabilities(4, 6)),
        case("probabilities and token weights", 6, eight(4 * 6), probabilities=probabilities(4, 6),
             token_weight=[1.0, 0.0, 0.5, 2.0]),
        case("probabilities, class weights and label smoothing", 6, eight(4 * 6), probabilities=probabilities(4, 6),
             class_weight=[1.5, 0.25, 0.0, 1.0, 2.0, 0.5], label_smoothing=0.2),
        case("probabilities, all options", 6, eight(4 * 6), probabilities=probabilities(4, 6),
             token_weight=[1.0, 0.0, 0.5, 2.0], class_weight=weights(6), **everything),
        case("probabilities, all options and a normalizer", 6, eight(3 * 6), probabilities=probabilities(3, 6),
             token_weight=weights(3), class_weight=weights(6), normalizer=5.0, **everything),
    ]


# ---- the options of the latent KL ----------------------------------------------------------------------------------

def sigmoid(x):
    return 1 / (1 + mpmath.exp(-x))


@dataclasses.dataclass
class LatentOptions:
    """One call with each policy; z_logits [N * H], prior_logits [], [H] or [N * H], token_weight [] or [N]."""
    name: str
    latent_dim: int
    z_logits: list
    free_bits: float
    prior_logits: list = dataclasses.field(default_factory=list)
    token_weight: list = dataclasses.field(default_factory=list)
    normalizer: float = 0.0

    def u(self):
        rows = len(self.z_logits) // self.latent_dim
        return [mpf(u) for u in self.token_weight] or [mpf(1)] * rows

    def prior_of_each(self, prior):
        return [prior[index % len(prior)] if prior else mpf(0) for index in range(len(self.z_logits))]

    def bit_kl(self, z_logits, prior):
        """KL(Bernoulli(p) || Bernoulli(q)) = p log(p/q) + (1-p) log((1-p)/(1-q)), p = sigmoid(l), q = sigmoid(r)."""
        kl = []
        for l, r in zip(z_logits, self.prior_of_each(prior)):
            p, q, not_p, not_q = sigmoid(l), sigmoid(r), sigmoid(-l), sigmoid(-r)
            kl.append(p * mpmath.log(p / q) + not_p * mpmath.log(not_p / not_q))
        return rows_of(kl, self.latent_dim)

    def penalties(self, policy, z_logits, prior):
        kl, kappa, u = self.bit_kl(z_logits, prior), mpf(self.free_bits), self.u()
        if policy == "per_position":
            return [weight * hinge(mpmath.fsum(row) - kappa) for weight, row in zip(u, kl)]
        if policy == "per_bit":
            return [weight * mpmath.fsum(hinge(bit - kappa) for bit in row) for weight, row in zip(u, kl)]
        mean = mpmath.fsum(weight * mpmath.fsum(row) for weight, row in zip(u, kl)) / mpmath.fsum(u)
        return [weight * (mpmath.fsum(row) - kappa) if mean > kappa else mpf(0) for weight, row in zip(u, kl)]

    def loss(self, policy, z_logits, prior):
        divisor = mpf(self.normalizer) if self.normalizer != 0 else mpmath.fsum(self.u())
        return mpmath.fsum(self.penalties(policy, z_logits, prior)) / divisor

    def conditions(self):
        """What rounding by 1 part may add to the penalty of each position: near each other, |l-r| < 1, the KL of a bit is a
        difference of terms of p |l-r|; further away one of terms of 1 + |l| + |r|. The budget is subtracted, from each bit."""
        def condition(l, r):
            if not self.prior_logits:
                return mpf(0)
            return abs(l - r) if abs(l - r) < 1 else 1 + abs(l) + abs(r)

        prior = self.prior_of_each([mpf(r) for r in self.prior_logits])
        rows = rows_of([condition(mpf(l), r) for l, r in zip(self.z_logits, prior)], self.latent_dim)
        budget = self.latent_dim * mpf(self.free_bits)
        return [u * (mpmath.fsum(row) + budget) for u, row in zip(self.u(), rows)]

    def written(self):
        z_logits, prior = [mpf(z) for z in self.z_logits], [mpf(r) for r in self.prior_logits]
        settings = [self.latent_dim, self.free_bits, self.z_logits, self.prior_logits, self.token_weight, self.normalizer,
                    self.conditions()]
        policies = []
        for policy in LatentKL.POLICIES:
            policies.append(braces([text(self.penalties(policy, z_logits, prior)), text(self.loss(policy, z_logits, prior)),
                                    text(central_difference(lambda z: self.loss(policy, z, prior), z_logits)),
                                    text(central_difference(lambda r: self.loss(policy, z_logits, r), prior))]))
        return [text(self.name), smallest_type(self.z_logits, self.prior_logits, self.token_weight)] + \
            [text(value) for value in settings] + policies


def latent_option_cases():
    random_numbers = random.Random(20251021)
    eight = lambda count, largest=4.0: eighths(random_numbers, count, largest)
    quiet_and_loud = [0.125, 0.25, -0.125, 0.0, 4.0, -6.5, 3.25, 5.0, 1.0, -1.5, 0.5, 0.875]
    far = [7.5, -8.0, 15.0, -14.5]
    return [
        LatentOptions("token weights", 4, quiet_and_loud, 0.25, token_weight=[1.0, 0.5, 2.0]),
        LatentOptions("token weights, one of them 0", 4, quiet_and_loud, 0.25, token_weight=[1.0, 0.0, 0.125]),
        LatentOptions("a normalizer", 4, quiet_and_loud, 0.25, normalizer=7.0),
        LatentOptions("token weights and a normalizer", 4, quiet_and_loud, 0.125, token_weight=[1.5, 0.5, 2.0],
                      normalizer=0.75),
        LatentOptions("one prior", 4, eight(5 * 4), 0.0, eight(4, 2.0)),
        LatentOptions("a prior for each position", 4, eight(3 * 4), 0.25, eight(3 * 4)),
        LatentOptions("a prior near the posterior", 4, quiet_and_loud, 0.0, [x + d for x, d in zip(quiet_and_loud, [
            0.125, -0.125, 0.0, 0.25, 0.5, -0.125, 0.75, -0.875, 1.0, -1.0, 1.125, -0.25])]),
        LatentOptions("a prior far from the posterior", 4, far + [-x for x in far], 0.5,
                      [-x for x in far] + [x / 2 for x in far]),
        LatentOptions("a uniform prior that is given", 4, quiet_and_loud, 0.25, [0.0] * 4),
        LatentOptions("one prior, token weights", 4, eight(5 * 4), 0.25, eight(4, 2.0), [1.0, 0.0, 0.5, 2.0, 1.5]),
        LatentOptions("priors, token weights and a normalizer", 4, eight(4 * 4), 0.125, eight(4 * 4),
                      [1.0, 0.0, 0.5, 2.0], 3.0),
        LatentOptions("one bit", 1, [1.5, -0.75, 0.0], 0.0625, [0.5], [0.5, 1.0, 2.0]),
    ]


# ---- the latent code -----------------------------------------------------------------------------------------------

def log_probability(bit, logit):
    """log P(B = bit), P(B = 1) = 1 / (1 + exp(-l))."""
    return mpmath.log(sigmoid(logit) if bit else 1 - sigmoid(logit))


@dataclasses.dataclass
class LatentLogProbability:
    """z_logits and bits [N * H]."""
    name: str
    latent_dim: int
    z_logits: list
    bits: list

    def values(self, z_logits):
        of_bits = [log_probability(bit, z) for bit, z in zip(self.bits, z_logits)]
        return [mpmath.fsum(row) for row in rows_of(of_bits, self.latent_dim)]

    def written(self):
        z_logits = [mpf(z) for z in self.z_logits]
        gradient = central_difference(lambda z: mpmath.fsum(self.values(z)), z_logits)
        return [text(self.name), smallest_type(self.z_logits), text(self.latent_dim), text(self.z_logits),
                text(self.bits), text(self.values(z_logits)), text(gradient)]


def latent_log_probability_cases():
    random_numbers = random.Random(20251022)
    bits = lambda count: [random_numbers.randint(0, 1) for _ in range(count)]
    return [
        LatentLogProbability("moderate", 4, eighths(random_numbers, 5 * 4, 6.0), bits(5 * 4)),
        LatentLogProbability("sixteen bits", 16, eighths(random_numbers, 3 * 16, 3.0), bits(3 * 16)),
        LatentLogProbability("likely and large", 1, [20.0, 40.0, 85.0, -20.0, -40.0, -85.0], [1, 1, 1, 0, 0, 0]),
        LatentLogProbability("unlikely and large", 1, [20.0, 40.0, 85.0, -20.0, -40.0, -85.0], [0, 0, 0, 1, 1, 1]),
        LatentLogProbability("small", 2, [2.0 ** -13, -2.0 ** -10, 0.0, 2.0 ** -7], [1, 1, 0, 0]),
        LatentLogProbability("decimal fractions", 3, [0.1, -0.2, 0.3, 1e-8, -1e-4, 36.6], [1, 0, 0, 1, 1, 1]),
    ]


# ---- bounds on the evidence ----------------------------------------------------------------------------------------

@dataclasses.dataclass
class EvidenceBound:
    """log_likelihood [K * N * T], bits [K * N * T * H], z_logits [N * T * H], prior_logits [] or [H]."""
    name: str
    samples: int
    tokens: int
    latent_dim: int
    log_likelihood: list
    bits: list
    z_logits: list
    prior_logits: list

    def prior(self, index):
        return mpf(self.prior_logits[index % self.latent_dim]) if self.prior_logits else mpf(0)

    def log_weight(self, sample, sequence):
        """log p(x|z_k) + log p(z_k) - log q(z_k|x)."""
        latents, sequences = self.tokens * self.latent_dim, len(self.z_logits) // (self.tokens * self.latent_dim)
        place = sample * sequences + sequence
        bits = self.bits[place * latents:(place + 1) * latents]
        z_logits = self.z_logits[sequence * latents:(sequence + 1) * latents]
        return mpmath.fsum(mpf(x) for x in self.log_likelihood[place * self.tokens:(place + 1) * self.tokens]) + \
            mpmath.fsum(log_probability(bit, self.prior(index)) - log_probability(bit, mpf(z))
                        for index, (bit, z) in enumerate(zip(bits, z_logits)))

    def kl(self, index):
        p, r = sigmoid(mpf(self.z_logits[index])), sigmoid(self.prior(index))
        return p * mpmath.log(p / r) + (1 - p) * mpmath.log((1 - p) / (1 - r))

    def written(self):
        latents = self.tokens * self.latent_dim
        sequences = range(len(self.z_logits) // latents)
        elbo = [mpmath.fsum(self.kl(index) for index in range(sequence * latents, (sequence + 1) * latents)) -
                mpmath.fsum(mpf(x) for x in self.log_likelihood[sequence * self.tokens:(sequence + 1) * self.tokens])
                for sequence in sequences]
        importance_weighted = [
            -mpmath.log(mpmath.fsum(mpmath.exp(self.log_weight(sample, sequence)) for sample in range(self.samples)) /
                        self.samples) for sequence in sequences]
        return [text(self.name), smallest_type(self.log_likelihood, self.z_logits, self.prior_logits), text(self.samples),
                text(len(sequences)), text(self.tokens), text(self.latent_dim), text(self.log_likelihood), text(self.bits),
                text(self.z_logits), text(self.prior_logits), text(elbo), text(importance_weighted)]


def evidence_bound_cases():
    random_numbers = random.Random(20251023)

    def case(name, samples, sequences, tokens, latent_dim, lowest=8.0, prior=False, far=0.0):
        """The k-th sample is further off by k * far nats a token."""
        count = sequences * tokens
        log_likelihood = [x - sample * far for sample in range(samples)
                          for x in (-abs(y) for y in eighths(random_numbers, count, lowest))]
        return EvidenceBound(name, samples, tokens, latent_dim, log_likelihood,
                             [random_numbers.randint(0, 1) for _ in range(samples * count * latent_dim)],
                             eighths(random_numbers, count * latent_dim, 4.0),
                             eighths(random_numbers, latent_dim, 2.0) if prior else [])

    return [
        case("one sample", 1, 3, 4, 2),
        case("four samples", 4, 2, 3, 3),
        case("four samples, a prior", 4, 2, 3, 3, prior=True),
        case("samples that are far apart", 3, 2, 4, 2, far=512.0),
        case("no sample is likely", 3, 1, 5, 2, lowest=16.0, far=1024.0, prior=True),
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
        above = {"per_position": lambda row: mpmath.fsum(row) > kappa, "per_bit": lambda row: max(row) > kappa,
                 "batch_mean": lambda row: mpmath.fsum(row) > kappa}[self.policy]
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
        case("defaults", "per_position", 1.0, 0.3466, [0, 4, 2, 3], latent_dim=16, largest=0.75),
        case("some positions above the budget", "per_position", 0.5, 0.25, [0, -100, 2, -100], z=a_bit_below_its_share),
        case("a budget for each bit", "per_bit", 2.0, 0.125, [1, 3, 3, 0], ignore_index=3, z=a_bit_below_its_share),
        case("a budget for the batch", "batch_mean", 0.25, 0.25, [4, 0, -100, 1], z=a_bit_below_its_share),
        case("a budget for the batch that is not reached", "batch_mean", 1.5, 2.0, [4, 0, 2, 1], z=a_bit_below_its_share),
        case("no weight on the latent term", "per_position", 0.0, 0.0, [4, 0, 2], largest=5.0),
        case("everything ignored", "per_position", 1.0, 0.0, [-100, -100], largest=5.0),
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

enum class Policy { per_position, per_bit, batch_mean };

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

/// `*_condition`: what rounding by 1 part may add to the value, beside 1 part of it; see generate_references.py.
struct OptionCase {
  const char* name;
  Exact exact;
  int64_t classes, ignore_index;
  std::vector<double> logits;         ///< [N, classes]
  std::vector<int64_t> targets;       ///< [N], or empty:
  std::vector<double> probabilities;  ///< [N, classes]
  std::vector<double> token_weight;   ///< [N], or empty
  std::vector<double> class_weight;   ///< [classes], or empty
  double label_smoothing, z_loss, softcap, normalizer;  ///< 0: none
  std::vector<double> losses, loss_conditions;  ///< [N]
  double sum, mean, mean_condition;
  std::vector<double> gradient, gradient_conditions;  ///< of the mean, [N, classes]
};

struct LatentOptionExpectation {
  std::vector<double> penalties;  ///< [N], weighted
  double mean;
  std::vector<double> z_gradient, prior_gradient;  ///< of the mean; the second of the prior's shape
};

struct LatentOptionCase {
  const char* name;
  Exact exact;
  int64_t latent_dim;
  double free_bits;
  std::vector<double> z_logits;      ///< [N, latent_dim]
  std::vector<double> prior_logits;  ///< [N, latent_dim], [latent_dim] or empty
  std::vector<double> token_weight;  ///< [N], or empty
  double normalizer;                 ///< 0: none
  std::vector<double> conditions;    ///< of the penalties, [N]
  LatentOptionExpectation per_position, per_bit, batch_mean;
};

struct LatentLogProbabilityCase {
  const char* name;
  Exact exact;
  int64_t latent_dim;
  std::vector<double> z_logits;  ///< [N, latent_dim]
  std::vector<int64_t> bits;     ///< [N, latent_dim]
  std::vector<double> values;    ///< [N]
  std::vector<double> gradient;  ///< of the sum, [N, latent_dim]
};

struct EvidenceBoundCase {
  const char* name;
  Exact exact;
  int64_t samples, sequences, tokens, latent_dim;
  std::vector<double> log_likelihood;  ///< [samples, sequences, tokens]
  std::vector<int64_t> bits;           ///< [samples, sequences, tokens, latent_dim]
  std::vector<double> z_logits;        ///< [sequences, tokens, latent_dim]
  std::vector<double> prior_logits;    ///< [latent_dim] or empty
  std::vector<double> negative_elbo;   ///< [sequences], with the first sample's likelihood
  std::vector<double> importance_weighted;  ///< [sequences]
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
        array("OptionCase", "option_cases", option_cases()),
        array("LatentOptionCase", "latent_option_cases", latent_option_cases()),
        array("LatentLogProbabilityCase", "latent_log_probability_cases", latent_log_probability_cases()),
        array("EvidenceBoundCase", "evidence_bound_cases", evidence_bound_cases()),
        array("VAECase", "vae_cases", vae_cases()),
    ]) + "\n}  // namespace reference\n")


if __name__ == "__main__":
    main()
