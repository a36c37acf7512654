"""How many threads may work. Apart from the pool so that it can be asked without importing Numba."""

from __future__ import annotations

import os


def available_threads() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    return min(int(wanted), available_threads())
