"""The kernels' array of statistics, (5, n*g), and what it stands for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.statistics import Moments
from nbnorm_backends.numba_cpu.kernels import COUNT, EXACT, M2, MEAN, RESIDUAL, RSTD, STATISTICS

Array = NDArray[Any]


def table_of(x: Array, stats: tuple[Array | None, Array] | None = None, count: Any = None) -> Array:
    """The array for x (n, r, g, c, s), with what is given; the count is that of a call without a mask."""
    n, r, g, c, s = x.shape
    table = np.zeros((STATISTICS, n * g))
    table[COUNT] = r * c * s if count is None else np.broadcast_to(count, (n, g)).reshape(-1)
    if stats is not None:
        mean, rstd = stats
        table[MEAN] = 0.0 if mean is None else mean.reshape(-1)
        table[RSTD] = rstd.reshape(-1)
    return table


def moments_of(shape: tuple[int, ...], table: Array, mask: Array | None = None) -> Moments:
    """Moments (n, g) of an x of that shape."""
    n, r, g, c, s = shape
    mean, residual, m2, count = (table[row].reshape(n, g) for row in (MEAN, RESIDUAL, M2, COUNT))
    whole = r * c * s
    partial = mask is not None and not (count == whole).all()
    return Moments(count.astype(np.int64) if partial else whole, mean, m2, residual)


@EXACT
def give(mean, var, eps, table):  # type: ignore[no-untyped-def]  # compiled
    """Given statistics (g,), the same for every sample, into the table: `nbnorm.backend.fixed_stats`."""
    for p in range(table.shape[1]):
        j = p % mean.size
        table[MEAN, p] = mean[j]
        table[RSTD, p] = 1.0 / np.sqrt(var[j] + eps)


@EXACT
def move(mean, var, momentum, table):  # type: ignore[no-untyped-def]  # compiled
    """Running statistics (g,) after the batch of one table, (5, g): `Moments.blend`."""
    for j in range(mean.size):
        mean[j] = (1.0 - momentum) * mean[j] + momentum * table[MEAN, j]
        if table[COUNT, j] > 1.0:
            var[j] = (1.0 - momentum) * var[j] + momentum * (table[M2, j] / (table[COUNT, j] - 1.0))


@EXACT
def join_parts(parts, eps, stats):  # type: ignore[no-untyped-def]  # compiled
    """Statistics (5, g) of groups from those of their parts (5, parts, g): `Moments.merge` of all parts at once, about
    the mean of their means."""
    for j in range(stats.shape[1]):
        count = np.sum(parts[COUNT, :, j])
        stats[:, j] = 0.0
        if count == 0.0:
            continue
        pivot = 0.0
        for i in range(parts.shape[1]):
            pivot += parts[MEAN, i, j] * (parts[COUNT, i, j] / count)
        shift = 0.0
        for i in range(parts.shape[1]):
            shift += (parts[MEAN, i, j] - pivot + parts[RESIDUAL, i, j]) * (parts[COUNT, i, j] / count)
        m2 = 0.0
        for i in range(parts.shape[1]):
            distance = parts[MEAN, i, j] - pivot + (parts[RESIDUAL, i, j] - shift)
            m2 += parts[M2, i, j] + parts[COUNT, i, j] * (distance * distance)
        stats[COUNT, j] = count
        stats[MEAN, j] = pivot + shift
        stats[RESIDUAL, j] = (pivot - stats[MEAN, j]) + shift
        stats[M2, j] = m2
        stats[RSTD, j] = 1.0 / np.sqrt(m2 / count + eps)
