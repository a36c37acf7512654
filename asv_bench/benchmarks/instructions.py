"""Instructions of each case and of each kind of call; "n/a" without valgrind."""

from __future__ import annotations

import math

from . import callgrind
from .calls import CALLS, call
from .cases import BACKENDS, BACKWARD, CASES, FORWARD, LARGE, VERSION, Measured, Run, runner, value_of

UNKNOWN = ["normalize"]  # Valgrind 3.19 does not know all that LLVM makes of it: vmovq between registers


def _small(names: list[str]) -> list[str]:
    """Large cases run the instructions of the others, more often."""
    return [name for name in names if math.prod(CASES[name].shape) < LARGE and name not in UNKNOWN]


KINDS = {"forward": _small(FORWARD), "backward": _small(BACKWARD), "call": list(CALLS)}
FIGURES = [f"{kind}|{name}|{backend}" for kind, names in KINDS.items() for name in names for backend in BACKENDS]


def runner_of(figure: str) -> Run:
    kind, name, backend = figure.split("|")
    return call(name, backend) if kind == "call" else runner(kind, name, backend)


def counts(kind: str) -> Measured:
    """All of a kind: one process counts them."""
    of_kind = [figure for figure in FIGURES if figure.startswith(f"{kind}|")]
    return ({}, {}) if callgrind.absence() else callgrind.count(of_kind)


class Forward:
    version = VERSION
    params = (KINDS["forward"], BACKENDS)
    param_names = ("case", "backend")
    unit = "instructions"

    def setup_cache(self) -> Measured:
        return counts("forward")

    setup_cache.timeout = 1800  # type: ignore[attr-defined]

    def track_instructions_forward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"forward|{case}|{backend}")


class Backward:
    version = VERSION
    params = (KINDS["backward"], BACKENDS)
    param_names = ("case", "backend")
    unit = "instructions"

    def setup_cache(self) -> Measured:
        return counts("backward")

    setup_cache.timeout = 1800  # type: ignore[attr-defined]

    def track_instructions_backward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"backward|{case}|{backend}")


class Calls:
    version = VERSION
    params = (KINDS["call"], BACKENDS)
    param_names = ("call", "backend")
    unit = "instructions"

    def setup_cache(self) -> Measured:
        return counts("call")

    setup_cache.timeout = 1800  # type: ignore[attr-defined]

    def track_instructions_call(self, measured: Measured, name: str, backend: str) -> float:
        return value_of(measured, f"call|{name}|{backend}")
