"""The tables of docs/numerics.md: ``python docs/accuracy.py`` prints them.

Each figure stands for "at most": what was measured and a third more, since other processors sum in other orders,
rounded up to one digit. The exact results come from whole numbers, or from the oracle of the tests. Where torch is
installed its layer norm is measured too.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

import nbnorm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from bounds import CASES, SPREADS, example, normal

BACKENDS = ("numpy", "numba")
MARGIN = 4 / 3
LEAST = 1e-15  # below it a relative error is rounding of the last place of float64, and may be 0 elsewhere

# ---- the variance ----------------------------------------------------------------------------------------------------

GROUPS, SIZE = 16, 4096
DATA: dict[str, Callable[[Any], Any]] = {
    "mean 0": lambda x: x,
    "10⁴": lambda x: x + 1e4,
    "10⁶": lambda x: x + 1e6,
    "10⁸, std 100": lambda x: x * 100 + 1e8,
    "first is 10⁶": lambda x: np.where(np.arange(SIZE), x, 1e6),
}


def total(x: Any) -> Any:
    """Sums of rows by halves: of all orders one of the best, and the same on every processor."""
    while x.shape[1] > 1:
        x = x[:, ::2] + x[:, 1::2]
    return x[:, 0]


def square_of_the_mean(x: Any) -> Any:
    return total(x * x) / SIZE - (total(x) / SIZE) ** 2


def welford(x: Any) -> Any:
    mean, m2 = np.zeros_like(x[:, 0]), np.zeros_like(x[:, 0])
    for i in range(SIZE):
        distance = x[:, i] - mean
        mean += distance / (i + 1)
        m2 += distance * (x[:, i] - mean)
    return m2 / SIZE


def two_pass(x: Any) -> Any:
    return total((x - (total(x) / SIZE)[:, None]) ** 2) / SIZE


def corrected_two_pass(x: Any) -> Any:
    d = x - (total(x) / SIZE)[:, None]
    return (total(d * d) - total(d) ** 2 / SIZE) / SIZE


def rows(x: Any, backend: str) -> Any:
    return running(x[None], backend)


def columns(x: Any, backend: str) -> Any:
    return running(np.ascontiguousarray(x.T), backend)


def running(x: Any, backend: str) -> Any:
    """What batch norm normalizes with, as it reaches a running variance."""
    mean, var = np.zeros(GROUPS), np.zeros(GROUPS)
    nbnorm.batch_norm(x, mean, var, training=True, momentum=1.0, backend=backend)
    return var * ((SIZE - 1) / SIZE)


def moments(x: Any, backend: str) -> Any:
    return nbnorm.moments(x, 1, backend=backend).var()


def merged(x: Any, backend: str) -> Any:
    """From four uneven parts."""
    parts = (nbnorm.moments(part, 1, backend=backend) for part in np.split(x, [1, 10, 1000], axis=1))
    return reduce(nbnorm.Moments.merge, parts).var()


TEXTBOOK = {
    "E[x²] - E[x]²": square_of_the_mean,
    "Welford, element by element": welford,
    "two-pass": two_pass,
    "corrected two-pass": corrected_two_pass,
}
OURS = {
    "layer norm, batch norm channels first": rows,
    "batch norm channels last": columns,
    "`moments`": moments,
    "`Moments.merge` of four parts": merged,
}


def variances(dtype: str) -> dict[str, list[float]]:
    """For each method its largest relative error over the groups, on each kind of data."""
    normal_values = np.random.default_rng(0).normal(size=(GROUPS, SIZE))
    found: dict[str, list[float]] = {name: [] for name in TEXTBOOK | OURS}
    for made in DATA.values():
        x = made(normal_values).astype(dtype)
        exact = exact_variances(x)
        for name, method in TEXTBOOK.items():
            found[name].append(relative(method(x), exact))
        for name, ours in OURS.items():
            found[name].append(max(relative(ours(x, backend), exact) for backend in BACKENDS))
    return found


def exact_variances(x: Any) -> list[tuple[int, int]]:
    """The biased variance of each row as a fraction, in whole numbers: each value is one of some power of two."""
    found = []
    for row in x.tolist():
        ratios = [value.as_integer_ratio() for value in row]
        scale = max(below for _, below in ratios)
        values = [above * (scale // below) for above, below in ratios]
        found.append((SIZE * sum(v * v for v in values) - sum(values) ** 2, (SIZE * scale) ** 2))
    return found


def relative(found: Any, exact: list[tuple[int, int]]) -> float:
    """|found / exact - 1|, the largest: the difference is taken in whole numbers."""
    errors = []
    for value, (above, below) in zip(found.tolist(), exact, strict=True):
        numerator, denominator = value.as_integer_ratio()
        errors.append(abs(numerator * below - above * denominator) / (above * denominator))
    return max(errors)


def torch_variances() -> list[float]:
    """As the first table, for torch's layer norm; its rstd is a float32, and so no better than 1e-7."""
    torch = importlib.import_module("torch")
    normal_values = np.random.default_rng(0).normal(size=(GROUPS, SIZE))
    found = []
    for made in DATA.values():
        x = made(normal_values).astype(np.float32)
        rstd = torch.native_layer_norm(torch.from_numpy(x), [SIZE], None, None, 0.0)[2]
        found.append(relative((1 / rstd.numpy().astype(float) ** 2)[:, 0], exact_variances(x)))
    return found


# ---- the norms -------------------------------------------------------------------------------------------------------


def norms(dtype: str) -> dict[str, list[float]]:
    """For each norm the largest error of y and of the gradients, as multiples of what is allowed, on each spread."""
    return {f"`{name}`": [*both(cases, dtype)] for name, cases in CASES.items()}


def both(cases: Any, dtype: str) -> Iterator[float]:
    for mean, std in SPREADS[dtype]:
        examples = [example(case, normal(case, dtype, mean, std)) for case in cases]
        yield from map(max, zip(*(each.errors(backend) for each in examples for backend in BACKENDS), strict=True))


# ---- tables ----------------------------------------------------------------------------------------------------------


def at_most(error: float) -> float:
    """The figure that is printed."""
    error = max(error * MARGIN, LEAST)
    power = math.floor(math.log10(error))
    return float(f"{math.ceil(error / 10.0**power)}e{power}")


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def table_of_variances(dtype: str) -> str:
    lines = [line(dtype, *DATA), line(*["---"] * (1 + len(DATA)))]
    return "\n".join(lines + [row_of_variances(*item) for item in variances(dtype).items()])


def row_of_variances(name: str, errors: list[float]) -> str:
    return line(name, *(f"{at_most(error):.0e}" for error in errors))


def table_of_norms(dtype: str) -> str:
    heads = [f"{mean:g}, {std:g}" for mean, std in SPREADS[dtype]]
    lines = [line(f"{dtype}: mean, std", *heads), line(*["---"] * (1 + len(heads)))]
    for name, errors in norms(dtype).items():
        pairs = zip(errors[::2], errors[1::2], strict=True)
        lines.append(line(name, *(" / ".join(f"{at_most(error):.2g}" for error in pair) for pair in pairs)))
    return "\n".join(lines)


def main() -> None:
    for dtype in ("float32", "float64"):
        print(table_of_variances(dtype), end="\n\n")
    if importlib.util.find_spec("torch"):
        print(row_of_variances("torch's layer norm, float32", torch_variances()), end="\n\n")
    for dtype in SPREADS:
        print(table_of_norms(dtype), end="\n\n")


if __name__ == "__main__":
    main()
