"""Device functions that several kernels share, and the flags that switch a kernel at run time.

All are compiled into the kernel that calls them. `cuda` and `P` are what the factory of the kernel was given.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from nbnorm.backend import ACTIVATIONS, LEAK

WARP = 32
ALL_LANES = 0xFFFFFFFF

# What a launch does, in `flags`. Uniform branches cost next to nothing; a variant for each would be thousands.
CENTER = 1  # without it: RMS statistics
WEIGHT = 2
BIAS = 4
WIDE = 8  # weight and bias are float32 beside a half type
PLANES = 16  # row kernels: one weight for each `inner` elements, another for each group
RESIDUAL = 32
TOTAL = 64  # x + residual is what is normalized, and is stored
MASK = 128
ADDEND = 256  # added to dx
FIXED = 512  # the statistics were given: no gradient flows through them
VARIANCE = 1024  # `rstd` holds variances, to which eps is to be added
ALONG = 2048  # a statistic for each row and a weight for each column, as layer norm has them
REVERSE = 4096
BARE = 8192  # row kernels: nobody asks for the statistics

CODES = {None: 0} | {name: code for code, name in enumerate(ACTIVATIONS, 1)}
RELU, LEAKY, SILU, GELU, GELU_TANH, SIGMOID, TANH = (CODES[name] for name in ACTIVATIONS)


def real_of(P):
    """The NumPy type that a kernel computes in."""
    return np.float64 if P.V == 2 else np.float32


def make_access(P, vector):
    """Loads and stores of V elements: 16 bytes, or one element of any alignment.

    Returns V, load(pointer, k, array, offset), store(the same), and two that read weights: load_weights(pointer,
    wide pointer, flags, k, array, offset), and weight(pointer, wide pointer, flags, i).
    """
    V, half, ld, st, ld1, st1 = P.V if vector else 1, P.V == 8, P.ld, P.st, P.ld1, P.st1

    @P.dev
    def load_one(pointer, k, array, offset):
        array[offset] = ld1(pointer, k)

    @P.dev
    def store_one(pointer, k, array, offset):
        st1(pointer, k, array[offset])

    load, store = (ld, st) if vector else (load_one, store_one)

    @P.dev
    def load_weights(pointer, wide, flags, k, array, offset):
        if half and flags & WIDE:
            for e in range(V):
                array[offset + e] = wide[k * V + e]
        else:
            load(pointer, k, array, offset)

    @P.dev
    def weight(pointer, wide, flags, i):
        if half and flags & WIDE:
            return wide[i]
        return ld1(pointer, i)

    return SimpleNamespace(V=V, load=load, store=store, load_weights=load_weights, weight=weight)


FOLD = 32  # even: terms that a thread adds plainly, where registers hold no rests; off by 1e-6 of their sum at most


def make_add(P):
    """add(total, rest, term): total + term, and what rounding has put into it, to be taken off the next term (Kahan).

    Thousands of equal terms would be rounded to one side, and were off by 1e-5 of their sum.
    """
    zero = real_of(P)(0)

    @P.dev
    def add(total, rest, term):
        term -= rest
        found = total + term
        rest = (found - total) - term
        if rest - rest != zero:  # it is not finite, as the total is not: which shall stay infinite
            rest = zero
        return found, rest

    return add


def make_across(cuda, P, threads):
    """across(value): the sum over `threads` lanes side by side, a power of two; every one of them gets it."""
    steps = tuple(step for step in (16, 8, 4, 2, 1) if step < threads)

    @P.dev
    def across(value):
        for step in steps:
            value += cuda.shfl_xor_sync(ALL_LANES, value, step)
        return value

    return across


def make_sums(cuda, P, threads):
    """Sums over `threads` consecutive threads, a power of two; every one of them gets the result.

    `slots` is shared, of 6 * threads / 32 reals: two regions, taken in turns by `turn` = 0 or 1, so that one barrier a
    sum is enough. More than a warp must be the whole block.
    """
    warps = max(1, threads // WARP)
    across, across_heads = make_across(cuda, P, threads), make_across(cuda, P, warps)

    @P.dev
    def gather(slots, base, lane):
        return across_heads(slots[base + (lane & (warps - 1))])

    @P.dev
    def sum_one(value, slots, turn, lane):
        value = across(value)
        if warps > 1:
            base = turn * 3 * warps
            if lane & (WARP - 1) == 0:
                slots[base + lane // WARP] = value
            cuda.syncthreads()
            value = gather(slots, base, lane)
        return value

    @P.dev
    def sum_two(a, b, slots, turn, lane):
        a, b = across(a), across(b)
        if warps > 1:
            base = turn * 3 * warps + warps
            if lane & (WARP - 1) == 0:
                slots[base + lane // WARP] = a
                slots[base + warps + lane // WARP] = b
            cuda.syncthreads()
            a, b = gather(slots, base, lane), gather(slots, base + warps, lane)
        return a, b

    return sum_one, sum_two


def make_activations(P):
    """(activate, slope): an activation by its code, and its derivative.

    Four of them are (p * z + q) * sigmoid(t) + offset, t being z, 2 z or a cubic of z: so there are three branches.
    """
    real = real_of(P)
    exp, erf, fdiv = P.exp, P.erf, P.fdiv
    zero, half, one, two, three = (real(number) for number in (0, 0.5, 1, 2, 3))
    leak, root_half, density = real(LEAK), real(np.sqrt(0.5)), real(1 / np.sqrt(2 * np.pi))
    # The tanh of gelu_tanh (Hendrycks and Gimpel, 2016) as a sigmoid, which does not cancel.
    linear, cubic = real(np.sqrt(8 / np.pi)), real(np.sqrt(8 / np.pi) * 0.044715)

    @P.dev
    def inner(code, z):
        """t, and its derivative."""
        t, rate = z, one
        if code == TANH:
            t, rate = two * z, two
        elif code == GELU_TANH:  # alone: beyond 2^64 the square of a float32 is infinite
            bend = cubic * (z * z)
            t, rate = z * (linear + bend), linear + three * bend
        return t, rate

    @P.dev
    def factor(code, z):
        if code == SIGMOID:
            return one
        if code == TANH:
            return two
        return z

    @P.dev
    def sigmoid(t):
        return fdiv(one, one + exp(-t))

    @P.dev
    def activate(code, z):
        result = z
        if 0 < code <= LEAKY:
            if z <= zero:
                result = z * leak if code == LEAKY else zero
        elif code == GELU:
            result = half * z * (one + erf(z * root_half))
        elif code != 0:
            t, _ = inner(code, z)
            result = factor(code, z) * sigmoid(t)
            if code == TANH:
                result -= one
        return result

    @P.dev
    def slope(code, z):
        result = one
        if 0 < code <= LEAKY:
            if not z > zero:
                result = leak if code == LEAKY else zero
        elif code == GELU:
            result = half * (one + erf(z * root_half)) + z * density * exp(-half * z * z)
        elif code != 0:
            t, rate = inner(code, z)
            s = sigmoid(t)
            flat = s * (one - s)
            result = zero
            if flat != zero:  # far out the other factor may be infinite
                result = factor(code, z) * flat * rate
            if code != SIGMOID and code != TANH:
                result += s
        return result

    return activate, slope


def make_merge(cuda, P):
    """Chan's merge of (count, high, low, m2), the mean being high + low, and the same over a warp and a block.

    high is an element of the set: equal values have low = 0 and m2 = 0, exactly; an offset costs no digits. `rest` is
    m2's, where many are merged one after another.
    """
    real, fdiv, add = real_of(P), P.fdiv, make_add(P)
    zero = real(0)

    @P.dev
    def merge(n, high, low, m2, rest, other_n, other_high, other_low, other_m2):
        if other_n > 0:
            if n == 0:
                n, high, low, m2 = other_n, other_high, other_low, other_m2
            else:
                total = n + other_n
                distance = (other_high - high) + (other_low - low)
                share = fdiv(real(other_n), real(total))
                low += distance * share
                m2, rest = add(m2, rest, other_m2 + distance * distance * (real(n) * share))
                n = total
        return n, high, low, m2, rest

    @P.dev
    def merge_warp(n, high, low, m2):
        """Every lane gets the result of lane 0."""
        for step in (16, 8, 4, 2, 1):
            other_n = cuda.shfl_down_sync(ALL_LANES, n, step)
            other_high = cuda.shfl_down_sync(ALL_LANES, high, step)
            other_low = cuda.shfl_down_sync(ALL_LANES, low, step)
            other_m2 = cuda.shfl_down_sync(ALL_LANES, m2, step)
            n, high, low, m2, _ = merge(n, high, low, m2, zero, other_n, other_high, other_low, other_m2)
        n = cuda.shfl_sync(ALL_LANES, n, 0)
        high = cuda.shfl_sync(ALL_LANES, high, 0)
        low = cuda.shfl_sync(ALL_LANES, low, 0)
        m2 = cuda.shfl_sync(ALL_LANES, m2, 0)
        return n, high, low, m2

    @P.dev
    def merge_block(n, high, low, m2, counts, slots, turn, warps):
        """Every thread of the block gets the result. `counts` is shared, of 2 * warps int64, `slots` of 6 * warps
        reals; `turn` is 0 and 1 in turns, so that one barrier is enough."""
        n, high, low, m2 = merge_warp(n, high, low, m2)
        if warps > 1:
            thread = cuda.threadIdx.x
            if thread & (WARP - 1) == 0:
                i = turn * warps + thread // WARP
                counts[i] = n
                slots[3 * i] = high
                slots[3 * i + 1] = low
                slots[3 * i + 2] = m2
            cuda.syncthreads()
            n = 0
            if thread & (WARP - 1) < warps:
                i = turn * warps + (thread & (WARP - 1))
                n, high, low, m2 = counts[i], slots[3 * i], slots[3 * i + 1], slots[3 * i + 2]
            n, high, low, m2 = merge_warp(n, high, low, m2)
        return n, high, low, m2

    return merge, merge_block


def make_two_sum(P):
    """two_sum(a, b): the nearest number to a + b, and what that leaves (Knuth)."""

    @P.dev
    def two_sum(a, b):
        total = a + b
        part = total - a
        return total, (a - (total - part)) + (b - part)

    return two_sum


FEW = 8  # values of a thread; until then `high` follows the mean, for the digits of a large `low` would be lost


def make_absorb(P, size):
    """Take `size` values into (count, high, low, m2, rest of m2): their own mean and sum of squares, then Chan's merge.

    absorb(values, n, high, low, m2, rest, flags) takes all of them, absorb_kept(values, keep, and so on) those where
    keep is not 0.
    """
    real, fdiv, two_sum, add = real_of(P), P.fdiv, make_two_sum(P), make_add(P)
    zero, share_of_one, whole = real(0), real(1 / size), real(size)

    @P.dev
    def absorb(values, n, high, low, m2, rest, flags):
        squares = zero
        if flags & CENTER:
            if n == 0:
                high = values[0]
            s = zero
            for e in range(size):
                s += values[e] - high
            mean = s * share_of_one
            for e in range(size):
                d = (values[e] - high) - mean
                squares += d * d
            before = real(n)
            share = fdiv(whole, before + whole)
            distance = mean - low
            low += distance * share
            squares += distance * distance * (before * share)
            if n < FEW:
                high, low = two_sum(high, low)
        else:
            for e in range(size):
                squares += values[e] * values[e]
        m2, rest = add(m2, rest, squares)
        return n + size, high, low, m2, rest

    @P.dev
    def absorb_kept(values, keep, n, high, low, m2, rest, flags):
        for e in range(size):
            if keep[e] != 0:
                n += 1
                if flags & CENTER:
                    if n == 1:
                        high = values[e]
                    d = (values[e] - high) - low
                    low += fdiv(d, real(n))
                    square = d * ((values[e] - high) - low)
                    if n <= FEW:
                        high, low = two_sum(high, low)
                else:
                    square = values[e] * values[e]
                m2, rest = add(m2, rest, square)
        return n, high, low, m2, rest

    return absorb, absorb_kept


def make_join(P, access):
    """join(q, p, residual, i, flags, after): what is behind a norm, of the V elements of q; p is overwritten."""
    V, load = access.V, access.load
    activate, _ = make_activations(P)

    @P.dev
    def join(q, p, residual, i, flags, after):
        if flags & RESIDUAL:
            load(residual, i, p, 0)
            for e in range(V):
                q[e] += p[e]
        if after != 0:
            for e in range(V):
                q[e] = activate(after, q[e])

    return join


def make_settle(P):
    """settle(i, n, high, low, m2, mean_high, mean_low, rstd, sums, valid, eps, write): the reciprocal standard
    deviation, 0 where nothing was counted; written with the rest where `write` says, the mean as the nearest number and
    what that leaves."""
    real, rsqrt, fdiv, two_sum = real_of(P), P.rsqrt, P.fdiv, make_two_sum(P)

    @P.dev
    def settle(i, n, high, low, m2, mean_high, mean_low, rstd, sums, valid, eps, write):
        scale = real(0)
        if n > 0:
            scale = rsqrt(fdiv(m2, real(n)) + eps)
        if write:
            mean_high[i], mean_low[i] = two_sum(high, low)
            rstd[i] = scale
            sums[i] = m2
            valid[i] = n
        return scale

    return settle


def make_arrive(cuda, P):
    """arrive(counters, i, expected, flag): whether this block is the last of `expected` that arrive at the i-th
    counter, which then is 0 again. What the others wrote before is visible to it. `flag` is shared, of one int32."""
    add = getattr(P, "atomic_add", cuda.atomic.add)  # Numba's own takes arrays, no pointers

    @P.dev
    def arrive(counters, i, expected, flag):
        cuda.threadfence()
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            last = add(counters, i, 1) == expected - 1
            if last:
                add(counters, i, -expected)
            flag[0] = 1 if last else 0
        cuda.syncthreads()
        cuda.threadfence()
        return flag[0] == 1

    return arrive


def make_gradient(P):
    """gradient(code, dy, xhat, w, b): the gradient of w * xhat + b, where an activation follows."""
    _, slope = make_activations(P)

    @P.dev
    def gradient(code, dy, xhat, w, b):
        result = dy
        if code != 0:
            result *= slope(code, xhat * w + b)
        return result

    return gradient


def make_statistic(P):
    """statistic(i, mean_high, mean_low, rstd, eps, flags): (high, low, scale) of the i-th group."""
    real, rsqrt = real_of(P), P.rsqrt

    @P.dev
    def statistic(i, mean_high, mean_low, rstd, eps, flags):
        high = real(0)
        low = real(0)
        scale = rstd[i]
        if flags & CENTER:
            high = mean_high[i]
        if flags & VARIANCE:
            scale = rsqrt(scale + eps)
        elif flags & CENTER:
            low = mean_low[i]
        return high, low, scale

    return statistic
