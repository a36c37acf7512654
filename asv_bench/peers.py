"""nbnorm beside its peers: torch eager and compiled, oneDNN, JAX and ONNX Runtime, where they are installed.

    OMP_WAIT_POLICY=passive python asv_bench/peers.py [--quick] [--processes 5] [--cells layer ...] [--json FILE]

Every cell is a norm on one shape. Ours goes through the public API, with outputs of its own; it and a peer run in turn
in one process, and what is printed is the peer's time over ours, as the median of many pairs: above 1 nbnorm is faster.
With several processes it is the median of their medians, with the quartiles over them. "limit" is the time of a copy of
x (of x + dy -> dx, for a pullback) over ours, with ordinary or with non-temporal stores, whichever is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before any library starts threads

import numpy as np

import nbnorm
from nbnorm.measure import compare
from nbnorm.parallel import thread_count
from nbnorm_backends.numba_cpu import limits, outputs

Run = Callable[[], Any]
EPS = 1e-5
THREADS = thread_count()


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    op: str
    shape: tuple[int, ...]
    goal: float  # against the fastest peer
    kind: str = "forward"  # or "backward", or "eval + ReLU"
    dtype: str = "float32"
    last: bool = False  # channels last
    groups: int = 0

    @property
    def name(self) -> str:
        place = " channels last" if self.last and len(self.shape) > 2 else ""
        half = "" if self.dtype == "float32" else f" {self.dtype}"
        kind = "" if self.kind == "forward" else f" {self.kind}"
        return f"{self.op.replace('_', ' ')}{kind}{place} {self.shape}{half}".replace(", ", ",")

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are reduced, with the channels of groups split."""
        dims = len(self.shape)
        if self.op in ("layer_norm", "rms_norm"):
            return (dims - 1,)
        if self.op == "batch_norm":
            return tuple(axis for axis in range(dims) if axis != self.channel)
        return tuple(range(2, dims + 1))

    @property
    def channel(self) -> int:
        return len(self.shape) - 1 if self.last or self.op in ("layer_norm", "rms_norm") else 1


FLOAT32 = (
    Cell("batch_norm", (32, 64, 56, 56), 2.0),
    Cell("batch_norm", (64, 256, 14, 14), 1.5),
    Cell("batch_norm", (8, 64, 112, 112), 2.0),
    Cell("batch_norm", (32, 56, 56, 64), 1.3, last=True),
    Cell("batch_norm", (64, 14, 14, 256), 1.3, last=True),
    Cell("batch_norm", (128, 1024), 1.3),
    Cell("batch_norm", (4096, 512), 1.2),
    Cell("batch_norm", (32, 64, 56, 56), 1.6, kind="backward"),
    Cell("batch_norm", (32, 56, 56, 64), 1.25, kind="backward", last=True),
    Cell("batch_norm", (32, 64, 56, 56), 1.4, kind="eval + ReLU"),
    Cell("layer_norm", (64, 768), 1.2),
    Cell("layer_norm", (4096, 1024), 1.8),
    Cell("layer_norm", (8192, 4096), 1.8),
    Cell("layer_norm", (64, 768), 1.4, kind="backward"),
    Cell("layer_norm", (4096, 1024), 1.4, kind="backward"),
    Cell("layer_norm", (8192, 4096), 1.4, kind="backward"),
    Cell("rms_norm", (4096, 1024), 1.9),
    Cell("group_norm", (16, 256, 32, 32), 1.35, groups=32),
    Cell("instance_norm", (16, 64, 128, 128), 2.0, groups=64),
)
HALVES = tuple(
    Cell(cell.op, cell.shape, 1.5, cell.kind, dtype, cell.last, cell.groups)
    for dtype in ("float16", "bfloat16")
    for cell in FLOAT32
)


class Problem:
    """The arrays of a cell, our call, and the result in float64."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        rng = np.random.default_rng(0)
        dtype = cell.dtype
        if dtype == "bfloat16":
            import ml_dtypes  # noqa: PLC0415  only these cells need it

            dtype = ml_dtypes.bfloat16

        def normal(*shape: int) -> Any:
            return rng.standard_normal(shape, np.float32)

        channels = cell.shape[cell.channel]
        self.x, self.dy = normal(*cell.shape).astype(dtype), normal(*cell.shape).astype(dtype)
        self.weight, self.bias = normal(channels), normal(channels)  # float32, also beside half types
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)
        if cell.kind == "eval + ReLU":
            self.mean, self.var = normal(channels), np.exp(normal(channels))

    def ours(self) -> Run:
        cell, x = self.cell, self.x
        op, args, keys = getattr(nbnorm, cell.op), [], {"weight": self.weight, "bias": self.bias}
        if cell.op == "batch_norm":
            args = [self.mean, self.var]
            keys |= {"channel_axis": cell.channel, "training": cell.kind != "eval + ReLU"}
            if cell.kind == "eval + ReLU":
                keys["activation"] = "relu"
        elif cell.op == "group_norm":
            args = [cell.groups]
        elif cell.op in ("layer_norm", "rms_norm"):
            args = [cell.shape[-1]]
        if cell.op == "rms_norm":
            del keys["bias"]
        keys["eps"] = EPS
        if cell.kind == "backward":
            if cell.op == "batch_norm":
                args = []
            dy, (_, pullback) = self.dy, nbnorm.vjp(op, x, *args, **keys)
            return lambda: pullback(dy)
        return lambda: op(x, *args, **keys)

    def _along_channels(self, param: Any, dims: int) -> Any:
        shape = [1] * dims
        shape[self.cell.channel] = -1
        return param.astype("f8").reshape(shape)

    def exact(self) -> Any:
        """The result (dx, for a pullback) in float64."""
        cell, x = self.cell, self.x.astype("f8")
        weight, bias = (self._along_channels(param, x.ndim) for param in (self.weight, self.bias))
        if cell.kind == "eval + ReLU":
            mean, var = (self._along_channels(param, x.ndim) for param in (self.mean, self.var))
            return np.maximum((x - mean) / np.sqrt(var + EPS) * weight + bias, 0)
        split = x.reshape(x.shape[0], cell.groups, -1, *x.shape[2:]) if cell.groups else x
        keep = {"axis": cell.axes, "keepdims": True}
        mean = 0.0 if cell.op == "rms_norm" else split.mean(**keep)
        rstd = 1 / np.sqrt(((split - mean) ** 2).mean(**keep) + EPS)
        xhat = (split - mean) * rstd
        if cell.kind == "backward":
            t = self.dy.astype("f8") * weight
            return rstd * (t - t.mean(**keep) - xhat * (t * xhat).mean(**keep))
        return xhat.reshape(x.shape) * weight + (0.0 if cell.op == "rms_norm" else bias)

    def error(self) -> float:
        """The largest difference between our result and the exact one."""
        found = self.ours()()
        found = found.x if self.cell.kind == "backward" else found
        return float(np.abs(found.astype("f8") - self.exact()).max())

    def limit(self) -> list[Run]:
        """The copy (or the sum of two arrays), with ordinary and with non-temporal stores."""
        x, dy = (array.reshape(-1).view(np.float32) for array in (self.x, self.dy))
        other = dy if self.cell.kind == "backward" else None
        target = outputs.empty(x.shape, x.dtype)
        return [lambda stream=stream: limits.move(x, other, target, stream=stream) for stream in (False, True)]


# ---- the peers -------------------------------------------------------------------------------------------------------


def torch_function(problem: Problem) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A function of tensors, and the tensors."""
    import torch  # noqa: PLC0415  a peer may be absent
    import torch.nn.functional as F  # noqa: PLC0415

    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    cell = problem.cell

    def tensor(array: Any) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    x, dy, w, b, mean, var = map(
        tensor, (problem.x, problem.dy, problem.weight, problem.bias, problem.mean.copy(), problem.var.copy())
    )
    if cell.last and x.ndim == 4:
        x, dy = x.permute(0, 3, 1, 2), dy.permute(0, 3, 1, 2)
    half = cell.dtype != "float32"
    if half and cell.op in ("rms_norm",):
        w, b = w.to(x.dtype), b.to(x.dtype)  # it takes no other
    if cell.kind == "backward":
        wide = problem.x.astype("f8")
        m = wide.mean(cell.axes, keepdims=True)
        r = 1 / np.sqrt(((wide - m) ** 2).mean(cell.axes, keepdims=True) + EPS)
        m, r = (tensor(np.ascontiguousarray(part, np.float32)) for part in (m, r))
        every = [True, True, True]
        if cell.op == "batch_norm":
            m, r = m.reshape(-1), r.reshape(-1)
            backward = torch.ops.aten.native_batch_norm_backward
            return (lambda g, x: backward(g, x, w, mean, var, m, r, True, EPS, every)), (dy, x)
        backward = torch.ops.aten.native_layer_norm_backward
        return (lambda g, x: backward(g, x, (x.shape[-1],), m, r, w, b, every)), (dy, x)
    if cell.kind == "eval + ReLU":
        return (lambda x: F.relu(F.batch_norm(x, mean, var, w, b, False, 0.1, EPS))), (x,)
    size = (cell.shape[-1],)
    return {
        "batch_norm": lambda x: F.batch_norm(x, mean, var, w, b, True, 0.1, EPS),
        "layer_norm": lambda x: F.layer_norm(x, size, w, b, EPS),
        "rms_norm": lambda x: F.rms_norm(x, size, w, EPS),
        "group_norm": lambda x: F.group_norm(x, cell.groups, w, b, EPS),
        "instance_norm": lambda x: F.instance_norm(x, None, None, w, b, True, 0.1, EPS),
    }[cell.op], (x,)


def torch_eager(problem: Problem) -> Run:
    function, tensors = torch_function(problem)
    return lambda: function(*tensors)


def torch_compile(problem: Problem) -> Run:
    import torch  # noqa: PLC0415

    function, tensors = torch_function(problem)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True)
    return lambda: compiled(*tensors)


def onednn(problem: Problem) -> Run | None:
    cell = problem.cell
    if cell.op != "batch_norm" or cell.kind == "backward" or cell.last or len(cell.shape) < 4:
        return None  # torch hands it nothing else
    if cell.dtype != "float32":
        return None
    function, tensors = torch_function(problem)
    blocked = [tensor.to_mkldnn() for tensor in tensors]
    return lambda: function(*blocked)


def jax(problem: Problem) -> Run:
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    cell = problem.cell
    dims = problem.x.ndim
    along = [1] * dims
    along[cell.channel] = -1
    w, b, mean, var = (jnp.asarray(p.reshape(along)) for p in (problem.weight, problem.bias, problem.mean, problem.var))

    def stats(x: Any) -> tuple[Any, Any]:
        m = 0.0 if cell.op == "rms_norm" else x.mean(cell.axes, keepdims=True)
        return m, jax.lax.rsqrt(((x - m) ** 2).mean(cell.axes, keepdims=True) + EPS)

    def forward(x: Any) -> Any:
        wide = x.astype(jnp.float32)
        split = wide.reshape(x.shape[0], cell.groups, -1, *x.shape[2:]) if cell.groups else wide
        m, r = (mean, jax.lax.rsqrt(var + EPS)) if cell.kind == "eval + ReLU" else stats(split)
        y = ((split - m) * r).reshape(x.shape) * w + (0.0 if cell.op == "rms_norm" else b)
        return (jnp.maximum(y, 0) if cell.kind == "eval + ReLU" else y).astype(x.dtype)

    def backward(dy: Any, x: Any, m: Any, r: Any) -> Any:
        xhat = (x.astype(jnp.float32) - m) * r
        wide = dy.astype(jnp.float32)
        t = wide * w
        k1, k2 = (part.mean(cell.axes, keepdims=True) for part in (t, t * xhat))
        others = tuple(axis for axis in range(dims) if axis != cell.channel)
        return (r * (t - k1 - xhat * k2)).astype(x.dtype), (wide * xhat).sum(others), wide.sum(others)

    x = jnp.asarray(problem.x)
    if cell.kind != "backward":
        run = jax.jit(forward)
        return lambda: jax.block_until_ready(run(x))
    dy, run = jnp.asarray(problem.dy), jax.jit(backward)
    m, r = jax.jit(stats)(x.astype(jnp.float32))
    return lambda: jax.block_until_ready(run(dy, x, m, r))


def onnxruntime(problem: Problem) -> Run | None:
    import onnx  # noqa: PLC0415
    import onnxruntime as ort  # noqa: PLC0415
    from onnx import helper  # noqa: PLC0415

    cell = problem.cell
    if cell.kind == "backward" or cell.dtype != "float32" or (cell.op == "batch_norm" and cell.kind == "forward"):
        return None  # inference only, and what runs here in half types is emulated
    feeds = {"x": problem.x, "w": problem.weight, "b": problem.bias}
    opset, attributes, nodes = 17, {"epsilon": EPS}, []
    if cell.op == "batch_norm":
        feeds |= {"m": problem.mean, "v": problem.var}
        nodes = [
            helper.make_node("BatchNormalization", list(feeds), ["t"], epsilon=EPS),
            helper.make_node("Relu", ["t"], ["y"]),
        ]
    elif cell.op == "rms_norm":
        del feeds["b"]
        opset, attributes = 23, {"axis": -1, "epsilon": EPS}
    elif cell.op == "layer_norm":
        attributes["axis"] = -1
    elif cell.op == "group_norm":
        opset, attributes = 21, {"num_groups": cell.groups, "epsilon": EPS}
    name = {"rms_norm": "RMSNormalization"}.get(cell.op, cell.op.partition("_")[0].title() + "Normalization")
    nodes = nodes or [helper.make_node(name, list(feeds), ["y"], **attributes)]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "cell",
        [helper.make_tensor_value_info(key, kind, array.shape) for key, array in feeds.items()],
        [helper.make_tensor_value_info("y", kind, problem.x.shape)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = THREADS
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


PEERS: dict[str, tuple[Callable[[Problem], Run | None], str]] = {  # with the package that brings each
    "torch": (torch_eager, "torch"),
    "compile": (torch_compile, "torch"),
    "oneDNN": (onednn, "torch"),
    "JAX": (jax, "jax"),
    "ORT": (onnxruntime, "onnxruntime"),
}


# ---- measuring and reporting -----------------------------------------------------------------------------------------


def measure(cell: Cell, peers: list[str], pairs: int) -> dict[str, Any]:
    """One cell in this process: our time, the fraction of the limit, our error, and each peer's ratio."""
    problem = Problem(cell)
    ours = problem.ours()
    found: dict[str, Any] = {"error": problem.error(), "peers": {}}
    timed = [compare(ours, run, pairs=pairs) for run in problem.limit()]
    found["ms"] = statistics.median(pair.first for pair in timed) * 1e3
    found["limit"] = min(pair.ratios[1] for pair in timed)
    for peer in peers:
        run = PEERS[peer][0](problem)
        if run is not None:
            found["peers"][peer] = compare(ours, run, pairs=pairs).ratios[1]
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


@dataclass(frozen=True)
class Row:
    """One cell over all processes."""

    cell: Cell
    runs: list[dict[str, Any]]

    def of(self, key: str) -> float:
        return statistics.median(run[key] for run in self.runs)

    @property
    def peers(self) -> dict[str, tuple[float, float, float]]:
        names = self.runs[0]["peers"]
        return {peer: quartiles([run["peers"][peer] for run in self.runs]) for peer in names}

    @property
    def fastest(self) -> tuple[str, tuple[float, float, float]]:
        return min(self.peers.items(), key=lambda item: item[1][1])


def table(rows: list[Row], peers: list[str]) -> Iterator[str]:
    """Lines of Markdown, with the geometric mean and the worst cell last."""
    yield f"| cell | ms | {' | '.join(peers)} | fastest peer | goal | limit | error |"
    yield "|---|---|" + "---|" * (len(peers) + 4)
    for row in rows:
        found = row.peers
        cells = [f"{found[peer][1]:.2f}" if peer in found else "" for peer in peers]
        _, (low, median, high) = row.fastest
        verdict = f"{median:.2f} ({low:.2f} to {high:.2f})"
        if high < 1:
            verdict += ", lost"
        missed = "" if median >= row.cell.goal else " missed"
        yield (
            f"| {row.cell.name} | {row.of('ms'):.3f} | {' | '.join(cells)} | {verdict} | {row.cell.goal}{missed} | "
            f"{row.of('limit'):.2f} | {row.of('error'):.1e} |"
        )
    ratios = {row.cell.name: row.fastest[1][1] for row in rows}
    worst = min(ratios, key=lambda name: ratios[name])
    mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios.values()))
    yield ""
    yield f"geometric mean against the fastest peer: {mean:.2f}; worst cell: {worst}, {ratios[worst]:.2f}"


def machine() -> str:
    """Date, processor, threads and versions."""
    info = Path("/proc/cpuinfo")
    named = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    parts = [date.today().isoformat(), named[0] if named else platform.processor(), f"{THREADS} threads"]
    for package in ("nbnorm", "numba", "numpy", "torch", "jax", "onnxruntime"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few pairs, float32 and torch only")
    parser.add_argument("--processes", type=int, default=1, help="run so often anew, and print the quartiles")
    parser.add_argument("--pairs", type=int, help="pairs a ratio (31, or 7 with --quick)")
    parser.add_argument("--cells", nargs="+", default=[], metavar="WORD", help="only cells whose name has one of these")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="only these")
    parser.add_argument(
        "--halves", action="store_true", help="float16 and bfloat16, against torch, in place of float32"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    wanted = options.peers or (["torch"] if options.quick or options.halves else list(PEERS))
    peers = []
    for peer in wanted:
        try:
            version(PEERS[peer][1])
            peers.append(peer)
        except PackageNotFoundError:
            print(f"{peer} is left out: pip install {PEERS[peer][1]}", file=sys.stderr)
    if not peers:
        sys.exit("no peer is installed")
    cells = [
        cell
        for cell in (HALVES if options.halves else FLOAT32)
        if not options.cells or any(word in cell.name for word in options.cells)
    ]
    if not cells:
        sys.exit(f"no cell has {' or '.join(options.cells)} in its name")
    pairs = options.pairs or (7 if options.quick else 31)
    runs: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in cells}
    for process in range(options.processes):
        if options.processes == 1:
            for cell in cells:
                runs[cell.name].append(measure(cell, peers, pairs))
                print(f"{cell.name}: {runs[cell.name][-1]}", file=sys.stderr, flush=True)
        else:
            for name, found in in_a_process(process, peers, pairs, options.halves, options.cells).items():
                runs[name].append(found)
    rows = [Row(cell, runs[cell.name]) for cell in cells]
    print(machine(), end="\n\n")
    for line in table(rows, peers):
        print(line)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "pairs": pairs, "cells": runs}, indent=1))


def in_a_process(process: int, peers: list[str], pairs: int, halves: bool, words: list[str]) -> dict[str, Any]:
    """The figures of one run in a process of its own."""
    print(f"process {process + 1}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "cells.json")
        command = [sys.executable, __file__, "--pairs", str(pairs), "--json", str(target), "--peers", *peers]
        command += ["--halves"] * halves + (["--cells", *words] if words else [])
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {name: found[0] for name, found in json.loads(target.read_text())["cells"].items()}


if __name__ == "__main__":
    main()
