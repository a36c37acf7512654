"""What a call costs beside its kernel: layer norm of (8, 64), whose kernel takes 1 us."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

import nbnorm

from .cases import BACKENDS, VERSION, Run

REPEATS = 1000


def _remembered(x: Any, keys: Any) -> Run:
    return lambda: nbnorm.layer_norm(x, 64, **keys)


def _checked(x: Any, keys: Any) -> Run:
    """A trace wants to see each decision, so nothing is remembered."""

    def run() -> Any:
        with nbnorm.trace():
            return nbnorm.layer_norm(x, 64, **keys)

    return run


def _preferred(x: Any, keys: Any) -> Run:
    name, others = keys["backend"], {key: value for key, value in keys.items() if key != "backend"}

    def run() -> Any:
        with nbnorm.use_backend(name):
            return nbnorm.layer_norm(x, 64, **others)

    return run


def _vjp(x: Any, keys: Any) -> Run:
    def run() -> Any:
        _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 64, **keys)
        return pullback(x)

    return run


def _explain(x: Any, keys: Any) -> Run:
    return lambda: nbnorm.explain(nbnorm.layer_norm, x, 64, **keys)


def _make_plan(x: Any, keys: Any) -> Run:
    return lambda: nbnorm.plan(nbnorm.layer_norm, x, 64, **keys)


def _planned(x: Any, keys: Any) -> Run:
    planned = nbnorm.plan(nbnorm.layer_norm, x, 64, **keys)
    return lambda: planned(x)


CALLS: dict[str, Callable[[Any, Any], Run]] = {
    "remembered": _remembered,
    "checked": _checked,
    "preferred": _preferred,
    "vjp": _vjp,
    "explain": _explain,
    "make_plan": _make_plan,
    "planned": _planned,
}


@functools.cache
def call(name: str, backend: str) -> Run:
    """One of the calls, after it ran once; NotImplementedError where this version does not have it."""
    if name in ("make_plan", "planned") and not hasattr(nbnorm, "plan"):
        raise NotImplementedError(f"nbnorm {nbnorm.__version__} has no plan")
    x, ones = np.ones((8, 64), np.float32), np.ones(64, np.float32)
    run = CALLS[name](x, {"weight": ones, "bias": ones, "backend": backend})
    run()
    return run


class Calls:
    """A thousand calls: asv times each call of a benchmark with a setup alone, and one is too short for the clock."""

    version = VERSION
    params = (list(CALLS), BACKENDS)
    param_names = ("call", "backend")
    repeat = (3, 20, 1.0)

    def setup(self, name: str, backend: str) -> None:
        self.run = call(name, backend)

    def time_thousand_calls(self, name: str, backend: str) -> None:
        run = self.run
        for _ in range(REPEATS):
            run()
