"""Our time over that of a peer, in turn in one process: what a slow spell of the machine meets both of."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Collection
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .cases import (
    BACKENDS,
    BACKWARD,
    CASES,
    FORWARD,
    LARGE,
    VERSION,
    Case,
    Measured,
    Run,
    normal,
    on_path,
    runner,
    value_of,
)

EPS = 1e-5
PAIRS = 31
FEW = 7  # pairs of cases whose call takes 0.1 s or more
# Two runs of one code with two threads on two busy cores: 28 of 70 ratios differed by more than 1.3. With one thread
# none did, and half by less than 1.06. Without malloc's settings torch's differed by up to 4: it may map blocks anew.
STEADY = {
    "NBNORM_NUM_THREADS": "1",
    "NUMBA_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
TORCH = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "layer_norm large", "rms_norm"]


def _timer() -> ModuleType:
    """The paired timer of this checkout, also where the library that is measured is an older one."""
    path = Path(__file__).parents[2] / "nbnorm" / "measure.py"
    spec = importlib.util.spec_from_loader("checkout_measure", SourceFileLoader("checkout_measure", str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = _timer().compare


def numpy_norm(kind: str, case: Case) -> Run:
    """A norm of the case's array over its axes in plain NumPy, or its gradient: the same work for each op, and for each
    version of the library."""
    x, dy = normal(case, 0), normal(case, 1)
    if x.itemsize < 4:
        x, dy = x.astype(np.float32), dy.astype(np.float32)
    keep: dict[str, Any] = {"axis": case.axes, "keepdims": True}

    def forward() -> Any:
        mean = x.mean(**keep)
        return (x - mean) / np.sqrt(x.var(**keep) + EPS)

    mean, rstd = x.mean(**keep), 1 / np.sqrt(x.var(**keep) + EPS)

    def backward() -> Any:
        xhat = (x - mean) * rstd
        return rstd * (dy - dy.mean(**keep) - xhat * (dy * xhat).mean(**keep))

    return forward if kind == "forward" else backward


def torch_norm(kind: str, case: Case) -> Run:
    """torch's own norm, eager."""
    import torch  # noqa: PLC0415  a peer may be absent
    import torch.nn.functional as F  # noqa: PLC0415

    x, dy = torch.from_numpy(normal(case, 0)), torch.from_numpy(normal(case, 1))
    size = case.shape[case.channel]
    w, b, mean, var = torch.ones(size), torch.zeros(size), torch.zeros(size), torch.ones(size)
    norm = {
        "batch_norm": lambda: F.batch_norm(x, mean, var, w, b, True, 0.1, EPS),
        "group_norm": lambda: F.group_norm(x, 8, w, b, EPS),
        "instance_norm": lambda: F.instance_norm(x, None, None, w, b, True, 0.1, EPS),
        "layer_norm": lambda: F.layer_norm(x, (size,), w, b, EPS),
        "rms_norm": lambda: F.rms_norm(x, (size,), w, EPS),
    }[case.op]
    if kind == "forward":
        return norm
    inputs = [part.requires_grad_() for part in ([x, w] if case.op == "rms_norm" else [x, w, b])]
    y = norm()
    return lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True)


PEERS = {"numpy": numpy_norm, "torch": torch_norm}


def ratio(peer: str, kind: str, name: str, backend: str, pairs: int) -> float:
    """Our time over the peer's, as the median of the pairs: lower is better."""
    case = CASES[name]
    ours, theirs = runner(kind, name, backend), PEERS[peer](kind, case)
    few = math.prod(case.shape) >= LARGE
    return float(compare(theirs, ours, pairs=min(FEW, pairs) if few else pairs).ratios[1])


def measure(figures: Collection[str], pairs: int = PAIRS, timeout: float = 1800) -> Measured:
    """Ratios by figure, "peer|kind|name|backend", in one process of one thread, and what was raised."""
    command = [sys.executable, "-m", "benchmarks.ratios", str(pairs), *figures]
    environment = on_path(os.environ | STEADY)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring ratios ended with {done.returncode}:\n{done.stderr[-4000:]}")
    values, failed = json.loads(done.stdout)
    return values, failed


def main(pairs: int, figures: list[str]) -> None:
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for figure in figures:
        peer, kind, name, backend = figure.split("|")
        try:
            values[figure] = ratio(peer, kind, name, backend, pairs)
        except NotImplementedError:
            continue
        except Exception as error:  # noqa: BLE001  the others can be measured
            failed[figure] = f"{type(error).__name__}: {error}"
    print(json.dumps([values, failed]))


RIVALS = [backend for backend in BACKENDS if backend != "numpy"]  # it is no rival of torch
KINDS = {"forward": FORWARD, "backward": BACKWARD}
FIGURES = [
    f"{peer}|{kind}|{name}|{backend}"
    for kind, names in KINDS.items()
    for peer, known, backends in (
        ("numpy", names, BACKENDS),
        ("torch", TORCH if find_spec("torch") else [], RIVALS),
    )
    for name in known
    for backend in backends
]


def setup_cache() -> Measured:
    return measure(FIGURES)


setup_cache.timeout = 1800  # type: ignore[attr-defined]


class NumPyForward:
    version = VERSION
    params = (FORWARD, BACKENDS)
    param_names = ("case", "backend")
    unit = "times of a norm in NumPy"

    def track_ratio_numpy_forward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"numpy|forward|{case}|{backend}")


class NumPyBackward:
    version = VERSION
    params = (BACKWARD, BACKENDS)
    param_names = ("case", "backend")
    unit = "times of a norm's gradient in NumPy"

    def track_ratio_numpy_backward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"numpy|backward|{case}|{backend}")


class TorchForward:
    version = VERSION
    params = (TORCH, RIVALS)
    param_names = ("case", "backend")
    unit = "times of torch"

    def track_ratio_torch_forward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"torch|forward|{case}|{backend}")


class TorchBackward:
    version = VERSION
    params = (TORCH, RIVALS)
    param_names = ("case", "backend")
    unit = "times of torch"

    def track_ratio_torch_backward(self, measured: Measured, case: str, backend: str) -> float:
        return value_of(measured, f"torch|backward|{case}|{backend}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
