"""Memory of results on the Numba backend: cache lines, stores past the caches, and memory that is used again."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm.dispatch import registry
from nbnorm_backends.numba_cpu import outputs
from nbnorm_backends.numba_cpu.elements import LINE

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 16, 24, 32)).astype("f4")  # runs and rows of whole cache lines, also in half types
ROWS = RNG.normal(size=(300, 1024)).astype("f4")
FLAT = np.dtype("f4")


def address(array: Any) -> int:
    return int(array.ctypes.data)


def results(x: Any, rows: Any, *, joined: bool) -> list[Any]:
    """Results and gradients of norms along runs, along columns, and of rows, and with what may be joined to them."""
    channels = np.linspace(0.5, 2, x.shape[1]).astype(x.dtype)
    weight = np.linspace(0.5, 2, rows.shape[1]).astype(x.dtype)
    images = {"weight": channels, "bias": channels, "training": True}
    calls: list[tuple[Any, Any, dict[str, Any]]] = [
        (nbnorm.batch_norm, x, images),
        (nbnorm.batch_norm, np.ascontiguousarray(np.moveaxis(x, 1, -1)), {**images, "channel_axis": -1}),
        (nbnorm.layer_norm, rows, {"normalized_shape": rows.shape[1], "weight": weight, "bias": weight}),
    ]
    if joined:
        calls += [
            (nbnorm.batch_norm, x, {**images, "residual": x[::-1].copy(), "activation": "gelu"}),
            (nbnorm.batch_norm, rows, {"training": True, "activation": "relu"}),
            (nbnorm.layer_norm, rows, {"normalized_shape": rows.shape[1], "mask": rows > 0.3}),
            (nbnorm.rms_norm, rows, {"normalized_shape": rows.shape[1], "activation": "silu", "order": "act_norm"}),
        ]
    found = []
    for op, array, keys in calls:
        y, pullback = nbnorm.vjp(op, array, backend="numba", **keys)
        found += [y, *(grad for grad in pullback(array) if grad is not None)]
    if joined:
        found += nbnorm.add_layer_norm(rows, rows[::-1].copy(), rows.shape[1], backend="numba")
    return found


@pytest.mark.parametrize("joined", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "dtype", ["f4", *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in ("f8", "f2", ml_dtypes.bfloat16))]
)
def test_stores_past_the_caches_change_no_bit(dtype: Any, joined: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, rows = X.astype(dtype), ROWS.astype(dtype)
    decide = outputs.streams
    for name in ("STREAM_RUNS", "STREAM_RUNS_BACKWARD", "STREAM_COLUMNS", "STREAM_COLUMNS_BACKWARD"):
        monkeypatch.setattr(outputs, name, 1)
    monkeypatch.setattr(outputs, "streams", lambda *_: False)
    registry.calls.clear()
    expected = results(x, rows, joined=joined)
    asked: list[bool] = []
    monkeypatch.setattr(outputs, "streams", lambda y, row, _: asked.append(decide(y, row, 1)) or asked[-1])
    found = results(x, rows, joined=joined)
    assert sum(asked) >= (13 if joined else 6)
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours.tobytes() == theirs.tobytes(), index
    registry.calls.clear()  # which would store past the caches from one byte on


def test_results_that_are_small_or_no_whole_lines_go_through_the_caches() -> None:
    y = outputs.empty((64, 512), FLAT)
    assert outputs.streams(y, 512, y.nbytes)
    assert not outputs.streams(y, 512, y.nbytes + 1)
    assert not outputs.streams(outputs.empty((64, 500), FLAT), 500, 1)
    assert not outputs.streams(outputs.empty((64, 513), FLAT)[:, 1:], 512, 1)


@pytest.mark.parametrize("shift", [0, 1, 3, 15])
def test_out_may_begin_anywhere(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = nbnorm.layer_norm(ROWS, 1024, backend="numba")
    monkeypatch.setattr(outputs, "STREAM_RUNS", 1)
    memory = np.zeros(ROWS.size + 32, "f4")
    first = -address(memory) % LINE // 4 + shift
    out = memory[first : first + ROWS.size].reshape(ROWS.shape)
    assert nbnorm.layer_norm(ROWS, 1024, out=out, backend="numba") is out
    np.testing.assert_array_equal(out, expected)
    assert not memory[:first].any()
    assert not memory[first + ROWS.size :].any()


def test_results_begin_with_a_cache_line() -> None:
    for x in (ROWS, ROWS[:7]):
        y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 1024, backend="numba")
        for array in (y, pullback(x).x, nbnorm.normalize(x, backend="numba")):
            assert array.nbytes >= outputs.SMALL
            assert address(array) % LINE == 0


def test_memory_is_used_again_when_no_view_is_left() -> None:
    gc.collect()
    y = nbnorm.layer_norm(ROWS, 1024, backend="numba")
    assert y.nbytes >= outputs.LARGE
    where, content, view = address(y), y.copy(), y[5:, ::2]
    del y
    other = nbnorm.layer_norm(ROWS * 2, 1024, eps=1.0, backend="numba")
    assert address(other) != where
    np.testing.assert_array_equal(view, content[5:, ::2])
    del view
    gc.collect()
    third = nbnorm.layer_norm(ROWS, 1024, backend="numba")
    assert address(third) == where
    np.testing.assert_array_equal(third, content)


def test_what_lay_there_before_is_not_seen() -> None:
    mask = ROWS > 0.5
    expected = nbnorm.layer_norm(ROWS, 1024, mask=mask, backend="numba").copy()
    gc.collect()
    for _ in range(3):
        spoiled = outputs.empty(ROWS.shape, FLAT)
        spoiled.fill(np.nan)
        where = address(spoiled)
        del spoiled
        y = nbnorm.layer_norm(ROWS, 1024, mask=mask, backend="numba")
        assert address(y) == where
        np.testing.assert_array_equal(y, expected)
        del y


def test_no_more_is_kept_than_is_allowed() -> None:
    recycler = outputs.Recycler(100)
    for size in (40, 50, 60):
        recycler.give_back(outputs.Block(size))
    assert [block.size for block in recycler.free] == [60]  # what was given back first is dropped first
    recycler.give_back(outputs.Block(40))
    latest = outputs.Block(0)
    recycler.give_back(latest)
    assert recycler.take(0) is latest
    assert recycler.take(41).size == 41
    assert [block.size for block in recycler.free] == [60, 40]
    recycler.give_back(outputs.Block(101))
    assert recycler.free == []


def test_many_threads_share_the_memory() -> None:
    expected = nbnorm.layer_norm(ROWS, 1024, backend="numba").copy()

    def check(_: int) -> bool:
        return bool((nbnorm.layer_norm(ROWS, 1024, backend="numba") == expected).all())

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(check, range(200)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_child_forked_while_memory_changes_hands() -> None:
    """The lock may be another thread's then, which the child does not have."""
    code = (
        "import os, signal, threading, time\n"
        "import numpy as np, nbnorm\n"
        "from nbnorm_backends.numba_cpu import outputs\n"
        "x = np.ones((300, 1024), np.float32)\n"
        "nbnorm.layer_norm(x, 1024, backend='numba')\n"
        "held = threading.Event()\n"
        "def hold():\n"
        "    with outputs.recycler.lock:\n"
        "        held.set()\n"
        "        time.sleep(0.3)\n"
        "threading.Thread(target=hold).start()\n"
        "held.wait()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    signal.alarm(20)\n"
        "    nbnorm.layer_norm(x, 1024, backend='numba')\n"
        "    os._exit(0)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.parametrize("given", ["0", "1000000000", "-1", "1e9"])
def test_environment(given: str) -> None:
    code = (
        "import numpy as np, nbnorm\n"
        "x = np.ones((300, 1024), np.float32)\n"
        "y = nbnorm.layer_norm(x, 1024, backend='numba')\n"
        "del y\n"
        "from nbnorm_backends.numba_cpu import outputs\n"
        "print(len(outputs.recycler.free))\n"
    )
    environment = {**os.environ, "NBNORM_RECYCLE_BYTES": given}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if given.isdecimal():
        assert done.stdout.strip() == ("0" if given == "0" else "1"), done.stderr
    else:
        assert f"NBNORM_RECYCLE_BYTES must be a whole number of bytes; got {given!r}" in done.stderr
