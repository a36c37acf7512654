"""Our time over that of a peer, in turn in one process: what a slow spell of the machine meets both of."""

from __future__ import annotations

import functools
import importlib.util
import math
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .cases import BACKENDS, BACKWARD, CASES, FORWARD, LARGE, Case, Run, normal, runner

EPS = 1e-5
PAIRS = 31
FEW = 7  # pairs of cases whose call takes 0.1 s or more
TORCH = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "layer_norm large", "rms_norm"]


def _timer() -> ModuleType:
    """The paired timer of this checkout, also where the library that is measured is an older one."""
    path = Path(__file__).parents[2] / "nbnorm" / "measure.py"
    spec = importlib.util.spec_from_loader("checkout_measure", SourceFileLoader("checkout_measure", str(path)))
    assert spec is not None and spec.loader is not None
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
    """torch's own norm, eager, with as many threads; NotImplementedError where torch is not installed."""
    try:
        import torch  # noqa: PLC0415  a peer may be absent
        import torch.nn.functional as F  # noqa: PLC0415
    except ImportError as error:
        raise NotImplementedError("torch is not installed") from error
    from nbnorm.parallel import thread_count  # noqa: PLC0415  as torch, only here

    torch.set_num_threads(thread_count())
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


@functools.cache
def ratio(kind: str, name: str, backend: str, peer: str, pairs: int = PAIRS) -> float:
    """Our time over the peer's, as the median of the pairs: lower is better."""
    case = CASES[name]
    ours, theirs = runner(kind, name, backend), PEERS[peer](kind, case)
    few = math.prod(case.shape) >= LARGE
    return float(compare(theirs, ours, pairs=min(FEW, pairs) if few else pairs).ratios[1])


class _Ratio:
    param_names = ("case", "backend")
    timeout = 300
    kind, peer = "forward", "numpy"

    def setup(self, case: str, backend: str) -> None:
        """What a version does not have is "n/a" only if setup finds it."""
        runner(self.kind, case, backend)
        PEERS[self.peer](self.kind, CASES[case])


class NumPyForward(_Ratio):
    params = (FORWARD, BACKENDS)
    unit = "times of a norm in NumPy"

    def track_ratio_numpy_forward(self, case: str, backend: str) -> float:
        return ratio("forward", case, backend, "numpy")


class NumPyBackward(_Ratio):
    params = (BACKWARD, BACKENDS)
    unit = "times of a norm's gradient in NumPy"
    kind = "backward"

    def track_ratio_numpy_backward(self, case: str, backend: str) -> float:
        return ratio("backward", case, backend, "numpy")


class TorchForward(_Ratio):
    params = (TORCH, BACKENDS)
    unit = "times of torch"
    peer = "torch"

    def track_ratio_torch_forward(self, case: str, backend: str) -> float:
        return ratio("forward", case, backend, "torch")


class TorchBackward(_Ratio):
    params = (TORCH, BACKENDS)
    unit = "times of torch"
    kind, peer = "backward", "torch"

    def track_ratio_torch_backward(self, case: str, backend: str) -> float:
        return ratio("backward", case, backend, "torch")
