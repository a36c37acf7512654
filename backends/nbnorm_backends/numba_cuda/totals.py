"""Small kernels of the size of the statistics or the weights, behind the large ones: sums of partial sums, the
coefficients of a gradient, and the running statistics."""

from __future__ import annotations

import numpy as np

from nbnorm_backends.numba_cuda.functions import (
    MASK,
    WARP,
    WEIGHT,
    make_access,
    make_across,
    make_add,
    real_of,
)

LINES = 8  # rows of a block of sum_columns


def make_finish_gradient(cuda, P, vector):
    """k1 = sum(w * dz) / count and k2 = sum(w * dz * xhat) / count of each statistic, dweight and dbias of each
    channel, from partial sums (samples, groups, channels, splits): a warp for each result, always in one order."""
    real, fdiv, add = real_of(P), P.fdiv, make_add(P)
    weight_at, across = make_access(P, False).weight, make_across(cuda, P, WARP)
    zero, one = real(0), real(1)

    def finish_gradient(
        part_weight, part_bias, weight, weight_wide, valid, k1, k2, dweight, dbias,
        samples, groups, channels, splits, count, first, last, flags,
    ):  # fmt: skip
        lane = cuda.threadIdx.x % WARP
        item = first + (cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x) // WARP
        statistics = samples * groups
        columns = groups * channels
        if item < last:
            s1 = zero
            s2 = zero
            rest1 = zero
            rest2 = zero
            if item < statistics:
                for j in range(lane, channels * splits, WARP):
                    w = one
                    if flags & WEIGHT:
                        w = weight_at(weight, weight_wide, flags, item % groups * channels + j // splits)
                    s1, rest1 = add(s1, rest1, w * part_bias[item * channels * splits + j])
                    s2, rest2 = add(s2, rest2, w * part_weight[item * channels * splits + j])
            else:
                for j in range(lane, samples * splits, WARP):
                    i = (j // splits * columns + item - statistics) * splits + j % splits
                    s1, rest1 = add(s1, rest1, part_bias[i])
                    s2, rest2 = add(s2, rest2, part_weight[i])
            s1 = across(s1)
            s2 = across(s2)
            if lane == 0:
                if item < statistics:
                    size = count
                    if flags & MASK:
                        size = max(valid[item], 1)
                    k1[item] = fdiv(s1, real(size))
                    k2[item] = fdiv(s2, real(size))
                else:
                    dbias[item - statistics] = s1
                    dweight[item - statistics] = s2

    return finish_gradient


def make_sum_columns(cuda, P, vector):
    """dweight and dbias from partial sums (parts, length)."""
    real, add = real_of(P), make_add(P)
    cells = WARP * LINES
    zero = real(0)

    def sum_columns(part_weight, part_bias, dweight, dbias, parts, length):
        shared_weight = cuda.shared.array(cells, real)
        shared_bias = cuda.shared.array(cells, real)
        thread = cuda.threadIdx.x
        column = cuda.blockIdx.x * WARP + thread % WARP
        s1 = zero
        s2 = zero
        rest1 = zero
        rest2 = zero
        if column < length:
            for row in range(thread // WARP, parts, LINES):
                s1, rest1 = add(s1, rest1, part_bias[row * length + column])
                s2, rest2 = add(s2, rest2, part_weight[row * length + column])
        shared_bias[thread] = s1
        shared_weight[thread] = s2
        cuda.syncthreads()
        if thread < WARP and column < length:
            for line in range(1, LINES):
                s1 += shared_bias[line * WARP + thread]
                s2 += shared_weight[line * WARP + thread]
            dbias[column] = s1
            dweight[column] = s2

    return sum_columns


def make_commit(cuda, P, vector):
    """Running statistics after one more batch: (1 - momentum) * old + momentum * new, the variance unbiased, of several
    samples the mean of those known. A batch with a statistic that is not finite is left out. One block."""
    real, fdiv, add = real_of(P), P.fdiv, make_add(P)
    zero, one = real(0), real(1)

    def commit(mean_high, m2, valid, running_mean, running_var, samples, channels, count, momentum, flags):
        spoilt = cuda.shared.array(1, np.int32)
        if cuda.threadIdx.x == 0:
            spoilt[0] = 0
        cuda.syncthreads()
        for i in range(cuda.threadIdx.x, samples * channels, cuda.blockDim.x):
            # A difference with itself is 0 for finite numbers alone.
            if mean_high[i] - mean_high[i] != zero or m2[i] - m2[i] != zero:
                cuda.atomic.add(spoilt, 0, 1)
        cuda.syncthreads()
        if spoilt[0] == 0:
            for channel in range(cuda.threadIdx.x, channels, cuda.blockDim.x):
                means = 0
                variances = 0
                mean = zero
                variance = zero
                rest_mean = zero
                rest_variance = zero
                for sample in range(samples):
                    i = sample * channels + channel
                    size = count
                    if flags & MASK:
                        size = valid[i]
                    if size > 0:
                        means += 1
                        mean, rest_mean = add(mean, rest_mean, mean_high[i])
                    if size > 1:
                        variances += 1
                        variance, rest_variance = add(variance, rest_variance, fdiv(m2[i], real(size - 1)))
                if means > 0:
                    new = fdiv(mean, real(means))
                    running_mean[channel] = (one - momentum) * running_mean[channel] + momentum * new
                if variances > 0:
                    new = fdiv(variance, real(variances))
                    running_var[channel] = (one - momentum) * running_var[channel] + momentum * new

    return commit
