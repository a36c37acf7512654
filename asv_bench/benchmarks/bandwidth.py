"""Large cases against what memory allows: the time of a copy of as many bytes over ours. Higher is better."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from .cases import BACKENDS, CASES, VERSION, Run, runner
from .ratios import compare

LARGE_CASES = [name for name in CASES if name.endswith(" large")]
MOVED = {"forward": 2, "backward": 3}  # arrays of x's size that are read or written
PAIRS = 9


def copy_of(floats: int) -> Run:
    """Copies so many float32, a share in each thread."""
    source, target = np.ones(floats, np.float32), np.ones(floats, np.float32)
    shares = [slice(part[0], part[-1] + 1) for part in np.array_split(np.arange(floats), len(os.sched_getaffinity(0)))]
    pool = ThreadPoolExecutor(len(shares))
    return lambda: list(pool.map(lambda share: np.copyto(target[share], source[share]), shares))


def fraction(kind: str, name: str, backend: str) -> float:
    copy = copy_of(math.prod(CASES[name].shape) * MOVED[kind] // 2)
    return float(compare(runner(kind, name, backend), copy, pairs=PAIRS).ratios[1])


class Bandwidth:
    version = VERSION
    params = (LARGE_CASES, BACKENDS)
    param_names = ("case", "backend")
    unit = "of the speed of a copy"
    timeout = 300

    def setup(self, case: str, backend: str) -> None:
        for kind in MOVED:
            runner(kind, case, backend)

    def track_bandwidth_forward(self, case: str, backend: str) -> float:
        return fraction("forward", case, backend)

    def track_bandwidth_backward(self, case: str, backend: str) -> float:
        return fraction("backward", case, backend)
