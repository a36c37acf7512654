"""What backends compile for later calls of a norm, in pieces with a name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

import nbnorm
from nbnorm.errors import BackendError
from nbnorm_backends.numba_cuda import device
from nbnorm_backends.numba_cuda.cubins import kernel_of
from nbnorm_backends.numba_cuda.launch import variants_of

BFLOAT16 = ("bfloat16",) if find_spec("ml_dtypes") else ()
DTYPES = ("float32", "float64", "float16", *BFLOAT16)
NORMS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (nbnorm.batch_norm, nbnorm.layer_norm, nbnorm.group_norm, nbnorm.instance_norm, nbnorm.rms_norm)
}
# Rows, and images, which are worth sharing among threads. Kernels do not depend on sizes, only on which axes there are.
SHAPES = (8, 64), (4, 64, 32, 32)


Pieces = list[tuple[str, Callable[[], object]]]


def pieces_of(names: Iterable[str], dtypes: Iterable[str]) -> Pieces:
    """For the Numba backend: a piece for each norm and dtype."""
    return [(f"{name}, {dtype}", partial(warm, name, dtype)) for name in names for dtype in dtypes]


def gpu_pieces(dtypes: Collection[str]) -> Pieces:
    """For the first GPU: a piece for each kernel. BackendError where there is none."""
    reason = device.problem()
    if reason is not None:
        raise BackendError(reason)
    capability = device.CudaDevice(0).capability
    return [(each.name, partial(kernel_of, each, divmod(capability, 10))) for each in variants_of(dtypes, capability)]


def warm(name: str, dtype: str) -> None:
    """Run a norm and its gradient on the Numba backend: as in training, and in evaluation, plainly and affine."""
    if dtype in BFLOAT16:
        import_module("ml_dtypes")  # tells NumPy the name
    for shape in SHAPES:
        x = np.ones(shape, np.dtype(dtype))
        for kwargs in _arguments(name, x):
            y, pullback = nbnorm.vjp(NORMS[name], x, **kwargs, backend="numba")
            pullback(y)


def _arguments(name: str, x: Any) -> Iterator[dict[str, Any]]:
    """Arguments beside x, the affine ones first."""
    size = x.shape[-1] if name in ("layer_norm", "rms_norm") else x.shape[1]
    weight = np.ones(size, x.dtype)
    affine = {"weight": weight} if name == "rms_norm" else {"weight": weight, "bias": weight}
    if name == "batch_norm":
        yield {"training": True} | affine
        yield {"training": True}
        yield {"running_mean": weight, "running_var": weight} | affine
        return
    own = {
        "layer_norm": {"normalized_shape": size},
        "rms_norm": {"normalized_shape": size},
        "group_norm": {"num_groups": 8},
        "instance_norm": {},
    }[name]
    if name != "instance_norm" or x.ndim > 2:
        yield own | affine
        yield own
