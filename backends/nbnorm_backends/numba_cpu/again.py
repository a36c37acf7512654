"""Norms over runs that are made again and again: what does not change between calls is settled once.

Numba takes 1 us to find the types of twenty arguments, and NumPy 0.1 us to make a view: as much as the kernel takes for
a few rows. So what is called here is the compiled function itself, which checks no types.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import typeof
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu import cuts, kernels, outputs
from nbnorm_backends.numba_cpu.checks import overlaps_in_part, share_memory
from nbnorm_backends.numba_cpu.elements import CARRIERS
from nbnorm_backends.numba_cpu.options import Options
from nbnorm_backends.numba_cpu.pool import Pool, worker
from nbnorm_backends.numba_cpu.runs import leap_of, parameters, runs_view
from nbnorm_backends.numba_cpu.tables import moments_of
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]


def parameter_views(x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Array] | None:
    """weight and bias as kernels take them, if that takes no conversion."""
    found = parameters(x, weight, bias)
    for given, view in zip((weight, bias), found, strict=True):
        if given is not None and not (given.size == view.size and np.may_share_memory(given, view)):
            return None
    return found


def repeated(
    pool: Pool,
    x: Array,
    w: Array,
    b: Array,
    options: Options,
    *,
    center: bool,
    eps: float,
    shape: tuple[int, ...],
    moments: bool,
) -> Callable[..., Any]:
    """`Backend.repeated`, by the kernel that `runs.forward` runs, for w and b of `parameter_views`."""
    given, view = x.shape, runs_view(x)
    five, four, dtype, empty = view.shape, w.shape, x.dtype, _empty(x)
    seen = _seen(x, five)
    total, leap = five[0] * five[2], leap_of(pool, x, 2)
    groups = cuts.groups_per_chunk(x.size, total)
    chunks, parallel, large = cuts.parts(total, groups), x.size > TUNING.serial, x.nbytes >= outputs.STREAM_RUNS

    def arguments(x: Array, w: Array, b: Array, find: bool, table: Array, y: Array) -> tuple[Any, ...]:
        stream = large and outputs.streams(y, five[4], outputs.STREAM_RUNS)
        found = groups, leap, x, w, b, center, eps, find, table
        return *found, None, None, options.before, options.after, None, None, None, stream, y

    sample = runs_view(np.empty(given, dtype))
    table = np.empty((kernels.STATISTICS, total))
    work = worker(kernels.runs_forward)
    run = _compiled(work, (np.zeros(1, np.int64), chunks, *arguments(view, w, b, True, table, sample)))

    def again(x: Array, weight: Array | None, bias: Array | None, out: Array | None, stats: Any = None) -> Any:
        y = empty(shape, dtype) if out is None else out
        own = w if weight is None else weight.reshape(four), b if bias is None else bias.reshape(four)
        table = np.empty((kernels.STATISTICS, total))
        if stats is not None:
            table[kernels.MEAN], table[kernels.RSTD] = (stat.reshape(-1) for stat in stats)
        args = arguments(seen(x), *own, stats is None, table, seen(y))
        if parallel:
            pool.share(run, chunks, args)
        else:
            run(np.zeros(1, np.int64), chunks, *args)
        if moments:
            return y, moments_of(given, table) if stats is None else None
        return y

    return again


def bound(
    x: Array, w: Array, b: Array, options: Options, *, center: bool, eps: float, shape: tuple[int, ...]
) -> Callable[..., Array | None]:
    """The same with weight and bias as they are, by a function that is compiled for x as it comes."""
    dtype, empty = x.dtype, _empty(x)
    seen = _seen(x, shape)
    settled = w, b, runs_view(x).shape, center, eps, options.before, options.after
    sample = seen(np.empty(shape, dtype))
    run = _compiled(forward, (sample, sample, *settled))

    def again(x: Array, out: Array | None) -> Array | None:
        y = empty(shape, dtype) if out is None else out
        return y if run(x, y, *settled) else None

    def again_in_half(x: Array, out: Array | None) -> Array | None:
        y = empty(shape, dtype) if out is None else out
        return y if run(seen(x), seen(y), *settled) else None

    return again_in_half if dtype.itemsize == 2 else again


def _compiled(function: Any, arguments: tuple[Any, ...]) -> Any:
    """The machine code for arguments of these types; it is not run."""
    return function.compile(tuple(map(typeof, arguments)))


@kernels.KERNEL
def forward(x, y, w, b, five, center, eps, before, after):  # type: ignore[no-untyped-def]  # compiled
    """y of a C-contiguous x, in one chunk. False, and nothing done, where y is neither x nor apart from the inputs, or
    one of both is not aligned."""
    if overlaps_in_part(y, x) or share_memory(w, y) or share_memory(b, y):
        return False
    if x.ctypes.data % x.itemsize or y.ctypes.data % y.itemsize:
        return False
    groups = five[0] * five[2]
    stats = np.empty((kernels.STATISTICS, groups))
    nothing = None, None, before, after, None, None, None, False
    kernels.runs_forward(0, groups, 0, x.reshape(five), w, b, center, eps, True, stats, *nothing, y.reshape(five))
    return True


def _seen(x: Array, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """How kernels see an array like x: in that shape, and half types as the integers that carry them."""
    if x.dtype.itemsize > 2:
        return lambda array: array.reshape(shape)
    carrier = CARRIERS[x.dtype.name]
    return lambda array: array.view(carrier).reshape(shape)


def _empty(x: Array) -> Callable[..., Array]:
    """What `outputs.empty` does for arrays of this size, without asking for it."""
    return np.empty if x.nbytes < outputs.SMALL else outputs.empty
