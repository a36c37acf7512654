"""Statistics over runs of neighbours that lie apart: batch norm where channels come first, and the gradients of group
and instance norm there.

x is (samples, runs, groups, channels, inner): a statistic for each sample and group, a weight for each group and
channel.
A thread takes every so many-th vector, so that a warp reads neighbours.
"""

from __future__ import annotations

import numpy as np

from nbnorm_backends.numba_cuda.functions import (
    ADDEND,
    ALONG,
    BIAS,
    CENTER,
    FIXED,
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
    make_sums,
    real_of,
)

BLOCK = 256  # threads of a block, at most
UNROLL = 4  # loads under way together
WARPS = BLOCK // WARP
COUNTS, SLOTS = 2 * WARPS, 6 * WARPS


def make_planes_statistics(cuda, P, vector):
    """A block for each statistic and split; the last one of a statistic merges the splits."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load = access.V, access.load
    tile = UNROLL * V
    activate, _ = make_activations(P)
    absorb_tile, _ = make_absorb(P, tile)
    absorb, absorb_kept = make_absorb(P, V)
    merge, merge_block = make_merge(cuda, P)
    settle, arrive = make_settle(P), make_arrive(cuda, P)
    zero = real(0)

    def planes_statistics(
        x, mask, mean_high, mean_low, rstd, m2, valid, part_n, part_high, part_low, part_m2, counters,
        runs, groups, length, inner, splits, mask_n, mask_r, mask_g, mask_c, mask_s, eps, flags, before,
    ):  # fmt: skip
        counts = cuda.shared.array(COUNTS, np.int64)
        slots = cuda.shared.array(SLOTS, real)
        flag = cuda.shared.array(1, np.int32)
        q = cuda.local.array(tile, real)
        keep = cuda.local.array(V, real)
        thread = cuda.threadIdx.x
        warps = cuda.blockDim.x // WARP
        statistic = cuda.blockIdx.x // splits
        split = cuda.blockIdx.x % splits
        sample = statistic // groups
        group = statistic % groups
        vectors = length // V
        total = runs * vectors
        step = splits * cuda.blockDim.x
        step_run = step // vectors
        step_vector = step % vectors
        i = split * cuda.blockDim.x + thread
        run = i // vectors
        j = i % vectors
        n = 0
        high = zero
        low = zero
        squares = zero
        rest = zero
        while not flags & MASK and i + (UNROLL - 1) * step < total:
            for u in range(UNROLL):
                load(x, ((sample * runs + run) * groups + group) * vectors + j, q, u * V)
                run += step_run
                j += step_vector
                if j >= vectors:
                    j -= vectors
                    run += 1
            if before != 0:
                for e in range(tile):
                    q[e] = activate(before, q[e])
            n, high, low, squares, rest = absorb_tile(q, n, high, low, squares, rest, flags)
            i += UNROLL * step
        while i < total:
            load(x, ((sample * runs + run) * groups + group) * vectors + j, q, 0)
            if before != 0:
                for e in range(V):
                    q[e] = activate(before, q[e])
            if flags & MASK:
                start = sample * mask_n + run * mask_r + group * mask_g
                for e in range(V):
                    k = j * V + e
                    keep[e] = real(mask[start + k // inner * mask_c + k % inner * mask_s])
                n, high, low, squares, rest = absorb_kept(q, keep, n, high, low, squares, rest, flags)
            else:
                n, high, low, squares, rest = absorb(q, n, high, low, squares, rest, flags)
            run += step_run
            j += step_vector
            if j >= vectors:
                j -= vectors
                run += 1
            i += step
        n, high, low, squares = merge_block(n, high, low, squares, counts, slots, 0, warps)
        if splits == 1:
            settle(statistic, n, high, low, squares, mean_high, mean_low, rstd, m2, valid, eps, thread == 0)
        else:
            if thread == 0:
                i = statistic * splits + split
                part_n[i] = n
                part_high[i] = high
                part_low[i] = low
                part_m2[i] = squares
            if arrive(counters, statistic, splits, flag):
                n = 0
                high = zero
                low = zero
                squares = zero
                rest = zero
                for k in range(thread, splits, cuda.blockDim.x):
                    i = statistic * splits + k
                    n, high, low, squares, rest = merge(
                        n, high, low, squares, rest, part_n[i], part_high[i], part_low[i], part_m2[i]
                    )
                n, high, low, squares = merge_block(n, high, low, squares, counts, slots, 1, warps)
                settle(statistic, n, high, low, squares, mean_high, mean_low, rstd, m2, valid, eps, thread == 0)

    return planes_statistics


def _make_unit(cuda, P):
    """unit(...): which plane a thread works on. A block has several where planes are small, a plane several blocks
    where they are large. In reverse, what the statistics were taken of last is in the cache, and comes first."""

    @P.dev
    def unit(units, splits, width, runs, groups, channels, flags):
        i = cuda.blockIdx.x // splits * (cuda.blockDim.x // width) + cuda.threadIdx.x // width
        here = i < units
        if flags & REVERSE:
            i = units - 1 - i
        channel = i % channels
        i = i // channels
        run = i % runs
        i = i // runs
        return here, i // groups, run, i % groups, channel

    return unit


def make_planes_apply(cuda, P, vector):
    """The result, from statistics that are known."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store, weight_at = access.V, access.load, access.store, access.weight
    activate, _ = make_activations(P)
    statistic, unit, join = make_statistic(P), _make_unit(cuda, P), make_join(P, access)
    zero, one = real(0), real(1)

    def planes_apply(
        x, residual, weight, bias, weight_wide, bias_wide, mask, y, mean_high, mean_low, rstd,
        units, runs, groups, channels, inner, stride_n, splits, width, mask_n, mask_r, mask_g, mask_c, mask_s,
        eps, flags, before, after,
    ):  # fmt: skip
        q = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        here, sample, run, group, channel = unit(units, splits, width, runs, groups, channels, flags)
        if here:
            high, low, scale = statistic(sample * stride_n + group, mean_high, mean_low, rstd, eps, flags)
            w = one
            b = zero
            if flags & WEIGHT:
                w = weight_at(weight, weight_wide, flags, group * channels + channel)
            if flags & BIAS:
                b = weight_at(bias, bias_wide, flags, group * channels + channel)
            scale *= w
            vectors = inner // V
            base = (((sample * runs + run) * groups + group) * channels + channel) * vectors
            start = sample * mask_n + run * mask_r + group * mask_g + channel * mask_c
            k = cuda.blockIdx.x % splits * width + cuda.threadIdx.x % width
            while k < vectors:
                load(x, base + k, q, 0)
                if before != 0:
                    for e in range(V):
                        q[e] = activate(before, q[e])
                for e in range(V):
                    q[e] = ((q[e] - high) - low) * scale + b
                join(q, p, residual, base + k, flags, after)
                if flags & MASK:
                    for e in range(V):
                        if mask[start + (k * V + e) * mask_s] == 0:
                            q[e] = zero
                store(y, base + k, q, 0)
                k += splits * width

    return planes_apply


def make_planes_sums(cuda, P, vector):
    """The sums of dz * xhat and dz for each sample, group, channel and split, dz being the gradient of the norm.

    With ALONG a run is a row with a weight for each element, by which dz is multiplied.
    """
    real = real_of(P)
    access = make_access(P, vector)
    V, load, load_weights, weight_at = access.V, access.load, access.load_weights, access.weight
    activate, _ = make_activations(P)
    gradient, statistic_of, add = make_gradient(P), make_statistic(P), make_add(P)
    _, sum_two = make_sums(cuda, P, BLOCK)
    zero, one = real(0), real(1)

    def planes_sums(
        x, dy, residual, weight, bias, weight_wide, bias_wide, mask, mean_high, mean_low, rstd, part_weight, part_bias,
        runs, groups, channels, inner, stride_n, splits, mask_n, mask_r, mask_g, mask_c, mask_s,
        eps, flags, before, after,
    ):  # fmt: skip
        slots = cuda.shared.array(SLOTS, real)
        q = cuda.local.array(V, real)
        g = cuda.local.array(V, real)
        w = cuda.local.array(V, real)
        b = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        unit = cuda.blockIdx.x // splits
        split = cuda.blockIdx.x % splits
        channel = unit % channels
        statistic = unit // channels
        sample = statistic // groups
        group = statistic % groups
        high, low, scale = statistic_of(sample * stride_n + group, mean_high, mean_low, rstd, eps, flags)
        for e in range(V):
            w[e] = one
            b[e] = zero
        if not flags & ALONG:
            for e in range(V):
                if flags & WEIGHT:
                    w[e] = weight_at(weight, weight_wide, flags, group * channels + channel)
                if flags & BIAS:
                    b[e] = weight_at(bias, bias_wide, flags, group * channels + channel)
        vectors = inner // V
        total = runs * vectors
        step = splits * cuda.blockDim.x
        step_run = step // vectors
        step_vector = step % vectors
        i = split * cuda.blockDim.x + cuda.threadIdx.x
        run = i // vectors
        j = i % vectors
        s1 = zero
        s2 = zero
        rest1 = zero
        rest2 = zero
        while i < total:
            k = (((sample * runs + run) * groups + group) * channels + channel) * vectors + j
            load(x, k, q, 0)
            load(dy, k, g, 0)
            if flags & ALONG:
                if flags & WEIGHT:
                    load_weights(weight, weight_wide, flags, j, w, 0)
                if flags & BIAS:
                    load_weights(bias, bias_wide, flags, j, b, 0)
            for e in range(V):
                p[e] = b[e]
            if flags & RESIDUAL:
                load(residual, k, p, 0)
                for e in range(V):
                    p[e] += b[e]
            if flags & MASK:
                start = sample * mask_n + run * mask_r + group * mask_g + channel * mask_c
                for e in range(V):
                    m = (j * V + e) * mask_c if flags & ALONG else (j * V + e) * mask_s
                    if mask[start + m] == 0:  # what is not valid may be NaN
                        g[e] = zero
                        q[e] = high
                        p[e] = zero
            t1 = zero
            t2 = zero
            for e in range(V):
                u = q[e]
                if before != 0:
                    u = activate(before, u)
                u = ((u - high) - low) * scale
                dz = gradient(after, g[e], u, w[e], p[e])
                if flags & ALONG:
                    dz *= w[e]
                t1 += dz
                t2 += dz * u
            s1, rest1 = add(s1, rest1, t1)
            s2, rest2 = add(s2, rest2, t2)
            run += step_run
            j += step_vector
            if j >= vectors:
                j -= vectors
                run += 1
            i += step
        s1, s2 = sum_two(s1, s2, slots, 0, cuda.threadIdx.x)
        if cuda.threadIdx.x == 0:
            part_bias[unit * splits + split] = s1
            part_weight[unit * splits + split] = s2

    return planes_sums


def make_planes_backward(cuda, P, vector):
    """dx from the coefficients k1 and k2 of each statistic, and dz, the gradient of the residual."""
    real = real_of(P)
    access = make_access(P, vector)
    V, load, store, weight_at = access.V, access.load, access.store, access.weight
    activate, slope = make_activations(P)
    gradient, statistic_of, unit = make_gradient(P), make_statistic(P), _make_unit(cuda, P)
    zero, one = real(0), real(1)

    def planes_backward(
        x, dy, residual, addend, weight, bias, weight_wide, bias_wide, mask, mean_high, mean_low, rstd, k1, k2, dx, dz,
        units, runs, groups, channels, inner, stride_n, splits, width, mask_n, mask_r, mask_g, mask_c, mask_s,
        eps, flags, before, after,
    ):  # fmt: skip
        q = cuda.local.array(V, real)
        g = cuda.local.array(V, real)
        p = cuda.local.array(V, real)
        here, sample, run, group, channel = unit(units, splits, width, runs, groups, channels, flags)
        if here:
            i = sample * stride_n + group
            high, low, scale = statistic_of(i, mean_high, mean_low, rstd, eps, flags)
            c1 = zero
            c2 = zero
            if not flags & FIXED:
                c2 = k2[i]
                if flags & CENTER:
                    c1 = k1[i]
            w = one
            b = zero
            if flags & WEIGHT:
                w = weight_at(weight, weight_wide, flags, group * channels + channel)
            if flags & BIAS:
                b = weight_at(bias, bias_wide, flags, group * channels + channel)
            vectors = inner // V
            base = (((sample * runs + run) * groups + group) * channels + channel) * vectors
            start = sample * mask_n + run * mask_r + group * mask_g + channel * mask_c
            k = cuda.blockIdx.x % splits * width + cuda.threadIdx.x % width
            while k < vectors:
                load(x, base + k, q, 0)
                load(dy, base + k, g, 0)
                for e in range(V):
                    p[e] = zero
                if flags & RESIDUAL:
                    load(residual, base + k, p, 0)
                for e in range(V):
                    u = q[e]
                    if before != 0:
                        u = activate(before, u)
                    u = ((u - high) - low) * scale
                    dz_e = gradient(after, g[e], u, w, p[e] + b)
                    d = ((dz_e * w - c1) - u * c2) * scale
                    if before != 0:
                        d *= slope(before, q[e])
                    q[e] = d
                    g[e] = dz_e
                if flags & MASK:
                    for e in range(V):
                        if mask[start + (k * V + e) * mask_s] == 0:
                            q[e] = zero
                            g[e] = zero
                if flags & RESIDUAL:
                    store(dz, base + k, g, 0)
                if flags & ADDEND:
                    load(addend, base + k, p, 0)
                    for e in range(V):
                        q[e] += p[e]
                store(dx, base + k, q, 0)
                k += splits * width

    return planes_backward
