"""How many threads may work."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

from nbnorm.checks import check_length

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")

_limit: ContextVar[int | None] = ContextVar("nbnorm_threads", default=None)


def available_threads() -> int:
    """The processors that this process may use: its affinity, and the quota of its control groups, rounded up."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = processor_quota()
    return processors if quota is None else max(1, min(processors, math.ceil(quota)))


def processor_quota() -> float | None:
    """Processors' worth of time that the control groups of this process allow, as containers set it; None for no limit.

    Version 2 of the groups and version 1, as the kernel documents them (Documentation/admin-guide/cgroup-v2.rst,
    "cpu.max", and scheduler/sched-bwc.rst, "cpu.cfs_quota_us"). A group is bound by those above it as well.
    """
    quotas = []
    for line in _read(MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        root = CONTROL_GROUPS / "cpu" if "cpu" in controllers.split(",") else CONTROL_GROUPS
        if controllers and root == CONTROL_GROUPS:
            continue  # of another controller
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            quotas += _quotas(root / group)
    return min(quotas, default=None)


def _quotas(group: Path) -> list[float]:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    try:
        found = float(quota) / float(period)
    except (ValueError, ZeroDivisionError):  # "max", or no such file
        return []
    return [found] if found > 0 else []  # -1 is version 1's "max"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def thread_count() -> int:
    """NBNORM_NUM_THREADS, at most the processors that this process may use; without it, all of them.

    Raises
    ------
    ValueError
        If the variable is not a positive whole number.
    """
    wanted = os.environ.get("NBNORM_NUM_THREADS", "").strip()
    if not wanted:
        return available_threads()
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"NBNORM_NUM_THREADS must be a positive whole number; got {wanted!r}")
    return clipped("NBNORM_NUM_THREADS", int(wanted))


def clipped(name: str, wanted: int) -> int:
    """At most the processors that this process may use; that there are no more is told once."""
    available = available_threads()
    if wanted > available:
        _warn_of_clipping(name, available)
    return min(wanted, available)


@cache
def _warn_of_clipping(name: str, available: int) -> None:
    warnings.warn(f"{name} is more than the {available} processors that this process may use", stacklevel=5)


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let calls inside the ``with`` block use at most `n` threads, the calling one among them.

    Holds for the current context (thread or asyncio task) only; an inner block replaces an outer one. No bit of a
    result depends on it. More threads than the backend was started with (NBNORM_NUM_THREADS, else every processor that
    the process may use) cannot be had; more than there are processors are told of by one warning.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    ValueError, TypeError
        If it is not a positive whole number.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> with nbnorm.threads(1):
    ...     y = nbnorm.layer_norm(np.zeros((2, 3)), 3)
    """
    token = _limit.set(clipped("n", check_length("n", n)))
    try:
        yield
    finally:
        _limit.reset(token)


def thread_limit(most: int) -> int:
    """The threads that a call may use here, of `most` that there are."""
    limit = _limit.get()
    return most if limit is None else min(limit, most)
