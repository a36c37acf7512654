"""Local response normalization and division by a p-norm.

A tile is all of the axis for some neighbours along `inner`, for one sample or, where samples are small, for some. It is
read before anything of it is written, so y may be x. Where `inner` is short, axis and inner are one run of neighbours
that repeats with period `inner`, so that loops are long whichever axis lies innermost.

Computed in float64 in buffers of a tile's size; which tiles there are depends on the shape only.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
from numba import njit
from numpy.typing import NDArray

from nbnorm.backend import WHOLE_OPS
from nbnorm_backends.numba_cpu import outputs
from nbnorm_backends.numba_cpu.elements import UNCOUNTED, at, borrowed, carried, load, store
from nbnorm_backends.numba_cpu.kernels import ALLOCATES, PLAIN, ROW
from nbnorm_backends.numba_cpu.pool import Kernel, Scheduler
from nbnorm_backends.numba_cpu.tuning import TUNING

Array = NDArray[Any]

# Of loops over a row a call would cost as much as a row of 16 elements.
ROW_REDUCE = njit(
    fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True, forceinline=True, **UNCOUNTED
)

SHORT_ROW = 32  # rows of inner elements shorter than this are joined: 1.1 times faster for 9, 2.2 to 2.9 times for 1
BUFFER = 2048  # elements of a buffer for local responses: the four of the gradient stay in L1 and L2
NARROWEST = 32  # neighbours along inner of a tile, at least
WIDEST = 512  # and at most: their norms and sums stay in L1
COST = 4  # of a local response, in elements of a norm: chunks are smaller by it
SMALLEST = 1e-140  # 1-norms and 2-norms below this, or infinite, are found again by scaled sums: squares may vanish


class WholeOps:
    """What `NumbaBackend` has beside the norms; the views are `nbnorm.backend.Backend`'s, (outer, axis, inner)."""

    scheduler: Scheduler
    whole_ops: ClassVar[frozenset[str]] = frozenset(WHOLE_OPS)

    def local_response_norm(
        self, x: Array, window: tuple[int, int], alpha: float, beta: float, k: float, *, out: Array | None = None
    ) -> Array:
        y = outputs.empty(x.shape, x.dtype) if out is None else out
        self._respond(respond, (x, y), window, (alpha, beta, k))
        return y

    def local_response_norm_backward(
        self, dy: Array, x: Array, window: tuple[int, int], alpha: float, beta: float, k: float
    ) -> Array:
        dx = outputs.empty(x.shape, x.dtype)
        self._respond(respond_backward, (x, dy, dx), window, (alpha, beta, k))
        return dx

    def normalize(self, x: Array, p: float, eps: float, *, out: Array | None = None) -> Array:
        y = outputs.empty(x.shape, x.dtype) if out is None else out
        self._divide((divide_runs, divide_columns), (x, y), (p, eps))
        return y

    def normalize_backward(self, dy: Array, x: Array, p: float, eps: float) -> Array:
        dx = outputs.empty(x.shape, x.dtype)
        self._divide((divide_runs_backward, divide_columns_backward), (x, dy, dx), (p, eps))
        return dx

    def _respond(self, kernel: Kernel, arrays: tuple[Array, ...], window: tuple[int, int], args: Any) -> None:
        outer, axis, inner = arrays[0].shape
        before, after = (min(side, axis - 1) for side in window)
        gap = max(before, after)
        joined, views = _joined(arrays)
        step = inner if joined else _even(inner, max(NARROWEST, BUFFER // axis))
        width = axis * inner if joined else step
        fold = max(1, min(outer, BUFFER // ((axis + gap) * step)))
        samples = fold * max(1, TUNING.chunk // COST // (fold * axis * step))
        _run(self.scheduler, kernel, samples, width, (fold, step, axis, before, after, *views, *args), views, COST)

    def _divide(self, kernels: tuple[Kernel, Kernel], arrays: tuple[Array, ...], args: tuple[float, float]) -> None:
        outer, axis, inner = arrays[0].shape
        if inner == 1:
            kernel, width = kernels[0], axis
            arrays = tuple(array.swapaxes(1, 2) for array in arrays)
        else:
            kernel, width = kernels[1], _even(inner, min(WIDEST, max(NARROWEST, outer * inner // TUNING.shares)))
        samples = max(1, TUNING.chunk // (axis * min(width, inner)))
        _run(self.scheduler, kernel, samples, width, (*arrays, *args), arrays, 1)


def _joined(arrays: tuple[Array, ...]) -> tuple[bool, tuple[Array, ...]]:
    """(outer, axis, inner) as (outer, 1, axis * inner) where inner is short and the strides of all allow it."""
    outer, axis, inner = arrays[0].shape
    if inner < SHORT_ROW:
        try:
            return True, tuple(array.reshape(outer, 1, axis * inner, copy=False) for array in arrays)
        except ValueError:
            pass
    return False, arrays


def _even(length: int, most: int) -> int:
    """The width of tiles that cut a length evenly, none wider than `most`."""
    return math.ceil(length / math.ceil(length / most))


def _run(
    scheduler: Scheduler,
    kernel: Kernel,
    samples: int,
    width: int,
    args: tuple[Any, ...],
    views: tuple[Array, ...],
    cost: int,
) -> None:
    """Every tile of so many samples and of that width along the run."""
    outer, _, run = views[0].shape
    chunks = math.ceil(outer / samples) * math.ceil(run / width)
    args = tuple(carried(arg) if isinstance(arg, np.ndarray) else arg for arg in args)
    scheduler.run(kernel, chunks, (samples, width, *args), parallel=views[0].size * cost > TUNING.serial)


@ROW
def tile_of(chunk: int, samples: int, width: int, x: Array) -> tuple[int, int, int, int]:
    """(o0, o1, r0, r1): samples and piece of the run of a chunk; x (outer, lines, run)."""
    outer, _, run = x.shape
    across = (run + width - 1) // width
    o0, r0 = chunk // across * samples, chunk % across * width
    return o0, min(o0 + samples, outer), r0, min(r0 + width, run)


# ---- local response normalization ------------------------------------------------------------------------------------
# A buffer holds `fold` samples, each of axis * step elements, with zeros around them that outlast any window. The sum
# over a window stands in the buffer where the window begins.


@ALLOCATES
def respond(
    chunk: int,
    samples: int,
    width: int,
    fold: int,
    step: int,
    axis: int,
    before: int,
    after: int,
    x: Array,
    y: Array,
    alpha: float,
    beta: float,
    k: float,
) -> None:
    """y = x / (k + alpha * sum(x*x))**beta"""
    x, y = borrowed(x), borrowed(y)
    o0, o1, r0, r1 = tile_of(chunk, samples, width, x)
    gap = max(before, after) * step
    pitch = axis * step + gap
    size = gap + fold * pitch
    part, spare, total, root = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    for first in range(o0, o1, fold):
        last = min(first + fold, o1)
        fill_squares(x, first, last, r0, r1, gap, pitch, step, part)
        window_sums(part, spare, total, before + after + 1, step)
        powers(total, alpha, beta, k, root)
        for o in range(first, last):
            for line in range(x.shape[1]):
                own = gap + (o - first) * pitch + line * step
                respond_row(x[o, line, r0:r1], root, own - before * step, y[o, line, r0:r1])


@ALLOCATES
def respond_backward(
    chunk: int,
    samples: int,
    width: int,
    fold: int,
    step: int,
    axis: int,
    before: int,
    after: int,
    x: Array,
    dy: Array,
    dx: Array,
    alpha: float,
    beta: float,
    k: float,
) -> None:
    """With d = k + alpha * sum(x*x): dx = dy / d**beta - 2 * alpha * beta * x * sum(dy * x / d**(beta + 1)), the second
    sum over the elements whose windows hold this one."""
    x, dy, dx = borrowed(x), borrowed(dy), borrowed(dx)
    o0, o1, r0, r1 = tile_of(chunk, samples, width, x)
    gap = max(before, after) * step
    pitch = axis * step + gap
    size = gap + fold * pitch
    part, spare, total, root = np.empty(size), np.empty(size), np.empty(size), np.empty(size)
    for first in range(o0, o1, fold):
        last = min(first + fold, o1)
        fill_squares(x, first, last, r0, r1, gap, pitch, step, part)
        window_sums(part, spare, total, before + after + 1, step)
        powers(total, alpha, beta, k, root)
        part[:] = 0.0
        for o in range(first, last):
            for line in range(x.shape[1]):
                own = gap + (o - first) * pitch + line * step
                begin = own - before * step
                quotients_row(dy[o, line, r0:r1], x[o, line, r0:r1], total, root, begin, part, own)
        window_sums(part, spare, total, before + after + 1, step)
        for o in range(first, last):
            for line in range(x.shape[1]):
                own = gap + (o - first) * pitch + line * step
                begin, back = own - before * step, own - after * step
                slope = 2.0 * alpha * beta
                respond_backward_row(x[o, line, r0:r1], root, begin, total, back, slope, dx[o, line, r0:r1])


@PLAIN
def fill_squares(
    x: Array, first: int, last: int, r0: int, r1: int, gap: int, pitch: int, step: int, part: Array
) -> None:
    """x*x of samples [first, last) into a buffer, with zeros around each of them."""
    part[:] = 0.0
    for o in range(first, last):
        for line in range(x.shape[1]):
            squares_row(x[o, line, r0:r1], part, gap + (o - first) * pitch + line * step)


@ROW
def squares_row(x: Array, part: Array, own: int) -> None:
    for i in range(x.size):
        value = load(x, i)
        store(part, own + i, value * value)


@PLAIN
def window_sums(part: Array, spare: Array, total: Array, count: int, step: int) -> None:
    """total[i] = part[i] + part[i + step] + ..., `count` terms; part and spare are overwritten.

    Sums of 1, 2, 4 ... terms, picked by the bits of count: log2(count) additions for each element, and no subtraction,
    which would cancel after a large element.
    """
    total[:] = 0.0
    done, terms = 0, 1
    while True:
        if count & terms:
            add_row(part[done * step :], total)
            done += terms
        if done == count:
            return
        add_pairs(part, part[terms * step :], spare)
        part, spare = spare, part
        terms *= 2


@ROW
def add_row(row: Array, total: Array) -> None:
    for i in range(row.size):
        total[i] += row[i]


@ROW
def add_pairs(row: Array, shifted: Array, total: Array) -> None:
    """row + shifted, which ends earlier."""
    for i in range(shifted.size):
        total[i] = row[i] + shifted[i]
    for i in range(shifted.size, row.size):
        total[i] = row[i]


@PLAIN
def powers(total: Array, alpha: float, beta: float, k: float, root: Array) -> None:
    """total = k + alpha * total, root = total**beta; square roots where they do: a power costs ten of them."""
    for i in range(total.size):
        total[i] = k + alpha * total[i]
    if beta == 0.75:
        for i in range(total.size):
            half = math.sqrt(total[i])
            root[i] = half * math.sqrt(half)
    elif beta == 0.5:
        for i in range(total.size):
            root[i] = math.sqrt(total[i])
    elif beta == 1.0:
        for i in range(total.size):
            root[i] = total[i]
    else:
        for i in range(total.size):
            root[i] = total[i] ** beta


# Rows of buffers begin at a number, because a slice counts references, which costs more than a short row.


@ROW
def respond_row(x: Array, root: Array, begin: int, y: Array) -> None:
    for i in range(x.size):
        store(y, i, load(x, i) / load(root, begin + i))


@ROW
def quotients_row(dy: Array, x: Array, total: Array, root: Array, begin: int, part: Array, own: int) -> None:
    """root = dy / root, part = root * x / total"""
    for i in range(x.size):
        quotient = load(dy, i) / load(root, begin + i)
        store(root, begin + i, quotient)
        store(part, own + i, quotient * (load(x, i) / load(total, begin + i)))


@ROW
def respond_backward_row(
    x: Array, quotient: Array, begin: int, total: Array, back: int, slope: float, dx: Array
) -> None:
    if slope == 0.0:  # also where the sum has no value: 0**0 is 1, without a gradient
        for i in range(x.size):
            store(dx, i, load(quotient, begin + i))
    else:
        for i in range(x.size):
            store(dx, i, load(quotient, begin + i) - slope * load(x, i) * load(total, back + i))


# ---- normalize -------------------------------------------------------------------------------------------------------
# Runs, (outer, 1, axis): a norm is one number. Columns, (outer, axis, inner): norms lie side by side, in an array.
# Sums of powers are scaled by the largest element (the smallest, where p is negative): 3e38**10 and 1e200**2 have no
# place in float64. For p = 1 and 2 that is done only where the plain sum failed.


@PLAIN
def divide_runs(chunk: int, samples: int, width: int, x: Array, y: Array, p: float, eps: float) -> None:
    """y = x / max(norm, eps)"""
    x, y = borrowed(x), borrowed(y)
    o0, o1, _, _ = tile_of(chunk, samples, width, x)
    for o in range(o0, o1):
        divide_row(x[o, 0], at_least(run_norm(x[o, 0], p), eps), y[o, 0])


@PLAIN
def divide_runs_backward(
    chunk: int, samples: int, width: int, x: Array, dy: Array, dx: Array, p: float, eps: float
) -> None:
    """dx = (dy - sum(dy * y) * dnorm/dx) / max(norm, eps), without the sum where the norm is below eps."""
    x, dy, dx = borrowed(x), borrowed(dy), borrowed(dx)
    o0, o1, _, _ = tile_of(chunk, samples, width, x)
    for o in range(o0, o1):
        norm = run_norm(x[o, 0], p)
        total = 0.0
        if p != 0.0 and norm >= eps:
            total = run_products(dy[o, 0], x[o, 0], norm)
            if math.isinf(p):  # elements that share the extreme share its gradient
                total /= run_ties(x[o, 0], norm)
        divide_row_backward(dy[o, 0], x[o, 0], at_least(norm, eps), total, p, dx[o, 0])


@ALLOCATES
def divide_columns(chunk: int, samples: int, width: int, x: Array, y: Array, p: float, eps: float) -> None:
    """y = x / max(norm, eps)"""
    x, y = borrowed(x), borrowed(y)
    o0, o1, r0, r1 = tile_of(chunk, samples, width, x)
    norm, scale, total = np.empty(r1 - r0), np.empty(r1 - r0), np.empty(r1 - r0)
    for o in range(o0, o1):
        column_norms(x, o, r0, r1, p, norm, scale, total)
        for j in range(norm.size):
            norm[j] = at_least(norm[j], eps)
        for line in range(x.shape[1]):
            divide_row(x[o, line, r0:r1], norm, y[o, line, r0:r1])


@ALLOCATES
def divide_columns_backward(
    chunk: int, samples: int, width: int, x: Array, dy: Array, dx: Array, p: float, eps: float
) -> None:
    """As `divide_runs_backward`."""
    x, dy, dx = borrowed(x), borrowed(dy), borrowed(dx)
    o0, o1, r0, r1 = tile_of(chunk, samples, width, x)
    norm, ties, total = np.empty(r1 - r0), np.empty(r1 - r0), np.empty(r1 - r0)
    for o in range(o0, o1):
        column_norms(x, o, r0, r1, p, norm, ties, total)
        ties[:] = 0.0
        total[:] = 0.0
        for line in range(x.shape[1]):
            add_products(dy[o, line, r0:r1], x[o, line, r0:r1], norm, total)
            if math.isinf(p):
                add_ties(x[o, line, r0:r1], norm, ties)
        for j in range(norm.size):
            if math.isinf(p):
                total[j] /= ties[j]
            if p == 0.0 or not norm[j] >= eps:
                total[j] = 0.0
            norm[j] = at_least(norm[j], eps)
        for line in range(x.shape[1]):
            divide_row_backward(dy[o, line, r0:r1], x[o, line, r0:r1], norm, total, p, dx[o, line, r0:r1])


@ROW
def at_least(norm: float, eps: float) -> float:
    """max(norm, eps); NaN stays NaN."""
    return eps if norm < eps else norm


@ROW
def divide_row(x: Array, norm: Any, y: Array) -> None:
    for j in range(x.size):
        store(y, j, load(x, j) / at(norm, j))


@ROW
def divide_row_backward(dy: Array, x: Array, norm: Any, total: Any, p: float, dx: Array) -> None:
    """dx = (dy - total * dnorm/dx) / norm; norm and total are one number, or an array along the row."""
    if p == 2.0:
        for j in range(x.size):
            store(dx, j, (load(dy, j) - load(x, j) / at(norm, j) * at(total, j)) / at(norm, j))
    elif p == 1.0:
        for j in range(x.size):
            store(dx, j, (load(dy, j) - sign(load(x, j)) * at(total, j)) / at(norm, j))
    elif p == 0.0:
        divide_row(dy, norm, dx)
    elif math.isinf(p):
        for j in range(x.size):
            value = load(x, j)
            share = at(total, j) * (1.0 if abs(value) == at(norm, j) else 0.0)
            store(dx, j, (load(dy, j) - sign(value) * share) / at(norm, j))
    else:
        for j in range(x.size):
            value = load(x, j)
            slope = 0.0
            if value != 0.0 and at(total, j) != 0.0:  # else a negative power may be infinite
                slope = sign(value) * (abs(value) / at(norm, j)) ** (p - 1.0)
            store(dx, j, (load(dy, j) - slope * at(total, j)) / at(norm, j))


@ROW
def sign(value: float) -> float:
    return 1.0 if value > 0.0 else -1.0 if value < 0.0 else 0.0


@ROW
def larger(value: float, best: float) -> float:
    """The larger of two, or NaN if either is."""
    return value if value > best or value != value else best


@ROW
def smaller(value: float, best: float) -> float:
    return value if value < best or value != value else best


# ---- one run ---------------------------------------------------------------------------------------------------------


@ROW
def run_norm(x: Array, p: float) -> float:
    norm: float = math.nan
    if p == 0.0 or p == 1.0 or p == 2.0 or math.isinf(p):
        norm = run_power(x, p)
    if p == 0.0 or math.isinf(p):
        return norm
    if p == 2.0:
        norm = math.sqrt(norm)
    if SMALLEST < norm < math.inf:
        return norm
    scale: float = run_power(x, math.inf if p > 0.0 else -math.inf)
    if not 0.0 < scale < math.inf:
        scale = 1.0
    return float(scale * run_scaled_power(x, scale, p) ** (1.0 / p))


@ROW_REDUCE
def run_power(x: Array, p: float) -> float:
    """sum(abs(x)**p) for p = 0, 1, 2; for inf and -inf the largest and the smallest."""
    found = math.inf if p < 0.0 else 0.0
    if p == 2.0:
        for j in range(x.size):
            value = load(x, j)
            found += value * value
    elif p == 1.0:
        for j in range(x.size):
            found += abs(load(x, j))
    elif p == 0.0:
        for j in range(x.size):
            found += 0.0 if load(x, j) == 0.0 else 1.0
    elif p > 0.0:
        for j in range(x.size):
            found = larger(abs(load(x, j)), found)
    else:
        for j in range(x.size):
            found = smaller(abs(load(x, j)), found)
    return found


@ROW_REDUCE
def run_scaled_power(x: Array, scale: float, p: float) -> float:
    found = 0.0
    for j in range(x.size):
        found += (abs(load(x, j)) / scale) ** p
    return found


@ROW_REDUCE
def run_products(dy: Array, x: Array, norm: float) -> float:
    found = 0.0
    for j in range(x.size):
        found += load(dy, j) * (load(x, j) / norm)
    return found


@ROW_REDUCE
def run_ties(x: Array, norm: float) -> float:
    found = 0.0
    for j in range(x.size):
        found += 1.0 if abs(load(x, j)) == norm else 0.0
    return found


# ---- columns ---------------------------------------------------------------------------------------------------------


@PLAIN
def column_norms(x: Array, o: int, r0: int, r1: int, p: float, norm: Array, scale: Array, total: Array) -> None:
    """norm: the p-norms of x[o, :, r0:r1] down its lines; scale and total are overwritten."""
    norm[:] = math.nan
    if p == 0.0 or p == 1.0 or p == 2.0 or math.isinf(p):
        column_powers(x, o, r0, r1, p, norm)
    if p == 0.0 or math.isinf(p):
        return
    good = True
    for j in range(norm.size):
        if p == 2.0:
            norm[j] = math.sqrt(norm[j])
        good &= SMALLEST < norm[j] < math.inf
    if good:
        return
    column_powers(x, o, r0, r1, math.inf if p > 0.0 else -math.inf, scale)
    total[:] = 0.0
    for j in range(scale.size):
        if not 0.0 < scale[j] < math.inf:
            scale[j] = 1.0
    for line in range(x.shape[1]):
        add_scaled_powers(x[o, line, r0:r1], scale, p, total)
    for j in range(norm.size):
        if not SMALLEST < norm[j] < math.inf:
            norm[j] = scale[j] * total[j] ** (1.0 / p)


@PLAIN
def column_powers(x: Array, o: int, r0: int, r1: int, p: float, found: Array) -> None:
    """As `run_power`."""
    found[:] = math.inf if p < 0.0 else 0.0
    for line in range(x.shape[1]):
        add_powers(x[o, line, r0:r1], p, found)


@ROW
def add_powers(x: Array, p: float, found: Array) -> None:
    if p == 2.0:
        for j in range(x.size):
            value = load(x, j)
            found[j] += value * value
    elif p == 1.0:
        for j in range(x.size):
            found[j] += abs(load(x, j))
    elif p == 0.0:
        for j in range(x.size):
            found[j] += 0.0 if load(x, j) == 0.0 else 1.0
    elif p > 0.0:
        for j in range(x.size):
            found[j] = larger(abs(load(x, j)), found[j])
    else:
        for j in range(x.size):
            found[j] = smaller(abs(load(x, j)), found[j])


@ROW
def add_scaled_powers(x: Array, scale: Array, p: float, found: Array) -> None:
    for j in range(x.size):
        found[j] += (abs(load(x, j)) / scale[j]) ** p


@ROW
def add_products(dy: Array, x: Array, norm: Array, found: Array) -> None:
    for j in range(x.size):
        found[j] += load(dy, j) * (load(x, j) / norm[j])


@ROW
def add_ties(x: Array, norm: Array, found: Array) -> None:
    for j in range(x.size):
        found[j] += 1.0 if abs(load(x, j)) == norm[j] else 0.0
