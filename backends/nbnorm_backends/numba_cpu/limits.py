"""What memory allows: the time of a copy, or of the sum of two arrays, that a norm's time is a fraction of."""

from __future__ import annotations

import math
from typing import Any

from numba import njit
from numpy.typing import NDArray

from nbnorm.parallel import thread_count
from nbnorm_backends.numba_cpu.elements import plus, put, span
from nbnorm_backends.numba_cpu.pool import Pool

Array = NDArray[Any]
CHUNK = 65536  # elements, as in a norm

_pool = Pool(thread_count())


def move(x: Array, other: Array | None, y: Array, *, stream: bool) -> None:
    """y = x, or x + other: float32, contiguous; past the caches with `stream`, for which y begins with a cache line."""
    _pool.run(_move, math.ceil(x.size / CHUNK), (x, other, y, stream or None), parallel=x.size > 2 * CHUNK)


@njit(nogil=True)
def _move(chunk, x, other, y, stream):  # type: ignore[no-untyped-def]  # compiled
    begin, end = chunk * CHUNK, min((chunk + 1) * CHUNK, x.size)
    _move_row(x[begin:end], span(other, begin, end), y[begin:end], stream)


@njit(nogil=True)
def _move_row(x, other, y, stream):  # type: ignore[no-untyped-def]  # compiled
    for i in range(x.size):
        put(stream, y, i, plus(x[i], other, i))
