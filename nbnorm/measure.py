"""The one way in which two calls are timed against each other: in turn, in one process, as the median of many pairs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

WARM_UP = 3  # pairs that are run and not counted: caches, page faults, clocks
LEAST = 2e-4  # seconds that one timing takes, by repeating a short call: the clock and the loop cost 1e-7


class Comparison(NamedTuple):
    """Two calls, timed in turn.

    Attributes
    ----------
    first, second : float
        Median times of one call, in seconds.
    ratios : tuple of float
        Lower quartile, median and upper quartile, over the pairs, of the second's time over the first's.
    """

    first: float
    second: float
    ratios: tuple[float, float, float]


def compare(first: Callable[[], Any], second: Callable[[], Any], *, pairs: int = 31) -> Comparison:
    """Time two calls in turn (A B A B ...), so that a slow spell of the machine meets both.

    Parameters
    ----------
    first, second : callables without arguments
        Each is called a few times before it counts.
    pairs : int
        At least 2.

    Returns
    -------
    Comparison

    Examples
    --------
    >>> from nbnorm.measure import compare
    >>> found = compare(lambda: sum(range(10)), lambda: sum(range(1000)), pairs=5)
    >>> found.ratios[1] > 1
    True
    """
    repeats = [_repeats(call) for call in (first, second)]
    times: list[tuple[float, float]] = []
    for _ in range(WARM_UP + pairs):
        times.append((_seconds(first, repeats[0]), _seconds(second, repeats[1])))
    times = times[WARM_UP:]
    low, median, high = statistics.quantiles([b / a for a, b in times], n=4)
    ours, theirs = (statistics.median(column) for column in zip(*times))
    return Comparison(ours, theirs, (low, median, high))


def _repeats(call: Callable[[], Any]) -> int:
    """How often to run a call so that the sum takes LEAST seconds."""
    call()
    return max(1, math.ceil(LEAST / max(min(_seconds(call, 1) for _ in range(3)), 1e-9)))


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Time of one of `repeats` calls."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats
