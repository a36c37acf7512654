"""What `nbnorm bench` and `asv_bench/peers.py` find out about a case: times, ratios, noise, errors; a picture of it."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nbnorm.errors import BackendError
from nbnorm.measure import Quartiles, compare, noisy, verdict
from nbnorm.parallel import thread_count
from nbnorm.peers import PEERS, Case, Problem, Unavailable


@dataclass(frozen=True)
class Timing:
    """One call of a case.

    Attributes
    ----------
    seconds : float
        Median time.
    ratios : three floats
        Quartiles, over the pairs, of its time over that of nbnorm's call; nbnorm's own are the noise.
    verdict : str
        Of nbnorm's call, beside this one: see `nbnorm.measure.verdict`. Empty for nbnorm's own.
    gigabytes_per_second : float
        What has to be moved at the least, `Case.bytes`, over the time.
    copy_fraction : float
        The time of a copy of as many bytes over this time.
    error : float
        The largest difference from the result in float64.
    """

    seconds: float
    ratios: Quartiles
    verdict: str
    gigabytes_per_second: float
    copy_fraction: float
    error: float


@dataclass(frozen=True)
class Report:
    """A case, measured: nbnorm, and each peer or why it does not run the case."""

    case: Case
    backend: str
    copied_by: str
    pairs: int
    ours: Timing
    peers: dict[str, Timing | str]

    @property
    def noisy(self) -> bool:
        """Whether nbnorm's call, timed against itself, shows the machine to be too noisy for small differences."""
        return noisy(self.ours.ratios)

    def as_json(self) -> dict[str, Any]:
        """Numbers and text; times in seconds."""
        peers = {
            name: {"unavailable": found} if isinstance(found, str) else asdict(found)
            for name, found in self.peers.items()
        }
        facts = {"machine": machine(), "threads": thread_count(), "noisy": self.noisy}
        return asdict(self) | {"peers": peers} | facts


def measure(case: Case, against: Sequence[str], pairs: int, backend: str | None = None) -> Report:
    """Time nbnorm's call in turn with a copy, with itself, and with each peer or backend that is named.

    Raises
    ------
    ValueError, TypeError, BackendError
        As nbnorm does for the case.
    """
    problem = Problem(case)
    ours = problem.ours(backend)
    ours.run()  # where a case cannot be, nbnorm says why
    error = ours.error(problem.exact)
    copied_by, runs = problem.copies()
    copies = [compare(ours.run, run, pairs=pairs) for run in runs]
    limit = min(copy.ratios[1] for copy in copies)
    itself = compare(ours.run, ours.run, pairs=pairs)
    seconds = [itself.first, *(copy.first for copy in copies)]
    peers: dict[str, Timing | str] = {}
    for name in against:
        try:
            peer = PEERS[name].call(problem) if name in PEERS else problem.ours(name)
            peer_error = peer.error(problem.exact)
        except (Unavailable, BackendError) as reason:
            peers[name] = str(reason)
            continue
        found = compare(ours.run, peer.run, pairs=pairs)
        seconds.append(found.first)
        peers[name] = Timing(
            found.second,
            found.ratios,
            verdict(found.ratios, itself.ratios),
            case.bytes / found.second / 1e9,
            limit / found.ratios[1],
            peer_error,
        )
    mine = statistics.median(seconds)
    own = Timing(mine, itself.ratios, "", case.bytes / mine / 1e9, limit, error)
    return Report(case, problem.chosen(backend), copied_by, pairs, own, peers)


def machine() -> str:
    """Date, processor, threads and versions."""
    parts = [date.today().isoformat(), processor(), f"{thread_count()} threads"]
    for package in ("nbnorm", "numba", "numpy", "torch", "jax", "onnxruntime"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            parts.append(f"no {package}")
    return ", ".join(parts)


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def save_picture(report: Report, title: str, path: Path) -> None:
    """Draw each ratio with its quartiles, and nbnorm's own, the noise, as a band."""
    from matplotlib.figure import Figure  # noqa: PLC0415  an extra, and only this function needs it

    timed = {name: found for name, found in report.peers.items() if not isinstance(found, str)}
    rows = {"nbnorm": report.ours, **timed}
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(rows)), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    low, _, high = report.ours.ratios
    axes.axvspan(low, high, color="tab:gray", alpha=0.3, label="nbnorm beside itself: the noise")
    for name, found in rows.items():
        below, median, above = found.ratios
        value = 1.0 if name == "nbnorm" else median
        spread = None if name == "nbnorm" else [[median - below], [above - median]]
        colour = "tab:blue" if name == "nbnorm" else "tab:orange"
        axes.barh(f"{name}\n{found.seconds * 1e3:.3g} ms", value, xerr=spread, color=colour, capsize=3)
    axes.axvline(report.ours.copy_fraction, color="black", linestyle="--", label="a copy of as many bytes")
    axes.invert_yaxis()
    axes.set(xlabel="time over that of nbnorm, with quartiles", title=title)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)
