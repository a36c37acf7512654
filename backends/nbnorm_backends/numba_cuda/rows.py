"""Rows of neighbours, each with a statistic of its own: layer and RMS norm, and group and instance norm where channels
come first. One read, one write, as long as a row stays in registers or in the cache.

x is (rows, length); `threads` threads of a block of `block` have a row, `elements` each in registers. Blocks go from
row to row, so that weights are loaded once.
"""

from __future__ import annotations

import numpy as np

from nbnorm_backends.numba_cuda.functions import (
    ADDEND,
    BARE,
    BIAS,
    CENTER,
    FIXED,
    FOLD,
    MASK,
    PLANES,
    RESIDUAL,
    TOTAL,
    WARP,
    WEIGHT,
    make_absorb,
    make_access,
    make_activations,
    make_add,
    make_join,
    make_merge,
    make_settle,
    make_sums,
    make_two_sum,
    real_of,
)


def _make_finish(cuda, P, vector, threads):
    """finish(row, ...): the result of a row whose statistics are known, from memory: it was just read, and is cached.

    Activations in loops that are unrolled over registers would make kernels of ten times the size.
    """
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store, load_weights, weight_at = access.V, access.load, access.store, access.load_weights, access.weight
    activate, _ = make_activations(P)
    join = make_join(P, access)

    @P.dev
    def finish(
        row, lane, high, low, scale, source, residual, weight, bias, weight_wide, bias_wide, mask, y, vectors,
        groups, channels, inner, mask_n, mask_g, mask_c, mask_s, flags, before, after,
    ):  # fmt: skip
        q = cuda.local.array(V, real)
        w = cuda.local.array(V, real)
        base = row * vectors
        valid = 0
        if flags & MASK:
            valid = row // groups * mask_n + row % groups * mask_g
        k = lane
        while k < vectors:
            load(source, base + k, q, 0)
            for e in range(V):
                if before != 0:
                    q[e] = activate(before, q[e])
                q[e] = ((q[e] - high) - low) * scale
            i = 0
            if flags & PLANES:
                i = row % groups * channels + k * V // inner
            if flags & WEIGHT:
                if flags & PLANES:
                    factor = weight_at(weight, weight_wide, flags, i)
                    for e in range(V):
                        w[e] = factor
                else:
                    load_weights(weight, weight_wide, flags, k, w, 0)
                for e in range(V):
                    q[e] *= w[e]
            if flags & BIAS:
                if flags & PLANES:
                    shift = weight_at(bias, bias_wide, flags, i)
                    for e in range(V):
                        w[e] = shift
                else:
                    load_weights(bias, bias_wide, flags, k, w, 0)
                for e in range(V):
                    q[e] += w[e]
            join(q, w, residual, base + k, flags, after)
            if flags & MASK:
                for e in range(V):
                    j = k * V + e
                    if mask[valid + j // inner * mask_c + j % inner * mask_s] == 0:
                        q[e] = real(0)
            store(y, base + k, q, 0)
            k += threads

    return finish


def make_row_forward(cuda, P, vector, threads, elements, block):
    """Statistics by a corrected two-pass about the row's first element, in registers, then the result."""
    real, rsqrt, fdiv, load_one, two_sum = real_of(P), P.rsqrt, P.fdiv, P.ld1, make_two_sum(P)
    access = make_access(P, vector)
    V, load, store, load_weights = access.V, access.load, access.store, access.load_weights
    rounds = P.V == 8  # the stored total is rounded, and it is what the norm is of
    sum_one, sum_two = make_sums(cuda, P, threads)
    finish = _make_finish(cuda, P, vector, threads)
    rows_per_block, steps = block // threads, elements // V
    slots_size = max(1, 6 * (threads // WARP))
    preload = block < 512  # 512 threads have 128 registers each, and more have fewer
    kept = elements if preload else V
    zero, one = real(0), real(1)

    def row_forward(
        x, residual, weight, bias, weight_wide, bias_wide, total, y, mean_high, mean_low, rstd, m2,
        rows, length, groups, channels, inner, eps, flags, after,
    ):  # fmt: skip
        slots = cuda.shared.array(slots_size, real)
        r = cuda.local.array(elements, real)
        w = cuda.local.array(kept, real)
        b = cuda.local.array(kept, real)
        q = cuda.local.array(V, real)
        lane = cuda.threadIdx.x % threads
        count = real(length)
        vectors = length // V
        plain = after == 0 and not flags & (RESIDUAL | PLANES)
        for e in range(kept):
            w[e] = one
            b[e] = zero
        if preload and plain:
            for j in range(steps):
                k = j * threads + lane
                if k < vectors:
                    if flags & WEIGHT:
                        load_weights(weight, weight_wide, flags, k, w, j * V)
                    if flags & BIAS:
                        load_weights(bias, bias_wide, flags, k, b, j * V)
        first = cuda.blockIdx.x * rows_per_block
        turn = 0
        while first < rows:
            row = first + cuda.threadIdx.x // threads
            here = row < rows
            base = row * vectors
            for j in range(steps):
                k = j * threads + lane
                if here and k < vectors:
                    load(x, base + k, r, j * V)
                else:
                    for e in range(V):
                        r[j * V + e] = zero
            if flags & TOTAL:
                for j in range(steps):
                    k = j * threads + lane
                    if here and k < vectors:
                        load(residual, base + k, q, 0)
                        for e in range(V):
                            r[j * V + e] += q[e]
                        store(total, base + k, r, j * V)
                        if rounds:
                            load(total, base + k, r, j * V)
            high = zero
            if flags & CENTER:
                pivot = zero
                if here:
                    pivot = load_one(x, row * length)
                    if flags & TOTAL:
                        pivot += load_one(residual, row * length)
                s = zero
                for j in range(steps):
                    if here and j * threads + lane < vectors:
                        for e in range(V):
                            s += r[j * V + e] - pivot
                high = pivot + fdiv(sum_one(s, slots, turn, lane), count)
            s = zero
            squares = zero
            for j in range(steps):
                if here and j * threads + lane < vectors:
                    for e in range(V):
                        d = r[j * V + e] - high
                        s += d
                        squares += d * d
            s, squares = sum_two(s, squares, slots, turn, lane)
            cuda.syncwarp()  # y may be x, whose first element all lanes have read; shuffles order no memory
            turn = 1 - turn
            low = zero
            if flags & CENTER:
                low = fdiv(s, count)
                squares -= s * low
                if squares < zero:
                    squares = zero
            scale = rsqrt(fdiv(squares, count) + eps)
            if here:
                if plain:
                    for j in range(steps):
                        k = j * threads + lane
                        if k < vectors:
                            i = j * V if preload else 0
                            if not preload and flags & WEIGHT:
                                load_weights(weight, weight_wide, flags, k, w, 0)
                            if not preload and flags & BIAS:
                                load_weights(bias, bias_wide, flags, k, b, 0)
                            for e in range(V):
                                r[j * V + e] = ((r[j * V + e] - high) - low) * (scale * w[i + e]) + b[i + e]
                            store(y, base + k, r, j * V)
                else:
                    finish(
                        row, lane, high, low, scale, total if flags & TOTAL else x, residual, weight, bias,
                        weight_wide, bias_wide, x, y, vectors, groups, channels, inner, 0, 0, 0, 0, flags, 0, after,
                    )  # fmt: skip
                if lane == 0 and not flags & BARE:
                    mean_high[row], mean_low[row] = two_sum(high, low)
                    rstd[row] = scale
                    m2[row] = squares
            first += cuda.gridDim.x * rows_per_block

    return row_forward


def make_long_row_forward(cuda, P, vector, threads, elements, block):
    """Rows of any length, with a mask or an activation in front of the norm: read again for the result."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store = access.V, access.load, access.store
    activate, _ = make_activations(P)
    absorb, absorb_kept = make_absorb(P, V)
    _, merge_block = make_merge(cuda, P)
    settle, two_sum = make_settle(P), make_two_sum(P)
    finish = _make_finish(cuda, P, vector, threads)
    rows_per_block, warps = block // threads, threads // WARP
    counts_size, slots_size = 2 * warps, 6 * warps
    zero = real(0)

    def long_row_forward(
        x, residual, weight, bias, weight_wide, bias_wide, mask, total, y, mean_high, mean_low, rstd, m2, valid,
        rows, length, groups, channels, inner, mask_n, mask_g, mask_c, mask_s, eps, flags, before, after,
    ):  # fmt: skip
        counts = cuda.shared.array(counts_size, np.int64)
        slots = cuda.shared.array(slots_size, real)
        q = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        lane = cuda.threadIdx.x % threads
        vectors = length // V
        first = cuda.blockIdx.x * rows_per_block
        turn = 0
        while first < rows:
            row = first + cuda.threadIdx.x // threads
            here = row < rows
            base = row * vectors
            start = 0
            if flags & MASK:
                start = row // groups * mask_n + row % groups * mask_g
            n = 0
            high = zero
            low = zero
            squares = zero
            rest = zero
            k = lane
            while here and k < vectors:
                load(x, base + k, q, 0)
                if flags & TOTAL:
                    load(residual, base + k, p, 0)
                    for e in range(V):
                        q[e] += p[e]
                    store(total, base + k, q, 0)
                    load(total, base + k, q, 0)
                if before != 0:
                    for e in range(V):
                        q[e] = activate(before, q[e])
                if flags & MASK:
                    for e in range(V):
                        j = k * V + e
                        p[e] = real(mask[start + j // inner * mask_c + j % inner * mask_s])
                    n, high, low, squares, rest = absorb_kept(q, p, n, high, low, squares, rest, flags)
                else:
                    n, high, low, squares, rest = absorb(q, n, high, low, squares, rest, flags)
                k += threads
            n, high, low, squares = merge_block(n, high, low, squares, counts, slots, turn, warps)
            turn = 1 - turn
            high, low = two_sum(high, low)
            if here:
                writes = lane == 0 and not flags & BARE
                scale = settle(row, n, high, low, squares, mean_high, mean_low, rstd, m2, valid, eps, writes)
                finish(
                    row, lane, high, low, scale, total if flags & TOTAL else x, residual, weight, bias,
                    weight_wide, bias_wide, mask, y, vectors, groups, channels, inner, mask_n, mask_g, mask_c, mask_s,
                    flags, before, after,
                )  # fmt: skip
            first += cuda.gridDim.x * rows_per_block

    return long_row_forward


def make_row_backward(cuda, P, vector, threads, elements, block):
    """dx, and the sums of dy * xhat and dy over the rows of a block, (blocks, length) each; behind them their rests.

    Those of `FOLD` rows are added in registers and then to what is in memory. Two blocks a multiprocessor of an H100
    have 17 MB of these for rows of 4096 float32, which its cache holds; every 32 rows, of 12 bytes an element each that
    memory moves, 32 bytes are read and written there.
    """
    real, fdiv, add = real_of(P), P.fdiv, make_add(P)
    access = make_access(P, vector)
    V, load, store, load_weights = access.V, access.load, access.store, access.load_weights
    activate, slope = make_activations(P)
    _, sum_two = make_sums(cuda, P, threads)
    rows_per_block, steps = block // threads, elements // V
    slots_size = max(1, 6 * (threads // 32))
    shared_size = threads * elements if rows_per_block > 1 else 1
    # Where 512 threads share the registers and elements are float32, weights kept there spilled 12 bytes on sm_90: they
    # are loaded in each row, from the cache.
    preload = block < 512 or P.V != 4
    kept = elements if preload else V
    zero, one = real(0), real(1)

    def row_backward(
        x, dy, residual, addend, weight, bias, weight_wide, bias_wide, mean_high, mean_low, rstd, dx, dz,
        part_weight, part_bias, rows, length, flags, before, after,
    ):  # fmt: skip
        slots = cuda.shared.array(slots_size, real)
        shared_weight = cuda.shared.array(shared_size, real)
        shared_bias = cuda.shared.array(shared_size, real)
        r = cuda.local.array(elements, real)
        g = cuda.local.array(elements, real)
        w = cuda.local.array(kept, real)
        sum_weight = cuda.local.array(elements, real)
        sum_bias = cuda.local.array(elements, real)
        q = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        lane = cuda.threadIdx.x % threads
        mine = cuda.threadIdx.x // threads
        count = real(length)
        vectors = length // V
        for e in range(kept):
            w[e] = one
        if preload and flags & WEIGHT:
            for j in range(steps):
                k = j * threads + lane
                if k < vectors:
                    load_weights(weight, weight_wide, flags, k, w, j * V)
        first = cuda.blockIdx.x * rows_per_block
        while first < rows:
            for e in range(elements):
                sum_weight[e] = zero
                sum_bias[e] = zero
            rounds = 0
            while first < rows and rounds < FOLD:
                row = first + mine
                here = row < rows
                base = row * vectors
                for j in range(steps):
                    k = j * threads + lane
                    if here and k < vectors:
                        load(x, base + k, r, j * V)
                        load(dy, base + k, g, j * V)
                    else:
                        for e in range(V):
                            r[j * V + e] = zero
                            g[j * V + e] = zero
                scale = zero
                high = zero
                low = zero
                if here:
                    scale = rstd[row]
                    if flags & CENTER:
                        high = mean_high[row]
                        low = mean_low[row]
                if before != 0:
                    for e in range(elements):
                        r[e] = activate(before, r[e])
                for e in range(elements):
                    r[e] = ((r[e] - high) - low) * scale
                if after != 0:
                    for j in range(steps):
                        k = j * threads + lane
                        if here and k < vectors:
                            i = j * V if preload else 0
                            if not preload and flags & WEIGHT:
                                load_weights(weight, weight_wide, flags, k, w, 0)
                            for e in range(V):
                                q[e] = r[j * V + e] * w[i + e]
                            if flags & BIAS:
                                load_weights(bias, bias_wide, flags, k, p, 0)
                                for e in range(V):
                                    q[e] += p[e]
                            if flags & RESIDUAL:
                                load(residual, base + k, p, 0)
                                for e in range(V):
                                    q[e] += p[e]
                            for e in range(V):
                                g[j * V + e] *= slope(after, q[e])
                if flags & RESIDUAL:
                    for j in range(steps):
                        k = j * threads + lane
                        if here and k < vectors:
                            store(dz, base + k, g, j * V)
                s1 = zero
                s2 = zero
                if preload:
                    for e in range(elements):
                        sum_weight[e] += g[e] * r[e]
                        sum_bias[e] += g[e]
                        g[e] *= w[e]
                        s1 += g[e]
                        s2 += g[e] * r[e]
                else:
                    for j in range(steps):
                        k = j * threads + lane
                        if here and k < vectors:
                            if flags & WEIGHT:
                                load_weights(weight, weight_wide, flags, k, w, 0)
                            for e in range(V):
                                sum_weight[j * V + e] += g[j * V + e] * r[j * V + e]
                                sum_bias[j * V + e] += g[j * V + e]
                                g[j * V + e] *= w[e]
                                s1 += g[j * V + e]
                                s2 += g[j * V + e] * r[j * V + e]
                if not flags & FIXED:
                    s1, s2 = sum_two(s1, s2, slots, rounds % 2, lane)
                    k1 = fdiv(s1, count) if flags & CENTER else zero
                    k2 = fdiv(s2, count)
                    for e in range(elements):
                        g[e] = (g[e] - k1) - r[e] * k2
                for j in range(steps):
                    k = j * threads + lane
                    if here and k < vectors:
                        for e in range(V):
                            g[j * V + e] *= scale
                        if before != 0:
                            load(x, base + k, q, 0)
                            for e in range(V):
                                g[j * V + e] *= slope(before, q[e])
                        if flags & ADDEND:
                            load(addend, base + k, q, 0)
                            for e in range(V):
                                g[j * V + e] += q[e]
                        store(dx, base + k, g, j * V)
                first += cuda.gridDim.x * rows_per_block
                rounds += 1
            # The rows of a block are added one after another, and so always in one order.
            for slot in range(rows_per_block):
                if rows_per_block > 1 and mine == slot:
                    for j in range(steps):
                        for e in range(V):
                            i = (j * threads + lane) * V + e
                            if slot > 0:
                                sum_weight[j * V + e] += shared_weight[i]
                                sum_bias[j * V + e] += shared_bias[i]
                            shared_weight[i] = sum_weight[j * V + e]
                            shared_bias[i] = sum_bias[j * V + e]
                cuda.syncthreads()
            fresh = first <= (cuda.blockIdx.x + FOLD * cuda.gridDim.x) * rows_per_block
            if mine == rows_per_block - 1:
                for j in range(steps):
                    k = j * threads + lane
                    if k < vectors:
                        for e in range(V):
                            i = cuda.blockIdx.x * length + k * V + e
                            rest = cuda.gridDim.x * length + i
                            if fresh:
                                part_weight[i] = sum_weight[j * V + e]
                                part_bias[i] = sum_bias[j * V + e]
                                part_weight[rest] = zero
                                part_bias[rest] = zero
                            else:
                                part_weight[i], part_weight[rest] = add(
                                    part_weight[i], part_weight[rest], sum_weight[j * V + e]
                                )
                                part_bias[i], part_bias[rest] = add(part_bias[i], part_bias[rest], sum_bias[j * V + e])

    return row_backward
