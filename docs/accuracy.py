"""The table of docs/numerics.md: ``python docs/accuracy.py`` prints it.

The data are 500 normal values in each of 8 channels, standard deviation 1, moved by an offset and rounded to the
dtype. Errors are taken against exact rational arithmetic on what the rounding left.
"""

from __future__ import annotations

from fractions import Fraction
from functools import reduce

import numpy as np

import nbnorm

CASES = (
    ("float32", 0.0),
    ("float32", 1e3),
    ("float32", 1e6),
    ("float64", 0.0),
    ("float64", 1e6),
    ("float64", 1e9),
)
COLUMNS = ("E[x²] - E[x]²", "numpy.var", "moments", "merged", "batch_norm")
BACKENDS = ("numpy", "numba")
EPS = 1e-5


def errors(dtype, offset):
    """One row: the largest error over the channels, for nbnorm over both backends too."""
    x = (np.random.default_rng(0).standard_normal((500, 8)) + offset).astype(dtype)
    wide = x.astype(np.float64)
    mean, var = exact_moments(x)

    def of(found):
        return max(abs(float((Fraction(float(f)) - v) / v)) for f, v in zip(found, var, strict=True))

    def worst(error):
        return max(error(name) for name in BACKENDS)

    xhat = (x.astype(np.longdouble) - extended(mean)) / np.sqrt(extended(var) + np.longdouble(EPS))
    return (
        of((wide * wide).mean(axis=0) - wide.mean(axis=0) ** 2),
        of(x.var(axis=0)),
        worst(lambda name: of(nbnorm.moments(x, 0, backend=name).var())),
        worst(lambda name: of(merged(x, name).var())),
        worst(lambda name: float(np.abs(nbnorm.batch_norm(x, training=True, eps=EPS, backend=name) - xhat).max())),
    )


def exact_moments(x):
    """Mean and biased variance of each column, as fractions."""
    columns = [[Fraction(float(value)) for value in column] for column in x.T]
    mean = [sum(column) / len(column) for column in columns]
    return mean, [sum((v - m) ** 2 for v in column) / len(column) for column, m in zip(columns, mean, strict=True)]


def extended(fractions):
    """Fractions in NumPy's longest float, by their float64 and what it leaves."""
    return np.array([np.longdouble(float(f)) + np.longdouble(float(f - Fraction(float(f)))) for f in fractions])


def merged(x, backend):
    """The moments of x from four uneven parts."""
    parts = (nbnorm.moments(part, 0, backend=backend) for part in np.split(x, [1, 10, 250]))
    return reduce(nbnorm.Moments.merge, parts)


def table():
    """The rows in Markdown."""
    rows = [("dtype", "offset", *COLUMNS), ("---",) * (2 + len(COLUMNS))]
    rows += [(dtype, f"{offset:g}", *(f"{e:.0e}" for e in errors(dtype, offset))) for dtype, offset in CASES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
