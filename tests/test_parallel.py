"""How many threads may work: the environment, affinity, control groups, and `nbnorm.threads`."""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba import njit

import nbnorm
from nbnorm import parallel
from nbnorm_backends.numba_cpu.pool import Pool

PROCESSORS = len(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Control groups of the test's own, without a limit."""
    monkeypatch.delenv("NBNORM_NUM_THREADS", raising=False)
    monkeypatch.setattr(parallel, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(parallel, "MEMBERSHIP", tmp_path / "membership")
    parallel._warn_of_clipping.cache_clear()
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.thread_count() == PROCESSORS
    monkeypatch.setenv("NBNORM_NUM_THREADS", "1")
    assert parallel.thread_count() == 1
    monkeypatch.setenv("NBNORM_NUM_THREADS", "4096")
    with pytest.warns(UserWarning, match=f"NBNORM_NUM_THREADS is more than the {PROCESSORS} processors"):
        assert parallel.thread_count() == PROCESSORS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parallel.thread_count() == PROCESSORS  # told once


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"membership": "0::/\n", "cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({"membership": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, None),
        ({"membership": "0::/a/b\n", "cgroup/a/cpu.max": "50000 100000", "cgroup/a/b/cpu.max": "max 100000"}, 0.5),
        ({"membership": "0::/a/b\n", "cgroup/a/cpu.max": "300000 100000", "cgroup/a/b/cpu.max": "20000 10000"}, 2.0),
        ({"membership": "0::/gone\n"}, None),
        ({"membership": ""}, None),
        (
            {
                "membership": "4:memory:/m\n3:cpu,cpuacct:/a\n",
                "cgroup/cpu/a/cpu.cfs_quota_us": "25000\n",
                "cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            0.25,
        ),
    ],
)
def test_quota_of_control_groups(files: dict[str, str], expected: float | None, machine: Path) -> None:
    for name, text in files.items():
        write(machine / name, text)
    assert parallel.processor_quota() == expected
    limit = PROCESSORS if expected is None else min(PROCESSORS, max(1, int(np.ceil(expected))))
    assert parallel.available_threads() == limit


def helpers_started(pool: Pool) -> int:
    return pool._helpers


def test_threads_limits_the_pool_in_its_context_only() -> None:
    pool = Pool(2)
    x = np.zeros(64, np.int64)

    @njit(nogil=True)
    def kernel(chunk, seen):  # type: ignore[no-untyped-def]  # compiled
        seen[chunk] += 1

    with nbnorm.threads(1):
        pool.run(kernel, 64, (x,), parallel=True)
        assert helpers_started(pool) == 0
        other = threading.Thread(target=lambda: pool.run(kernel, 64, (x,), parallel=True))
        other.start()
        other.join()
        assert helpers_started(pool) == 1
    assert (x == 2).all()
    pool.run(kernel, 64, (x,), parallel=True)
    assert (x == 3).all()


def test_threads_changes_no_bit() -> None:
    x = np.random.default_rng(0).normal(size=(64, 32, 30, 30)).astype("f4")
    y = nbnorm.batch_norm(x, training=True, backend="numba")
    with nbnorm.threads(1):
        assert nbnorm.batch_norm(x, training=True, backend="numba").tobytes() == y.tobytes()


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_counts(n: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"^n must be"), nbnorm.threads(n):
        pass


def test_more_threads_than_processors_are_clipped_with_one_warning() -> None:
    with pytest.warns(UserWarning, match="n is more than the"), nbnorm.threads(PROCESSORS + 1):
        assert parallel.thread_limit(4096) == PROCESSORS
    assert parallel.thread_limit(4096) == 4096
