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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbnorm.bench import Timing, machine, measure
from nbnorm.peers import PEERS, Case


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
    def case(self) -> Case:
        evaluated = self.kind == "eval + ReLU"
        return Case(
            self.op,
            self.shape,
            self.dtype,
            channel_axis=-1 if self.last else 1,
            num_groups=self.groups if self.op == "group_norm" else 0,
            activation="relu" if evaluated else None,
            training=not evaluated,
            backward=self.kind == "backward",
        )


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


COLUMNS = {"torch": "torch", "compile": "torch.compile", "oneDNN": "onednn", "JAX": "jax", "ORT": "onnxruntime"}


# ---- measuring and reporting -----------------------------------------------------------------------------------------


def figures(cell: Cell, peers: list[str], pairs: int) -> dict[str, Any]:
    """One cell in this process: our time, the fraction of the limit, our error, and each peer's ratio."""
    report = measure(cell.case, [COLUMNS[peer] for peer in peers], pairs)
    timed = {peer: report.peers[COLUMNS[peer]] for peer in peers}
    return {
        "error": report.ours.error,
        "peers": {peer: found.ratios[1] for peer, found in timed.items() if isinstance(found, Timing)},
        "ms": report.ours.seconds * 1e3,
        "limit": report.ours.copy_fraction,
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few pairs, float32 and torch only")
    parser.add_argument("--processes", type=int, default=1, help="run so often anew, and print the quartiles")
    parser.add_argument("--pairs", type=int, help="pairs a ratio (31, or 7 with --quick)")
    parser.add_argument("--cells", nargs="+", default=[], metavar="WORD", help="only cells whose name has one of these")
    parser.add_argument("--peers", nargs="+", choices=COLUMNS, help="only these")
    parser.add_argument(
        "--halves", action="store_true", help="float16 and bfloat16, against torch, in place of float32"
    )
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    wanted = options.peers or (["torch"] if options.quick or options.halves else list(COLUMNS))
    peers = []
    for peer in wanted:
        if missing := PEERS[COLUMNS[peer]].missing():
            print(f"{peer} is left out: pip install {' '.join(missing)}", file=sys.stderr)
        else:
            peers.append(peer)
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
                runs[cell.name].append(figures(cell, peers, pairs))
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
