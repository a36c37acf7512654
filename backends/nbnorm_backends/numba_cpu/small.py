"""Small norms over runs that are made again and again: what does not change between calls is settled once.

Numba takes 1 us to find the types of twenty arguments, and NumPy 0.1 us to make a view: as much as the kernel takes for
a few rows. So what is called here is the compiled function itself, which checks no types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, typeof
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu import kernels, outputs
from nbnorm_backends.numba_cpu.cache import sealed
from nbnorm_backends.numba_cpu.elements import CARRIERS, INNER
from nbnorm_backends.numba_cpu.options import Options
from nbnorm_backends.numba_cpu.pool import worker
from nbnorm_backends.numba_cpu.runs import groups_per_chunk, param_view, params_shape, runs_view

Array = NDArray[Any]


def repeated(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    shape: tuple[int, ...],
) -> Callable[..., Array] | None:
    """`Backend.repeated`, by the kernel that `runs.forward` runs; None where weight or bias must be converted."""
    parameters = _parameters(x, weight, bias)
    if parameters is None:
        return None
    w, b = parameters
    five, four, dtype, empty = runs_view(x).shape, w.shape, x.dtype, _empty(x)
    seen = _seen(x, five)
    sizes = five[0] * five[2], groups_per_chunk(x)
    chunks = -(-sizes[0] // sizes[1])
    table = kernels.STATISTICS, sizes[0]
    work = worker(kernels.runs_forward)

    def arguments(x: Array, w: Array, b: Array, y: Array) -> tuple[Any, ...]:
        found = np.zeros(1, np.int64), chunks, sizes[1], 0, x, w, b, center, eps, False, True, np.empty(table)
        return *found, None, None, options.before, options.after, None, None, None, False, y

    sample = arguments(runs_view(x), w, b, runs_view(np.empty(x.shape, dtype)))
    work(*sample)
    run = work.get_overload(tuple(map(typeof, sample)))  # type: ignore[attr-defined]

    def again(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Array:
        y = empty(shape, dtype) if out is None else out
        own = w if weight is None else weight.reshape(four), b if bias is None else bias.reshape(four)
        run(*arguments(seen(x), *own, seen(y)))
        return y

    return again


def bound(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    shape: tuple[int, ...],
) -> Callable[..., Array | None] | None:
    """The same with weight and bias as they are, by a function that is compiled for x as it comes."""
    parameters = _parameters(x, weight, bias)
    if parameters is None:
        return None
    five, dtype, empty = runs_view(x).shape, x.dtype, _empty(x)
    seen = _seen(x, None)
    settled = *parameters, five, center, eps, options.before, options.after
    sample = seen(np.empty(shape, dtype))
    forward(sample, sample, *settled)
    run = forward.get_overload(tuple(map(typeof, (sample, sample, *settled))))

    def again(x: Array, out: Array | None) -> Array | None:
        y = empty(shape, dtype) if out is None else out
        return y if run(x, y, *settled) else None

    def again_in_half(x: Array, out: Array | None) -> Array | None:
        y = empty(shape, dtype) if out is None else out
        return y if run(seen(x), seen(y), *settled) else None

    return again_in_half if dtype.itemsize == 2 else again


@njit(**INNER)
def touch(a, b):  # type: ignore[no-untyped-def]  # compiled
    """Whether two contiguous arrays share memory."""
    first, second = a.ctypes.data, b.ctypes.data
    return first < second + b.nbytes and second < first + a.nbytes


@njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True)
def _forward(x, y, w, b, five, center, eps, before, after):  # type: ignore[no-untyped-def]  # compiled
    """y of a C-contiguous x, in one chunk; False, and nothing done, where y is neither x nor apart from the inputs."""
    if (y.ctypes.data != x.ctypes.data and touch(x, y)) or touch(w, y) or touch(b, y):
        return False
    groups = five[0] * five[2]
    stats = np.empty((kernels.STATISTICS, groups))
    nothing = None, None, before, after, None, None, None, False
    kernels.runs_forward(
        0, groups, 0, x.reshape(five), w, b, center, eps, False, True, stats, *nothing, y.reshape(five)
    )
    return True


forward: Any = sealed(_forward, "small.forward")


def _parameters(x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Array] | None:
    """weight and bias as kernels take them, if that takes views only."""
    shape = params_shape(weight, bias)
    w, b = param_view(x, weight, shape, 1.0), param_view(x, bias, shape, 0.0)
    for given, found in ((weight, w), (bias, b)):
        if given is not None and not (given.size == found.size and np.may_share_memory(given, found)):
            return None
    return w, b


def _seen(x: Array, shape: tuple[int, ...] | None) -> Callable[[Array], Array]:
    """How kernels see an array like x: in that shape, and half types as the integers that carry them."""
    if x.dtype.itemsize > 2:
        return lambda array: array if shape is None else array.reshape(shape)
    carrier = CARRIERS[x.dtype.name]
    return lambda array: array.view(carrier) if shape is None else array.view(carrier).reshape(shape)


def _empty(x: Array) -> Callable[..., Array]:
    return np.empty if x.nbytes < outputs.SMALL else outputs.empty
