"""Neighbours of different statistics: batch and group norm where channels come last, and the gradients of rows that are
too long for registers.

x is (samples, rows, groups, channels): a statistic for each sample and group, over rows and channels, a weight for each
column of groups * channels. `width` threads of a block, a power of two, stand side by side, V columns each; the others
take the rows below. With ALONG there is a statistic for each row instead, and one sample.
"""

from __future__ import annotations

import numpy as np

from nbnorm_backends.numba_cuda.functions import (
    ADDEND,
    ALONG,
    BIAS,
    CENTER,
    FIXED,
    FOLD,
    MASK,
    RESIDUAL,
    REVERSE,
    WARP,
    WEIGHT,
    make_absorb,
    make_access,
    make_activations,
    make_add,
    make_arrive,
    make_gradient,
    make_join,
    make_merge,
    make_settle,
    make_statistic,
    real_of,
)

BLOCK = 256  # threads of a block, at most
SUMS_BLOCK = 128  # of those that sum; of half types they take 150 registers, and spilled with 128


def _make_place(cuda, P):
    """place(slabs, tiles, width, flags): (sample, slab, tile, column of threads, row of threads, rows of threads).

    In reverse, what the statistics were taken of last is in the cache, and comes first.
    """

    @P.dev
    def place(slabs, tiles, width, flags):
        block = cuda.blockIdx.x
        if flags & REVERSE:
            block = cuda.gridDim.x - 1 - block
        thread = cuda.threadIdx.x
        tile = block % tiles
        block = block // tiles
        return block // slabs, block % slabs, tile, thread % width, thread // width, cuda.blockDim.x // width

    return place


def make_columns_statistics(cuda, P, vector):
    """Tiles of rows by Chan's merge in registers, then the block's rows, then its slabs: the last block of a tile
    merges them, or of a sample where groups have several columns."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load = access.V, access.load
    unroll = 4
    size, cells = unroll * V, BLOCK * V
    activate, _ = make_activations(P)
    absorb, _ = make_absorb(P, unroll)
    _, absorb_kept = make_absorb(P, 1)
    merge, merge_block = make_merge(cuda, P)
    settle, arrive, place = make_settle(P), make_arrive(cuda, P), _make_place(cuda, P)
    zero, one = real(0), real(1)

    def columns_statistics(
        x, mask, mean_high, mean_low, rstd, m2, valid, part_n, part_high, part_low, part_m2, counters,
        rows, groups, channels, slabs, tiles, width, mask_n, mask_r, mask_g, mask_c, eps, flags, before,
    ):  # fmt: skip
        shared_n = cuda.shared.array(cells, np.int32)
        shared_high = cuda.shared.array(cells, real)
        shared_low = cuda.shared.array(cells, real)
        shared_m2 = cuda.shared.array(cells, real)
        flag = cuda.shared.array(1, np.int32)
        q = cuda.local.array(size, real)
        p = cuda.local.array(unroll, real)
        keep = cuda.local.array(1, real)
        n = cuda.local.array(V, np.int32)
        high = cuda.local.array(V, real)
        low = cuda.local.array(V, real)
        squares = cuda.local.array(V, real)
        rest = cuda.local.array(V, real)
        thread = cuda.threadIdx.x
        sample, slab, tile, lane, line, lines = place(slabs, tiles, width, flags)
        columns = groups * channels
        vectors = columns // V
        k = tile * width + lane
        step = slabs * lines
        row = slab * lines + line
        if k >= vectors:
            row = rows
        for e in range(V):
            n[e] = 0
            high[e] = zero
            low[e] = zero
            squares[e] = zero
            rest[e] = zero
        seen = 0  # without a mask all columns have the same count, and so one division does
        while not flags & MASK and row + (unroll - 1) * step < rows:
            for u in range(unroll):
                load(x, (sample * rows + row + u * step) * vectors + k, q, u * V)
            if before != 0:
                for e in range(size):
                    q[e] = activate(before, q[e])
            for e in range(V):
                for u in range(unroll):
                    p[u] = q[u * V + e]
                n[e], high[e], low[e], squares[e], rest[e] = absorb(
                    p, seen, high[e], low[e], squares[e], rest[e], flags
                )
            seen += unroll
            row += unroll * step
        while row < rows:
            load(x, (sample * rows + row) * vectors + k, q, 0)
            if before != 0:
                for e in range(V):
                    q[e] = activate(before, q[e])
            for e in range(V):
                keep[0] = one
                if flags & MASK:
                    column = k * V + e
                    i = sample * mask_n + row * mask_r + column // channels * mask_g + column % channels * mask_c
                    keep[0] = real(mask[i])
                p[0] = q[e]
                n[e], high[e], low[e], squares[e], rest[e] = absorb_kept(
                    p, keep, n[e], high[e], low[e], squares[e], rest[e], flags
                )
            row += step
        for e in range(V):
            i = thread * V + e
            shared_n[i] = n[e]
            shared_high[i] = high[e]
            shared_low[i] = low[e]
            shared_m2[i] = squares[e]
        cuda.syncthreads()
        first = tile * width * V
        for i in range(thread, width * V, cuda.blockDim.x):
            c_n, c_high, c_low, c_m2 = shared_n[i], shared_high[i], shared_low[i], shared_m2[i]
            c_rest = zero
            for j in range(i + width * V, cuda.blockDim.x * V, width * V):
                c_n, c_high, c_low, c_m2, c_rest = merge(
                    c_n, c_high, c_low, c_m2, c_rest, shared_n[j], shared_high[j], shared_low[j], shared_m2[j]
                )
            column = first + i
            if column < columns:
                j = ((sample * groups + column // channels) * slabs + slab) * channels + column % channels
                part_n[j] = c_n
                part_high[j] = c_high
                part_low[j] = c_low
                part_m2[j] = c_m2
        group = thread // WARP
        last = groups
        counter = sample
        expected = slabs * tiles
        if channels == 1:
            group += first
            last = min(groups, first + width * V)
            counter = sample * tiles + tile
            expected = slabs
        if arrive(counters, counter, expected, flag):
            while group < last:
                statistic = sample * groups + group
                c_n = 0
                c_high = zero
                c_low = zero
                c_m2 = zero
                c_rest = zero
                for j in range(thread % WARP, slabs * channels, WARP):
                    i = statistic * slabs * channels + j
                    c_n, c_high, c_low, c_m2, c_rest = merge(
                        c_n, c_high, c_low, c_m2, c_rest, part_n[i], part_high[i], part_low[i], part_m2[i]
                    )
                c_n, c_high, c_low, c_m2 = merge_block(c_n, c_high, c_low, c_m2, shared_n, shared_m2, 0, 1)
                wanted = thread % WARP == 0
                settle(statistic, c_n, c_high, c_low, c_m2, mean_high, mean_low, rstd, m2, valid, eps, wanted)
                group += cuda.blockDim.x // WARP

    return columns_statistics


def make_columns_apply(cuda, P, vector):
    """The result, from statistics that are known."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store, weight_at = access.V, access.load, access.store, access.weight
    activate, _ = make_activations(P)
    statistic, place, join = make_statistic(P), _make_place(cuda, P), make_join(P, access)
    zero = real(0)

    def columns_apply(
        x, residual, weight, bias, weight_wide, bias_wide, mask, y, mean_high, mean_low, rstd,
        rows, groups, channels, stride_n, slabs, tiles, width, mask_n, mask_r, mask_g, mask_c,
        eps, flags, before, after,
    ):  # fmt: skip
        q = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        high = cuda.local.array(V, real)
        low = cuda.local.array(V, real)
        scale = cuda.local.array(V, real)
        shift = cuda.local.array(V, real)
        sample, slab, tile, lane, line, lines = place(slabs, tiles, width, flags)
        vectors = groups * channels // V
        k = tile * width + lane
        if k < vectors:
            for e in range(V):
                column = k * V + e
                i = sample * stride_n + column // channels
                high[e], low[e], scale[e] = statistic(i, mean_high, mean_low, rstd, eps, flags)
                shift[e] = zero
                if flags & WEIGHT:
                    scale[e] *= weight_at(weight, weight_wide, flags, column)
                if flags & BIAS:
                    shift[e] = weight_at(bias, bias_wide, flags, column)
            row = slab * lines + line
            while row < rows:
                i = (sample * rows + row) * vectors + k
                load(x, i, q, 0)
                if before != 0:
                    for e in range(V):
                        q[e] = activate(before, q[e])
                for e in range(V):
                    q[e] = ((q[e] - high[e]) - low[e]) * scale[e] + shift[e]
                join(q, p, residual, i, flags, after)
                if flags & MASK:
                    for e in range(V):
                        column = k * V + e
                        m = sample * mask_n + row * mask_r + column // channels * mask_g + column % channels * mask_c
                        if mask[m] == 0:
                            q[e] = zero
                store(y, i, q, 0)
                row += slabs * lines

    return columns_apply


def make_columns_sums(cuda, P, vector):
    """The sums of dz * xhat and dz for each sample, column and slab, dz being the gradient of the norm.

    Those of `FOLD` rows are added in registers and then to what is in shared memory, with the rests: half types spilled
    with rests in registers.
    """
    real = real_of(P)
    access = make_access(P, vector)
    V, load, load_weights = access.V, access.load, access.load_weights
    cells = SUMS_BLOCK * V
    activate, _ = make_activations(P)
    gradient, statistic, place = make_gradient(P), make_statistic(P), _make_place(cuda, P)
    add = make_add(P)
    zero, one = real(0), real(1)

    def columns_sums(
        x, dy, residual, weight, bias, weight_wide, bias_wide, mask, mean_high, mean_low, rstd, part_weight, part_bias,
        rows, groups, channels, stride_n, slabs, tiles, width, mask_n, mask_r, mask_g, mask_c,
        eps, flags, before, after,
    ):  # fmt: skip
        shared_weight = cuda.shared.array(cells, real)
        shared_bias = cuda.shared.array(cells, real)
        rest_weight = cuda.shared.array(cells, real)
        rest_bias = cuda.shared.array(cells, real)
        q = cuda.local.array(V, real)
        g = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        high = cuda.local.array(V, real)
        low = cuda.local.array(V, real)
        scale = cuda.local.array(V, real)
        w = cuda.local.array(V, real)
        s1 = cuda.local.array(V, real)
        s2 = cuda.local.array(V, real)
        thread = cuda.threadIdx.x
        sample, slab, tile, lane, line, lines = place(slabs, tiles, width, flags)
        columns = groups * channels
        vectors = columns // V
        k = tile * width + lane
        row = slab * lines + line
        if k >= vectors:
            row = rows
        for e in range(V):
            shared_weight[thread * V + e] = zero
            shared_bias[thread * V + e] = zero
            rest_weight[thread * V + e] = zero
            rest_bias[thread * V + e] = zero
            if k < vectors and not flags & ALONG:
                i = sample * stride_n + (k * V + e) // channels
                high[e], low[e], scale[e] = statistic(i, mean_high, mean_low, rstd, eps, flags)
        while row < rows:
            for e in range(V):
                s1[e] = zero
                s2[e] = zero
            rounds = 0
            while row < rows and rounds < FOLD:
                i = (sample * rows + row) * vectors + k
                load(x, i, q, 0)
                load(dy, i, g, 0)
                for e in range(V):
                    p[e] = zero
                    w[e] = one
                if after != 0:  # weights are loaded again: registers are few
                    if flags & RESIDUAL:
                        load(residual, i, p, 0)
                    if flags & BIAS:
                        load_weights(bias, bias_wide, flags, k, w, 0)
                        for e in range(V):
                            p[e] += w[e]
                    for e in range(V):
                        w[e] = one
                    if flags & WEIGHT:
                        load_weights(weight, weight_wide, flags, k, w, 0)
                if flags & ALONG:
                    for e in range(V):
                        high[e], low[e], scale[e] = statistic(row, mean_high, mean_low, rstd, eps, flags)
                if flags & MASK:
                    for e in range(V):
                        column = k * V + e
                        m = sample * mask_n + row * mask_r + column // channels * mask_g + column % channels * mask_c
                        if mask[m] == 0:  # what is not valid may be NaN
                            g[e] = zero
                            q[e] = high[e]
                            p[e] = zero
                for e in range(V):
                    u = q[e]
                    if before != 0:
                        u = activate(before, u)
                    u = ((u - high[e]) - low[e]) * scale[e]
                    dz = gradient(after, g[e], u, w[e], p[e])
                    s1[e] += dz
                    s2[e] += dz * u
                row += slabs * lines
                rounds += 1
            for e in range(V):
                i = thread * V + e
                shared_bias[i], rest_bias[i] = add(shared_bias[i], rest_bias[i], s1[e])
            cuda.threadfence_block()  # or else all is loaded at once, and half types spill 28 bytes
            for e in range(V):
                i = thread * V + e
                shared_weight[i], rest_weight[i] = add(shared_weight[i], rest_weight[i], s2[e])
        cuda.syncthreads()
        for i in range(thread, width * V, cuda.blockDim.x):
            t1 = zero
            t2 = zero
            r1 = zero
            r2 = zero
            for j in range(i, cuda.blockDim.x * V, width * V):
                t1, r1 = add(t1, r1, shared_bias[j])
                t2, r2 = add(t2, r2, shared_weight[j])
            column = tile * width * V + i
            if column < columns:
                j = (sample * columns + column) * slabs + slab
                part_bias[j] = t1
                part_weight[j] = t2

    return columns_sums


def make_columns_backward(cuda, P, vector):
    """dx from the coefficients k1 and k2 of each statistic, and dz, the gradient of the residual."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store, weight_at = access.V, access.load, access.store, access.weight
    activate, slope = make_activations(P)
    gradient, statistic, place = make_gradient(P), make_statistic(P), _make_place(cuda, P)
    zero, one = real(0), real(1)

    @P.dev
    def coefficients(i, k1, k2, flags):
        c1 = zero
        c2 = zero
        if not flags & FIXED:
            c2 = k2[i]
            if flags & CENTER:
                c1 = k1[i]
        return c1, c2

    def columns_backward(
        x, dy, residual, addend, weight, bias, weight_wide, bias_wide, mask, mean_high, mean_low, rstd, k1, k2, dx, dz,
        rows, groups, channels, stride_n, slabs, tiles, width, mask_n, mask_r, mask_g, mask_c,
        eps, flags, before, after,
    ):  # fmt: skip
        q = cuda.local.array(V, real)
        g = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        high = cuda.local.array(V, real)
        low = cuda.local.array(V, real)
        scale = cuda.local.array(V, real)
        c1 = cuda.local.array(V, real)
        c2 = cuda.local.array(V, real)
        w = cuda.local.array(V, real)
        b = cuda.local.array(V, real)
        sample, slab, tile, lane, line, lines = place(slabs, tiles, width, flags)
        vectors = groups * channels // V
        k = tile * width + lane
        if k < vectors:
            for e in range(V):
                column = k * V + e
                w[e] = one
                b[e] = zero
                if not flags & ALONG:
                    i = sample * stride_n + column // channels
                    high[e], low[e], scale[e] = statistic(i, mean_high, mean_low, rstd, eps, flags)
                    c1[e], c2[e] = coefficients(i, k1, k2, flags)
                if flags & WEIGHT:
                    w[e] = weight_at(weight, weight_wide, flags, column)
                if flags & BIAS:
                    b[e] = weight_at(bias, bias_wide, flags, column)
            row = slab * lines + line
            while row < rows:
                i = (sample * rows + row) * vectors + k
                load(x, i, q, 0)
                load(dy, i, g, 0)
                for e in range(V):
                    p[e] = zero
                if flags & RESIDUAL:
                    load(residual, i, p, 0)
                if flags & ALONG:
                    for e in range(V):
                        high[e], low[e], scale[e] = statistic(row, mean_high, mean_low, rstd, eps, flags)
                        c1[e], c2[e] = coefficients(row, k1, k2, flags)
                for e in range(V):
                    u = q[e]
                    if before != 0:
                        u = activate(before, u)
                    u = ((u - high[e]) - low[e]) * scale[e]
                    g[e] = gradient(after, g[e], u, w[e], p[e] + b[e])
                    d = ((g[e] * w[e] - c1[e]) - u * c2[e]) * scale[e]
                    if before != 0:
                        d *= slope(before, q[e])
                    q[e] = d
                if flags & MASK:
                    for e in range(V):
                        column = k * V + e
                        m = sample * mask_n + row * mask_r + column // channels * mask_g + column % channels * mask_c
                        if mask[m] == 0:
                            q[e] = zero
                            g[e] = zero
                if flags & RESIDUAL:
                    store(dz, i, g, 0)
                if flags & ADDEND:
                    load(addend, i, p, 0)
                    for e in range(V):
                        q[e] += p[e]
                store(dx, i, q, 0)
                row += slabs * lines

    return columns_backward
