"""The coefficients of the Numba backend's float32 activations: ``python docs/coefficients.py`` fits and prints them.

Minimax fits of the relative error by Lawson's method: least squares, whose weights are multiplied by the errors, over
and over. A quotient p / q is fitted as p - f * q, divided by the q of the round before.
"""

from __future__ import annotations

import numpy as np
from scipy.special import erfcx

LN2 = np.log(2.0)
FARTHEST = 13.26


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


def mills(above=4, below=5):
    """exp(z*z/2) * (1 - Phi(z)) as a quotient, whose last coefficient below is 1.

    The exponential beside it is that of -z*z/2 * (1 - lack), since it takes float32's ln(2) for ln(2).
    """
    lack = float(np.float32(LN2)) / LN2 - 1
    z = nodes(0.0, FARTHEST)
    f = 0.5 * erfcx(z / np.sqrt(2)) * np.exp(-z * z * lack / 2)
    y = z / FARTHEST
    columns = np.hstack([powers(y, range(above + 1)), -f[:, None] * powers(y, range(1, below + 1))])

    def parts(c):
        return powers(y, range(above + 1)) @ c[: above + 1], 1 + powers(y, range(1, below + 1)) @ c[above + 1 :]

    def scale(c):
        return f if c is None else f * parts(c)[1]

    def error(c):
        p, q = parts(c)
        return p / q / f - 1

    largest, c = lawson(columns, f, scale, 2000, error)
    p, q = c[: above + 1], np.append(1.0, c[above + 1 :])
    q, p = q / FARTHEST ** np.arange(below + 1), p / FARTHEST ** np.arange(above + 1)
    return largest, p / q[-1], q / q[-1]


if __name__ == "__main__":
    for degree in (6, 5):
        print(f"exp, degree {degree}:", *exponential(degree))
    print("mills:", *mills())
