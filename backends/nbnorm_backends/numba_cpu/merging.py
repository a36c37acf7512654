"""What lies between two passes over columns: their sums become statistics, and statistics the terms of each column.

Columns (n, w) are (n, k, g, c): k rows folded into one, g groups, c columns of each. Statistics are (5, n*g), as for
runs. weight and bias are (g*c,), float64; empty where there are none, or where they lie along r. In NumPy these steps
were some forty calls.
"""

from __future__ import annotations

import numpy as np

from nbnorm_backends.numba_cpu.elements import load, store
from nbnorm_backends.numba_cpu.kernels import (
    COUNT,
    K1,
    K2,
    KERNEL,
    M2,
    MEAN,
    NEAR,
    PLAIN,
    RESIDUAL,
    ROW,
    RSTD,
    clamped,
    high_of,
    low_of,
    power_for,
    power_of_two,
)


@PLAIN
def add_to(row, total):
    for j in range(row.size):
        total[j] += row[j]


@KERNEL
def merge_shares(part, sums):
    """sums (a, n, w) = part (a, n, shares, w), summed over the shares in their order."""
    for a in range(part.shape[0]):
        for i in range(part.shape[1]):
            sums[a, i] = 0.0
            for share in range(part.shape[2]):
                add_to(part[a, i, share], sums[a, i])


@KERNEL
def merge_rounded(part, total):
    """total (w,) = part (shares, w), summed likewise and rounded to total's type."""
    sums = np.zeros(total.size)
    for share in range(part.shape[0]):
        add_to(part[share], sums)
    for j in range(total.size):
        total[j] = sums[j]


@KERNEL
def means_of_first(x, pivot):
    """pivot (n, w) of float64: the mean of each column's first NEAR elements (see `kernels.pivot_of`)."""
    rows = min(NEAR, x.shape[1])
    pivot[:] = 0.0
    for i in range(x.shape[0]):
        for k in range(rows):
            for j in range(x.shape[2]):
                pivot[i, j] += x[i, k, j] - x[i, 0, j]
        for j in range(x.shape[2]):
            pivot[i, j] = x[i, 0, j] + pivot[i, j] / rows


@PLAIN
def count_of(sums, rows, i, j):
    """Elements of a column: a third plane of the sums has them under a mask."""
    return sums[2, i, j] if sums.shape[0] > 2 else rows


@KERNEL
def doubt(sums, rows, farthest, pivot, doubted):
    """Mark the columns (n, w) whose pivot lies further from the mean than `farthest`, in n * m2, move it there, and
    return how many they are."""
    found = 0
    for i in range(pivot.shape[0]):
        for j in range(pivot.shape[1]):
            n = count_of(sums, rows, i, j)
            s, q = sums[0, i, j], sums[1, i, j]
            doubted[i, j] = n > 0.0 and not s * s <= farthest * n * (q - s * s / n)
            if doubted[i, j]:
                found += 1
                if np.isfinite(s):
                    pivot[i, j] += s / n
    return found


@KERNEL
def overflowed(sums, doubted):
    """Mark the columns (n, w) of which a sum is not finite; whether there are any."""
    found = False
    for i in range(doubted.shape[0]):
        for j in range(doubted.shape[1]):
            doubted[i, j] = not (np.isfinite(sums[0, i, j]) and np.isfinite(sums[1, i, j]))
            found |= doubted[i, j]
    return found


@KERNEL
def replace(sums, again, doubted):
    """The second sums where the first are doubted. A column's bits do not depend on its neighbours."""
    for i in range(doubted.shape[0]):
        for j in range(doubted.shape[1]):
            if doubted[i, j]:
                sums[0, i, j] = again[0, i, j]
                sums[1, i, j] = again[1, i, j]


# The columns begin, begin + c, ... of a row are one of each group. Where c is 1 that is spelled out, for vectors.


@ROW
def weigh(counts, s, pivot, begin, c, total, origin, weighed):
    """total += n, weighed += sum(u - origin); the origin of a group is the first pivot that it meets."""
    for a in range(total.size):
        j = begin + a * c
        n, here = load(counts, j), load(pivot, j)
        first = here if load(total, a) == 0.0 else load(origin, a)
        store(origin, a, first)
        store(total, a, load(total, a) + n)
        store(weighed, a, load(weighed, a) + ((here - first) * n + load(s, j) if n > 0.0 else 0.0))


@ROW
def spread(counts, s, q, pivot, begin, c, origin, step, m2):
    """m2 += sum((u - origin - step)^2)"""
    for a in range(step.size):
        j = begin + a * c
        n = load(counts, j)
        mean = load(s, j) / n
        offset = ((load(pivot, j) - load(origin, a)) + mean) - load(step, a)
        own = (load(q, j) - load(s, j) * mean) + n * offset * offset
        store(m2, a, load(m2, a) + (own if n > 0.0 else 0.0))


@ROW
def conclude(total, origin, step, m2, eps, count, mean, residual, squares, rstd):
    """Rows of the statistics of one sample's groups."""
    for a in range(total.size):
        n, first, shift, rest = load(total, a), load(origin, a), load(step, a), load(m2, a)
        known = n > 0.0
        rest = 0.0 if rest < 0.0 else rest  # rounding only; NaN stays NaN
        middle = first + shift
        store(count, a, n)
        store(mean, a, middle if known else 0.0)
        store(residual, a, (first - middle) + shift if known else 0.0)
        store(squares, a, rest if known else 0.0)
        store(rstd, a, 1.0 / np.sqrt(rest / n + eps) if known else 0.0)


@KERNEL
def columns_statistics(sums, rows, pivot, g, c, center, eps, stats):
    """stats (5, n*g) from the sums of columns about their pivots (n, w).

    The columns of a group count as one: each one's mean weighs as its count, and their spread joins m2. The inner loops
    go over groups: one after the other 1024 of them took 43 us.
    """
    work = np.empty((5, g))
    total, origin, weighed, step, m2 = work[0], work[1], work[2], work[3], work[4]
    same = np.full(pivot.shape[1], rows)
    for i in range(pivot.shape[0]):
        work[:] = 0.0
        counts = sums[2, i] if sums.shape[0] > 2 else same
        s, q, pivots, own = sums[0, i], sums[1, i], pivot[i], stats[:, i * g : (i + 1) * g]
        for k in range(0, pivots.size, g * c):
            for begin in range(k, k + c):
                if c == 1:
                    weigh(counts, s, pivots, begin, 1, total, origin, weighed)
                else:
                    weigh(counts, s, pivots, begin, c, total, origin, weighed)
        if center:
            for a in range(g):
                step[a] = weighed[a] / total[a] if total[a] > 0.0 else 0.0
        for k in range(0, pivots.size, g * c):
            for begin in range(k, k + c):
                if not center:
                    add_columns(q, begin, c, m2)
                elif c == 1:
                    spread(counts, s, q, pivots, begin, 1, origin, step, m2)
                else:
                    spread(counts, s, q, pivots, begin, c, origin, step, m2)
        conclude(total, origin, step, m2, eps, own[COUNT], own[MEAN], own[RESIDUAL], own[M2], own[RSTD])


@KERNEL
def settle(part, sums, rows, farthest, pivot, doubted, g, c, center, eps, stats):
    """Merge the shares, and find the statistics unless sums are to be done again; of how many columns they are."""
    merge_shares(part, sums)
    found = doubt(sums, rows, farthest, pivot, doubted) if center else 0
    if not found:
        columns_statistics(sums, rows, pivot, g, c, center, eps, stats)
    return found


@PLAIN
def add_columns(row, begin, c, total):
    for a in range(total.size):
        total[a] += row[begin + a * c]


@PLAIN
def reduced(mean, scale, single):
    """(power, high): what x is multiplied by, and the mean as it is taken from x; see `kernels.terms`."""
    return (power_for(mean, scale), high_of(mean)) if single else (1.0, mean)


@KERNEL
def columns_terms(stats, g, c, weight, bias, single, power, mean, scale, shift):
    """What `kernels.affine` takes of each column (n, w): (u * power - mean) * scale + shift. Returns whether a power is
    not 1."""
    extreme = False
    for i in range(scale.shape[0]):
        for channel in range(g * c):
            p = i * g + channel // c
            m, r = stats[MEAN, p], stats[RSTD, p]
            factor = r * weight[channel] if weight.size else r
            f, high = reduced(m, factor, single)
            power[i, channel] = f
            mean[i, channel] = high * f
            scale[i, channel] = clamped(factor / f) if single else factor
            shift[i, channel] = (bias[channel] if bias.size else 0.0) + low_of(m, high, factor)
            extreme |= f != 1.0
        for row in (power[i], mean[i], scale[i], shift[i]):
            unfold(row, g * c)
    return extreme


@PLAIN
def unfold(row, own):
    """What is there for the columns of one row of x, for those of all that are folded into it."""
    for j in range(own, row.size):
        store(row, j, load(row, j - own))


@KERNEL
def sums_of_xhat(sums, stats, g, c, weight, single):
    """sums[1], which is sum(t * d) of each column (n, w), as sum(t * xhat)."""
    for i in range(sums.shape[1]):
        j = 0
        while j < sums.shape[2]:
            for channel in range(g * c):
                p = i * g + channel // c
                m, r = stats[MEAN, p], stats[RSTD, p]
                f, high = reduced(m, r * weight[channel] if weight.size else r, single)
                sums[1, i, j] = sums[1, i, j] * (r / f) + low_of(m, high, r) * sums[0, i, j]
                j += 1


@KERNEL
def columns_gradients(sums, stats, g, c, weight, center, fixed, coefficients, dparams):
    """coefficients (2, n*g), and the gradients of weight and bias, dparams (2, g*c), from sum(t), sum(t * xhat)."""
    coefficients[:] = 0.0
    dparams[:] = 0.0
    for i in range(sums.shape[1]):
        j = 0
        while j < sums.shape[2]:
            for channel in range(g * c):
                p = i * g + channel // c
                w = weight[channel] if weight.size else 1.0
                coefficients[K1, p] += sums[0, i, j] * w
                coefficients[K2, p] += sums[1, i, j] * w
                dparams[0, channel] += sums[1, i, j]
                dparams[1, channel] += sums[0, i, j]
                j += 1
    for p in range(coefficients.shape[1]):
        n = stats[COUNT, p]
        coefficients[K1, p] = coefficients[K1, p] / n if center and not fixed and n else 0.0
        coefficients[K2, p] = coefficients[K2, p] / n if not fixed and n else 0.0


@KERNEL
def columns_gains(stats, g, c, weight, coefficients, single, gain, k1, k2, lift):
    """What `kernels.backward_affine` takes of each column (n, w), as `kernels.gains`; whether a lift is not 1."""
    extreme = False
    for i in range(gain.shape[0]):
        for channel in range(g * c):
            p = i * g + channel // c
            m, r, w = stats[MEAN, p], stats[RSTD, p], weight[channel] if weight.size else 1.0
            f, high = reduced(m, r * w, single)
            up = power_of_two(r) if single else 1.0
            own = r / up
            gain[i, channel] = own * w
            k1[i, channel] = -(coefficients[K1, p] + low_of(m, high, r) * coefficients[K2, p]) * own
            k2[i, channel] = -(r / f) * coefficients[K2, p] * own
            lift[i, channel] = up
            extreme |= up != 1.0
        for row in (gain[i], k1[i], k2[i], lift[i]):
            unfold(row, g * c)
    return extreme
