"""Norms that are made again and again: what does not change between calls is settled once.

Numba takes 1 us to find the types of twenty arguments, and NumPy 0.1 us to make a view: as much as the kernel takes for
a few rows. So what is called here is the compiled function itself, which checks no types.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
from numba import typeof
from numpy.typing import NDArray

from nbnorm.arrays import read_only
from nbnorm.backend import Grads, apart, shape_of_params
from nbnorm_backends.numba_cpu import columns, cuts, kernels, merging, outputs, tables
from nbnorm_backends.numba_cpu.checks import overlaps_in_part, share_memory
from nbnorm_backends.numba_cpu.elements import CARRIERS, chosen, load
from nbnorm_backends.numba_cpu.kernels import MEAN, RSTD, STATISTICS
from nbnorm_backends.numba_cpu.options import NOTHING_JOINED, Options
from nbnorm_backends.numba_cpu.pool import ALONE, Pool, worker
from nbnorm_backends.numba_cpu.runs import cut_backward, leap_of, parameters, parts_of, runs_view
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]
# (x, weight, bias, out, find, table) -> y: with statistics that `find` asks for, or with those of the table
Normalize = Callable[[Array, Array | None, Array | None, Array | None, bool, Array], Array]
# (y, x, weight, bias, table) -> what the call returns: y, or (y, gradient, statistics)
Result = Callable[[Array, Array, Array | None, Array | None, Array], Any]
Take = Callable[[Any], Array]
Merge = Callable[[Any, Array | None], Array | None]

LARGEST_ABSENT = 1 << 16  # ones or zeros that are kept for a weight or a bias that is not given


def parameter_views(x: Array, weight: Array | None, bias: Array | None) -> tuple[Array, Array] | None:
    """weight and bias as kernels take them, if to find them takes no more than a view, or for half types a conversion,
    and of one that is missing no large array."""
    found = parameters(x, weight, bias)
    if (weight is None or bias is None) and found[0].size > LARGEST_ABSENT:
        return None
    for given, view in zip((weight, bias), found, strict=True):
        if given is not None and not (given.size == view.size and _at_hand(given, view)):
            return None
    return found


def _at_hand(given: Array, view: Array) -> bool:
    return given.itemsize == 2 or np.may_share_memory(given, view)


def _normalized(y: Array, x: Array, weight: Array | None, bias: Array | None, table: Array) -> Array:
    """What a call returns whose gradient nobody asks for."""
    return y


def _taker(given: Array | None, view: Array) -> Take:
    """What finds the view of `parameter_views` for a parameter like the given one, of which nothing is kept; ones or
    zeros, if none is given."""
    if given is None:
        return lambda param: view
    seen = _seen(given, view.shape)
    if given.itemsize > 2:
        return seen
    widen = _compiled(widened, (seen(given),))
    return lambda param: widen(seen(param))


def repeated(normalize: Normalize, groups: int, result: Result = _normalized) -> Callable[..., Any]:
    """`Backend.repeated`, for x of so many groups."""

    def again(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Any:
        table = np.empty((STATISTICS, groups))
        return result(normalize(x, weight, bias, out, True, table), x, weight, bias, table)

    return again


def repeated_with_statistics(
    normalize: Normalize,
    groups: int,
    statistics: tuple[Array, Array],
    eps: float,
    momentum: float | None,
    result: Result = _normalized,
) -> Callable[..., Any]:
    """`Backend.repeated_with_statistics`, likewise; where they move, those of one group each."""
    table = np.empty((STATISTICS, groups))
    if momentum is None:
        fix = _compiled(tables.give, (*statistics, eps, table))

        def evaluate(
            x: Array, weight: Array | None, bias: Array | None, mean: Array, var: Array, out: Array | None
        ) -> Any:
            table = np.empty((STATISTICS, groups))
            fix(mean, var, eps, table)
            return result(normalize(x, weight, bias, out, False, table), x, weight, bias, table)

        return evaluate
    step, move = float(momentum), _compiled(tables.move, (*statistics, float(momentum), table))

    def train(x: Array, weight: Array | None, bias: Array | None, mean: Array, var: Array, out: Array | None) -> Any:
        if not apart((mean, var), x, weight, bias):
            return None
        table = np.empty((STATISTICS, groups))
        y = normalize(x, weight, bias, out, True, table)
        move(mean, var, step, table)
        return result(y, x, weight, bias, table)

    return train


def normalizes_runs(
    pool: Pool,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    shape: tuple[int, ...],
) -> Normalize | None:
    """By the kernel that `runs.forward` runs; None where it runs twice, or there are no `parameter_views`."""
    views = parameter_views(x, weight, bias)
    if views is None or parts_of(x, weight, bias) > 1:
        return None
    w, b = views
    view, dtype, empty = runs_view(x), x.dtype, _empty(x)
    five = view.shape
    seen = _seen(x, five)
    total, leap = five[0] * five[2], leap_of(pool, x, 2)
    groups = cuts.groups_per_chunk(x.size, total)
    chunks, parallel, large = cuts.parts(total, groups), x.size > TUNING.serial, x.nbytes >= outputs.STREAM_RUNS

    def arguments(x: Array, w: Array, b: Array, find: bool, table: Array, y: Array) -> tuple[Any, ...]:
        stream = large and outputs.streams(y, five[4], outputs.STREAM_RUNS)
        found = groups, leap, x, w, b, center, eps, find, table
        return *found, None, None, options.before, options.after, None, None, None, stream, y

    sample = runs_view(np.empty(x.shape, dtype))
    table = np.empty((STATISTICS, total))
    work = worker(kernels.runs_forward)
    run = _compiled(work, (np.zeros(1, np.int64), ALONE, chunks, *arguments(view, w, b, True, table, sample)))
    take_weight, take_bias = _taker(weight, w), _taker(bias, b)

    def normalize(
        x: Array, weight: Array | None, bias: Array | None, out: Array | None, find: bool, table: Array
    ) -> Array:
        y = empty(shape, dtype) if out is None else out
        args = arguments(seen(x), take_weight(weight), take_bias(bias), find, table, seen(y))
        if parallel:
            pool.share(run, chunks, args)
        else:
            run(np.zeros(1, np.int64), ALONE, chunks, *args)
        return y

    return normalize


def normalizes_columns(
    pool: Pool,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    center: bool,
    eps: float,
    shape: tuple[int, ...],
) -> Normalize:
    """By what `columns.forward` does once the grid is there; weight and bias are not along r."""
    five, dtype, empty, grid = x.shape, x.dtype, _empty(x), columns.Grid(pool, x, folds=True)
    param_shape = shape_of_params(weight, bias)
    extra = grid.options(options)

    def normalize(
        x: Array, weight: Array | None, bias: Array | None, out: Array | None, find: bool, table: Array
    ) -> Array:
        y = empty(shape, dtype) if out is None else out
        w, b = (None if param is None else param.reshape(param_shape) for param in (weight, bias))
        keys: dict[str, Any] = {"joined": NOTHING_JOINED, "center": center, "eps": eps, "find": find, "stats": table}
        columns.normalize(grid, read_only(x.reshape(five)), w, b, extra, y=y.reshape(five), **keys)
        return y

    return normalize


def differentiates_runs(
    pool: Pool,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    fixed: bool,
    center: bool,
    shape: tuple[int, ...],
) -> Result:
    """By the kernel that `runs.backward` runs, for weight and bias of which `parameter_views` gives views."""
    param_shape = shape_of_params(weight, bias)
    w, b = parameters(x, weight, bias)
    view, dtype, empty = runs_view(x), x.dtype, _empty(x)
    five = view.shape
    seen = _seen(x, five)
    groups, chunks, shares, allocate = cut_backward(x, w, param_shape)
    leap, find, total = leap_of(pool, x, 3), not fixed or shares > 0, five[0] * five[2]
    parallel, large = x.size > TUNING.serial, x.nbytes >= outputs.STREAM_RUNS_BACKWARD

    def arguments(dy: Array, x: Array, w: Array, b: Array, table: Array, grads: Array, dx: Array) -> tuple[Any, ...]:
        stream = large and outputs.streams(dx, five[4], outputs.STREAM_RUNS_BACKWARD)
        found = groups, leap, dy, x, w, b, center, fixed, find, table, np.zeros((2, total)), None, None
        return *found, options.before, options.after, None, grads[0], grads[1], None, stream, dx

    sample, table, grads = runs_view(np.empty(x.shape, dtype)), np.empty((STATISTICS, total)), allocate()
    given = arguments(view, view, w, b, table, grads, sample)
    signature = tuple(map(typeof, (np.zeros(1, np.int64), ALONE, chunks, *given)))
    take_weight, take_bias = _taker(weight, w), _taker(bias, b)
    merges = _merges(weight, bias)

    @cache  # not every pullback is called
    def compiled() -> Any:
        work: Any = worker(kernels.runs_backward)
        return work.compile(signature)

    def differentiate(dy: Array, x: Array, weight: Array | None, bias: Array | None, table: Array) -> Grads:
        dx, grads = empty(shape, dtype), allocate()
        own = take_weight(weight), take_bias(bias)
        run, args = compiled(), arguments(seen(dy), seen(x), *own, table, grads, seen(dx))
        if parallel:
            pool.share(run, chunks, args)
        else:
            run(np.zeros(1, np.int64), ALONE, chunks, *args)
        if not shares:
            return Grads(dx)
        return Grads(dx, merges[0](grads[0], weight), merges[1](grads[1], bias))

    return _with_gradient(differentiate, five, center)


def differentiates_columns(
    pool: Pool,
    x: Array,
    weight: Array | None,
    bias: Array | None,
    options: Options,
    *,
    fixed: bool,
    center: bool,
    shape: tuple[int, ...],
) -> Result:
    """By `columns.backward`; weight and bias are not along r."""
    five, dtype, empty, param_shape = x.shape, x.dtype, _empty(x), shape_of_params(weight, bias)
    keys: dict[str, Any] = {"center": center, "fixed": fixed, "find": not fixed or param_shape is not None}
    keys |= {"param_shape": param_shape, "addend": None, "dz": None}
    merges = _merges(weight, bias)

    def differentiate(dy: Array, x: Array, weight: Array | None, bias: Array | None, table: Array) -> Grads:
        dx = empty(shape, dtype)
        w, b = (None if param is None else param.reshape(param_shape) for param in (weight, bias))
        coefficients = np.zeros((2, table.shape[1]))
        given = read_only(dy.reshape(five)), read_only(x.reshape(five)), w, b, options
        found = columns.backward(pool, *given, stats=table, coefficients=coefficients, dx=dx.reshape(five), **keys)
        return Grads(dx, merges[0](found[0], weight), merges[1](found[1], bias))

    return _with_gradient(differentiate, five, center)


def _merges(weight: Array | None, bias: Array | None) -> list[Merge]:
    """For weight and bias what makes a gradient of its parts (shares, ...)."""
    return [_nothing if param is None else _merge(param.dtype) for param in (weight, bias)]


def _nothing(parts: Array, param: Array | None) -> None:
    """The gradient of what is not there."""


def _merge(dtype: np.dtype[Any]) -> Merge:
    """By a compiled sum, which rounds to the parameter's type: in NumPy that takes as long as all else that a small
    gradient needs. Half types, which have no such sum, are rounded there."""
    half = dtype.itemsize == 2
    real = np.dtype(np.float64) if half else dtype

    @cache
    def compiled() -> Any:
        return _compiled(merging.merge_rounded, (np.empty((1, 1)), np.empty(1, real)))

    def merge(parts: Array, param: Array | None) -> Array:
        assert param is not None
        total = np.empty(param.shape, real)
        compiled()(parts.reshape(-1, total.size), total.reshape(-1))
        if not half:
            return total
        with np.errstate(over="ignore", invalid="ignore"):
            return total.astype(dtype)

    return merge


def _with_gradient(differentiate: Callable[..., Grads], shape: tuple[int, ...], center: bool) -> Result:
    """What returns (y, gradient, statistics) of a norm with x of these five axes."""
    n, _, g, _, _ = shape

    def statistics_of(table: Array) -> tuple[Array | None, Array]:
        return table[MEAN].reshape(n, g) if center else None, table[RSTD].reshape(n, g)

    def result(y: Array, x: Array, weight: Array | None, bias: Array | None, table: Array) -> Any:
        gradient = partial(differentiate, x=x, weight=weight, bias=bias, table=table)
        return y, gradient, partial(statistics_of, table)

    return result


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
    """The same with weight and bias as they are when it is called, by a function that is compiled for x as it comes."""
    views = parameter_views(x, weight, bias)
    if views is None:
        return None
    own = (
        view if given is None else _seen(given, view.shape)(given)
        for given, view in zip((weight, bias), views, strict=True)
    )
    dtype, empty = x.dtype, _empty(x)
    seen = _seen(x, shape)
    settled = *own, runs_view(x).shape, center, eps, options.before, options.after
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
    stats = np.empty((STATISTICS, groups))
    nothing = None, None, before, after, None, None, None, False
    own = wide(w), wide(b)
    kernels.runs_forward(0, groups, 0, x.reshape(five), *own, center, eps, True, stats, *nothing, y.reshape(five))
    return True


@kernels.KERNEL
def widened(param):  # type: ignore[no-untyped-def]  # compiled
    """`wide` for Python: NumPy takes 4 us for 1024 elements of float16."""
    return wide(param)


@chosen(counted=True)
def wide(param):  # type: ignore[no-untyped-def]  # compiled
    """A parameter as kernels take it: of a half type as float32, others as they are."""
    return _as_float32 if param.dtype.bitwidth == 16 else lambda param: param


def _as_float32(param):  # type: ignore[no-untyped-def]  # compiled
    found = np.empty(param.size, np.float32)
    flat = param.reshape(param.size)
    for i in range(param.size):
        found[i] = load(flat, i)
    return found.reshape(param.shape)


def _seen(x: Array, shape: tuple[int, ...]) -> Callable[[Array], Array]:
    """How kernels see an array like x: in that shape, and half types as the integers that carry them."""
    if x.dtype.itemsize > 2:
        return lambda array: array.reshape(shape)
    carrier = CARRIERS[x.dtype.name]
    return lambda array: array.view(carrier).reshape(shape)


def _empty(x: Array) -> Callable[..., Array]:
    """What `outputs.empty` does for arrays of this size, without asking for it."""
    return np.empty if x.nbytes < outputs.SMALL else outputs.empty
