"""Instructions of each case and of each kind of call; "n/a" without valgrind."""

from __future__ import annotations

import math

from . import callgrind
from .calls import CALLS, call
from .cases import BACKENDS, BACKWARD, CASES, FORWARD, LARGE, Run, runner


UNKNOWN = ["normalize"]  # Valgrind 3.19 does not know all that LLVM makes of it: vmovq between registers


def _small(names: list[str]) -> list[str]:
    """Large cases run the instructions of the others, more often."""
    return [name for name in names if math.prod(CASES[name].shape) < LARGE and name not in UNKNOWN]


KINDS = {"forward": _small(FORWARD), "backward": _small(BACKWARD), "call": list(CALLS)}
FIGURES = [f"{kind}|{name}|{backend}" for kind, names in KINDS.items() for name in names for backend in BACKENDS]


def runner_of(figure: str) -> Run:
    kind, name, backend = figure.split("|")
    return call(name, backend) if kind == "call" else runner(kind, name, backend)


Counts = tuple[dict[str, int], dict[str, str]]


def setup_cache() -> Counts:
    """All counts: one process counts them."""
    return ({}, {}) if callgrind.absence() else callgrind.count(FIGURES)


setup_cache.timeout = 1800  # type: ignore[attr-defined]


def _of(counts: Counts, kind: str, name: str, backend: str) -> float:
    found, failed = counts
    figure = f"{kind}|{name}|{backend}"
    if figure in failed:
        raise RuntimeError(failed[figure])
    return found.get(figure, math.nan)


class Forward:
    params = (KINDS["forward"], BACKENDS)
    param_names = ("case", "backend")
    unit = "instructions"

    def track_instructions_forward(self, counts: Counts, case: str, backend: str) -> float:
        return _of(counts, "forward", case, backend)


class Backward:
    params = (KINDS["backward"], BACKENDS)
    param_names = ("case", "backend")
    unit = "instructions"

    def track_instructions_backward(self, counts: Counts, case: str, backend: str) -> float:
        return _of(counts, "backward", case, backend)


class Calls:
    params = (KINDS["call"], BACKENDS)
    param_names = ("call", "backend")
    unit = "instructions"

    def track_instructions_call(self, counts: Counts, name: str, backend: str) -> float:
        return _of(counts, "call", name, backend)
