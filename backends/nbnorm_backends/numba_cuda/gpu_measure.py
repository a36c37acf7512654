"""What `gpu_check` finds out on a GPU, part by part: results, graphs, launches, times, the sanitizer.

Each function takes what it measures and returns what goes into the JSON. A budget of time is asked before each piece.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np

import nbnorm
from nbnorm.backend import Backend
from nbnorm.measure import compare
from nbnorm.peers import ROW_NORMS, Case, Contender, Problem, Unavailable, dtype_of, torch_compile, torch_eager
from nbnorm_backends.numba_cuda import cubins
from nbnorm_backends.numba_cuda.checks import DEVICE, Array, Check, errors, exact, run
from nbnorm_backends.numba_cuda.gpu_device import Device
from nbnorm_backends.numba_cuda.launch import variants

Found = dict[str, Any]
PAIRS = 21
COPY_BYTES = 1 << 30
COPIES = 51
CALLS = 200  # that are enqueued without waiting: fewer than a GPU's queue holds
LAUNCH_GOAL = 5e-6  # seconds of the host
SANITIZER = "compute-sanitizer"
FOUND_BY_SANITIZER = 77  # its exit status, apart from those of the program


@dataclass
class Budget:
    """Seconds for the whole; what is left out once they are spent is kept by name."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    skipped: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds

    @property
    def left(self) -> float:
        return self._end - self.clock()

    def run(self, pieces: Iterable[tuple[str, Callable[[], Found]]]) -> list[Found]:
        """What each piece finds, while there is time. An exception is that piece's failure: a GPU is seldom at hand,
        and the others may tell why."""
        found = []
        for name, piece in pieces:
            if self.left <= 0:
                self.skipped.append(name)
                continue
            try:
                found.append(piece())
            except Exception:  # noqa: BLE001  it is reported, and the exit status is 1
                found.append({"name": name, "error": traceback.format_exc(), "passed": False})
        return found


# ---- goals -----------------------------------------------------------------------------------------------------------


class Goal(NamedTuple):
    """A case and what is wanted of it: a fraction of the copy bandwidth, and torch's time over nbnorm's at least."""

    case: Case
    fraction: float
    ratio: float = 1.0
    compiled: bool = False  # also beside torch.compile, which takes many seconds

    @property
    def name(self) -> str:
        return name_of(self.case)


def name_of(case: Case) -> str:
    parts = [f"{case.op} {case.shape} {case.dtype}"]
    if case.op not in ROW_NORMS and case.channel != 1:
        parts.append("channels last")
    return ", ".join([*parts, "backward" if case.backward else "forward" if case.training else "eval"])


def goals(size: int = 256 << 20) -> list[Goal]:
    """For x of `size` bytes, in the order in which they are measured."""
    return [goal for kind in ("float32", "bfloat16") for goal in _goals_of(kind, size // dtype_of(kind).itemsize)]


def _goals_of(kind: str, elements: int) -> Iterable[Goal]:
    def rows(length: int, op: str = "layer_norm", *, backward: bool = False) -> Case:
        return Case(op, (elements // length, length), kind, backward=backward)

    def images(op: str, *, last: bool = False, **keys: Any) -> Case:
        channels, side = 256, 64
        samples = elements // (channels * side * side)
        shape = (samples, side, side, channels) if last else (samples, channels, side, side)
        groups = 32 if op == "group_norm" else 0
        return Case(op, shape, kind, channel_axis=-1 if last else 1, num_groups=groups, **keys)

    yield Goal(rows(4096), 0.92, compiled=True)
    yield Goal(images("batch_norm"), 0.85, ratio=1.5, compiled=True)
    yield Goal(images("batch_norm", last=True), 0.85)
    yield Goal(rows(4096, backward=True), 0.85, compiled=True)
    yield Goal(images("batch_norm", backward=True), 0.82)
    yield Goal(images("batch_norm", last=True, backward=True), 0.82)
    yield Goal(images("batch_norm", training=False), 0.92)
    yield Goal(images("batch_norm", last=True, training=False), 0.92)
    yield Goal(images("group_norm", last=True), 0.80, compiled=True)
    yield Goal(images("group_norm"), 0.92)
    yield Goal(images("instance_norm"), 0.92)
    yield Goal(rows(4096, "rms_norm"), 0.92, compiled=True)
    yield Goal(rows(4096, "rms_norm", backward=True), 0.85)
    yield Goal(rows(1024, backward=True), 0.85)
    for length in (1024, 8192, 32768):
        yield Goal(rows(length), 0.92)
    for length in (64, 256, 512):
        yield Goal(rows(length), 0.85)


def traffic(case: Case, l2_bytes: int) -> int:
    """Bytes that have to be moved: x and the result, and dy for a gradient. What is read for statistics and then again
    counts twice, unless the second-level cache holds it."""
    tensor = math.prod(case.shape) * dtype_of(case.dtype).itemsize
    inputs = 2 if case.backward else 1
    rows = case.op in ROW_NORMS or (case.op != "batch_norm" and case.channel == 1)
    once = rows or not case.training or inputs * tensor <= l2_bytes
    return tensor * (inputs * (1 if once else 2) + 1)


# ---- parts -----------------------------------------------------------------------------------------------------------


def compile_all(capability: tuple[int, int], jobs: int, budget: Budget) -> Found:
    """Put every variant on disk, where this process finds it, by `jobs` processes, in half of the time that is left:
    the others are compiled when they are called."""
    chosen = [each for each in variants() if each.rows is None or each.rows.since <= 10 * capability[0] + capability[1]]
    begin, compiled = time.monotonic(), 0
    processes = ProcessPoolExecutor(jobs, get_context("spawn"))
    try:
        each = partial(cubins.kernel_of, capability=capability)
        for _ in processes.map(each, chosen, timeout=budget.left / 2):
            compiled += 1
    except TimeoutError:
        pass
    finally:
        processes.shutdown(cancel_futures=True)  # waits for those that are under way
    return {"name": "kernels", "compiled": compiled, "of": len(chosen), "seconds": time.monotonic() - begin}


def copy_bandwidth(device: Device, size: int = COPY_BYTES) -> Found:
    """Bytes read and written, over the median time of a copy out of cache."""
    call = device.copy(size)
    times = [device.seconds(call) for _ in range(COPIES)]
    low, median, high = statistics.quantiles(times, n=4)
    speeds = [2 * size / seconds for seconds in (high, median, low)]
    return {"bytes": size, "bytes_per_second": speeds[1], "quartiles": speeds}


def correctness(
    check: Check,
    put: Callable[[Array], Any],
    get: Callable[[Any], Array],
    single: float = DEVICE,
    *,
    backend: Backend | None = None,
    runs: int = 2,
) -> Found:
    """Each result beside what it may be off by, and whether every run gives the same bits."""
    case, inputs = check.case, check.inputs()
    found: Found = {"name": check.name, "op": case.op, "dtype": case.dtype, "shape": case.shape}
    first, *others = (run(check, inputs, put, get, backend) for _ in range(runs))
    off = errors(check, exact(check, inputs), first, single)
    same = all(first[name].tobytes() == other[name].tobytes() for other in others for name in first)
    listed = {name: {"error": error.difference, "bound": error.bound} for name, error in off.items()}
    return found | {"errors": listed, "same_bits": same, "passed": same and all(each.within for each in off.values())}


GRAPHS = (
    Case("layer_norm", (4096, 1024)),
    Case("layer_norm", (4096, 1024), backward=True),
    Case("batch_norm", (32, 64, 56, 56)),
    Case("batch_norm", (32, 56, 56, 64), channel_axis=-1),
    Case("batch_norm", (32, 64, 56, 56), backward=True),
    Case("group_norm", (16, 32, 32, 256), "bfloat16", channel_axis=-1, num_groups=32),
)


def graph(device: Device, case: Case, pairs: int = PAIRS) -> Found:
    """A call captured in a CUDA graph: the bits and the time of a replay, beside those of the call itself."""
    ours = Problem(case).ours(put=device.put, get=device.get)
    plain = ours.read(ours.run())
    replay, result = device.capture(ours.run)
    replay()
    device.wait()
    same = plain.tobytes() == ours.read(result).tobytes()
    times = compare(ours.run, replay, pairs=pairs, timer=device.seconds)
    return {"name": name_of(case), "same_bits": same, "passed": same, "seconds": times.first, "replay": times.second}


def launches(device: Device, shape: tuple[int, int] = (64, 256)) -> Found:
    """Seconds of the host for a small layer norm whose arguments have been seen before, by its call and by a plan, and
    for torch's."""
    rng = np.random.default_rng(0)
    x, weight, bias = (device.put(rng.normal(size=size).astype(np.float32)) for size in (shape, shape[1:], shape[1:]))
    functional = import_module("torch.nn.functional")
    plan = nbnorm.plan(nbnorm.layer_norm, x, shape[1:], weight, bias)
    calls: dict[str, Callable[[], Any]] = {
        "call": lambda: nbnorm.layer_norm(x, shape[1:], weight, bias),
        "plan": lambda: plan(x),
        "torch": lambda: functional.layer_norm(x, shape[1:], weight, bias),
    }
    found: Found = {name: _host_seconds(device, call) for name, call in calls.items()}
    return found | {"goal": LAUNCH_GOAL, "met": found["call"] <= LAUNCH_GOAL}


def _host_seconds(device: Device, call: Callable[[], Any]) -> float:
    times = []
    for _ in range(1 + PAIRS):
        device.wait()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times[1:])


def timing(device: Device, goal: Goal, bandwidth: float, pairs: int = PAIRS) -> Found:
    """Times out of cache, in turn with torch's, and the fraction of a copy's bandwidth. The two results must agree."""
    case, problem = goal.case, Problem(goal.case)
    moved = traffic(case, device.l2_bytes)
    found: Found = {"name": goal.name, "op": case.op, "dtype": case.dtype, "shape": case.shape, "bytes": moved}
    ours = problem.ours(put=device.put, get=device.get)
    theirs = torch_eager(problem, device.torch_name)
    found |= agreement(case, ours, theirs)
    times = compare(ours.run, theirs.run, pairs=pairs, timer=device.seconds)
    fraction = moved / times.first / bandwidth
    found |= {"seconds": times.first, "bytes_per_second": moved / times.first, "fraction": fraction}
    found |= {"goal": goal.fraction, "met": fraction >= goal.fraction}
    beside = {"seconds": times.second, "ratios": times.ratios, "goal": goal.ratio, "met": times.ratios[1] >= goal.ratio}
    return found | {"torch": beside}


def agreement(case: Case, ours: Contender, theirs: Contender) -> Found:
    """Whether the results of the whole arrays are as near as two of this type, rounded in other places, can be: a guard
    against a fast wrong one."""
    a, b = ours.read(ours.run()), theirs.read(theirs.run())
    largest = float(np.abs(b).max())
    bound = 1e-4 + 4 * float(np.finfo(np.float32).eps if case.dtype == "float32" else 2.0**-8) * largest
    difference = float(np.abs(a - b).max())
    return {"difference": difference, "difference_bound": bound, "passed": difference <= bound}


def beside_compiled(device: Device, goal: Goal, pairs: int = PAIRS) -> Found:
    """torch.compile's time, whose kernels on a GPU are Triton's, over nbnorm's in turn."""
    problem = Problem(goal.case)
    try:
        theirs = torch_compile(problem, device.torch_name)
    except Unavailable as reason:
        return {"name": goal.name, "unavailable": str(reason)}
    ours = problem.ours(put=device.put, get=device.get)
    times = compare(ours.run, theirs.run, pairs=pairs, timer=device.seconds)
    return {"name": goal.name, "seconds": times.second, "ratios": times.ratios}


def sanitize(tool: str, budget: Budget) -> Found:
    """memcheck or racecheck of NVIDIA's compute-sanitizer, over small norms in a process of their own."""
    path = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if path is None:
        return {"name": tool, "unavailable": f"{SANITIZER} is not on the PATH; it comes with the CUDA toolkit"}
    program = [sys.executable, "-m", "nbnorm_backends.numba_cuda.gpu_check", "--subset"]
    command = [path, "--tool", tool, "--error-exitcode", str(FOUND_BY_SANITIZER), *program]
    # An allocation of its own for each tensor: an access past the end of one must not fall into another.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    seconds = budget.left
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=environment, start_new_session=True, **streams) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer and the program that it watches
            return {"name": tool, "unavailable": f"not done after {seconds:.0f} s"}
    status = process.returncode
    return {"name": tool, "passed": status == 0, "exit_status": status, "output": text.decode(errors="replace")[-4000:]}
