"""Run the chunks of a kernel: by a fork-safe pool of threads, or by Numba's own prange.

The pool is the default, because it does no harm in other people's programs: Numba's workqueue layer aborts the
process when two threads enter it, and its OpenMP layer kills or hangs forked children. Kernels release the GIL, the
caller always works, and helpers only claim chunks that nobody has begun.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

import numba
import numpy as np
from numba import njit, prange

Kernel = Callable[..., None]


class Scheduler(Protocol):
    """What runs ``kernel(chunk, *args)`` for every chunk; `parallel` says whether the work is worth sharing."""

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None: ...


class _Job:
    """The chunks of one call. Claiming is ``next`` on one counter, which the GIL makes atomic."""

    def __init__(self, kernel: Kernel, chunks: int, args: tuple[Any, ...]) -> None:
        self._kernel, self._chunks, self._args = kernel, chunks, args
        self._claims = itertools.count()
        self._left = chunks
        self._lock = threading.Lock()
        self._finished = threading.Event()
        self._error: BaseException | None = None

    def work(self) -> None:
        """Claim and run chunks until none is left; after an error the rest are only counted."""
        done = 0
        for chunk in self._claims:
            if chunk >= self._chunks:
                break
            try:
                if self._error is None:
                    self._kernel(chunk, *self._args)
            except BaseException as error:  # noqa: BLE001  whoever runs the chunk, the caller of run() shall see it
                self._error = error
            done += 1
        with self._lock:
            self._left -= done
            if not self._left:
                self._finished.set()

    def wait(self) -> None:
        self._finished.wait()
        if self._error is not None:
            raise self._error


class Pool:
    """The caller and up to ``threads - 1`` daemon helpers, started when first needed, anew in a forked child."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._helpers = 0
        self._lock = threading.Lock()

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None:
        """Run ``kernel(chunk, *args)`` for every chunk; raises what a chunk raised, after all have ended."""
        threads = min(self.threads, chunks) if parallel else 1
        if threads <= 1:
            for chunk in range(chunks):
                kernel(chunk, *args)
            return
        job = _Job(kernel, chunks, args)
        for _ in range(min(threads - 1, self._started(threads - 1))):
            self._jobs.put(job)
        job.work()
        job.wait()

    def _started(self, wanted: int) -> int:
        """Helpers that run, after starting what is missing; fewer where the system gives no more threads."""
        if self._helpers < wanted:
            with self._lock:
                while self._helpers < wanted:
                    helper = threading.Thread(target=_help, args=(self._jobs,), name="nbnorm", daemon=True)
                    try:
                        helper.start()
                    except RuntimeError:  # no more threads, or the interpreter is ending: the caller does the work
                        break
                    self._helpers += 1
        return self._helpers


def _help(jobs: queue.SimpleQueue[_Job]) -> None:
    while True:
        job = jobs.get()
        job.work()
        del job  # its arrays must not live on while this thread waits for the next


class Prange:
    """Numba's parallel loop over the same chunks, for programs that know their threading layer to be safe.

    The results are the pool's, bit for bit: the kernel is the same compiled function.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pid = os.getpid()
        self._drivers: dict[Kernel, Callable[[int, tuple[Any, ...]], None]] = {}
        self._lock = threading.Lock()
        _two_chunks(2)  # starts the threading layer, which has no name before
        self._layer = numba.threading_layer()

    def refusal(self) -> str | None:
        """Why prange must not run here, or None."""
        if self._layer == "workqueue":
            return (
                "NBNORM_SCHEDULER=prange: Numba's threading layer here is workqueue, which aborts the process when "
                "two threads enter it; install tbb or OpenMP, or unset NBNORM_SCHEDULER"
            )
        if os.getpid() != self._pid:
            return (
                f"NBNORM_SCHEDULER=prange: this process is a forked child, where Numba's {self._layer} layer may hang "
                "or die; unset NBNORM_SCHEDULER, or start processes by spawn"
            )
        return None

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None:
        """Run ``kernel(chunk, *args)`` for every chunk."""
        if not parallel or chunks == 1:
            for chunk in range(chunks):
                kernel(chunk, *args)
            return
        driver = self._drivers.get(kernel)
        if driver is None:
            with self._lock:
                driver = self._drivers.setdefault(kernel, _driver(kernel))
        before = numba.get_num_threads()
        numba.set_num_threads(min(self.threads, numba.config.NUMBA_NUM_THREADS))
        try:
            driver(chunks, args)
        finally:
            numba.set_num_threads(before)


def _driver(kernel: Kernel) -> Callable[[int, tuple[Any, ...]], None]:
    def drive(chunks: int, args: tuple[Any, ...]) -> None:
        for chunk in prange(chunks):
            kernel(np.int64(chunk), *args)  # prange counts in uint64, for which the kernel would be compiled anew

    compiled: Callable[[int, tuple[Any, ...]], None] = njit(parallel=True, nogil=True)(drive)
    return compiled


@njit(parallel=True)
def _two_chunks(chunks: int) -> int:
    total = 0
    for chunk in prange(chunks):
        total += chunk
    return total
