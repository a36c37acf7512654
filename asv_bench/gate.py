"""Fails where a change made something slower, by figures that a busy machine does not move.

    python asv_bench/gate.py [BASE] [--head REVISION] [--quick] [--only REGEX]

builds the base (by default HEAD's first parent) and the working tree, or another revision, measures both by the
benchmarks of this checkout, and prints what moved. It ends with 1 if instructions grew by more than 2% or a ratio to
NumPy or torch by more than 1.3; with 2 if that cannot be told: a build or a benchmark fails, fewer benchmarks ran than
there are or the base has, or, where CI or NBNORM_CI_STRICT is set, nothing counts instructions. Dependencies are those
installed here.

A slowdown or a removal that is meant is said in the message of a commit after the base, by a trailer `Slower: REGEX`
that names the benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
LIMITS = {"track_instructions": 1.02, "track_ratio": 1.3}  # two runs of one code: equal, and within 1.28
RETRIES = 3  # processes for each side, in turn, before a ratio counts as slower
BUILT_IN = (", numba)", ", numpy)")


class GateError(Exception):
    """It cannot be told whether anything is slower."""


@dataclass(frozen=True)
class Row:
    """A benchmark on both sides."""

    name: str
    base: float | None
    head: float | None
    accepted: bool = False  # a commit says that it may be slower

    @property
    def limit(self) -> float:
        return next(limit for family, limit in LIMITS.items() if self.name.startswith(family))

    @property
    def verdict(self) -> str:
        if self.head is None:
            return "missing"
        if self.base is None:
            return "new"
        change = self.head / self.base
        if change > self.limit:
            return "accepted" if self.accepted else "slower"
        return "faster" if change < 1 / self.limit else "same"


def matches(accepted: Collection[re.Pattern[str]], name: str) -> bool:
    """Whether a pattern is found in the name, or is a part of it as it stands: the table's names have parentheses."""
    return any(pattern.pattern in name or pattern.search(name) for pattern in accepted)


def compare(
    base: Mapping[str, float],
    head: Mapping[str, float],
    expected: Collection[str],
    accepted: Collection[re.Pattern[str]] = (),
) -> list[Row]:
    """A row for each benchmark that is expected or that a side has."""
    return [
        Row(name, base.get(name), head.get(name), matches(accepted, name))
        for name in dict.fromkeys([*expected, *base, *head])
    ]


def exit_code(rows: Collection[Row]) -> int:
    """2 where a benchmark is missing, or there are none; 1 where one is slower."""
    verdicts = {row.verdict for row in rows}
    return 2 if not rows or "missing" in verdicts else 1 if "slower" in verdicts else 0


@dataclass(frozen=True)
class Side:
    """A revision, installed in a folder of its own, and what was measured of it."""

    folder: Path
    values: dict[str, float]
    failed: dict[str, str]

    @classmethod
    def build(cls, source: Path, folder: Path) -> Side:
        """Install it without its dependencies: they are those of this interpreter."""
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
        _run([*pip, "--target", str(folder), str(source)], "the build failed")
        return cls(folder, {}, {})

    def measure(self, names: Collection[str], quick: bool, suite: Path = HERE) -> dict[str, Any]:
        """Measure these in a process of its own; returns what `benchmarks.gated` of the suite wrote."""
        path = os.pathsep.join(filter(None, [str(self.folder), str(suite), os.environ.get("PYTHONPATH")]))
        with tempfile.TemporaryDirectory() as scratch:
            result = Path(scratch, "result.json")
            command = [sys.executable, "-m", "benchmarks.gated", str(result), *(["--quick"] if quick else [])]
            environment = os.environ | {"PYTHONPATH": path}
            _run(command, "measuring failed", cwd=scratch, env=environment, input="\n".join(names))
            found: dict[str, Any] = json.loads(result.read_text())
        if not Path(found["library"]).is_relative_to(self.folder):
            raise GateError(f"measured is {found['library']}, not the build in {self.folder}")
        for name in names:  # what fails now is not what was measured before
            self.values.pop(name, None)
        self.values.update(found["values"])
        self.failed.update(found["failed"])
        return found


def _run(command: list[str], failure: str, **options: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise GateError(f"{failure} ({' '.join(command)}):\n{(done.stdout + done.stderr)[-4000:]}")


def unpack(revision: str, root: Path, folder: Path) -> Path:
    """The files of a revision."""
    archive = subprocess.run(["git", "-C", str(root), "archive", revision], capture_output=True, check=False)
    if archive.returncode:
        raise GateError(f"{revision!r} is no revision of {root}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            files.extraction_filter = tarfile.data_filter
        files.extractall(folder)
    return folder


def accepted_slowdowns(base: str, head: str, root: Path) -> list[re.Pattern[str]]:
    """What the trailers `Slower` of the commits after the base name."""
    wanted = "--format=%(trailers:key=Slower,valueonly,unfold)"
    log = subprocess.run(["git", "-C", str(root), "log", wanted, f"{base}..{head}"], capture_output=True, check=True)
    lines = filter(None, map(str.strip, log.stdout.decode().splitlines()))
    try:
        return [re.compile(line) for line in lines]
    except re.error as error:
        raise GateError(f"a trailer Slower is no regular expression: {error.pattern!r}: {error}") from None


def without_counts(names: list[str], reason: str | None, console: Console) -> list[str]:
    """The names; those that need no counts where there are none, unless this must not be passed over."""
    if reason is None:
        return names
    if os.environ.get("CI") or os.environ.get("NBNORM_CI_STRICT") == "1":
        raise GateError(reason)
    console.print(f"[yellow]warning: {reason}: only ratios are compared[/]")
    return [name for name in names if not name.startswith("track_instructions")]


def removed(base: Side, suite: Path, known: Collection[str], quick: bool) -> list[str]:
    """What the suite of the base, if it has one, measures and this checkout's does not."""
    if not (suite / "benchmarks" / "gated.py").exists():
        return []
    return [name for name in base.measure([], quick, suite)["names"] if name not in known]


def again(base: Side, head: Side, names: list[str], quick: bool) -> None:
    """Measure ratios anew, the sides in turn, and keep the medians."""
    runs: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(RETRIES):
        for side in (base, head):
            side.measure(names, quick)
        runs.append((dict(base.values), dict(head.values)))
    for side, own in zip((base, head), zip(*runs, strict=True), strict=True):
        for name in side.values.keys() & names:
            side.values[name] = statistics.median(values[name] for values in own if name in values)


def gate(base: str, revision: str | None, only: re.Pattern[str], quick: bool, console: Console) -> list[Row]:
    """Build, measure and compare."""
    root = HERE.parent
    with tempfile.TemporaryDirectory(prefix="nbnorm-gate-") as folder:
        scratch = Path(folder)
        source = root if revision is None else unpack(revision, root, scratch / "head-source")
        sides = [
            Side.build(unpack(base, root, scratch / "base-source"), scratch / "base"),
            Side.build(source, scratch / "head"),
        ]
        accepted = accepted_slowdowns(base, revision or "HEAD", root)
        known = sides[1].measure([], quick)
        gone = removed(sides[0], scratch / "base-source" / HERE.name, known["names"], quick)
        names = [name for name in known["names"] if only.search(name)]
        if not names:
            raise GateError(f"--only {only.pattern!r} matches none of {', '.join(known['names'])}")
        names = without_counts(names, known["uncounted"], console)
        for side in sides:
            side.measure(names, quick)
        before, after = sides
        expected = [name for name in names if name.endswith(BUILT_IN)]
        expected += [name for name in gone if only.search(name) and not matches(accepted, name)]
        rows = compare(before.values, after.values, expected, accepted)
        doubtful = [row.name for row in rows if row.verdict == "slower" and row.name.startswith("track_ratio")]
        if doubtful:
            console.print(f"measured again: {', '.join(doubtful)}")
            again(before, after, doubtful, quick)
            rows = compare(before.values, after.values, expected, accepted)
        for which, failed in (("base", before.failed), ("head", after.failed)):
            for name, error in failed.items():
                console.print(f"{which}: {name}: {error}", markup=False)
        return rows


def table(rows: list[Row]) -> Table:
    """What is not the same."""
    grid = Table("benchmark", "base", "head", "change", "verdict")
    colours = {"slower": "red", "missing": "red", "faster": "green", "new": "cyan", "accepted": "yellow"}
    for row in rows:
        if row.verdict != "same":
            change = "" if row.base is None or row.head is None else f"{row.head / row.base:.3f}"
            verdict = f"[{colours[row.verdict]}]{row.verdict}[/]"
            grid.add_row(row.name, _number(row.base), _number(row.head), change, verdict)
    return grid


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"no regular expression: {text!r}: {error}") from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", nargs="?", default="HEAD^", help="the revision to compare with (HEAD^)")
    parser.add_argument("--head", metavar="REVISION", help="what is compared; by default the working tree")
    parser.add_argument("--quick", action="store_true", help="calls, and one case of each norm, with fewer pairs")
    parser.add_argument("--only", default="", type=_pattern, metavar="REGEX", help="only benchmarks whose name matches")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # folders and processes end with it
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        rows = gate(options.base, options.head, options.only, options.quick, console)
    except GateError as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except Exception:  # noqa: BLE001  Python would end with 1, which says that something is slower
        console.print_exception()
        return 2
    if any(row.verdict != "same" for row in rows):
        console.print(table(rows))
    code = exit_code(rows)
    console.print(f"{len(rows)} benchmarks: {['nothing is slower', 'slower', 'not all were measured'][code]}")
    return code


if __name__ == "__main__":
    sys.exit(main())
