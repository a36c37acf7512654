"""The coefficients of the Numba backend's float32 activations: ``python docs/coefficients.py`` fits and prints them.

Minimax fits of the relative error by Lawson's method: least squares, whose weights are multiplied by the errors, over
and over. A quotient p / q is fitted as p - f * q, divided by the q of the round before.
"""

from __future__ import annotations

import numpy as np
from scipy.special import erfcx

LN2 = np.log(2.0)
FARTHEST = 13.0
SCALE = (1 - 3e-6) / np.sqrt(2 * np.pi)  # what z * exp(z*z/2) * (1 - Phi(z)) tends to, but for a bit


def nodes(low, high, count=6001):
    """Chebyshev's, which lie close together at the ends."""
    return (low + high) / 2 - (high - low) / 2 * np.cos(np.pi * np.arange(count) / (count - 1))


def powers(x, degrees):
    return x[:, None] ** np.array(degrees)


def lawson(columns, target, scale, rounds, error):
    """The coefficients with which `error` is least at its largest, and that error; `scale` (coefficients) is what
    errors of columns @ coefficients - target are divided by."""
    weights, divisor = np.ones(len(target)), scale(None)
    best = np.inf, None
    for _ in range(rounds):
        rows = np.sqrt(weights) / divisor
        size = np.abs(columns * rows[:, None]).max(axis=0)
        found = np.linalg.lstsq(columns * rows[:, None] / size, target * rows, rcond=None)[0] / size
        errors, divisor = np.abs(error(found)), scale(found)
        if errors.max() < best[0]:
            best = errors.max(), found
        weights = weights * (errors + 1e-3 * errors.max())
        weights /= weights.max()
    return best


def exponential(degree):
    """exp(r) = 1 + r + r**2 * polynomial, for abs(r) <= ln(2) / 2."""
    r = nodes(-LN2 / 2, LN2 / 2)
    columns, target = powers(r, range(2, degree + 1)), np.exp(r) - 1 - r
    return lawson(columns, target, lambda _: np.exp(r), 400, lambda c: (columns @ c - target) / np.exp(r))


def coth(count=3):
    """a = r * coth(r / 2), in r**2, with which exp(r) = (a + r) / (a - r); the error is that of exp."""
    r = np.linspace(1e-4, LN2 / 2, 6001)
    columns, target = powers(r, range(0, 2 * count, 2)), r / np.tanh(r / 2)
    slope = 2 * r / (target**2 - r**2)
    return lawson(columns, target, lambda _: 1 / slope, 400, lambda c: (columns @ c - target) * slope)


def mills():
    """exp(z*z/2) * (1 - Phi(z)) as SCALE * p / q of degrees 4 and 5, leading coefficients 1 and the next ones equal.

    The exponential beside it is that of -z*z/2 * (1 - lack), since it takes float32's ln(2) for ln(2).
    """
    lack = float(np.float32(LN2)) / LN2 - 1
    z = nodes(0.0, FARTHEST, 1201)
    f = 0.5 * erfcx(z / np.sqrt(2)) * np.exp(-z * z * lack / 2)
    y, s = z / FARTHEST, SCALE / FARTHEST
    free = powers(y, range(4))
    columns = np.hstack([(s * y**3 - f * y**4)[:, None], s * free[:, :3], -f[:, None] * free])

    def parts(c):
        return s * (y**4 + c[0] * y**3 + free[:, :3] @ c[1:4]), y**5 + c[0] * y**4 + free @ c[4:]

    def scale(c):
        return f if c is None else f * parts(c)[1]

    def error(c):
        p, q = parts(c)
        return p / q / f - 1

    largest, c = lawson(columns, f * y**5 - s * y**4, scale, 600, error)
    c = c * FARTHEST ** np.array([1, 4, 3, 2, 5, 4, 3, 2])
    a, (b, *above), (f, *below) = (c[0] + 1) / 2, factors(c[0], c[1:4]), factors(c[0], c[5:])
    return largest, (a, b, *above), (f, *below, c[4])


def factors(u, low):
    """(b, c, e) with which z**4 + u * z**3 + low[2] * z**2 + low[1] * z + low[0] is (w + b) * (w - z + c) + e, where
    w = z * (z + (u + 1) / 2)."""
    total = low[2] - (u + 1) * (u - 1) / 4  # b + c
    b = (u + 1) / 2 * total - low[1]
    return b, total - b, low[0] - b * (total - b)


if __name__ == "__main__":
    print("BELL, before it is scaled:", *exponential(5))
    print("coth:", *coth())
    print("MILLS_SCALE:", SCALE)
    print("MILLS:", *mills())
