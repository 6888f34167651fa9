#!/usr/bin/env python3
"""Coefficients of the kernels' polynomials, lowest power first, from the functions alone.

    pip install mpmath && python3 fit_polynomials.py

A polynomial is fitted for the least largest relative error (Remez' exchange, in 50 digits). The coefficients are
float32, and the error given is theirs, without that of float32 arithmetic.
"""

import itertools
import struct

import mpmath
from mpmath import mp, mpf

mp.dps = 50
INTERVALS = 2000  # between points: an extremum between two of them is above both by less than 1e-4 of itself
EXCESS = mpf("1e-3")  # over the least largest error, at most; the rounding of the coefficients costs more


def kl_of_logit(x):
    """KL(Bernoulli(sigmoid(x)) || Bernoulli(1/2)) in nats."""
    half = x / 2
    return half * mpmath.tanh(half) - mpmath.log(mpmath.cosh(half))


def rest_of_exp(x):
    """(exp(x) - 1 - x) / x^2, from its series: at most 0.06 of its relative error is one of exp for |x| < log(2) / 2."""
    return mpmath.fsum(x ** k / mpmath.factorial(k + 2) for k in range(40))


def chebyshev_points(low, high):
    """Dense where the errors of a polynomial change fastest."""
    middle, radius = mpf(low + high) / 2, mpf(high - low) / 2
    return [middle + radius * mpmath.cos(mp.pi * k / INTERVALS) for k in range(INTERVALS + 1)]


def points_of_even_or_odd(largest):
    """Both signs would say the same twice."""
    return [x for x in chebyshev_points(-largest, largest) if x > mpf("1e-20")]


def errors_of(coefficients, columns, target):
    return [mpmath.fdot(row, coefficients) - value for row, value in zip(columns, target)]


def minimax(columns, target):
    """Coefficients c with the least largest |columns c - target|.

    An error of equal size and alternating sign at one point more than there are coefficients is a lower bound of it.
    """
    count = len(columns[0])
    chosen = [(2 * k + 1) * len(target) // (2 * count + 2) for k in range(count + 1)]
    while True:
        system = mpmath.matrix([columns[index] + [(-1) ** k] for k, index in enumerate(chosen)])
        *coefficients, bound = mpmath.lu_solve(system, mpmath.matrix([target[index] for index in chosen]))
        errors = errors_of(coefficients, columns, target)
        if max(map(abs, errors)) <= abs(bound) * (1 + EXCESS):
            return coefficients
        runs = itertools.groupby(range(len(errors)), key=lambda index: errors[index] > 0)
        chosen = [max(run, key=lambda index: abs(errors[index])) for _, run in runs]
        while len(chosen) > count + 1:  # from the ends alone, or the signs would no longer alternate
            chosen.pop(0 if abs(errors[chosen[0]]) < abs(errors[chosen[-1]]) else -1)


def to_float32(value):
    return mpf(struct.unpack("f", struct.pack("f", value))[0])


def round_in_turn(columns, target):
    """Each coefficient is rounded before those of higher powers are fitted, so that they make up for it."""
    if not columns[0]:
        return []
    first = to_float32(minimax(columns, target)[0])
    rest = [value - first * row[0] for row, value in zip(columns, target)]
    return [first] + round_in_turn([row[1:] for row in columns], rest)


def round_at_once(columns, target):
    """For powers of x - c with c inside the interval: at c none can make up for the first one's rounding."""
    return [to_float32(value) for value in minimax(columns, target)]


def fit(title, function, known, powers, points, round_coefficients):
    """Prints c for which known(x) + sum of c_k powers(x)[k] is function(x)."""
    columns = [[power / function(x) for power in powers(x)] for x in points]
    target = [1 - known(x) / function(x) for x in points]
    coefficients = round_coefficients(columns, target)
    largest = max(map(abs, errors_of(coefficients, columns, target)))
    print(f"{title}: relative error {float(largest):.2e}", *(f"{float(value):.9e}f" for value in coefficients), sep="\n    ")


fit("exp, |x| < log(2) / 2, p(x) of 1 + x + x^2 p(x)", rest_of_exp, lambda x: 0,
    lambda x: [x ** k for k in range(5)], chebyshev_points(-mp.ln2 / 2, mp.ln2 / 2), round_at_once)
fit("tanh, |x| < 0.625, x + x^3 p(x^2)", mpmath.tanh, lambda x: x,
    lambda x: [x ** (3 + 2 * k) for k in range(5)], points_of_even_or_odd(0.625), round_in_turn)
fit("KL, |x| < 2, x^2/8 + x^4 q(x^2)", kl_of_logit, lambda x: x ** 2 / 8,
    lambda x: [x ** (4 + 2 * k) for k in range(7)], points_of_even_or_odd(2), round_in_turn)
fit("KL, 2 <= x < 4, in powers of x - 3", kl_of_logit, lambda x: 0,
    lambda x: [(x - 3) ** k for k in range(9)], chebyshev_points(2, 4), round_at_once)


def rest_of_log1p(x):
    """(log(1 + x) - x + x^2/2) / x^3."""
    return (mpmath.log1p(x) - x + x ** 2 / 2) / x ** 3


def interpolate(title, function, rest, power, low, high, count):
    """The polynomial through `count` Chebyshev nodes, nearly as good as the best: the exchange above does not settle on an
    interval that is not the same on both sides of a zero. function(x) = known(x) + x^power rest(x)."""
    nodes = [mpf(low + high) / 2 + mpf(high - low) / 2 * mpmath.cos(mp.pi * (2 * k + 1) / (2 * count)) for k in range(count)]
    system = mpmath.matrix([[x ** k for k in range(count)] for x in nodes])
    coefficients = [to_float32(value) for value in mpmath.lu_solve(system, mpmath.matrix([rest(x) for x in nodes]))]
    points = [x for x in chebyshev_points(low, high) if abs(x) > mpf("1e-6")]
    largest = max(abs((mpmath.polyval(coefficients[::-1], x) - rest(x)) * x ** power / function(x)) for x in points)
    print(f"{title}: relative error {float(largest):.2e}", *(f"{float(value):.9e}f" for value in coefficients), sep="\n    ")


interpolate("log1p, sqrt(1/2) <= 1 + x <= sqrt(2), p(x) of x - x^2/2 + x^3 p(x)", mpmath.log1p, rest_of_log1p, 3,
            mpmath.sqrt(0.5) - 1, mpmath.sqrt(2) - 1, 8)
