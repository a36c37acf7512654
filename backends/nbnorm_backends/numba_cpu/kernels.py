"""The loops. A kernel does one chunk of the work, alone; which chunks there are depends on the shape only, so the
bits of a result do not depend on the number of threads.

Two families, by what is innermost in memory:

- *runs*, x (n, r, g, c, s): a run is s neighbouring elements of one group (n, g). Parameters are constant along a
  run, (g, c, 1), or vary along it, (g, 1, s).
- *columns*, x (n, r, w): neighbouring elements belong to different statistics. Each sum runs down r.

Statistics are float64 sums about a pivot near the data, and everything after them is computed in float64 too:
memory-bound calls pay nothing for it, and offsets of 1e8 cost no accuracy. Accesses slice a run first and loop over
``range(run.size)``: indexing inside ``range(begin, end)`` keeps the wraparound check and was 15 times slower.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from nbnorm_backends.numba_cpu.elements import load, store

# Reductions may be reordered into vector lanes; nothing may assume away NaN and Inf. fastmath=True, "nnan" and
# "ninf" break them, "arcp" turns x / denormal into infinity.
REDUCE = njit(fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", nogil=True)
PLAIN = njit(fastmath={"contract"}, error_model="numpy", nogil=True)

MEAN, RESIDUAL, M2, RSTD = range(4)  # rows of the array of statistics, (4, groups)
K1, K2 = range(2)  # rows of the array of backward coefficients, (2, groups)
POOR_PIVOT = 8.0  # redo about the mean when (sum of deviations)^2 > 8 * n * m2: beyond it a digit is lost


# ---- one run ---------------------------------------------------------------------------------------------------------


@REDUCE
def sums(x, pivot):
    """sum(x - pivot), sum((x - pivot)^2)"""
    s = 0.0
    q = 0.0
    for i in range(x.size):
        d = load(x, i) - pivot
        s += d
        q += d * d
    return s, q


@REDUCE
def backward_sums(dy, x, pivot):
    """sum(dy), sum(dy * (x - pivot))"""
    s = 0.0
    q = 0.0
    for i in range(x.size):
        t = load(dy, i)
        s += t
        q += t * (load(x, i) - pivot)
    return s, q


@REDUCE
def weighted_backward_sums(dy, x, w, pivot):
    """sum(w * dy), sum(w * dy * (x - pivot))"""
    s = 0.0
    q = 0.0
    for i in range(x.size):
        t = load(dy, i) * w[i]
        s += t
        q += t * (load(x, i) - pivot)
    return s, q


@PLAIN
def affine(x, mean, scale, shift, y):
    for i in range(x.size):
        store(y, i, (load(x, i) - mean) * scale + shift)


@PLAIN
def affine_along(x, mean, rstd, w, b, y):
    for i in range(x.size):
        store(y, i, (load(x, i) - mean) * rstd * w[i] + b[i])


@PLAIN
def backward_affine(dy, x, mean, a, k1, k2, dx):
    for i in range(x.size):
        store(dx, i, load(dy, i) * a - (load(x, i) - mean) * k2 - k1)


@PLAIN
def backward_affine_along(dy, x, w, mean, a, k1, k2, dx):
    for i in range(x.size):
        store(dx, i, load(dy, i) * w[i] * a - (load(x, i) - mean) * k2 - k1)


@PLAIN
def add_param_grads(dy, x, mean, rstd, dw, db):
    for i in range(x.size):
        t = load(dy, i)
        dw[i] += t * ((load(x, i) - mean) * rstd)
        db[i] += t


# ---- runs ------------------------------------------------------------------------------------------------------------


@PLAIN
def group_sums(x, i, j, pivot):
    """`sums` over the group (n, g) = (i, j)."""
    s = 0.0
    q = 0.0
    for k in range(x.shape[1]):
        for m in range(x.shape[3]):
            ds, dq = sums(x[i, k, j, m], pivot)
            s += ds
            q += dq
    return s, q


@PLAIN
def group_moments(x, i, j, center, eps, p, stats):
    """Statistics of the group (i, j) into stats[:, p]; without centring about zero."""
    n = np.float64(x.shape[1] * x.shape[3] * x.shape[4])
    pivot = load(x[i, 0, j, 0], 0) if center else 0.0
    s, q = group_sums(x, i, j, pivot)
    if center and not s * s <= POOR_PIVOT * n * (q - s * s / n):
        pivot += s / n
        s, q = group_sums(x, i, j, pivot)
    shift = s / n if center else 0.0
    mean = pivot + shift
    m2 = q - s * shift if center else q
    stats[MEAN, p] = mean
    stats[RESIDUAL, p] = (pivot - mean) + shift
    stats[M2, p] = 0.0 if m2 < 0.0 else m2  # rounding only; NaN stays NaN
    stats[RSTD, p] = 1.0 / np.sqrt(stats[M2, p] / n + eps)


@PLAIN
def runs_forward(chunk, groups, x, w, b, center, eps, find, stats, y):
    """Groups [chunk*groups, ...): statistics where `find` asks, then y, unless it is empty, while x is in the cache."""
    n, r, g, c, _ = x.shape
    for p in range(chunk * groups, min((chunk + 1) * groups, n * g)):
        i, j = p // g, p % g
        if find:
            group_moments(x, i, j, center, eps, p, stats)
        if y.size:
            mean, rstd = stats[MEAN, p], stats[RSTD, p]
            for k in range(r):
                for m in range(c):
                    if w.shape[2] > 1:
                        affine_along(x[i, k, j, m], mean, rstd, w[j, m], b[j, m], y[i, k, j, m])
                    else:
                        affine(x[i, k, j, m], mean, rstd * w[j, m, 0], b[j, m, 0], y[i, k, j, m])


@PLAIN
def group_backward_sums(dy, x, w, i, j, mean, rstd, dw, db):
    """s1 = sum(w*dy), s2 = sum(w*dy*xhat) of the group (i, j); dw, db (g, c, s or 1), where not empty, grow."""
    s1 = 0.0
    s2 = 0.0
    for m in range(x.shape[3]):
        if w.shape[2] > 1:
            for k in range(x.shape[1]):
                t1, t2 = weighted_backward_sums(dy[i, k, j, m], x[i, k, j, m], w[j, m], mean)
                s1 += t1
                s2 += t2 * rstd
                if dw.size:
                    add_param_grads(dy[i, k, j, m], x[i, k, j, m], mean, rstd, dw[j, m], db[j, m])
        else:
            u1 = 0.0
            u2 = 0.0
            for k in range(x.shape[1]):
                t1, t2 = backward_sums(dy[i, k, j, m], x[i, k, j, m], mean)
                u1 += t1
                u2 += t2 * rstd
            if dw.size:
                dw[j, m, 0] += u2
                db[j, m, 0] += u1
            s1 += w[j, m, 0] * u1
            s2 += w[j, m, 0] * u2
    return s1, s2


@PLAIN
def runs_backward(
    chunk,
    groups,
    dy,
    x,
    w,
    stats,
    find,
    divisors,
    k,
    dw,
    db,
    dx,
):
    """Groups [chunk*groups, ...): where `find` asks, the sums into k and the chunk's share of dw and db (chunks, g, c,
    s or 1), a single share where each group is met once; then dx, unless it is empty, while dy and x are in the cache.

    `divisors` (2): what the two sums are divided by to become k1 and k2; a zero makes that coefficient zero.
    """
    n, r, g, c, _ = x.shape
    share = chunk if dw.shape[0] > 1 else 0
    for p in range(chunk * groups, min((chunk + 1) * groups, n * g)):
        i, j = p // g, p % g
        mean, rstd = stats[MEAN, p], stats[RSTD, p]
        if find:
            s1, s2 = group_backward_sums(dy, x, w, i, j, mean, rstd, dw[share], db[share])
            k[K1, p] = s1 / divisors[K1] if divisors[K1] else 0.0
            k[K2, p] = s2 / divisors[K2] if divisors[K2] else 0.0
        if dx.size:
            k1 = k[K1, p] * rstd
            k2 = k[K2, p] * rstd * rstd
            for a in range(r):
                for m in range(c):
                    if w.shape[2] > 1:
                        backward_affine_along(
                            dy[i, a, j, m], x[i, a, j, m], w[j, m], mean, rstd, k1, k2, dx[i, a, j, m]
                        )
                    else:
                        scale = rstd * w[j, m, 0]
                        backward_affine(dy[i, a, j, m], x[i, a, j, m], mean, scale, k1, k2, dx[i, a, j, m])


# ---- columns ---------------------------------------------------------------------------------------------------------
# A chunk is a tile: rows [r0, r1) and columns [w0, w1) of samples [i0, i1), more than one sample where they are small.
# `wr` and `br` hold parameters that lie along r and are empty where there are none; `share` is the row block, which is
# the row of the partial sums that the chunk may write.


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
def add_row(x, pivot, s, q):
    for j in range(x.size):
        d = load(x, j) - pivot[j]
        s[j] += d
        q[j] += d * d


@PLAIN
def columns_sums(chunk, samples, rows, width, x, pivot, part):
    """part (2, n, shares, w): sum(x - pivot) and sum((x - pivot)^2) down the tile's rows; pivot (n, w)."""
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        s, q, p = part[0, i, share, w0:w1], part[1, i, share, w0:w1], pivot[i, w0:w1]
        s[:] = 0.0
        q[:] = 0.0
        for k in range(r0, r1):
            add_row(x[i, k, w0:w1], p, s, q)


@PLAIN
def apply_row(x, mean, a, b, y):
    for j in range(x.size):
        store(y, j, (load(x, j) - mean[j]) * a[j] + b[j])


@PLAIN
def apply_row_scaled(x, mean, a, b, scale, shift, y):
    for j in range(x.size):
        store(y, j, ((load(x, j) - mean[j]) * a[j] + b[j]) * scale + shift)


@PLAIN
def columns_apply(chunk, samples, rows, width, x, mean, a, b, wr, br, y):
    """y = ((x - mean) * a + b) * wr + br; mean, a, b (n, w)."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        m, scale, shift = mean[i, w0:w1], a[i, w0:w1], b[i, w0:w1]
        for k in range(r0, r1):
            if wr.size:
                apply_row_scaled(x[i, k, w0:w1], m, scale, shift, wr[k], br[k], y[i, k, w0:w1])
            else:
                apply_row(x[i, k, w0:w1], m, scale, shift, y[i, k, w0:w1])


@PLAIN
def add_backward_row(dy, x, mean, scale, s, q):
    for j in range(x.size):
        t = load(dy, j) * scale
        s[j] += t
        q[j] += t * (load(x, j) - mean[j])


@REDUCE
def row_param_grads(dy, x, mean, rstd):
    """sum(dy * xhat), sum(dy) along one row."""
    s = 0.0
    q = 0.0
    for j in range(x.size):
        t = load(dy, j)
        s += t
        q += t * ((load(x, j) - mean[j]) * rstd[j])
    return q, s


@PLAIN
def columns_backward_sums(chunk, samples, rows, width, dy, x, mean, rstd, wr, part, dwr):
    """part (2, n, shares, w): sum(wr * dy) and sum(wr * dy * (x - mean)) down the tile's rows; dwr (2, n, tiles, r),
    where not empty: each row's sum(dy * xhat) and sum(dy) along the tile."""
    i0, i1, share, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        s, q, m = part[0, i, share, w0:w1], part[1, i, share, w0:w1], mean[i, w0:w1]
        s[:] = 0.0
        q[:] = 0.0
        for k in range(r0, r1):
            scale = wr[k] if wr.size else 1.0
            add_backward_row(dy[i, k, w0:w1], x[i, k, w0:w1], m, scale, s, q)
            if dwr.size:
                t1, t2 = row_param_grads(dy[i, k, w0:w1], x[i, k, w0:w1], m, rstd[i, w0:w1])
                dwr[0, i, w0 // width, k] = t1
                dwr[1, i, w0 // width, k] = t2


@PLAIN
def backward_row(dy, x, mean, a, scale, k1, k2, dx):
    for j in range(x.size):
        store(dx, j, load(dy, j) * (a[j] * scale) - (load(x, j) - mean[j]) * k2[j] - k1[j])


@PLAIN
def columns_backward_apply(chunk, samples, rows, width, dy, x, mean, a, k1, k2, wr, dx):
    """dx = dy * a * wr - (x - mean) * k2 - k1; mean, a, k1, k2 (n, w)."""
    i0, i1, _, r0, r1, w0, w1 = tile_of(chunk, samples, rows, width, x)
    for i in range(i0, i1):
        m, scale, c1, c2 = mean[i, w0:w1], a[i, w0:w1], k1[i, w0:w1], k2[i, w0:w1]
        for k in range(r0, r1):
            share = wr[k] if wr.size else 1.0
            backward_row(dy[i, k, w0:w1], x[i, k, w0:w1], m, scale, share, c1, c2, dx[i, k, w0:w1])
