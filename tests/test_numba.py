"""The Numba backend's own promises: bits that do not depend on threads, schedulers and neighbours; threads and forks
of other people's programs."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import pkgutil
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numba import njit
from numba.core.dispatcher import Dispatcher

import nbnorm
from nbnorm.dispatch import registry
from nbnorm_backends import numba_cpu
from nbnorm_backends.numba_cpu import kernels
from nbnorm_backends.numba_cpu.pool import Pool, Prange

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 32, 29, 31)).astype("f4")
DY = RNG.normal(size=X.shape).astype("f4")


def everything(x: Any, dy: Any) -> list[Any]:
    """Results of every norm and gradient on one array, in both layouts."""
    found = []
    channels = x.shape[1]
    weight, bias = np.linspace(0.5, 2, channels).astype("f4"), np.linspace(-1, 1, channels).astype("f4")
    last, dy_last = np.ascontiguousarray(np.moveaxis(x, 1, -1)), np.ascontiguousarray(np.moveaxis(dy, 1, -1))
    calls = []
    for axis, array, cotangent in ((1, x, dy), (-1, last, dy_last)):
        keys = {"weight": weight, "bias": bias, "channel_axis": axis}
        calls += [
            (nbnorm.batch_norm, array, cotangent, {"training": True, **keys}),
            (nbnorm.group_norm, array, cotangent, {"num_groups": 4, **keys}),
            (nbnorm.instance_norm, array, cotangent, keys),
        ]
    calls += [
        (nbnorm.layer_norm, last, dy_last, {"normalized_shape": channels, "weight": weight, "bias": bias}),
        (nbnorm.layer_norm, x, dy, {"axis": 1, "weight": weight, "bias": bias}),
        (nbnorm.rms_norm, last, dy_last, {"normalized_shape": channels, "weight": weight}),
    ]
    for op, array, cotangent, call in calls:
        y, pullback = nbnorm.vjp(op, array, backend="numba", **call)
        found += [y, *(grad for grad in pullback(cotangent) if grad is not None)]
    return found


@pytest.fixture
def backend_numba() -> Any:
    return registry.load("numba")


def same_bits(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(p.tobytes() == q.tobytes() for p, q in zip(a, b, strict=True))


def test_bits_do_not_depend_on_the_number_of_threads(backend_numba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_numba, "scheduler", Pool(1))
    alone = everything(X, DY)
    for threads in (2, 3, 7):
        monkeypatch.setattr(backend_numba, "scheduler", Pool(threads))
        assert same_bits(everything(X, DY), alone), threads


@pytest.mark.slow
def test_prange_gives_the_same_bits(backend_numba: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_numba, "scheduler", Pool(2))
    pooled = everything(X, DY)
    prange = Prange(2)
    if reason := prange.refusal():
        pytest.skip(reason)
    monkeypatch.setattr(backend_numba, "scheduler", prange)
    assert same_bits(everything(X, DY), pooled)


def test_rows_do_not_depend_on_their_batch() -> None:
    x = RNG.normal(size=(300, 513)).astype("f4")
    weight = RNG.normal(size=513).astype("f4")
    whole = nbnorm.layer_norm(x, 513, weight, backend="numba")
    for rows in (slice(0, 1), slice(7, 8), slice(100, 299)):
        np.testing.assert_array_equal(nbnorm.layer_norm(x[rows], 513, weight, backend="numba"), whole[rows])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_samples_do_not_depend_on_their_batch(dtype: str) -> None:
    """Channels last too, where a sample is cut into row blocks: their size must not follow from the batch."""
    x = RNG.normal(size=(16, 70, 70, 32)).astype(dtype)
    small = RNG.normal(size=(500, 3, 8)).astype(dtype)
    for op, array, call in (
        (nbnorm.group_norm, x, {"num_groups": 4, "channel_axis": -1}),
        (nbnorm.instance_norm, x, {"channel_axis": -1}),
        (nbnorm.layer_norm, x, {"axis": (1, 2)}),
        (nbnorm.layer_norm, small, {"axis": 1}),
    ):
        whole, moments = op(array, backend="numba", return_moments=True, **call)
        for part in (slice(0, 1), slice(3, 5), slice(2, 15)):
            y, own = op(array[part], backend="numba", return_moments=True, **call)
            np.testing.assert_array_equal(y, whole[part])
            np.testing.assert_array_equal(own.m2, moments.m2[part])


def test_memory_stays_small() -> None:
    """Beyond inputs and outputs, less than half of x: long rows whose weight is as long share few partial sums."""
    import tracemalloc

    x, dy = RNG.normal(size=(2, 32, 60_000)).astype("f4")
    weight = np.ones(60_000, "f4")
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 60_000, weight, backend="numba")
    pullback(dy)
    tracemalloc.start()
    grads = pullback(dy)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - grads.x.nbytes < 0.75 * x.nbytes


def test_an_interrupted_call_leaves_nobody_at_work() -> None:
    """KeyboardInterrupt reaches the caller only when no helper touches the arrays any more; nothing hangs."""
    printed = fresh_process(
        """
        import _thread, ctypes, signal, time
        from numba import njit
        from nbnorm_backends.numba_cpu.pool import Pool
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
        usleep = ctypes.CDLL(None).usleep
        usleep.argtypes = [ctypes.c_uint]
        @njit(nogil=True)
        def kernel(chunk, over, late):
            usleep(500)
            if over[0]:
                late[chunk] = 1
        pool, late = Pool(4), np.zeros(16, np.int64)
        pool.run(kernel, 16, (np.zeros(1, np.int64), late), parallel=True)
        interrupted = 0
        for attempt in range(150):
            over = np.zeros(1, np.int64)
            timer = threading.Timer(0.0001 + 0.00005 * (attempt % 60), _thread.interrupt_main)
            try:
                timer.start()
                pool.run(kernel, 16, (over, late), parallel=True)
                timer.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                interrupted += 1
            over[0] = 1
            timer.join()
        pool.run(kernel, 16, (np.zeros(1, np.int64), late), parallel=True)
        print(interrupted > 100, late.any())
        """
    )
    assert printed == "True False"


@njit(nogil=True)
def slow(chunk, pause, seen):  # type: ignore[no-untyped-def]  # compiled
    pause(500)
    seen[chunk] += 1


def test_an_interrupt_while_helpers_are_called_waits_for_them() -> None:
    class Interrupted(queue.SimpleQueue):  # type: ignore[type-arg]
        def put(self, *args: Any) -> None:
            super().put(*args)
            time.sleep(0.01)  # the helper is at work
            raise KeyboardInterrupt

    pause = ctypes.CDLL(None).usleep
    pause.argtypes = [ctypes.c_uint]
    pool, seen = Pool(2), np.zeros(200, np.int64)
    pool.run(slow, 2, (pause, seen), parallel=False)  # compiled
    pool._jobs = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        pool.run(slow, 200, (pause, seen), parallel=True)
    found = seen.copy()
    time.sleep(0.02)
    assert found.any()
    assert (seen == found).all()


@njit(nogil=True)
def uneven(chunk, pause, seen):  # type: ignore[no-untyped-def]  # compiled
    pause(30_000 if chunk else 1000)
    seen[chunk] += 1


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timer that sends signals")
def test_what_a_handler_of_a_signal_raises_waits_for_helpers() -> None:
    def late(*_: Any) -> None:
        raise TimeoutError

    pause = ctypes.CDLL(None).usleep
    pause.argtypes = [ctypes.c_uint]
    pool, seen = Pool(2), np.zeros(2, np.int64)
    pool.run(uneven, 2, (pause, seen), parallel=True)
    before = signal.signal(signal.SIGALRM, late)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)  # the caller naps, the helper has the long chunk
        with pytest.raises(TimeoutError):
            pool.run(uneven, 2, (pause, seen), parallel=True)
    finally:
        signal.signal(signal.SIGALRM, before)
    found = seen.copy()
    time.sleep(0.04)
    assert (seen == found).all()


def test_a_call_while_numba_compiles() -> None:
    """The first helper that joins must need nothing more of Numba, whose lock the caller holds."""
    printed = fresh_process(
        """
        import faulthandler
        from numba import njit
        from numba.extending import overload
        from nbnorm_backends.numba_cpu.pool import Pool
        faulthandler.dump_traceback_later(60, exit=True)
        nbnorm.dispatch.registry.load("numba").scheduler = Pool(2)
        with nbnorm.threads(1):
            expected = work()
        def constant():
            pass
        @overload(constant)
        def find():
            found = work() == expected
            return lambda: found
        print(njit(lambda: constant())())
        """
    )
    assert printed == "True"


def test_a_helper_that_starts_may_call_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As garbage that it collects does, before its start is known to the thread that waits for it."""
    pool, inner = Pool(2), np.zeros(100, np.int64)
    begin = threading.Thread._bootstrap_inner  # type: ignore[attr-defined]

    def collect(thread: threading.Thread) -> None:
        if thread.name == "nbnorm" and not inner.any():
            pool.run(count, 100, (-1, inner), parallel=True)
        begin(thread)

    pool.run(count, 0, (-1, inner), parallel=False)
    monkeypatch.setattr(threading.Thread, "_bootstrap_inner", collect)
    outer = np.zeros(100, np.int64)
    caller = threading.Thread(target=pool.run, args=(count, 100, (-1, outer)), kwargs={"parallel": True}, daemon=True)
    caller.start()
    caller.join(30)
    assert not caller.is_alive()
    assert (inner == 1).all()
    assert (outer == 1).all()


def test_a_call_that_is_over_keeps_no_arrays_while_the_helper_is_busy() -> None:
    pause = ctypes.CDLL(None).usleep
    pause.argtypes = [ctypes.c_uint]
    pool, seen, long = Pool(2), np.zeros(20, np.int64), np.zeros(2, np.int64)
    pool.run(slow, 2, (pause, seen), parallel=False)

    @njit(nogil=True)
    def longer(chunk, pause, seen):  # type: ignore[no-untyped-def]  # compiled
        seen[chunk] += 1
        for _ in range(1000):
            pause(500)

    pool.run(longer, 0, (pause, long), parallel=False)
    with ThreadPoolExecutor(1) as other:
        busy = other.submit(pool.run, longer, 2, (pause, long), parallel=True)
        while not long.all():
            time.sleep(0.001)
        gone = weakref.ref(seen)
        pool.run(slow, 20, (pause, seen), parallel=True)
        del seen
        assert gone() is None
        assert not busy.done()


def test_flags_of_kernels() -> None:
    """Nothing assumes away NaN and Inf, and no quotient becomes a product."""
    allowed = {"reassoc", "contract", "nsz"}
    names = [info.name for info in pkgutil.iter_modules(numba_cpu.__path__, f"{numba_cpu.__name__}.")]
    modules = [importlib.import_module(name) for name in names]
    found = 0
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Dispatcher):
                flags = value.targetoptions.get("fastmath", False)
                assert flags is False or set(flags) <= allowed, value
                found += 1
    assert found > 50


def test_only_kernels_have_machine_code() -> None:
    """What they call is a part of theirs."""

    def library(dispatcher: Any) -> Any:
        (compiled,) = dispatcher.overloads.values()
        return compiled.library

    @kernels.PLAIN
    def inner(x: Any) -> float:
        return x + 1.0

    @njit
    def outer(x: Any) -> float:
        return inner(x)

    assert outer(1.0) == 2.0
    assert library(outer)._get_compiled_object()
    with pytest.raises(RuntimeError, match="no compiled object"):
        library(inner)._get_compiled_object()


def test_many_threads_call_at_once() -> None:
    expected = everything(X[:2], DY[:2])
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(lambda _: everything(X[:2], DY[:2]), range(24)))
    assert all(same_bits(result, expected) for result in results)


@njit(nogil=True)
def count(chunk, bad, seen):  # type: ignore[no-untyped-def]  # compiled
    if chunk == bad:
        raise ZeroDivisionError("a bad chunk")
    seen[chunk] += 1


def test_an_error_in_a_chunk_reaches_the_caller_and_the_pool_lives_on() -> None:
    pool = Pool(3)
    for bad in (0, 5, 39):
        with pytest.raises(ZeroDivisionError, match="a bad chunk"):
            pool.run(count, 40, (bad, np.zeros(40, np.int64)), parallel=True)
    seen = np.zeros(40, np.int64)
    pool.run(count, 40, (-1, seen), parallel=True)
    assert (seen == 1).all()


def test_every_chunk_runs_once() -> None:
    pool = Pool(4)
    for chunks in (1, 2, 3, 100, 10_000):
        for parallel in (True, False):
            seen = np.zeros(chunks, np.int64)
            pool.run(count, chunks, (-1, seen), parallel=parallel)
            assert (seen == 1).all()


def test_helpers_hold_no_arrays() -> None:
    """After a call the pool keeps no reference to the arrays it worked on."""
    pool, seen = Pool(2), np.zeros(1000, np.int64)
    gone = weakref.ref(seen)
    for _ in range(20):
        pool.run(count, 1000, (-1, seen), parallel=True)
    del seen
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None


PRELUDE = """
import os, sys, threading, numpy as np, nbnorm
x = np.random.default_rng(0).normal(size=(64, 64, 40, 2)).astype("f4")
def work():
    return nbnorm.batch_norm(x, training=True, backend="numba").tobytes()
def in_child():
    pid = os.fork()
    if not pid:
        ok = 1
        try:
            ok = 0 if work() == expected else 2
        finally:
            os._exit(ok)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def fresh_process(code: str, **environment: str) -> str:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name == "NBNORM_CACHE_DIR" or not name.startswith("NBNORM_")
    }
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PRELUDE + textwrap.dedent(code)]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_forked_children_and_grandchildren() -> None:
    """From a process whose pool is busy, as a data loader forks its workers."""
    printed = fresh_process(
        """
        expected = work()
        busy = threading.Event()
        def keep_busy():
            while not busy.is_set():
                work()
        threads = [threading.Thread(target=keep_busy) for _ in range(2)]
        for thread in threads:
            thread.start()
        codes = [in_child() for _ in range(10)]
        pid = os.fork()
        if not pid:
            os._exit(in_child())
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        busy.set()
        for thread in threads:
            thread.join()
        print(codes)
        """
    )
    assert printed == str([0] * 11)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_many_threads_and_many_forks() -> None:
    """8 threads of 300 calls each while the main thread forks 60 times; every result and every child is checked."""
    printed = fresh_process(
        """
        expected = work()
        wrong = []
        def call():
            for _ in range(300):
                if work() != expected:
                    wrong.append(1)
        threads = [threading.Thread(target=call) for _ in range(8)]
        for thread in threads:
            thread.start()
        codes = {in_child() for _ in range(60)}
        for thread in threads:
            thread.join()
        print(len(wrong), codes)
        """
    )
    assert printed == "0 {0}"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.slow
def test_fork_while_another_thread_compiles() -> None:
    """The child must compile too, under the lock that the compiling thread held when it forked."""
    printed = fresh_process(
        """
        expected = nbnorm.batch_norm(x, training=True, backend="numpy")
        def compile_all():
            for dtype in ("f4", "f8"):
                nbnorm.vjp(nbnorm.group_norm, x.astype(dtype), 4, backend="numba")[1](x.astype(dtype))
        nbnorm.moments(x[:1], backend="numba")
        thread = threading.Thread(target=compile_all)
        thread.start()
        codes = []
        while thread.is_alive() and len(codes) < 3:
            pid = os.fork()
            if not pid:
                ok = 1
                try:
                    y = nbnorm.batch_norm(x, training=True, backend="numba")
                    ok = 0 if np.abs(y - expected).max() < 1e-5 else 2
                finally:
                    os._exit(ok)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        thread.join()
        print(set(codes))
        """,
        NBNORM_CACHE_DIR="",
    )
    assert printed == "{0}"


def test_prange_is_chosen_by_the_environment_and_refused_in_a_child() -> None:
    printed = fresh_process(
        """
        import numba
        expected = work()
        backend = nbnorm.dispatch.registry.load("numba")
        print(type(backend.scheduler).__name__, numba.threading_layer(), flush=True)
        pid = os.fork()
        if not pid:
            decision = nbnorm.explain(nbnorm.batch_norm, x, training=True)
            print(decision.chosen, decision.rejected[0][1], flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        """,
        NBNORM_SCHEDULER="prange",
        NUMBA_THREADING_LAYER="omp",
    )
    first, second = printed.splitlines()
    assert first == "Prange omp"
    assert second.startswith("numpy NBNORM_SCHEDULER=prange: this process is a forked child")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.slow
def test_prange_pullback_from_before_a_fork_runs_in_the_child() -> None:
    """Nobody asks the backend again then: it must run the chunks one by one, to the same bits."""
    printed = fresh_process(
        """
        y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, training=True, backend="numba")
        expected = pullback(x).x.tobytes()
        pid = os.fork()
        if not pid:
            os._exit(0 if pullback(x).x.tobytes() == expected else 2)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        """,
        NBNORM_SCHEDULER="prange",
        NUMBA_THREADING_LAYER="omp",
    )
    assert printed == "0"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_while_a_plugin_compiles_as_it_loads() -> None:
    """The loading thread holds the registry's lock and wants the compiler's; the fork must take them in that order."""
    printed = fresh_process(
        """
        import faulthandler, time, types, numba
        from importlib.metadata import EntryPoint
        from nbnorm_backends.numpy_ref import NumpyBackend
        work()
        started = threading.Event()
        class Slow(NumpyBackend):
            name = "slow"
        def make():
            started.set()
            time.sleep(0.3)
            numba.njit(lambda a: a + 1)(1)
            return Slow()
        sys.modules["slow_plugin"] = types.ModuleType("slow_plugin")
        sys.modules["slow_plugin"].make = make
        nbnorm.dispatch.registry.scan()["slow"] = EntryPoint("slow", "slow_plugin:make", "nbnorm.backends")
        faulthandler.dump_traceback_later(30, exit=True)
        thread = threading.Thread(target=lambda: nbnorm.layer_norm(x, 2, backend="slow"))
        thread.start()
        started.wait()
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        thread.join()
        print("done")
        """
    )
    assert printed == "done"


def test_prange_is_refused_on_workqueue() -> None:
    printed = fresh_process(
        "print(nbnorm.explain(nbnorm.batch_norm, x, training=True))",
        NBNORM_SCHEDULER="prange",
        NUMBA_THREADING_LAYER="workqueue",
    )
    assert "float32: numpy" in printed
    assert "not numba: NBNORM_SCHEDULER=prange: Numba's threading layer here is workqueue" in printed


def test_wrong_settings_are_reported() -> None:
    for name, value, message in (
        ("NBNORM_SCHEDULER", "fibers", "NBNORM_SCHEDULER must be pool or prange; got 'fibers'"),
        ("NBNORM_NUM_THREADS", "many", "NBNORM_NUM_THREADS must be a positive whole number; got 'many'"),
        ("NBNORM_NUM_THREADS", "0", "NBNORM_NUM_THREADS must be a positive whole number; got '0'"),
    ):
        printed = fresh_process("print(nbnorm.explain(nbnorm.batch_norm, x, training=True))", **{name: value})
        assert message in printed
        assert "float32: numpy" in printed


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_sums_alone_are_in_float64(dtype: str, weighted: bool) -> None:
    """Where no dx is asked for, sums of a gradient are what is: float32 would be off by 1e-8."""
    rng = np.random.default_rng(11)
    x, dy = rng.normal(3, 2, (2, 6, 1, 1, 700, 1)).astype(dtype)
    mean, rstd = (rng.uniform(0.5, 2, (6, 1)) for _ in range(2))
    shape = (1, 1, 1, 700, 1)
    weight = rng.normal(size=shape).astype(dtype) if weighted else None
    given = dy, x, mean, rstd, weight, shape if weighted else None
    found = numba_cpu.make().backward_sums(*given)
    wide = dy.astype(float), x.astype(float)
    terms = wide[0] * (1.0 if weight is None else weight.astype(float))
    xhat = (wide[1] - mean[:, :, None, None, None]) * rstd[:, :, None, None, None]
    expected = [terms.sum(axis=(1, 3, 4)), (terms * xhat).sum(axis=(1, 3, 4))]
    expected += [(wide[0] * xhat).sum(axis=0)[None], wide[0].sum(axis=0)[None]] if weighted else []
    for sums, exact in zip(found, expected, strict=False):
        np.testing.assert_allclose(sums, exact, rtol=0, atol=1e-11 * np.abs(exact).max())
