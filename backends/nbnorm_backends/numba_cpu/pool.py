"""Run the chunks of a kernel: by a fork-safe pool of threads, or by Numba's own prange.

The pool is the default, because it does no harm in other people's programs: Numba's workqueue layer aborts the
process when two threads enter it, and its OpenMP layer kills or hangs forked children. Kernels release the GIL, the
caller always works, and helpers only claim chunks that nobody has begun.
"""

from __future__ import annotations

import inspect
import os
import queue
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numba
import numpy as np
from numba import njit, prange

from nbnorm.dispatch import registry
from nbnorm.parallel import thread_limit
from nbnorm_backends.numba_cpu import atomics
from nbnorm_backends.numba_cpu.cache import sealed

Kernel = Callable[..., None]
# Counters of a job, each on a cache line of its own, and the address of the pool's bell.
CLAIMED, JOINED, LEFT, CLOSED, BELL, COUNTERS = 0, 8, 16, 24, 32, 40
ALONE, CALLER, HELPER = range(3)  # who works
SPINS = 1000  # pauses (about 40 cycles each) before a thread that waits sleeps: 10 us, a fraction of what waking costs
LINGER = 3000  # the same for a helper without work: between two norms Python takes 10 us or more
NAP = 5e-5  # seconds


class Scheduler(Protocol):
    """What runs ``kernel(chunk, *args)`` for every chunk; `parallel` says whether the work is worth sharing."""

    threads: int

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None: ...


_workers: dict[Kernel, Callable[..., None]] = {}


def worker(kernel: Kernel) -> Callable[..., None]:
    """``work(counters, who, chunks, *args)``: compiled, claims chunks and runs the kernel on them until none is left.

    ALONE needs one counter. The CALLER rings the bell, and waits a little for the helpers at the end; a HELPER joins,
    unless the job is closed. All of that without the GIL: a helper that the bell wakes would find it held.
    """
    found = _workers.get(kernel)
    if found is None:
        # Spelled out: Numba takes 50 us to call a function of *args, and 2 us for as many that have names.
        body = (
            "if who == CALLER:\n"
            "    add_at(get(counters, BELL), 1)\n"
            "elif who == HELPER:\n"
            "    add(counters, JOINED, 1)\n"  # before CLOSED is read: the caller sees the one or we the other
            "    chunks = 0 if get(counters, CLOSED) else chunks\n"
            "while True:\n"
            "    chunk = add(counters, CLAIMED, 1)\n"
            "    if chunk >= chunks:\n"
            "        break\n"
            "    kernel(chunk{args})\n"
            "fence()\n"
            "if who == CALLER:\n"
            "    close(counters)\n"
        )
        work = _compiled("counters, who, chunks", body, kernel, nogil=True)
        if kernel.__module__.startswith(__package__):  # of others the cache does not know the sources
            work = sealed(work, f"worker of {kernel.__module__}.{kernel.__qualname__}")
        found = _workers.setdefault(kernel, work)
    return found


def _compiled(first: str, body: str, kernel: Any, **flags: Any) -> Callable[..., None]:
    """A function of `first` and all arguments of the kernel but the chunk."""
    args = "".join(f", {name}" for name in list(inspect.signature(kernel.py_func).parameters)[1:])
    lines = body.format(args=args).replace("\n", "\n    ")
    names = vars(atomics) | globals() | {"kernel": kernel, "int64": np.int64}
    exec(f"def work({first}{args}):\n    {lines}", names)
    compiled: Callable[..., None] = njit(error_model="numpy", no_cfunc_wrapper=True, **flags)(names["work"])
    return compiled


@partial(sealed, name="pool.close")
@njit(error_model="numpy", nogil=True)
def close(counters):  # type: ignore[no-untyped-def]  # compiled
    """Keep late helpers out, and wait for those that have joined, which are nearly done."""
    atomics.add(counters, CLOSED, 1)
    for _ in range(SPINS):
        if atomics.get(counters, LEFT) >= atomics.get(counters, JOINED):
            break
        atomics.pause()


@partial(sealed, name="pool.linger")
@njit(error_model="numpy", nogil=True)
def linger(counters, bell, rung, spins):  # type: ignore[no-untyped-def]  # compiled
    """Leave a job, and wait a little for the bell, which rang so often."""
    atomics.add(counters, LEFT, 1)
    for _ in range(spins):
        if atomics.get(bell, 0) != rung:
            break
        atomics.pause()


class _Job:
    """The chunks of one call. Claiming is an atomic addition, and so is joining and leaving.

    The caller ends the job: it waits for the helpers that have joined, not for a count of chunks, which an error in a
    chunk, or an interrupt between two, would leave short for ever.
    """

    def __init__(self, bell: Any, address: int, work: Callable[..., None], chunks: int, args: tuple[Any, ...]) -> None:
        self.counters = np.zeros(COUNTERS, np.int64)
        self.counters[BELL] = address
        self._bell = bell  # while there is its address: the pool of a forked child has another
        self._call: tuple[Callable[..., None], int, tuple[Any, ...]] | None = work, chunks, args
        self._error: BaseException | None = None

    def help(self) -> None:
        """Join, unless the caller has closed the job already. `linger` leaves."""
        call = self._call
        if call is not None:
            self._work(HELPER, *call)

    def run(self, announce: Callable[[_Job], None]) -> None:
        """Announce the job to helpers and work, then wait until no helper touches the arrays any more, even when
        interrupted; raise what was raised."""
        assert self._call is not None
        try:
            announce(self)
            self._work(CALLER, *self._call)
        except BaseException as error:  # noqa: BLE001  raised below, after the helpers have left
            self._error = error
        while True:
            try:
                self._close()
                break
            except RecursionError:
                raise  # to call a helper takes as much of the stack, so there is none
            except BaseException as error:  # noqa: BLE001  what the handler of a signal raises
                self._error = error
        self._call = None  # a helper that is late finds nothing, and keeps no arrays
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # whose traceback knows this job: the arrays of both would wait for a collection

    def _work(self, who: int, work: Callable[..., None], chunks: int, args: tuple[Any, ...]) -> None:
        """Claim and run chunks until none is left; after an error, which the caller raises, nobody finds one."""
        try:
            work(self.counters, who, chunks, *args)
        except BaseException as error:  # noqa: BLE001  a helper must live on
            self._error = error  # before the caller finds no chunk
            self.counters[CLAIMED] = chunks

    def _close(self) -> None:
        """Close the job, if an error kept the compiled code from it, and nap until the helpers have left."""
        counters = self.counters
        if not counters[CLOSED]:
            close(counters)
        while counters[LEFT] < counters[JOINED]:
            time.sleep(NAP)


class Pool:
    """The caller and up to ``threads - 1`` daemon helpers, started when first needed, anew in a forked child."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._reset()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._bell = np.zeros(1, np.int64)  # rings when a job is there
        self._address = int(self._bell.ctypes.data)  # which takes 0.7 us to ask for
        self._helpers = 0
        self._lock = threading.RLock()  # a collection of garbage may call a norm while a helper is started

    def run(self, kernel: Kernel, chunks: int, args: tuple[Any, ...], *, parallel: bool) -> None:
        """Run ``kernel(chunk, *args)`` for every chunk; raises what a chunk raised, after all have ended."""
        if parallel:
            self.share(worker(kernel), chunks, args)
        else:
            worker(kernel)(np.zeros(1, np.int64), ALONE, chunks, *args)

    def share(self, work: Callable[..., None], chunks: int, args: tuple[Any, ...]) -> None:
        """The same in parallel with a `worker`, or what was compiled of one."""
        threads = min(thread_limit(self.threads), chunks)
        if threads <= 1:
            work(np.zeros(1, np.int64), ALONE, chunks, *args)
            return

        def announce(job: _Job) -> None:
            for _ in range(min(threads - 1, self._started(threads - 1))):
                self._jobs.put(job)

        _Job(self._bell, self._address, work, chunks, args).run(announce)

    def _started(self, wanted: int) -> int:
        """Helpers that run, after starting what is missing; fewer where the system gives no more threads, or while
        another thread starts them: a new one that collects garbage may call a norm before `start` returns, and must not
        wait for that.
        """
        if self._helpers < wanted and self._lock.acquire(blocking=False):
            try:
                while self._helpers < wanted:
                    mine = self._jobs, self._bell
                    helper = threading.Thread(target=_help, args=mine, name="nbnorm", daemon=True)
                    try:
                        helper.start()
                    except RuntimeError:  # no more threads, or the interpreter is ending: the caller does the work
                        break
                    self._helpers += 1
            finally:
                self._lock.release()
        return self._helpers


def _help(jobs: queue.SimpleQueue[_Job], bell: Any) -> None:
    # Compiled now: a caller may hold the compiler's lock, and waits for a helper that has joined.
    counters = np.zeros(COUNTERS, np.int64)
    close(counters)
    linger(counters, bell, 0, 0)
    while True:
        job = jobs.get()
        job.help()
        counters = job.counters
        del job  # its arrays must not live on while this thread waits for the next
        rung = int(bell[0])
        linger(counters, bell, rung, LINGER if jobs.empty() else 0)  # the next call is often there in a moment


class Prange:
    """Numba's parallel loop over the same chunks, for programs that know their threading layer to be safe.

    The results are the pool's, bit for bit: the kernel is the same compiled function.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._drivers: dict[Kernel, Callable[..., None]] = {}
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
            worker(kernel)(np.zeros(1, np.int64), ALONE, chunks, *args)
            return
        driver = self._drivers.get(kernel) or self._drivers.setdefault(kernel, _driver(kernel))
        before = numba.get_num_threads()
        numba.set_num_threads(min(thread_limit(self.threads), numba.config.NUMBA_NUM_THREADS))
        try:
            driver(chunks, *args)
        finally:
            numba.set_num_threads(before)


def _driver(kernel: Kernel) -> Callable[..., None]:
    # prange counts in uint64, for which the kernel would be compiled anew
    body = "for chunk in prange(chunks):\n    kernel(int64(chunk){args})\nfence()\n"
    return _compiled("chunks", body, kernel, nogil=True, parallel=True)


@njit(parallel=True)
def _two_chunks(chunks: int) -> int:
    total = 0
    for chunk in prange(chunks):
        total += chunk
    return total
