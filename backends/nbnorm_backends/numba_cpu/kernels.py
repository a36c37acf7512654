"""The loops. A kernel does one chunk of the work, alone; which chunks there are depends on the shape only, so the
bits of a result do not depend on the number of threads.

Two families, by what is innermost in memory:

- *runs*, x (n, r, g, c, s): a run is s neighbouring elements of one group (n, g). Parameters are (r or 1, g, c, s or
  1): constant along a run, or not.
- *columns*, x (n, r, w): neighbouring elements belong to different statistics. Each sum runs down r.

Both come down to the same loops over one row of neighbouring elements. What a call does not use is None, or the
identity, and leaves no trace in the compiled code:

- `before` and `after` are activations: u = before(x) is normalized, and y = after(norm(u) + residual);
- `mask` is 0 where an element does not count; its row has the row's length, or length 1 and holds for all of it;
- mean, scale, bias and the like are one number for the whole row, or an array along it.

Statistics are sums in float64: of float64 about a pivot near the data, of narrower types, whose squares float64 holds
exactly, about zero; where the mean turns out to be far from there, again about the mean. What follows is computed in
float32, or in float64 for float64, with the mean in two parts: u - mean is taken from the float32 that is nearest to
the mean, and what that leaves joins the shift, so offsets of 1e8 cost no accuracy. A power of two in front (`power`,
one for most data) keeps the differences and the scale of extreme data within float32.

Accesses are by `load`, `at` and the like, which do not wrap around: plain indexing inside ``range(begin, end)`` keeps
that check and was 15 times slower.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from nbnorm_backends.numba_cpu.activations import activate, curved, slope
from nbnorm_backends.numba_cpu.cache import sealed
from nbnorm_backends.numba_cpu.elements import (
    COUNTED,
    UNCOUNTED,
    at_like,
    borrowed,
    chosen,
    element,
    increase,
    interleaved,
    keep,
    load,
    minus,
    optional,
    plus,
    put,
    row_at,
    span,
    store,
    summed,
    times,
    touch,
    widens_to_512_bits,
    widest_vectors,
)

# Reductions may be reordered into vector lanes; nothing may assume away NaN and Inf. fastmath=True, "nnan" and
# "ninf" break them, "arcp" turns x / denormal into infinity.
REDUCE = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True, **UNCOUNTED)
PLAIN = njit(fastmath={"contract"}, error_model="numpy", nogil=True, **UNCOUNTED)
ALLOCATES = njit(fastmath={"contract"}, error_model="numpy", nogil=True, **COUNTED)
# For steps within a row, which a call would slow down; and for what returns a row.
RETURNS = njit(error_model="numpy", nogil=True, forceinline=True, **COUNTED)
ROW = njit(fastmath={"contract"}, error_model="numpy", nogil=True, forceinline=True, **UNCOUNTED)


def KERNEL(function):
    """Compile a function that is called from Python, and keep it on disk."""
    compiled = njit(fastmath={"contract"}, error_model="numpy", nogil=True, no_cfunc_wrapper=True)(function)
    return sealed(compiled, f"{function.__module__}.{function.__qualname__}")


def EXACT(function):
    """The same for what NumPy computes too, in calls that are not remembered: no product is rounded with its sum."""
    compiled = njit(error_model="numpy", nogil=True, no_cfunc_wrapper=True)(function)
    return sealed(compiled, f"{function.__module__}.{function.__qualname__}")


STATISTICS = 5
MEAN, RESIDUAL, M2, RSTD, COUNT = range(STATISTICS)  # rows of the array of statistics, (5, groups)
K1, K2 = range(2)  # rows of the array of backward coefficients, (2, groups)
STRIDE = 64  # elements of a loop of known length, and between two batches of prefetches: see docs/design_choices.md
# Vectors that an activation is computed of in turn. With 256 bits, and 16 registers, 4 take 0.74 to 0.94 of the time of
# one, in cache and out of it; 8 take 0.70 to 1.03. With 512 bits, and twice the registers, that is not measured.
VECTORS = 1 if widens_to_512_bits() else 4
LONG = 256  # elements from which rows are cut into such loops without prefetches too; of 64, rows of 48 take 1.17
ROWS = 8  # of columns whose sums stay in registers
# Elements that are summed in one loop in float64: errors of longer sums of few values do not cancel. Of vectors of half
# the width there are half as many sums.
PIECE = 2048 if widens_to_512_bits() else 1024
SINGLE_PIECE = 512  # the same in float32
FLUSH = 32  # rows whose sums lie in float32 before they go to float64
BATCH = 8  # groups, at most, whose sums come before the first of them is written: layer norm (32768, 16) takes 0.87 of
BATCHED = 4096  # its time, (64, 768) 0.95; more elements than these are not kept in the first-level cache
NEAR = 32  # elements whose mean is the pivot of sums of float64
NEAR_PIVOT = 0.25  # it is near where (sum of deviations)^2 <= n * m2 / 4: beyond it rounding errors are amplified
NEAR_ZERO = 64.0  # sums of narrower types are done again where sum^2 > 64 * n * m2: beyond it they lose two digits
MODERATE = 16.0  # scales up to it, and down to its reciprocal, leave float32 room on both sides
TOP = 2.0**126  # the last power of two but one that float32 has, and the reciprocal of its smallest normal number
LARGEST = float(np.finfo(np.float32).max)
PAST = True  # the caches; None for ordinary stores


# ---- one row ---------------------------------------------------------------------------------------------------------


@optional(lambda x, addend, total: None)
def add_rows(x, addend, total):
    for i in range(x.size):
        store(total, i, load(x, i) + load(addend, i))


@REDUCE
def valid_in(mask):
    """How many elements of a row count."""
    total = 0
    for i in range(mask.size):
        total += 1 if mask[i] else 0
    return total


@optional(lambda mask: 0)
def first_valid(mask):
    """The first element of a row that counts, or the row's size."""
    for i in range(mask.size):
        if mask[i]:
            return i
    return mask.size


@chosen
def zero(like):
    """0 in the type of `like`, a float32 or a float64."""
    return (lambda like: np.float32(0.0)) if like == types.float32 else lambda like: 0.0


@REDUCE
def piece_sums(x, begin, end, pivot, mask, before):
    """`sums` of the elements [begin, end)."""
    widest_vectors()
    s = 0.0
    q = 0.0
    for i in range(begin, end):
        d = keep(mask, i, minus(activate(before, x, load(x, i)), pivot, i))
        s += d
        q += d * d
    return s, q


@PLAIN
def sums(x, pivot, mask, before):
    """sum(u - pivot), sum((u - pivot)^2) of a row.

    Without a pivot (None) that is 1.3 times as fast: 114 GB/s from the second-level cache in place of 86.
    """
    s = 0.0
    q = 0.0
    for begin in range(0, x.size, PIECE):
        ds, dq = piece_sums(x, begin, min(begin + PIECE, x.size), pivot, mask, before)
        s += ds
        q += dq
    return s, q


@PLAIN
def affine(x, ahead, power, mean, scale, low, w, b, residual, mask, before, after, past, y):
    """y = after(((u * power - mean) * scale + low) * w + b + residual), in the type of scale.

    `ahead` is a row of that size which will be read soon, or empty. `past` is None, or y goes past the caches (`put`).
    """
    widest_vectors()
    whole = x.size // STRIDE * STRIDE if ahead.size or x.size >= LONG else 0
    operands = x, power, mean, scale, low, w, b, residual, mask, before, after, past, y
    for begin in range(0, whole, STRIDE):
        if ahead.size:
            touch(ahead, begin, STRIDE)
        block_of(affine_at, before, after, begin, operands)
    for i in range(whole, x.size):
        affine_at(i, *operands)


def plain_block(step, before, after, begin, operands):
    for i in range(STRIDE):
        step(begin + i, *operands)


def curved_block(step, before, after, begin, operands):
    interleaved(step, STRIDE, VECTORS, begin, operands)


@chosen
def block_of(step, before, after, begin, operands):
    """`step` of STRIDE elements from `begin` on."""
    return curved_block if curved(before, after) and VECTORS > 1 else plain_block


@ROW
def affine_at(i, x, power, mean, scale, low, w, b, residual, mask, before, after, past, y):
    """`affine` of one element."""
    d = times(activate(before, x, at_like(scale, x, i)), power, i) - at_like(scale, mean, i)
    z = plus(plus(times(plus(d * at_like(scale, scale, i), low, i), w, i), b, i), residual, i)
    put(past, y, i, keep(mask, i, activate(after, y, z)))


@PLAIN
def gradient_at(i, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after):
    """(d, t) of one element, 0 where it does not count, from g of dy and v of x: d = u * power - mean, z is found again
    as in `affine`, and t = g * after'(z) is its gradient."""
    d = keep(mask, i, times(activate(before, x, v), power, i) - at_like(scale, mean, i))
    z = plus(plus(times(plus(d * at_like(scale, scale, i), low, i), w, i), b, i), residual, i)
    return d, keep(mask, i, g * slope(after, dy, z))


@chosen
def summand(x, term):
    """A term in the type in which gradients are summed within a piece: in float64, but float32 of half types as it is,
    by which layer norm of (4096, 1024) takes 0.80 (bfloat16) or 0.88 (float16) of its time. For float32 itself it took
    1.10, for rows of 64 1.4."""
    return (lambda x, term: term) if x.dtype.bitwidth == 16 else lambda x, term: np.float64(term)


@chosen
def backward_piece(x):
    """How many products are summed in one loop."""
    return (lambda x: SINGLE_PIECE) if x.dtype.bitwidth == 16 else lambda x: PIECE


@ROW
def backward_terms(i, dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, dw, db):
    """What one element adds to `backward_sums`."""
    g, v = at_like(scale, dy, i), at_like(scale, x, i)
    d, t = gradient_at(i, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after)
    increase(dw, i, t * plus(d * at_like(scale, scale, i), low, i))
    increase(db, i, t)
    term = summand(x, times(t, weights, i))
    return term, term * at_like(term, d, i)


@chosen
def lanes(x):
    """How many elements the sums of a gradient take at once. LLVM takes as many as a register has of the widest type,
    which is float64 unless x is of a half type: 4 with 256 bits, where these 8 take 0.91 to 0.99 of the time. Otherwise
    they are what LLVM takes on x86; on AArch64 neither is measured."""
    if x.dtype.bitwidth == 16 and widens_to_512_bits():
        return lambda x: 16
    return lambda x: 8


@PLAIN
def piece_backward_sums(
    begin, end, dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, dw, db
):
    """`backward_sums` of the elements [begin, end)."""
    widest_vectors()
    operands = dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, dw, db
    return summed(backward_terms, lanes(x), begin, end, operands)


@PLAIN
def backward_sums(dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, dw, db):
    """sum(t * weights), sum(t * weights * d) of a row, in float64.

    With a weight and a bias for each element dw += t * xhat and db += t too, where xhat = d * scale + low; else both
    are None.
    """
    s = 0.0
    q = 0.0
    piece = backward_piece(x)
    for begin in range(0, x.size, piece):
        end = min(begin + piece, x.size)
        ds, dq = piece_backward_sums(
            begin, end, dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, dw, db
        )
        s += ds
        q += dq
    return s, q


@PLAIN
def backward_affine(
    dy,
    x,
    dy_ahead,
    x_ahead,
    power,
    mean,
    scale,
    low,
    w,
    b,
    residual,
    mask,
    before,
    after,
    gain,
    k1,
    k2,
    lift,
    addend,
    dz,
    past,
    dx,
):
    """dx = (t * gain * w + (d * k2 + k1)) * lift * before'(x) + addend, and dz = t; `past` and rows ahead as for
    `affine`."""
    widest_vectors()
    whole = x.size // STRIDE * STRIDE if x_ahead.size or x.size >= LONG else 0
    factors = power, mean, scale, low, w, b, residual, mask, before, after, gain, k1, k2, lift, addend, dz, past
    for begin in range(0, whole, STRIDE):
        if x_ahead.size:
            touch(dy_ahead, begin, STRIDE)
            touch(x_ahead, begin, STRIDE)
        block_of(backward_affine_at, before, after, begin, (dy, x, *factors, dx))
    for i in range(whole, x.size):
        backward_affine_at(i, dy, x, *factors, dx)


@ROW
def backward_affine_at(
    i, dy, x, power, mean, scale, low, w, b, residual, mask, before, after, gain, k1, k2, lift, addend, dz, past, dx
):
    """`backward_affine` of one element."""
    g, v = at_like(scale, dy, i), at_like(scale, x, i)
    d, t = gradient_at(i, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after)
    store(dz, i, t)
    du = times(t * at_like(scale, gain, i), w, i) + (d * at_like(scale, k2, i) + at_like(scale, k1, i))
    du = times(du, lift, i) * slope(before, x, v)
    put(past, dx, i, plus(keep(mask, i, du), addend, i))


# ---- rows of what may be None ----------------------------------------------------------------------------------------
# A mask is a pair: flags with the axes of x, each 1 or full, and where their rows have length 1 and those of x more, a
# row of zeros and one of ones, of which one stands for such a row; else none.


@optional(lambda mask, i, k, j, m: None, counted=True)
def mask_run(mask, i, k, j, m):
    """The row of a mask (n, r, g, c, s) for one run."""
    flags, constant = mask
    i, k = i if flags.shape[0] > 1 else 0, k if flags.shape[1] > 1 else 0
    j, m = j if flags.shape[2] > 1 else 0, m if flags.shape[3] > 1 else 0
    own = row_at(flags, (i, k, j, m))
    return row_at(constant, (1 if own[0] else 0,)) if constant.size else own


@optional(lambda mask, i, k, begin, end: None, counted=True)
def mask_row(mask, i, k, begin, end):
    """The part of a mask (n, r, w) for one row of columns."""
    flags, constant = mask
    own = row_at(flags, (i if flags.shape[0] > 1 else 0, k if flags.shape[1] > 1 else 0))
    return span(row_at(constant, (1 if own[0] else 0,)), 0, end - begin) if constant.size else span(own, begin, end)


def param_number(param, k, j, m):
    return param[k if param.shape[0] > 1 else 0, j, m]


def param_row(param, k, j, m):
    return row_at(param, (k if param.shape[0] > 1 else 0, j, m))


@chosen(counted=True)
def param_run(param, k, j, m):
    """What of a parameter belongs to a run: a number of (r or 1, g, c), a row of (r or 1, g, c, s)."""
    return param_row if param.ndim > 3 else param_number


# ---- runs ------------------------------------------------------------------------------------------------------------


@ROW
def group_size(x):
    return np.float64(x.shape[1] * x.shape[3] * x.shape[4])


@REDUCE
def first_sums(mask, before, x, first, origin):
    """(count, sum(u - origin)) of the elements that count among the NEAR from `first` on."""
    count = 0.0
    total = 0.0
    for i in range(first, min(first + NEAR, x.size)):
        count += keep(mask, i, 1.0)
        total += keep(mask, i, activate(before, x, load(x, i)) - origin)
    return count, total


def no_pivot(x, mask, before, i, j, center):
    """None: of narrower types sums about zero lose little."""
    return None


def mean_of_first(x, mask, before, i, j, center):
    for k in range(x.shape[1] if center else 0):
        for m in range(x.shape[3]):
            row, valid = x[i, k, j, m], mask_run(mask, i, k, j, m)
            first = first_valid(valid)
            if first < row.size:
                origin = activate(before, x, load(row, first))
                count, total = first_sums(valid, before, row, first, origin)
                return origin + total / count
    return 0.0


@chosen
def pivot_of(x, mask, before, i, j, center):
    """What the group (n, g) = (i, j) is summed about at first: of equal values that value, exactly; 0 without `center`.

    For float64 the mean of its first elements that count, which is nearer to that of all than a single one: less is
    lost to rounding, and of normal data one group in 200 is summed again.
    """
    return mean_of_first if x.dtype == types.float64 else no_pivot


@chosen
def farthest(x):
    """Where sums are done again about the mean, in n * m2."""
    return (lambda x: NEAR_PIVOT) if x.dtype == types.float64 else lambda x: NEAR_ZERO


@optional(lambda mask, x, i, j: group_size(x))
def count_valid(mask, x, i, j):
    """Elements of the group (i, j) that count."""
    total = 0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            total += valid_in(mask_run(mask, i, k, j, m))
    return np.float64(total)


@PLAIN
def group_sums(x, mask, before, i, j, pivot):
    """`sums` over the group (i, j)."""
    s = 0.0
    q = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            ds, dq = sums(x[i, k, j, m], pivot, mask_run(mask, i, k, j, m), before)
            s += ds
            q += dq
    return s, q


@ROW
def group_moments(x, mask, before, i, j, center, eps, p, stats):
    """Statistics of the group (i, j) into stats[:, p]; without centring about zero."""
    n = count_valid(mask, x, i, j)
    stats[COUNT, p] = n
    if n == 0.0:
        stats[:, p] = 0.0
        return
    each = 1.0 / n  # found while the sums are; divisions behind them would take 10 ns of a row
    first = pivot_of(x, mask, before, i, j, center)
    s, q = group_sums(x, mask, before, i, j, first)
    pivot = plus(0.0, first, 0)
    shift = s * each if center else 0.0
    if center and not s * shift <= farthest(x) * (q - s * shift):
        pivot += s / n
        s, q = group_sums(x, mask, before, i, j, pivot)
        shift = s * each
    mean = pivot + shift
    m2 = q - s * shift if center else q
    stats[MEAN, p] = mean
    stats[RESIDUAL, p] = (pivot - mean) + shift
    stats[M2, p] = 0.0 if m2 < 0.0 else m2  # rounding only; NaN stays NaN
    stats[RSTD, p] = 1.0 / np.sqrt(stats[M2, p] * each + eps)


@ROW
def power_of_two(size):
    """1 for a moderate number, else the power of two next to it, as far as float32 has one."""
    if 1.0 / MODERATE <= size <= MODERATE or not 0.0 < size < np.inf:
        return 1.0
    return min(max(2.0 ** np.rint(np.log2(size)), 1.0 / TOP), TOP)


@ROW
def power_for(mean, scale):
    """The power of two by which x is multiplied so that differences from the mean become about 1, and what is left of
    the scale too; less where the mean would overflow."""
    power = power_of_two(abs(scale))
    if abs(mean) * power > TOP:
        power = 2.0 ** np.floor(np.log2(TOP / abs(mean)))
    return power


@ROW
def clamped(value):
    """A finite number as a finite float32: a difference of 0 times an infinite scale would be NaN."""
    return np.copysign(LARGEST, value) if LARGEST < abs(value) < np.inf else value


@ROW
def high_of(mean):
    """The float32 next to the mean, as a float64."""
    return np.float64(np.float32(clamped(mean)))


@ROW
def low_of(mean, high, scale):
    """What is left of the mean, times the scale."""
    return (high - mean) * scale if abs(scale) < np.inf else 0.0


def double_terms(x, mean, scale):
    return None, mean, scale, 0.0


def single_terms(x, mean, scale):
    power = power_for(mean, scale)
    high = high_of(mean)
    lowered = scale if power == 1.0 else scale / power
    return np.float32(power), np.float32(high * power), np.float32(clamped(lowered)), low_of(mean, high, scale)


@chosen
def terms(x, mean, scale):
    """(power, mean, scale, low), with which `affine` computes (u - mean) * scale in the type for x."""
    return double_terms if x.dtype == types.float64 else single_terms


def double_gains(x, rstd, scale, low, k1, k2):
    return rstd, -(k1 + low * k2) * rstd, -scale * k2 * rstd, None


def single_gains(x, rstd, scale, low, k1, k2):
    lift = power_of_two(rstd)
    gain = rstd / lift
    return np.float32(gain), np.float32(-(k1 + low * k2) * gain), np.float32(-scale * k2 * gain), np.float32(lift)


@chosen
def gains(x, rstd, scale, low, k1, k2):
    """(gain, k1, k2, lift), with which `backward_affine` computes rstd * (t * w - k1 - xhat * k2) in the type for x,
    where xhat = d * scale + low. An extreme rstd is applied last, as a power of two, so that the difference stays in
    range."""
    return double_gains if x.dtype == types.float64 else single_gains


@optional(lambda source, addend, total, i, j: None)
def add_group(source, addend, total, i, j):
    for k in range(source.shape[1]):
        for m in range(source.shape[3]):
            add_rows(source[i, k, j, m], addend[i, k, j, m], total[i, k, j, m])


@ROW
def batch_of(x):
    """How many groups are summed before the first of them is written: what follows the sums of one, some 100 cycles in
    which each step waits for the one before, is done beside the sums of the next."""
    return max(1, min(BATCH, BATCHED // max(1, x.shape[1] * x.shape[3] * x.shape[4])))


@ROW
def coming_after(p, batch, end, begin, leap):
    """The group that is likely to come a batch after p: in this chunk, which ends at `end`, or in the thread's next,
    which begins `leap` groups after `begin`."""
    return p + batch if p + batch < end else begin + leap + (p + batch - end)


@RETURNS
def run_ahead(x, leap, p, k, m):
    """A run of the group p, which comes next; empty without `leap`, and behind the last group."""
    g = x.shape[2]
    if leap and p < x.shape[0] * g:
        return row_at(x, (p // g, k, p % g, m))
    return span(row_at(x, (0, 0, 0, 0)), 0, 0)


@PLAIN
def runs_forward(
    chunk,
    groups,
    leap,
    x,
    w,
    b,
    center,
    eps,
    find,
    stats,
    residual,
    mask,
    before,
    after,
    source,
    addend,
    total,
    stream,
    y,
):
    """Groups [chunk*groups, ...): statistics where `find` asks, then y, unless it is empty, while x is in the cache.

    Where `source` is not None, x is the memory of `total`, and total = source + addend comes first. `leap` chunks on
    lies the chunk that this thread is likely to do next, which is fetched to the cache meanwhile; 0 for none. With
    `stream` y, whose runs are whole cache lines, goes past the caches.
    """
    widest_vectors()
    x, y, w, b, stats = borrowed(x), borrowed(y), borrowed(w), borrowed(b), borrowed(stats)
    residual, mask = borrowed(residual), borrowed(mask)
    source, addend, total = borrowed(source), borrowed(addend), borrowed(total)
    n, r, g, c, _ = x.shape
    begin = chunk * groups
    end = min(begin + groups, n * g)
    batch = batch_of(x)
    for first in range(begin, end, batch):
        last = min(first + batch, end)
        for p in range(first, last):
            add_group(source, addend, total, p // g, p % g)
            if find:
                group_moments(x, mask, before, p // g, p % g, center, eps, p, stats)
        for p in range(first, last if y.size else first):
            i, j = p // g, p % g
            coming = coming_after(p, batch, end, begin, leap * groups)
            for k in range(r):
                for m in range(c):
                    xs, ys, rs = x[i, k, j, m], y[i, k, j, m], row_at(residual, (i, k, j, m))
                    ms, ws, bs = mask_run(mask, i, k, j, m), param_run(w, k, j, m), param_run(b, k, j, m)
                    ahead = run_ahead(x, leap, coming, k, m)
                    mean, rstd = stats[MEAN, p], stats[RSTD, p]
                    if stream:
                        affine_run(xs, ahead, mean, rstd, ws, bs, rs, ms, before, after, PAST, ys)
                    else:
                        affine_run(xs, ahead, mean, rstd, ws, bs, rs, ms, before, after, None, ys)


def affine_number(x, ahead, mean, rstd, w, b, residual, mask, before, after, past, y):
    power, high, scale, low = terms(x, mean, rstd * w)
    affine(x, ahead, power, high, scale, None, None, b + low, residual, mask, before, after, past, y)


def affine_row(x, ahead, mean, rstd, w, b, residual, mask, before, after, past, y):
    power, high, scale, low = terms(x, mean, rstd)
    affine(x, ahead, power, high, scale, low, w, b, residual, mask, before, after, past, y)


@chosen
def affine_run(x, ahead, mean, rstd, w, b, residual, mask, before, after, past, y):
    """`affine` of a run, where weight and bias are numbers or rows."""
    return affine_row if isinstance(w, types.Array) else affine_number


@PLAIN
def run_backward_sums(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, weights, dw, db):
    """sum(t * weights), sum(t * weights * xhat) of a run, and dw and db as `backward_sums` has them; in float64 where
    float32 overflows, or with `precise`."""
    s = np.inf
    q = np.inf
    if not precise:
        power, high, scale, low = terms(x, mean, rstd)
        s, q = backward_sums(dy, x, power, high, scale, low, w, b, residual, mask, before, after, weights, dw, db)
        q = q * scale + low * s
    if not abs(s) + abs(q) < np.inf:
        s, q = backward_sums(dy, x, None, mean, rstd, 0.0, w, b, residual, mask, before, after, weights, None, None)
        q *= rstd
    return s, q


def grow_numbers(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, k, j, m, dw, db, dws, dbs):
    s, q = run_backward_sums(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, None, None, None)
    if dw.size:
        k = k if dw.shape[0] > 1 else 0
        dw[k, j, m] += q
        db[k, j, m] += s
    return w * s, w * q


def grow_rows(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, k, j, m, dw, db, dws, dbs):
    if dw.size and precise:
        dw, db = param_run(dw, k, j, m), param_run(db, k, j, m)
        s, q = backward_sums(dy, x, None, mean, rstd, 0.0, w, b, residual, mask, before, after, w, dw, db)
        return s, q * rstd
    if dw.size:
        dws, dbs = param_run(dws, k, j, m), param_run(dbs, k, j, m)
        return run_backward_sums(dy, x, mean, rstd, w, b, residual, mask, before, after, False, w, dws, dbs)
    return run_backward_sums(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, w, None, None)


@chosen
def grow(dy, x, mean, rstd, w, b, residual, mask, before, after, precise, k, j, m, dw, db, dws, dbs):
    """sum(w * t), sum(w * t * xhat) of a run.

    The gradients of weight and bias, dw and db, grow where they are not empty. Where those are rows, and `precise` is
    not asked for, their parts dws and dbs grow in their place.
    """
    return grow_rows if isinstance(w, types.Array) else grow_numbers


@PLAIN
def group_backward_sums(dy, x, w, b, residual, mask, before, after, precise, i, j, mean, rstd, dw, db, dws, dbs):
    """sum(w * t), sum(w * t * xhat) of the group (i, j); `grow` has the rest."""
    s1 = 0.0
    s2 = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            dys, xs, rs = dy[i, k, j, m], x[i, k, j, m], row_at(residual, (i, k, j, m))
            ms, ws, bs = mask_run(mask, i, k, j, m), param_run(w, k, j, m), param_run(b, k, j, m)
            t1, t2 = grow(dys, xs, mean, rstd, ws, bs, rs, ms, before, after, precise, k, j, m, dw, db, dws, dbs)
            s1 += t1
            s2 += t2
    return s1, s2


@PLAIN
def flush_row(partial, total):
    """total += partial, which begins anew."""
    for i in range(partial.size):
        total[i] += partial[i]
        partial[i] = 0.0


@optional(lambda partial, total: None)
def flush(partial, total):
    """`flush_row` for every row of (r or 1, g, c, s)."""
    for k in range(partial.shape[0]):
        for j in range(partial.shape[1]):
            for m in range(partial.shape[2]):
                flush_row(partial[k, j, m], total[k, j, m])


@chosen(counted=True)
def partial_like(x, total):
    """Zeros for sums that go to `total` later, in the type that x is computed in; None for single numbers."""
    if total.ndim == 3:
        return lambda x, total: None
    real = np.float64 if x.dtype == types.float64 else np.float32
    return lambda x, total: np.zeros(total.shape, real)


@ALLOCATES
def runs_backward(
    chunk,
    groups,
    leap,
    dy,
    x,
    w,
    b,
    center,
    fixed,
    find,
    stats,
    k,
    residual,
    mask,
    before,
    after,
    addend,
    dw,
    db,
    dz,
    stream,
    dx,
):
    """Groups [chunk*groups, ...): where `find` asks, the sums into k and the chunk's share of dw and db; then dx and
    dz, unless dx is empty, while dy and x are in the cache. `leap` and `stream` as for `runs_forward`.

    Where dx is empty the sums are what is asked for, and so in float64. dw, db (chunks, r or 1, g, c), with rows of s
    where weight and bias have them; one share of zeros in place of `chunks` where each group is met once. The sums over
    the group's count are k1 and k2; k1 is zero without `center`, and both are where the statistics are `fixed`.
    """
    share = chunk if dw.shape[0] > 1 else 0
    if dw.shape[0] > 1:
        dw[share] = 0.0
        db[share] = 0.0
    dw1, db1 = dw[share], db[share]
    dw2, db2 = partial_like(x, dw1), partial_like(x, db1)
    operands = dy, x, w, b, center, fixed, find, stats, k, residual, mask, before, after, addend
    backward_groups(chunk, groups, leap, operands, (dw1, db1, dw2, db2), dz, stream, dx)
    flush(dw2, dw1)
    flush(db2, db1)


@PLAIN
def backward_groups(chunk, groups, leap, operands, shares, dz, stream, dx):
    """`runs_backward`, with the chunk's share of dw and db, and zeros dws and dbs for their parts (see `grow`)."""
    dy, x, w, b, center, fixed, find, stats, k, residual, mask, before, after, addend = operands
    dw, db, dws, dbs = shares
    dy, x, w, b, dx = borrowed(dy), borrowed(x), borrowed(w), borrowed(b), borrowed(dx)
    residual, mask, addend, dz = borrowed(residual), borrowed(mask), borrowed(addend), borrowed(dz)
    stats, k, dw, db, dws, dbs = borrowed(stats), borrowed(k), borrowed(dw), borrowed(db), borrowed(dws), borrowed(dbs)
    n, r, g, c, _ = x.shape
    precise = dx.size == 0
    begin = chunk * groups
    end = min(begin + groups, n * g)
    batch = batch_of(x)
    for first in range(begin, end, batch):
        last = min(first + batch, end)
        for p in range(first, last if find else first):
            i, j, mean, rstd, count = p // g, p % g, stats[MEAN, p], stats[RSTD, p], stats[COUNT, p]
            s1, s2 = group_backward_sums(
                dy, x, w, b, residual, mask, before, after, precise, i, j, mean, rstd, dw, db, dws, dbs
            )
            k[K1, p] = s1 / count if center and not fixed and count else 0.0
            k[K2, p] = s2 / count if not fixed and count else 0.0
            if (p - begin) % FLUSH == FLUSH - 1:
                flush(dws, dw)
                flush(dbs, db)
        for p in range(first, last if dx.size else first):
            i, j, mean, rstd = p // g, p % g, stats[MEAN, p], stats[RSTD, p]
            coming = coming_after(p, batch, end, begin, leap * groups)
            power, high, scale, low = terms(x, mean, rstd)
            gain, k1, k2, lift = gains(x, rstd, scale, low, k[K1, p], k[K2, p])
            for a in range(r):
                for m in range(c):
                    dys, xs, dxs = dy[i, a, j, m], x[i, a, j, m], dx[i, a, j, m]
                    rs, ms = row_at(residual, (i, a, j, m)), mask_run(mask, i, a, j, m)
                    ws, bs = param_run(w, a, j, m), param_run(b, a, j, m)
                    ts, zs = row_at(addend, (i, a, j, m)), row_at(dz, (i, a, j, m))
                    ahead = run_ahead(dy, leap, coming, a, m), run_ahead(x, leap, coming, a, m)
                    rest = gain, k1, k2, lift, ts, zs
                    found = dys, xs, *ahead, power, high, scale, low, ws, bs, rs, ms, before, after, *rest
                    if stream:
                        backward_affine(*found, PAST, dxs)
                    else:
                        backward_affine(*found, None, dxs)


# ---- columns ---------------------------------------------------------------------------------------------------------
# A chunk is a tile: rows [r0, r1) and columns [w0, w1) of samples [i0, i1), more than one sample where they are small.
# `share` is the row block, which is the row of the partial sums that the chunk may write. What belongs to a column is
# (n, w), in the type that x is computed in. `wr` and `br`, where not None, are parameters along r: (r, 1), or (r, c)
# where they lie along c too and columns are (g, c).


@PLAIN
def tile_of(chunk, samples, rows, width, x):
    """(i0, i1, share, r0, r1, w0, w1) of a chunk of so many samples, rows and columns."""
    n, r, w = x.shape
    across = (w + width - 1) // width
    down = (r + rows - 1) // rows
    block, column = chunk // across, chunk % across
    sample, share = block // down, block % down
    i0, r0, w0 = sample * samples, share * rows, column * width
    return i0, min(i0 + samples, n), share, r0, min(r0 + rows, r), w0, min(w0 + width, w)


@PLAIN
def tile_from_end(chunk, samples, rows, width, x):
    """`tile_of`, the last one first: caches still have what sums have read last. Batch norm's gradient channels last
    takes 0.93 to 0.95 of its time for half types and 0.94 to 0.99 for float32 (AVX2), the norm itself 0.98 to 1.04."""
    n, r, w = x.shape
    chunks = ((n + samples - 1) // samples) * ((r + rows - 1) // rows) * ((w + width - 1) // width)
    return tile_of(chunks - 1 - chunk, samples, rows, width, x)


@PLAIN
def columns_pivot(chunk, samples, rows, width, x, mask, before, pivot, count):
    """pivot (n, w): u of the first element of each column that counts; count (n, w): 1 where there is one."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        missing = w1 - w0
        k = r0
        while missing and k < r1:
            row, valid = x[i, k, w0:w1], mask_row(mask, i, k, w0, w1)
            for j in range(row.size):
                if valid[j] and count[i, w0 + j] == 0.0:
                    pivot[i, w0 + j] = activate(before, row, load(row, j))
                    count[i, w0 + j] = 1.0
                    missing -= 1
            k += 1


@PLAIN
def add_row(x, pivot, mask, before, s, q):
    """`sums` of every column on its own."""
    widest_vectors()
    for j in range(x.size):
        d = keep(mask, j, minus(activate(before, x, load(x, j)), pivot, j))
        s[j] += d
        q[j] += d * d


@optional(lambda mask, part, i, share, begin: None)
def add_counts(mask, part, i, share, begin):
    """The third plane of the partial sums; there is none without a mask."""
    for j in range(mask.size):
        part[2, i, share, begin + j] += 1.0 if mask[j] else 0.0


@PLAIN
def add_block(x, i, k, begin, pivot, before, s, q):
    """`add_row` of ROWS rows, whose sums stay in registers."""
    widest_vectors()
    for j in range(s.size):
        ds = 0.0
        dq = 0.0
        for m in range(ROWS):
            d = minus(activate(before, x, element(s, x, i, k + m, begin + j)), pivot, j)
            ds += d
            dq += d * d
        s[j] += ds
        q[j] += dq


def no_blocks(mask, x, i, r0, r1, begin, pivot, before, s, q):
    return r0


def plain_blocks(mask, x, i, r0, r1, begin, pivot, before, s, q):
    for k in range(r0, r1 - ROWS + 1, ROWS):
        add_block(x, i, k, begin, pivot, before, s, q)
    return r0 + (r1 - r0) // ROWS * ROWS


@chosen
def add_blocks(mask, x, i, r0, r1, begin, pivot, before, s, q):
    """The rows [r0, r1) of sample i, as far as they fill blocks; returns the first row that is left."""
    return plain_blocks if isinstance(mask, types.NoneType) and not curved(before) else no_blocks


@PLAIN
def columns_sums(chunk, samples, rows, width, x, pivot, mask, before, source, addend, total, part):
    """part (3, n, shares, w): sum(u - pivot), sum((u - pivot)^2) and, with a mask, the count down the tile's rows.

    pivot (n, w), float64, or None. `source` as for `runs_forward`.
    """
    x, mask, pivot, part = borrowed(x), borrowed(mask), borrowed(pivot), borrowed(part)
    source, addend, total = borrowed(source), borrowed(addend), borrowed(total)
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        s, q, p = part[0, i, share, w0:w1], part[1, i, share, w0:w1], span(row_at(pivot, (i,)), w0, w1)
        part[:, i, share, w0:w1] = 0.0
        for k in range(r0, r1):
            joined = row_at(source, (i, k)), row_at(addend, (i, k)), row_at(total, (i, k))
            add_rows(span(joined[0], w0, w1), span(joined[1], w0, w1), span(joined[2], w0, w1))
        for k in range(add_blocks(mask, x, i, r0, r1, w0, p, before, s, q), r1):
            valid = mask_row(mask, i, k, w0, w1)
            add_row(x[i, k, w0:w1], p, valid, before, s, q)
            add_counts(valid, part, i, share, w0)


@optional(lambda wr, w: w)
def period_of(wr, w):
    """After how many columns the parameters along r begin anew."""
    return w if wr.shape[1] == 1 else wr.shape[1]


@PLAIN
def columns_apply(
    chunk, samples, rows, width, x, power, mean, scale, shift, wr, br, residual, mask, before, after, stream, y
):
    """y = after(z + residual), where z = (u * power - mean) * scale + shift, or z * wr + br in its place.

    power (or None), mean, scale and shift (n, w). With `stream`, and without wr, y goes past the caches while the next
    row is fetched: neither gains without the other.
    """
    x, residual, mask, y = borrowed(x), borrowed(residual), borrowed(mask), borrowed(y)
    power, mean, scale, shift = borrowed(power), borrowed(mean), borrowed(scale), borrowed(shift)
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    c = period_of(wr, x.shape[2])
    for i in range(i0, i1):
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            p, m, a, b = span(row_at(power, (i,)), j, e), mean[i, j:e], scale[i, j:e], shift[i, j:e]
            for k in range(r0, r1):
                xs, ys, rs = x[i, k, j:e], y[i, k, j:e], span(row_at(residual, (i, k)), j, e)
                ms = span(mask_row(mask, i, k, w0, w1), j - w0, e - w0)
                if wr is None:
                    if stream:
                        below = x[i, min(k + 1, r1 - 1), j:e]
                        affine(xs, below, p, m, a, None, None, b, rs, ms, before, after, PAST, ys)
                    else:
                        affine(xs, xs[:0], p, m, a, None, None, b, rs, ms, before, after, None, ys)
                elif wr.shape[1] == 1:
                    affine(xs, xs[:0], p, m, a, b, wr[k, 0], br[k, 0], rs, ms, before, after, None, ys)
                else:
                    u, v = j % c, j % c + e - j
                    affine(xs, xs[:0], p, m, a, b, wr[k, u:v], br[k, u:v], rs, ms, before, after, None, ys)
            j = e


@PLAIN
def add_backward_row(dy, x, power, mean, scale, low, w, b, residual, mask, before, after, weights, s, q):
    """`backward_sums` of every column on its own."""
    widest_vectors()
    for j in range(x.size):
        g, v = at_like(scale, dy, j), at_like(scale, x, j)
        d, t = gradient_at(j, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after)
        t = times(t, weights, j)
        s[j] += t
        q[j] += t * d


@chosen
def backward_rows(x):
    """As ROWS, for a gradient. A row of 1024 float32 is 4 KiB long, so that every row's line has the same place in the
    first-level cache, which has room for 8: of dy and of x are 4. Batch norm's gradient channels last (32, 56, 56, 64)
    takes 0.92 of its time with AVX2, that of half types, whose rows are half as long, 1.04."""
    return (lambda x: ROWS) if x.dtype.bitwidth == 16 else lambda x: ROWS // 2


@PLAIN
def add_backward_block(dy, x, i, k, begin, power, mean, scale, shift, before, after, s, q):
    """`add_backward_row` of `backward_rows`, whose sums stay in registers."""
    widest_vectors()
    for j in range(s.size):
        ds = zero(scale[j])
        dq = zero(scale[j])
        for m in range(backward_rows(x)):
            g, v = element(scale, dy, i, k + m, begin + j), element(scale, x, i, k + m, begin + j)
            d, t = gradient_at(j, g, v, dy, x, power, mean, scale, None, None, shift, None, None, before, after)
            ds += t
            dq += t * d
        s[j] += ds
        q[j] += dq


def no_backward_blocks(wr, residual, mask, dy, x, i, r0, r1, begin, power, mean, scale, shift, before, after, s, q):
    return r0


def plain_backward_blocks(wr, residual, mask, dy, x, i, r0, r1, begin, power, mean, scale, shift, before, after, s, q):
    rows = backward_rows(x)
    for k in range(r0, r1 - rows + 1, rows):
        add_backward_block(dy, x, i, k, begin, power, mean, scale, shift, before, after, s, q)
    return r0 + (r1 - r0) // rows * rows


@chosen
def add_backward_blocks(wr, residual, mask, dy, x, i, r0, r1, begin, power, mean, scale, shift, before, after, s, q):
    """The rows [r0, r1) of sample i, as far as they fill blocks; returns the first row that is left."""
    plain = all(isinstance(option, types.NoneType) for option in (wr, residual, mask)) and not curved(before, after)
    return plain_backward_blocks if plain else no_backward_blocks


@PLAIN
def columns_backward_sums(
    chunk, samples, rows, width, dy, x, power, mean, scale, shift, wr, br, residual, mask, before, after, part, dwr
):
    """part (2, n, shares, w): sum(wr * t) and sum(wr * t * d) down the tile's rows; dwr (2, n, tiles, r, 1 or c), where
    not empty: each row's sum(t * xhat) and sum(t) along the tile."""
    dy, x, residual, mask, part = borrowed(dy), borrowed(x), borrowed(residual), borrowed(mask), borrowed(part)
    power, mean, scale, shift = borrowed(power), borrowed(mean), borrowed(scale), borrowed(shift)
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    c = period_of(wr, x.shape[2])
    tile = w0 // width
    for i in range(i0, i1):
        part[:, i, share, w0:w1] = 0.0
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            p, m, a, b = span(row_at(power, (i,)), j, e), mean[i, j:e], scale[i, j:e], shift[i, j:e]
            s, q = part[0, i, share, j:e], part[1, i, share, j:e]
            for k in range(
                add_backward_blocks(wr, residual, mask, dy, x, i, r0, r1, j, p, m, a, b, before, after, s, q), r1
            ):
                dys, xs, rs = dy[i, k, j:e], x[i, k, j:e], span(row_at(residual, (i, k)), j, e)
                ms = span(mask_row(mask, i, k, w0, w1), j - w0, e - w0)
                if wr is None:
                    add_backward_row(dys, xs, p, m, a, None, None, b, rs, ms, before, after, None, s, q)
                elif wr.shape[1] == 1:
                    w, bias = wr[k, 0], br[k, 0]
                    add_backward_row(dys, xs, p, m, a, b, w, bias, rs, ms, before, after, w, s, q)
                    if dwr.size:
                        add_row_param_grads(dys, xs, p, m, a, b, w, bias, rs, ms, before, after, dwr[:, i, tile, k, 0])
                else:
                    ws, bs = wr[k, j % c : j % c + e - j], br[k, j % c : j % c + e - j]
                    add_backward_row(dys, xs, p, m, a, b, ws, bs, rs, ms, before, after, ws, s, q)
                    if dwr.size:
                        own = dwr[:, i, tile, k, j % c : j % c + e - j]
                        add_param_grads(dys, xs, p, m, a, b, ws, bs, rs, ms, before, after, own[0], own[1])
            j = e


@PLAIN
def add_param_grads(dy, x, power, mean, scale, low, w, b, residual, mask, before, after, dw, db):
    """With a weight and a bias for each element: dw += t * xhat, db += t, where xhat = d * scale + low."""
    widest_vectors()
    for i in range(x.size):
        g, v = at_like(scale, dy, i), at_like(scale, x, i)
        d, t = gradient_at(i, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after)
        dw[i] += t * plus(d * at_like(scale, scale, i), low, i)
        db[i] += t


@REDUCE
def add_row_param_grads(dy, x, power, mean, scale, low, w, b, residual, mask, before, after, grads):
    """Where one weight and one bias serve the whole row: grads += (sum(t * xhat), sum(t))"""
    widest_vectors()
    s = 0.0
    q = 0.0
    for i in range(x.size):
        g, v = at_like(scale, dy, i), at_like(scale, x, i)
        d, t = gradient_at(i, g, v, dy, x, power, mean, scale, low, w, b, residual, mask, before, after)
        s += t
        q += t * plus(d * at_like(scale, scale, i), low, i)
    grads[0] += q
    grads[1] += s


@PLAIN
def columns_backward_apply(
    chunk,
    samples,
    rows,
    width,
    dy,
    x,
    power,
    mean,
    scale,
    shift,
    wr,
    br,
    gain,
    k1,
    k2,
    lift,
    residual,
    mask,
    before,
    after,
    addend,
    dz,
    stream,
    dx,
):
    """dx = (t * gain * wr + (d * k2 + k1)) * lift * before'(x) + addend, dz = t.

    gain, k1, k2 and lift (or None) (n, w). `stream` as for `columns_apply`.
    """
    dy, x, dx, residual, mask = borrowed(dy), borrowed(x), borrowed(dx), borrowed(residual), borrowed(mask)
    addend, dz = borrowed(addend), borrowed(dz)
    power, mean, scale, shift = borrowed(power), borrowed(mean), borrowed(scale), borrowed(shift)
    gain, k1, k2, lift = borrowed(gain), borrowed(k1), borrowed(k2), borrowed(lift)
    i0, i1, _, r0, r1, w0, w1 = tile_from_end(chunk, samples, rows, width, x)
    c = period_of(wr, x.shape[2])
    for i in range(i0, i1):
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            p, m, a, b = span(row_at(power, (i,)), j, e), mean[i, j:e], scale[i, j:e], shift[i, j:e]
            f, c1, c2, g = gain[i, j:e], k1[i, j:e], k2[i, j:e], span(row_at(lift, (i,)), j, e)
            for k in range(r0, r1):
                dys, xs, rs = dy[i, k, j:e], x[i, k, j:e], span(row_at(residual, (i, k)), j, e)
                ms = span(mask_row(mask, i, k, w0, w1), j - w0, e - w0)
                ts, zs, out = span(row_at(addend, (i, k)), j, e), span(row_at(dz, (i, k)), j, e), dx[i, k, j:e]
                rest = f, c1, c2, g, ts, zs
                if wr is None:
                    found = p, m, a, None, None, b, rs, ms, before, after, *rest
                    if stream:
                        below = min(k + 1, r1 - 1)
                        backward_affine(dys, xs, dy[i, below, j:e], x[i, below, j:e], *found, PAST, out)
                    else:
                        backward_affine(dys, xs, dys[:0], xs[:0], *found, None, out)
                elif wr.shape[1] == 1:
                    w, bias = wr[k, 0], br[k, 0]
                    backward_affine(
                        dys, xs, dys[:0], xs[:0], p, m, a, b, w, bias, rs, ms, before, after, *rest, None, out
                    )
                else:
                    ws, bs = wr[k, j % c : j % c + e - j], br[k, j % c : j % c + e - j]
                    backward_affine(
                        dys, xs, dys[:0], xs[:0], p, m, a, b, ws, bs, rs, ms, before, after, *rest, None, out
                    )
            j = e
