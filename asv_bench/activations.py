"""What an activation costs: the time of a norm with it over that of the plain norm, on arrays far larger than a cache.

    OMP_WAIT_POLICY=passive python asv_bench/activations.py [--backward | --own] [--pairs 31] [--norm layer ...]

The two calls alternate in one process, so that a slow spell of the machine meets both; printed is the median of the
pairs' ratios, with its quartiles. Both write to one array of NumPy's, whose place in memory is the same for both; with
`--own` to arrays of nbnorm's, which begin with a cache line and so are stored past the caches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

import nbnorm
from nbnorm.backend import ACTIVATIONS
from nbnorm.measure import compare

ROWS = (8192, 4096)
IMAGES = (32, 256, 64, 64)  # both are 128 MiB of float32
NORMS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "batch": (nbnorm.batch_norm, IMAGES, {"training": True}),
    "batch, channels last": (nbnorm.batch_norm, (32, 64, 64, 256), {"training": True, "channel_axis": -1}),
    "instance": (nbnorm.instance_norm, IMAGES, {}),
    "group": (nbnorm.group_norm, IMAGES, {"num_groups": 16}),
    "layer": (nbnorm.layer_norm, ROWS, {"normalized_shape": ROWS[1]}),
    "rms": (nbnorm.rms_norm, ROWS, {"normalized_shape": ROWS[1]}),
}


def forward(op: Any, x: Any, keys: dict[str, Any], activation: str | None, out: Any) -> Callable[[], Any]:
    return lambda: op(x, **keys, activation=activation, out=out, backend="numba")


def backward(op: Any, x: Any, keys: dict[str, Any], activation: str | None, out: None) -> Callable[[], Any]:
    _, pullback = nbnorm.vjp(op, x, **keys, activation=activation, backend="numba")
    return lambda: pullback(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--backward", action="store_true", help="the pullback in place of the forward")
    what.add_argument("--own", action="store_true", help="the forward without out=")
    parser.add_argument("--pairs", type=int, default=31)
    parser.add_argument("--norm", nargs="+", choices=NORMS, default=list(NORMS))
    parser.add_argument("--activation", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    options = parser.parse_args()
    make = backward if options.backward else forward
    rng, worst = np.random.default_rng(0), 0.0
    for norm in options.norm:
        op, shape, keys = NORMS[norm]
        x = rng.standard_normal(shape, np.float32)
        out = None if options.backward or options.own else np.zeros_like(x)
        for activation in options.activation:
            found = compare(make(op, x, keys, None, out), make(op, x, keys, activation, out), pairs=options.pairs)
            low, median, high = found.ratios
            worst = max(worst, median)
            cost = found.first / x.size * 1e9
            print(f"{norm:21} {activation:11} {median:5.2f} ({low:.2f} to {high:.2f})  plain {cost:.3f} ns", flush=True)
    print(f"worst median {worst:.2f}")


if __name__ == "__main__":
    main()
