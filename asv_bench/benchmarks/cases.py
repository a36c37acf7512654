"""What is measured: each norm once, one of them varied along one axis at a time, and how a case runs.

Names and sizes are those of results that were kept: a case whose meaning changes gets a new name.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import nbnorm

Run = Callable[[], Any]
Measured = tuple[dict[str, float], dict[str, str]]  # values by figure, and errors of those that failed
ROWS, IMAGES, KERNEL = (256, 1024), (16, 64, 16, 16), (256, 64, 4, 4)  # 1 MiB of float32: in a second-level cache
LARGE_ROWS, LARGE_IMAGES = (4096, 4096), (32, 64, 64, 128)  # 64 MiB: in no cache
LARGE = 1 << 24  # elements
VERSION = "1"  # of every benchmark, in place of asv's digest of its source: results are kept while it stays
ARRAY = object()  # for an option that is an array: made for the case


@dataclass(frozen=True)
class Case:
    """A norm on one shape. Options are keyword arguments; with `training` running statistics are updated."""

    op: str
    shape: tuple[int, ...] = ROWS
    dtype: str = "float32"
    channel: int = -1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[int, ...]:
        """What the NumPy norm beside it reduces: of images all axes but the channels', of rows the last one."""
        dims = len(self.shape)
        return tuple(axis for axis in range(dims) if axis != self.channel % dims) if dims == 4 else (-1,)


TRAINING = {"training": True}
CASES = {
    "batch_norm": Case("batch_norm", IMAGES, channel=1, options=TRAINING),
    "batch_norm channels_last": Case("batch_norm", (16, 16, 16, 64), options=TRAINING),
    "batch_norm rows": Case("batch_norm", options=TRAINING),
    "batch_norm small": Case("batch_norm", (8, 64), options=TRAINING),
    "batch_norm large": Case("batch_norm", LARGE_IMAGES, channel=1, options=TRAINING),
    "batch_norm float16": Case("batch_norm", IMAGES, "float16", channel=1, options=TRAINING),
    "batch_norm eval": Case("batch_norm", IMAGES, channel=1),
    "batch_norm eval_relu": Case("batch_norm", IMAGES, channel=1, options={"activation": "relu"}),
    "batch_norm ghost": Case("batch_norm", IMAGES, channel=1, options=TRAINING | {"ghost_batch_size": 4}),
    "batch_renorm": Case("batch_renorm", IMAGES, channel=1, options=TRAINING),
    "group_norm": Case("group_norm", IMAGES, channel=1),
    "group_norm channels_last": Case("group_norm", (16, 16, 16, 64)),
    "group_norm silu": Case("group_norm", IMAGES, channel=1, options={"activation": "silu"}),
    "instance_norm": Case("instance_norm", IMAGES, channel=1),
    "layer_norm": Case("layer_norm"),
    "layer_norm small": Case("layer_norm", (8, 64)),
    "layer_norm large": Case("layer_norm", LARGE_ROWS),
    "layer_norm float64": Case("layer_norm", dtype="float64"),
    "layer_norm float16": Case("layer_norm", dtype="float16"),
    "layer_norm bfloat16": Case("layer_norm", dtype="bfloat16"),
    "layer_norm mask": Case("layer_norm", options={"mask": ARRAY}),
    "layer_norm gelu": Case("layer_norm", options={"activation": "gelu"}),
    "layer_norm residual": Case("layer_norm", options={"residual": ARRAY}),
    "add_layer_norm": Case("add_layer_norm"),
    "rms_norm": Case("rms_norm"),
    "add_rms_norm": Case("add_rms_norm"),
    "norm_dropout": Case("norm_dropout", options={"p": 0.1, "seed": 0}),
    "weight_standardization": Case("weight_standardization", KERNEL, channel=0),
    "local_response_norm": Case("local_response_norm", IMAGES, channel=1),
    "normalize": Case("normalize"),
    "moments": Case("moments"),
}
FORWARD = list(CASES)
BACKWARD = [name for name in CASES if name != "moments"]  # has no gradient


def _backends() -> list[str]:
    """The two that come with the library, and those named in NBNORM_BENCH_BACKENDS."""
    wanted = [name.strip() for name in os.environ.get("NBNORM_BENCH_BACKENDS", "").split(",") if name.strip()]
    installed = {backend.name for backend in nbnorm.backends() if backend.state != "refused"}
    absent = ", ".join(name for name in wanted if name not in installed)
    if absent:
        raise ValueError(f"NBNORM_BENCH_BACKENDS names {absent}; installed are {', '.join(sorted(installed))}")
    return list(dict.fromkeys(["numba", "numpy", *wanted]))


BACKENDS = _backends()


@functools.cache
def runner(kind: str, name: str, backend: str) -> Run:
    """What runs a case on a backend, "forward" or "backward", after one call that has compiled what it needs.

    Raises
    ------
    NotImplementedError
        If this version has no such norm or option, a package is missing, or the backend refuses the case. asv shows
        "n/a" for it.
    """
    case = CASES[name]
    op, args, keys = _arguments(case)
    try:
        run = _forward(op, args, keys, backend) if kind == "forward" else _backward(case, op, args, keys, backend)
        run()
    except nbnorm.BackendError as error:
        raise NotImplementedError(f"{name}: {error}") from error
    return run


def value_of(measured: Measured, figure: str) -> float:
    """NaN, which asv shows as "n/a", for what this version does not have."""
    values, failed = measured
    if figure in failed:
        raise RuntimeError(f"{figure}: {failed[figure]}")
    return values.get(figure, math.nan)


def on_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child that imports these benchmarks."""
    folders = [str(Path(__file__).parents[1]), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(folders)}


def _forward(op: Callable[..., Any], args: tuple[Any, ...], keys: dict[str, Any], backend: str) -> Run:
    return lambda: op(*args, **keys, backend=backend)


def _backward(case: Case, op: Callable[..., Any], args: tuple[Any, ...], keys: dict[str, Any], backend: str) -> Run:
    y, pullback = nbnorm.vjp(op, *args, **keys, backend=backend)
    dy = normal(case, 1)
    cotangent = (dy, dy) if isinstance(y, tuple) else dy
    return lambda: pullback(cotangent)


def normal(case: Case, seed: int) -> Any:
    """An array of the case's shape and dtype."""
    return np.random.default_rng(seed).standard_normal(case.shape, np.float32).astype(dtype_of(case))


def dtype_of(case: Case) -> np.dtype[Any]:
    """NumPy has no bfloat16 of its own."""
    if case.dtype == "bfloat16":
        try:
            import ml_dtypes  # noqa: F401, PLC0415  only these cases need it
        except ImportError as error:
            raise NotImplementedError("bfloat16 needs the package ml_dtypes") from error
    return np.dtype(case.dtype)


def _arguments(case: Case) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The operation, and its arguments beside `backend`."""
    op = getattr(nbnorm, case.op, None)
    if op is None:
        raise NotImplementedError(f"nbnorm {nbnorm.__version__} has no {case.op}")
    x, size = normal(case, 0), case.shape[case.channel]
    real = np.float64 if case.dtype == "float64" else np.float32
    ones, zeros = np.ones(size, real), np.zeros(size, real)
    affine: dict[str, Any] = {"weight": ones, "bias": zeros}
    first: tuple[Any, ...] = {
        "batch_norm": (x, zeros.copy(), ones.copy()),
        "batch_renorm": (x, zeros.copy(), ones.copy()),
        "layer_norm": (x, size),
        "rms_norm": (x, size),
        "add_layer_norm": (x, x, size),
        "add_rms_norm": (x, x, size),
        "group_norm": (x, 8),
        "norm_dropout": (nbnorm.layer_norm, x, size),
        "local_response_norm": (x, 5),
        "moments": (x, -1),
    }.get(case.op, (x,))
    if "rms" in case.op:
        del affine["bias"]
    if case.op in ("weight_standardization", "local_response_norm", "normalize", "moments"):
        affine = {}
    if case.op in ("batch_norm", "batch_renorm", "group_norm", "instance_norm") and case.channel != 1:
        affine["channel_axis"] = case.channel
    given = {"mask": lambda: np.arange(case.shape[-1]) % 8 != 0, "residual": lambda: normal(case, 2)}
    options = {key: given[key]() if value is ARRAY else value for key, value in case.options.items()}
    known = inspect.signature(op).parameters
    absent = [key for key in options if key not in known]
    if absent:
        raise NotImplementedError(f"{case.op} of nbnorm {nbnorm.__version__} has no {', '.join(absent)}")
    return op, first, affine | options
