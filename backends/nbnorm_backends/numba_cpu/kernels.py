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

Statistics are float64 sums about a pivot near the data, and everything after them is computed in float64 too:
memory-bound calls pay nothing for it, and offsets of 1e8 cost no accuracy. Accesses slice a row first and loop over
``range(row.size)``: indexing inside ``range(begin, end)`` keeps the wraparound check and was 15 times slower.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types

from nbnorm_backends.numba_cpu.activations import activate, curved, slope
from nbnorm_backends.numba_cpu.elements import (
    at,
    at_like,
    chosen,
    keep,
    load,
    optional,
    plus,
    store,
    times,
    touch,
    widest_vectors,
)

# Reductions may be reordered into vector lanes; nothing may assume away NaN and Inf. fastmath=True, "nnan" and
# "ninf" break them, "arcp" turns x / denormal into infinity.
REDUCE = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True)
PLAIN = njit(fastmath={"contract"}, error_model="numpy", nogil=True)

MEAN, RESIDUAL, M2, RSTD, COUNT = range(5)  # rows of the array of statistics, (5, groups)
LINE = 64  # bytes of a cache line
STRIDE = 256  # elements between two batches of prefetches: 16 lines of float32, as many as a core waits for at once
K1, K2 = range(2)  # rows of the array of backward coefficients, (2, groups)
HUGE = 1e30  # means and scales below it, and above its reciprocal, leave float32 room
POOR_PIVOT = 8.0  # redo about the mean when (sum of deviations)^2 > 8 * n * m2: beyond it a digit is lost


# ---- one row ---------------------------------------------------------------------------------------------------------


@optional(lambda x, addend, total: None)
def add_rows(x, addend, total):
    for i in range(x.size):
        store(total, i, load(x, i) + load(addend, i))


@PLAIN
def valid_in(mask):
    """How many elements of a row count, and which is the first that does."""
    total = 0
    first = mask.size
    for i in range(mask.size):
        if mask[i]:
            total += 1
            first = min(first, i)
    return total, first


@REDUCE
def sums(x, pivot, mask, before):
    """sum(u - pivot), sum((u - pivot)^2)"""
    s = 0.0
    q = 0.0
    for i in range(x.size):
        d = keep(mask, i, activate(before, x, load(x, i)) - pivot)
        s += d
        q += d * d
    return s, q


@PLAIN
def affine(x, ahead, mean, scale, low, w, b, residual, mask, before, after, y):
    """y = after(((u - mean) * scale + low) * w + b + residual), in float32 where scale is one; `ahead` is a row that
    will be read soon."""
    widest_vectors()
    for begin in range(0, x.size, STRIDE):
        end = min(begin + STRIDE, x.size)
        fetch(ahead, begin, end)
        for i in range(begin, end):
            d = activate(before, x, at_like(scale, x, i)) - at_like(scale, mean, i)
            z = plus(plus(times(plus(d * at_like(scale, scale, i), low, i), w, i), b, i), residual, i)
            store(y, i, keep(mask, i, activate(after, y, z)))


@PLAIN
def fetch(row, begin, end):
    """Ask for the lines of row[begin:end]."""
    for i in range(begin, min(end, row.size), LINE // row.itemsize):
        touch(row, i)


def affine_double(x, ahead, mean, scale, w, b, residual, mask, before, after, y):
    affine(x, ahead, mean, scale, None, w, b, residual, mask, before, after, y)


def affine_single(x, ahead, mean, scale, w, b, residual, mask, before, after, y):
    """In float32, where nothing in between can overflow or vanish: the mean in two parts, so that x - mean is exact."""
    if abs(mean) < HUGE and (scale == 0.0 or 1.0 / HUGE < abs(scale) < HUGE):
        high = np.float32(mean)
        low = (high - mean) * scale
        if w is None:
            affine(x, ahead, high, np.float32(scale), None, w, b + low, residual, mask, before, after, y)
        else:
            affine(x, ahead, high, np.float32(scale), low, w, b, residual, mask, before, after, y)
    else:
        affine(x, ahead, mean, scale, None, w, b, residual, mask, before, after, y)


@chosen
def affine_run(x, ahead, mean, scale, w, b, residual, mask, before, after, y):
    """`affine` of a run, where mean and scale are numbers."""
    return affine_single if x.dtype != types.float64 and curved(before, after) else affine_double


@PLAIN
def gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after):
    """(u - mean, t) of one element, 0 where it does not count: z is found again as in `affine`, and t = dy * after'(z)
    is its gradient."""
    d = keep(mask, i, activate(before, x, load(x, i)) - at(mean, i))
    z = plus(plus(times(d * at(scale, i), w, i), b, i), residual, i)
    return d, keep(mask, i, load(dy, i) * slope(after, dy, z))


@REDUCE
def backward_sums(dy, x, mean, scale, w, b, residual, mask, before, after, weights):
    """sum(t * weights), sum(t * weights * (u - mean)); without `weights` sum(t), sum(t * (u - mean))"""
    widest_vectors()
    s = 0.0
    q = 0.0
    for i in range(x.size):
        d, t = gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after)
        t = times(t, weights, i)
        s += t
        q += t * d
    return s, q


@PLAIN
def add_backward_row(dy, x, mean, scale, w, b, residual, mask, before, after, weights, s, q):
    """`backward_sums` of every column on its own."""
    widest_vectors()
    for i in range(x.size):
        d, t = gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after)
        t = times(t, weights, i)
        s[i] += t
        q[i] += t * d


@PLAIN
def add_param_grads(dy, x, mean, scale, w, b, residual, mask, before, after, dw, db):
    """With a weight and a bias for each element: dw += t * xhat, db += t, where xhat = (u - mean) * scale."""
    widest_vectors()
    for i in range(x.size):
        d, t = gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after)
        dw[i] += t * (d * at(scale, i))
        db[i] += t


@REDUCE
def row_param_grads(dy, x, mean, scale, w, b, residual, mask, before, after):
    """Where one weight and one bias serve the whole row: sum(t * xhat), sum(t)"""
    widest_vectors()
    s = 0.0
    q = 0.0
    for i in range(x.size):
        d, t = gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after)
        s += t
        q += t * (d * at(scale, i))
    return q, s


@PLAIN
def backward_affine(dy, x, mean, scale, w, b, residual, mask, before, after, k1, k2, addend, dz, dx):
    """dx = (t * scale * w - (u - mean) * k2 - k1) * before'(x) + addend, and dz = t"""
    widest_vectors()
    for i in range(x.size):
        d, t = gradient_at(i, dy, x, mean, scale, w, b, residual, mask, before, after)
        store(dz, i, t)
        du = times(t * at(scale, i), w, i) - d * at(k2, i) - at(k1, i)
        store(dx, i, plus(keep(mask, i, du * slope(before, x, load(x, i))), addend, i))


# ---- rows of what may be None ----------------------------------------------------------------------------------------
# A mask has the axes of x, each 1 or full. Where its row has length 1, one of two constant rows stands for it.


@optional(lambda mask, size: None)
def constant_rows(mask, size):
    """A row of zeros and one of ones, for a mask that has no row of that length."""
    rows = np.zeros((2, size), np.uint8)
    rows[1] = 1
    return rows


@optional(lambda mask, constant, i, k, j, m: None)
def mask_run(mask, constant, i, k, j, m):
    """The row of a mask (n, r, g, c, s) for one run."""
    row = mask[
        i if mask.shape[0] > 1 else 0,
        k if mask.shape[1] > 1 else 0,
        j if mask.shape[2] > 1 else 0,
        m if mask.shape[3] > 1 else 0,
    ]
    return row if row.size == constant.shape[1] else constant[1 if row[0] else 0]


@optional(lambda mask, constant, i, k, begin, end: None)
def mask_row(mask, constant, i, k, begin, end):
    """The part of a mask (n, r, w) for one row of columns."""
    row = mask[i if mask.shape[0] > 1 else 0, k if mask.shape[1] > 1 else 0]
    return row[begin:end] if row.size > 1 else constant[1 if row[0] else 0, : end - begin]


@PLAIN
def param_run(param, k, j, m):
    """The row of a parameter (r or 1, g, c, s or 1) for one run."""
    return param[k if param.shape[0] > 1 else 0, j, m]


@optional(lambda array, i, k, j, m: None)
def run_of(array, i, k, j, m):
    return array[i, k, j, m]


@optional(lambda array, i, k, begin, end: None)
def row_of(array, i, k, begin, end):
    return array[i, k, begin:end]


@optional(lambda row, begin, end: None)
def part_of(row, begin, end):
    return row[begin:end]


# ---- runs ------------------------------------------------------------------------------------------------------------


@PLAIN
def group_size(x):
    return np.float64(x.shape[1] * x.shape[3] * x.shape[4])


@optional(
    lambda mask, constant, before, x, i, j: (group_size(x), activate(before, x[i, 0, j, 0], load(x[i, 0, j, 0], 0)))
)
def group_start(mask, constant, before, x, i, j):
    """(elements that count, u of the first of them) in the group (n, g) = (i, j)."""
    count = 0
    pivot = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            found, first = valid_in(mask_run(mask, constant, i, k, j, m))
            if count == 0 and found:
                pivot = activate(before, x[i, k, j, m], load(x[i, k, j, m], first))
            count += found
    return np.float64(count), pivot


@PLAIN
def group_sums(x, mask, constant, before, i, j, pivot):
    """`sums` over the group (i, j)."""
    s = 0.0
    q = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            ds, dq = sums(x[i, k, j, m], pivot, mask_run(mask, constant, i, k, j, m), before)
            s += ds
            q += dq
    return s, q


@PLAIN
def group_moments(x, mask, constant, before, i, j, center, eps, p, stats):
    """Statistics of the group (i, j) into stats[:, p]; without centring about zero."""
    n, first = group_start(mask, constant, before, x, i, j)
    stats[COUNT, p] = n
    if n == 0.0:
        stats[:, p] = 0.0
        return
    pivot = first if center else 0.0
    s, q = group_sums(x, mask, constant, before, i, j, pivot)
    if center and not s * s <= POOR_PIVOT * n * (q - s * s / n):
        pivot += s / n
        s, q = group_sums(x, mask, constant, before, i, j, pivot)
    shift = s / n if center else 0.0
    mean = pivot + shift
    m2 = q - s * shift if center else q
    stats[MEAN, p] = mean
    stats[RESIDUAL, p] = (pivot - mean) + shift
    stats[M2, p] = 0.0 if m2 < 0.0 else m2  # rounding only; NaN stays NaN
    stats[RSTD, p] = 1.0 / np.sqrt(stats[M2, p] / n + eps)


@optional(lambda source, addend, total, i, j: None)
def add_group(source, addend, total, i, j):
    for k in range(source.shape[1]):
        for m in range(source.shape[3]):
            add_rows(source[i, k, j, m], addend[i, k, j, m], total[i, k, j, m])


@PLAIN
def runs_forward(
    chunk, groups, leap, x, w, b, center, eps, find, stats, residual, mask, before, after, source, addend, total, y
):
    """Groups [chunk*groups, ...): statistics where `find` asks, then y, unless it is empty, while x is in the cache.

    Where `source` is not None, x is the memory of `total`, and total = source + addend comes first. `leap` chunks on
    lies the chunk that this thread is likely to do next, which is fetched to the cache meanwhile; 0 for none.
    """
    n, r, g, c, size = x.shape
    constant = constant_rows(mask, size)
    end = min((chunk + 1) * groups, n * g)
    for p in range(chunk * groups, end):
        i, j = p // g, p % g
        coming = p + 1 if p + 1 < end else (chunk + leap) * groups
        add_group(source, addend, total, i, j)
        if find:
            group_moments(x, mask, constant, before, i, j, center, eps, p, stats)
        if y.size:
            mean, rstd = stats[MEAN, p], stats[RSTD, p]
            for k in range(r):
                for m in range(c):
                    xs, ys, rs = x[i, k, j, m], y[i, k, j, m], run_of(residual, i, k, j, m)
                    ms, ws, bs = mask_run(mask, constant, i, k, j, m), param_run(w, k, j, m), param_run(b, k, j, m)
                    ahead = x[coming // g, k, coming % g, m] if leap and coming < n * g else xs[:0]
                    if ws.size > 1:
                        affine_run(xs, ahead, mean, rstd, ws, bs, rs, ms, before, after, ys)
                    else:
                        affine_run(xs, ahead, mean, rstd * ws[0], None, bs[0], rs, ms, before, after, ys)


@PLAIN
def group_backward_sums(dy, x, w, b, residual, mask, constant, before, after, i, j, mean, rstd, dw, db):
    """s1 = sum(w*t), s2 = sum(w*t*xhat) of the group (i, j); dw, db (r or 1, g, c, s or 1), where not empty, grow."""
    s1 = 0.0
    s2 = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            dys, xs, rs = dy[i, k, j, m], x[i, k, j, m], run_of(residual, i, k, j, m)
            ms, ws, bs = mask_run(mask, constant, i, k, j, m), param_run(w, k, j, m), param_run(b, k, j, m)
            if ws.size > 1:
                t1, t2 = backward_sums(dys, xs, mean, rstd, ws, bs, rs, ms, before, after, ws)
                if dw.size:
                    dws, dbs = param_run(dw, k, j, m), param_run(db, k, j, m)
                    add_param_grads(dys, xs, mean, rstd, ws, bs, rs, ms, before, after, dws, dbs)
                s1 += t1
                s2 += t2 * rstd
            else:
                t1, t2 = backward_sums(dys, xs, mean, rstd * ws[0], None, bs[0], rs, ms, before, after, None)
                if dw.size:
                    param_run(dw, k, j, m)[0] += t2 * rstd
                    param_run(db, k, j, m)[0] += t1
                s1 += ws[0] * t1
                s2 += ws[0] * t2 * rstd
    return s1, s2


@PLAIN
def runs_backward(
    chunk,
    groups,
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
    dx,
):
    """Groups [chunk*groups, ...): where `find` asks, the sums into k and the chunk's share of dw and db; then dx and
    dz, unless dx is empty, while dy and x are in the cache.

    dw, db (chunks, r or 1, g, c, s or 1), or one share in place of `chunks` where each group is met once.
    The sums over the group's count are k1 and k2; k1 is zero without `center`, and both are where the statistics are
    `fixed`.
    """
    n, r, g, c, size = x.shape
    constant = constant_rows(mask, size)
    share = chunk if dw.shape[0] > 1 else 0
    for p in range(chunk * groups, min((chunk + 1) * groups, n * g)):
        i, j = p // g, p % g
        mean, rstd, count = stats[MEAN, p], stats[RSTD, p], stats[COUNT, p]
        if find:
            s1, s2 = group_backward_sums(
                dy, x, w, b, residual, mask, constant, before, after, i, j, mean, rstd, dw[share], db[share]
            )
            k[K1, p] = s1 / count if center and not fixed and count else 0.0
            k[K2, p] = s2 / count if not fixed and count else 0.0
        if dx.size:
            k1 = k[K1, p] * rstd
            k2 = k[K2, p] * rstd * rstd
            for a in range(r):
                for m in range(c):
                    dys, xs, dxs = dy[i, a, j, m], x[i, a, j, m], dx[i, a, j, m]
                    rs, ms = run_of(residual, i, a, j, m), mask_run(mask, constant, i, a, j, m)
                    ws, bs = param_run(w, a, j, m), param_run(b, a, j, m)
                    ts, zs = run_of(addend, i, a, j, m), run_of(dz, i, a, j, m)
                    if ws.size > 1:
                        backward_affine(dys, xs, mean, rstd, ws, bs, rs, ms, before, after, k1, k2, ts, zs, dxs)
                    else:
                        scale = rstd * ws[0]
                        backward_affine(dys, xs, mean, scale, None, bs[0], rs, ms, before, after, k1, k2, ts, zs, dxs)


# ---- columns ---------------------------------------------------------------------------------------------------------
# A chunk is a tile: rows [r0, r1) and columns [w0, w1) of samples [i0, i1), more than one sample where they are small.
# `share` is the row block, which is the row of the partial sums that the chunk may write. `wr` and `br`, where not
# None, are parameters along r: (r, 1), or (r, c) where they lie along c too and columns are (g, c).


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
def columns_pivot(chunk, samples, rows, width, x, mask, before, pivot, count):
    """pivot (n, w): u of the first element of each column that counts; count (n, w): 1 where there is one."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    constant = constant_rows(mask, w1 - w0)
    for i in range(i0, i1):
        missing = w1 - w0
        k = r0
        while missing and k < r1:
            row, valid = x[i, k, w0:w1], mask_row(mask, constant, i, k, w0, w1)
            for j in range(row.size):
                if valid[j] and count[i, w0 + j] == 0.0:
                    pivot[i, w0 + j] = activate(before, row, load(row, j))
                    count[i, w0 + j] = 1.0
                    missing -= 1
            k += 1


@PLAIN
def add_row(x, pivot, mask, before, s, q):
    for j in range(x.size):
        d = keep(mask, j, activate(before, x, load(x, j)) - pivot[j])
        s[j] += d
        q[j] += d * d


@optional(lambda mask, part, i, share, begin: None)
def add_counts(mask, part, i, share, begin):
    """The third plane of the partial sums; there is none without a mask."""
    for j in range(mask.size):
        part[2, i, share, begin + j] += 1.0 if mask[j] else 0.0


@PLAIN
def columns_sums(chunk, samples, rows, width, x, pivot, mask, before, source, addend, total, part):
    """part (3, n, shares, w): sum(u - pivot), sum((u - pivot)^2) and, with a mask, the count down the tile's rows.

    pivot (n, w). `source` as for `runs_forward`.
    """
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    constant = constant_rows(mask, w1 - w0)
    for i in range(i0, i1):
        s, q, p = part[0, i, share, w0:w1], part[1, i, share, w0:w1], pivot[i, w0:w1]
        part[:, i, share, w0:w1] = 0.0
        for k in range(r0, r1):
            add_rows(row_of(source, i, k, w0, w1), row_of(addend, i, k, w0, w1), row_of(total, i, k, w0, w1))
            valid = mask_row(mask, constant, i, k, w0, w1)
            add_row(x[i, k, w0:w1], p, valid, before, s, q)
            add_counts(valid, part, i, share, w0)


@optional(lambda wr, w: w)
def period_of(wr, w):
    """After how many columns the parameters along r begin anew."""
    return w if wr.shape[1] == 1 else wr.shape[1]


@PLAIN
def columns_apply(chunk, samples, rows, width, x, mean, a, b, wr, br, residual, mask, before, after, y):
    """y = after((u - mean) * a + b + residual), or after(((u - mean) * a + b) * wr + br + residual); mean, a, b (n, w),
    all float64 or all float32."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    constant = constant_rows(mask, w1 - w0)
    c = period_of(wr, x.shape[2])
    for i in range(i0, i1):
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            m, scale, shift = mean[i, j:e], a[i, j:e], b[i, j:e]
            for k in range(r0, r1):
                xs, ys, rs = x[i, k, j:e], y[i, k, j:e], row_of(residual, i, k, j, e)
                ms = part_of(mask_row(mask, constant, i, k, w0, w1), j - w0, e - w0)
                ahead = x[i, k + 1, j:e] if k + 1 < x.shape[1] else xs[:0]
                if wr is None:
                    affine(xs, ahead, m, scale, None, None, shift, rs, ms, before, after, ys)
                elif wr.shape[1] == 1:
                    affine(xs, ahead, m, scale, shift, wr[k, 0], br[k, 0], rs, ms, before, after, ys)
                else:
                    u, v = j % c, j % c + e - j
                    affine(xs, ahead, m, scale, shift, wr[k, u:v], br[k, u:v], rs, ms, before, after, ys)
            j = e


@PLAIN
def columns_backward_sums(
    chunk, samples, rows, width, dy, x, mean, a, b, wr, br, residual, mask, before, after, part, dwr
):
    """part (2, n, shares, w): sum(wr * t) and sum(wr * t * (u - mean)) down the tile's rows; dwr (2, n, tiles, r, 1 or
    c), where not empty: each row's sum(t * xhat) and sum(t) along the tile."""
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    constant = constant_rows(mask, w1 - w0)
    c = period_of(wr, x.shape[2])
    for i in range(i0, i1):
        part[:, i, share, w0:w1] = 0.0
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            m, scale, shift = mean[i, j:e], a[i, j:e], b[i, j:e]
            s, q = part[0, i, share, j:e], part[1, i, share, j:e]
            for k in range(r0, r1):
                dys, xs, rs = dy[i, k, j:e], x[i, k, j:e], row_of(residual, i, k, j, e)
                ms = part_of(mask_row(mask, constant, i, k, w0, w1), j - w0, e - w0)
                if wr is None:
                    add_backward_row(dys, xs, m, scale, None, shift, rs, ms, before, after, None, s, q)
                elif wr.shape[1] == 1:
                    w = wr[k, 0]
                    add_backward_row(dys, xs, m, scale, w, br[k, 0], rs, ms, before, after, w, s, q)
                    if dwr.size:
                        t1, t2 = row_param_grads(dys, xs, m, scale, w, br[k, 0], rs, ms, before, after)
                        dwr[0, i, w0 // width, k, 0] = t1
                        dwr[1, i, w0 // width, k, 0] = t2
                else:
                    u, v = j % c, j % c + e - j
                    ws, bs = wr[k, u:v], br[k, u:v]
                    add_backward_row(dys, xs, m, scale, ws, bs, rs, ms, before, after, ws, s, q)
                    if dwr.size:
                        dws, dbs = dwr[0, i, w0 // width, k, u:v], dwr[1, i, w0 // width, k, u:v]
                        add_param_grads(dys, xs, m, scale, ws, bs, rs, ms, before, after, dws, dbs)
            j = e


@PLAIN
def columns_backward_apply(
    chunk, samples, rows, width, dy, x, mean, a, b, wr, br, k1, k2, residual, mask, before, after, addend, dz, dx
):
    """dx = (t * a * wr - (u - mean) * k2 - k1) * before'(x) + addend, dz = t; mean, a, b, k1, k2 (n, w)."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    constant = constant_rows(mask, w1 - w0)
    c = period_of(wr, x.shape[2])
    for i in range(i0, i1):
        j = w0
        while j < w1:
            e = min(w1, (j // c + 1) * c)
            m, scale, shift, c1, c2 = mean[i, j:e], a[i, j:e], b[i, j:e], k1[i, j:e], k2[i, j:e]
            for k in range(r0, r1):
                dys, xs, rs = dy[i, k, j:e], x[i, k, j:e], row_of(residual, i, k, j, e)
                ms = part_of(mask_row(mask, constant, i, k, w0, w1), j - w0, e - w0)
                ts, zs, dxs = row_of(addend, i, k, j, e), row_of(dz, i, k, j, e), dx[i, k, j:e]
                if wr is None:
                    backward_affine(dys, xs, m, scale, None, shift, rs, ms, before, after, c1, c2, ts, zs, dxs)
                elif wr.shape[1] == 1:
                    w, bias = wr[k, 0], br[k, 0]
                    backward_affine(dys, xs, m, scale, w, bias, rs, ms, before, after, c1, c2, ts, zs, dxs)
                else:
                    ws, bs = wr[k, j % c : j % c + e - j], br[k, j % c : j % c + e - j]
                    backward_affine(dys, xs, m, scale, ws, bs, rs, ms, before, after, c1, c2, ts, zs, dxs)
            j = e
