"""Norms whose reduction lies innermost in memory: batch, group and instance norm channels first, layer and RMS norm."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu import cuts, kernels, merging, outputs, tables
from nbnorm_backends.numba_cpu.columns import lie_along_r
from nbnorm_backends.numba_cpu.elements import carried
from nbnorm_backends.numba_cpu.options import NOTHING_JOINED, Joined, Options, with_rows
from nbnorm_backends.numba_cpu.pool import Scheduler
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]


def forward(
    scheduler: Scheduler,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    find: bool,
    stats: Array,
    joined: Joined,
    y: Array,
) -> None:
    """Fill `stats` where `find` asks, and y where it is not empty."""
    parts = parts_of(x, weight, bias)
    if parts > 1:  # without what is joined: to rows alone
        keys: dict[str, Any] = {"center": center, "eps": eps, "find": find, "stats": stats, "y": y}
        _forward_in_parts(parts, scheduler, x, weight, bias, options, **keys)
        return
    w, b = parameters(x, weight, bias)
    groups = cuts.groups_per_chunk(x.size, stats.shape[1])
    chunks = cuts.parts(stats.shape[1], groups)
    parallel = x.size > TUNING.serial
    found = groups, leap_of(scheduler, x, 2), runs_view(x), w, b, center, eps, find, stats
    target = runs_view(y)
    stream = outputs.streams(target, target.shape[4], outputs.STREAM_RUNS)
    args = *found, *_options(x, options), *map(_optional, joined), stream, target
    scheduler.run(kernels.runs_forward, chunks, args, parallel=parallel)


def backward(
    scheduler: Scheduler,
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    stats: Array,
    center: bool,
    fixed: bool,
    find: bool,
    coefficients: Array,
    param_shape: tuple[int, ...] | None,
    addend: Array | None,
    dz: Array | None,
    dx: Array,
) -> tuple[Array | None, Array | None]:
    """Fill `coefficients` where `find` asks, and dx where it is not empty; (dweight, dbias) where they have a shape."""
    parts = 1 if param_shape is not None and param_shape[1] > 1 else parts_of(x, weight, bias)
    if parts > 1:
        keys: dict[str, Any] = {"stats": stats, "center": center, "fixed": fixed, "find": find, "dz": dz, "dx": dx}
        keys |= {"coefficients": coefficients, "param_shape": param_shape, "addend": addend}
        return _backward_in_parts(parts, scheduler, dy, x, weight, bias, options, **keys)
    w, b = parameters(x, weight, bias, param_shape)
    groups, chunks, shares, allocate = cut_backward(x, w, param_shape)
    grads = allocate()
    found = (
        groups,
        leap_of(scheduler, x, 3),
        runs_view(dy),
        runs_view(x),
        w,
        b,
        center,
        fixed,
        find,
        stats,
        coefficients,
    )
    target = runs_view(dx)
    stream = outputs.streams(target, target.shape[4], outputs.STREAM_RUNS_BACKWARD)
    args = *found, *_options(x, options), _optional(addend), grads[0], grads[1], _optional(dz), stream, target
    scheduler.run(kernels.runs_backward, chunks, args, parallel=x.size > TUNING.serial)
    if param_shape is None:
        return None, None
    sums = np.empty((2, 1, w.size))
    merging.merge_shares(grads.reshape(2, 1, shares, -1), sums)
    dweight, dbias = (_five_axes(grad.reshape(w.shape), x, param_shape) for grad in sums)
    return dweight, dbias


# ---- groups in parts: each pass goes through x as it lies, in place of both through one group after the other --------


def parts_of(x: Array, weight: Array | None, bias: Array | None) -> int:
    """`cuts.parts_of_group`; 1 where weight or bias lie along r."""
    return 1 if lie_along_r(weight, bias) else cuts.parts_of_group(x.shape)


def _forward_in_parts(
    parts: int,
    scheduler: Scheduler,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    find: bool,
    stats: Array,
    y: Array,
) -> None:
    """`forward`: parts take the place of samples, with statistics of their own in the first pass."""
    x, y, options = _cut(x, parts), _cut(y, parts), _options_in_parts(options, parts)
    given = scheduler, x, weight, bias, options
    keys: dict[str, Any] = {"center": center, "eps": eps, "joined": NOTHING_JOINED}
    if find:
        found = np.empty((len(stats), parts, stats.shape[1]))
        forward(*given, find=True, stats=found.reshape(len(stats), -1), y=y[:0], **keys)
        tables.join_parts(found, eps, stats)
    if y.size:
        forward(*given, find=False, stats=np.tile(stats, parts), y=y, **keys)


def _backward_in_parts(
    parts: int,
    scheduler: Scheduler,
    dy: Array,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    stats: Array,
    center: bool,
    fixed: bool,
    find: bool,
    coefficients: Array,
    param_shape: tuple[int, ...] | None,
    addend: Array | None,
    dz: Array | None,
    dx: Array,
) -> tuple[Array | None, Array | None]:
    """`backward`, likewise: coefficients of parts, which are over the count of the whole, add up to its own."""
    dy, x, dx, options = _cut(dy, parts), _cut(x, parts), _cut(dx, parts), _options_in_parts(options, parts)
    given = scheduler, dy, x, weight, bias, options
    keys: dict[str, Any] = {"stats": np.tile(stats, parts), "center": center, "fixed": fixed}
    grads: tuple[Array | None, Array | None] = None, None
    if find:
        found = np.zeros((2, parts, stats.shape[1]))
        more: dict[str, Any] = {"coefficients": found.reshape(2, -1), "param_shape": param_shape, "dx": dx[:0]}
        grads = backward(*given, find=True, addend=None, dz=None, **(keys | more))
        coefficients[:] = found.sum(axis=1)
    if dx.size:
        more = {"coefficients": np.tile(coefficients, parts), "param_shape": None}
        more |= {"addend": _in_parts(addend, parts), "dz": _in_parts(dz, parts), "dx": dx}
        backward(*given, find=False, **(keys | more))
    return grads


def _cut(array: Array, parts: int) -> Array:
    """(1, r, g, c, s) as (parts, r / parts, g, c, s); of an axis r of 1, and of an empty array, nothing is cut."""
    _, r, *rest = array.shape
    return array.reshape(parts, r // parts, *rest) if r > 1 else array


def _in_parts(array: Array | None, parts: int) -> Array | None:
    return None if array is None else _cut(array, parts)


def _options_in_parts(options: Options, parts: int) -> Options:
    return options._replace(residual=_in_parts(options.residual, parts), mask=_in_parts(options.mask, parts))


def cut_backward(x: Array, w: Array, param_shape: tuple[int, ...] | None) -> tuple[int, int, int, Callable[..., Array]]:
    """Groups of a chunk, chunks, shares of the gradients of weight and bias, and what makes the array of both."""
    total, once = x.shape[0] * x.shape[2], x.shape[0] == 1
    if param_shape is None or once:
        groups = cuts.groups_per_chunk(x.size, total)
    else:
        groups = cuts.groups_per_share(x.size, total, w.size)
    chunks = cuts.parts(total, groups)
    # With one sample no two groups share parameters, so one share of their gradients serves all chunks.
    shares = 0 if param_shape is None else 1 if once else chunks
    size = 2, max(shares, 1), *(w.shape if shares else (0,) * w.ndim)
    return groups, chunks, shares, partial(np.empty if shares > 1 else np.zeros, size)


def leap_of(scheduler: Scheduler, x: Array, arrays: int) -> int:
    """After how many chunks a thread's next one is likely to come; 0 where a group is not fetched while the one before
    it is written."""
    return scheduler.threads if cuts.fetches_ahead(x.shape, arrays) else 0


def runs_view(array: Array) -> Array:
    """(n, r, g, c, s) with the run last: where s is 1 the run is along c."""
    view = carried(array)
    return view.swapaxes(3, 4) if array.shape[4] == 1 else view


def _optional(array: Array | None) -> Array | None:
    return None if array is None else runs_view(array)


def _options(x: Array, options: Options) -> tuple[Any, ...]:
    """residual, mask, before, after, as kernels take them."""
    mask, size = options.mask, x.shape[4]
    if mask is not None and size == 1:
        mask, size = mask.swapaxes(3, 4), x.shape[3]
    return _optional(options.residual), with_rows(mask, size), options.before, options.after


def parameters(
    x: Array, weight: Array | None, bias: Array | None, shape: tuple[int, ...] | None = None
) -> tuple[Array, Array]:
    """weight and bias as kernels take them, with ones and zeros for what is not given; `shape` is theirs, if known."""
    given = weight if weight is not None else bias
    shape = shape or ((1, 1, 1, 1, 1) if given is None else given.shape)
    return _param(x, weight, shape, 1.0), _param(x, bias, shape, 0.0)


def _param(x: Array, param: Array | None, shape: tuple[int, ...], absent: float) -> Array:
    """A parameter as kernels take it: (r or 1, g, c), with rows along the run where it has them.

    In the type that x is computed in; float64 too where the engine computed it.
    """
    wide = x.itemsize == 8 or (param is not None and param.dtype == np.float64)
    real = np.float64 if wide else np.float32
    five = np.full(shape, absent, real) if param is None else np.asarray(param, real, order="C")
    c = x.shape[3]
    if x.shape[4] == 1:
        five, c = five.swapaxes(3, 4), 1
    full = five.shape[1], x.shape[2], c, five.shape[4]
    four = five[0] if five.shape[1:] == full else np.array(np.broadcast_to(five[0], full), order="C")
    return four if four.shape[3] > 1 else four[..., 0]


def _five_axes(grad: Array, x: Array, param_shape: tuple[int, ...]) -> Array:
    """A gradient, of the axes of `_param`, in the shape of its parameter, summed over axes that it lacks."""
    five = grad[None] if grad.ndim == 4 else grad[None, ..., None]
    if x.shape[4] == 1:
        five = five.swapaxes(3, 4)
    lacking = tuple(axis for axis in range(5) if param_shape[axis] == 1)
    return np.asarray(five.sum(axis=lacking, keepdims=True))
