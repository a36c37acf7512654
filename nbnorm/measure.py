"""The one way in which two calls are timed against each other: in turn, in one process, as the median of many pairs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

WARM_UP = 3  # pairs that are run and not counted: caches, page faults, clocks
LEAST = 2e-4  # seconds that one timing takes, by repeating a short call: the clock and the loop cost 1e-7
# Upper over lower quartile of a call's time over its own, in 31 pairs, on two processors: 1.01 to 1.22 in 32 trials of
# four norms on a quiet machine; out of cache beside another program 1.06 to 1.97.
NOISY = 1.25

Quartiles = tuple[float, float, float]


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
    ratios: Quartiles


def compare(
    first: Callable[[], Any],
    second: Callable[[], Any],
    *,
    pairs: int = 31,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Comparison:
    """Time two calls in turn (A B A B ...), so that a slow spell of the machine meets both.

    Parameters
    ----------
    first, second : callables without arguments
        Each is called a few times before it counts.
    pairs : int
        At least 2.
    timer : callable, optional
        Runs a call and returns the seconds that it took, as a device's events tell; the host's clock where not given.

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
    timers = [timer or partial(_seconds, repeats=_repeats(call)) for call in (first, second)]
    times: list[tuple[float, float]] = []
    for _ in range(WARM_UP + pairs):
        times.append((timers[0](first), timers[1](second)))
    times = times[WARM_UP:]
    low, median, high = statistics.quantiles([b / a for a, b in times], n=4)
    ours, theirs = (statistics.median(column) for column in zip(*times))
    return Comparison(ours, theirs, (low, median, high))


def verdict(ratios: Quartiles, noise: Quartiles) -> str:
    """What a ratio tells, beside that of a call to itself.

    Parameters
    ----------
    ratios : three floats
        `Comparison.ratios`: quartiles of the second call's time over the first's.
    noise : three floats
        The same of the first call beside itself, measured in the same session.

    Returns
    -------
    str
        "faster" or "slower", of the first call, where the quartiles of both lie apart. Where they overlap, "too noisy
        to tell" if the upper quartile of either is more than 1.25 times its lower, else "too close to tell".

    Notes
    -----
    Two series of one call, of random times, are told apart in 1 case of 10 with 3 pairs, 1 of 100 with 9, and in none
    of 10,000 with 31.

    Examples
    --------
    >>> from nbnorm.measure import verdict
    >>> verdict((1.2, 1.3, 1.4), noise=(0.98, 1.0, 1.02))
    'faster'
    >>> verdict((1.2, 1.3, 1.4), noise=(0.8, 1.0, 1.3))
    'too noisy to tell'
    """
    if ratios[0] > noise[2]:
        return "faster"
    if ratios[2] < noise[0]:
        return "slower"
    return "too noisy to tell" if noisy(noise) or noisy(ratios) else "too close to tell"


def noisy(ratios: Quartiles) -> bool:
    """Whether ratios spread by more than those of a call against itself do on a quiet machine."""
    return ratios[2] > NOISY * ratios[0]


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
