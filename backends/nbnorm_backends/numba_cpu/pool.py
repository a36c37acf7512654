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

from nbnorm.dispatch import registry

Kernel = Callable[..., None]


class Scheduler(Protocol):
    """What runs ``kernel(chunk, *args)`` for every chunk; `parallel` says whether the work is worth sharing."""

    threads: int

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None: ...


class _Job:
    """The chunks of one call. Claiming is ``next`` on one counter, which the GIL makes atomic.

    The caller ends the job: it waits for the helpers that have joined, not for a count of chunks, which an interrupt
    between a claim and its kernel would leave short for ever.
    """

    def __init__(self, kernel: Kernel, chunks: int, args: tuple[Any, ...]) -> None:
        self._kernel, self._chunks, self._args = kernel, chunks, args
        self._claims = itertools.count()
        self._changed = threading.Condition()
        self._helpers = 0
        self._closed = False
        self._error: BaseException | None = None

    def help(self) -> None:
        """Join, unless the caller has closed the job already; what a chunk raises is the caller's."""
        with self._changed:
            if self._closed:
                return
            self._helpers += 1
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  the helper must live on, and the caller shall see it
            self._error = error
        finally:
            with self._changed:
                self._helpers -= 1
                self._changed.notify()

    def run(self) -> None:
        """Work, then wait until no helper touches the arrays any more, even when interrupted; raise what was raised."""
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001  raised below, after the helpers have left
            self._error = error
        while True:
            try:
                self._close()
                break
            except KeyboardInterrupt as interrupt:
                self._error = interrupt
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        """Claim and run chunks until none is left or one has failed."""
        for chunk in self._claims:
            if chunk >= self._chunks or self._error is not None:
                return
            self._kernel(chunk, *self._args)

    def _close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._helpers)


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
        job.run()

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
        job.help()
        del job  # its arrays must not live on while this thread waits for the next


class Prange:
    """Numba's parallel loop over the same chunks, for programs that know their threading layer to be safe.

    The results are the pool's, bit for bit: the kernel is the same compiled function.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._drivers: dict[Kernel, Callable[[int, tuple[Any, ...]], None]] = {}
        self._layer = ""

    def refusal(self) -> str | None:
        """Why prange must not run here, or None."""
        if registry.forked:
            return (
                "NBNORM_SCHEDULER=prange: this process is a forked child, where a threading layer that ran in its "
                "parent may hang or die; unset NBNORM_SCHEDULER, or start processes by spawn"
            )
        if not self._layer:
            _two_chunks(2)  # starts the threading layer, which has no name before
            self._layer = numba.threading_layer()
        if self._layer == "workqueue":
            return (
                "NBNORM_SCHEDULER=prange: Numba's threading layer here is workqueue, which aborts the process when "
                "two threads enter it; install tbb or OpenMP, or unset NBNORM_SCHEDULER"
            )
        return None

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None:
        """Run ``kernel(chunk, *args)`` for every chunk; one by one where the call is small, or prange must not run:
        a pullback made before a fork may be called in the child."""
        if not parallel or chunks == 1 or self.refusal() is not None:
            for chunk in range(chunks):
                kernel(chunk, *args)
            return
        driver = self._drivers.get(kernel) or self._drivers.setdefault(kernel, _driver(kernel))
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
