"""The options of `gpu_check`, its tables, its JSON and its exit status."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from nbnorm.bench import processor
from nbnorm.files import replacing
from nbnorm.parallel import available_threads
from nbnorm.peers import Case
from nbnorm_backends import store
from nbnorm_backends.numba_cuda import checks, compile_check, gpu_device, gpu_measure
from nbnorm_backends.numba_cuda.backend import CudaBackend
from nbnorm_backends.numba_cuda.gpu_device import Device
from nbnorm_backends.numba_cuda.gpu_measure import Budget, Found
from nbnorm_backends.numba_cuda.launch import CAPABILITIES, Variant, variants

PACKAGES = "nbnorm", "numba", "numba-cuda", "cuda-core", "cuda-bindings", "numpy", "torch", "triton"
FILE = "gpu_check.json"
LOG_WIDTH = 150
SIMULATED_DEVICE = "nbnorm_backends.numba_cuda.simulated_device"  # needs greenlet
BUDGET = 420  # seconds: with the piece that is under way at their end, under 8 minutes
PARTS = "kernels", "graphs", "launch", "times", "sanitizer", "compiled"
BACKWARD = "dx", "dweight", "dbias", "dresidual"

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def gpu_check(
    dry: Annotated[
        bool, typer.Option("--dry", help="Without a GPU: compile every kernel, simulate every norm.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --dry: one kernel of each family, some norms.")] = False,
    jobs: Annotated[
        int, typer.Option(min=1, help="Processes that compile.", show_default="one a processor")
    ] = available_threads(),
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help=f"An existing folder for {FILE}.", exists=True)
    ] = None,
    budget: Annotated[float, typer.Option(min=0, help="Seconds; what they do not suffice for is named.")] = BUDGET,
    subset: Annotated[bool, typer.Option("--subset", hidden=True, help="What the sanitizer watches.")] = False,
) -> None:
    """Check the CUDA kernels on this machine's GPU; exit status 1 where one fails, 2 where there is no GPU."""
    if quick and not dry:
        raise typer.BadParameter("is for --dry", param_hint="--quick")
    # Names of checks fit into a log's lines as well.
    console = Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    report: Found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": _versions()}
    if dry:
        if problem := dry_problem():
            _leave([problem])
    elif reasons := gpu_device.missing():
        _leave(["no GPU to check on this machine:", *reasons, "--dry does what needs no GPU"])
    begin = time.monotonic()
    try:
        if dry:
            _dry(console, report, quick, jobs)
        elif subset:
            _check(console, report, gpu_device.Gpu(), Budget(budget), subset_checks())
        else:
            measure(console, report, gpu_device.Gpu(), Budget(budget), jobs=jobs)
    finally:  # what was found until an error is worth keeping
        report["seconds"] = time.monotonic() - begin
        if out is not None:
            _save(report, out / FILE)
    if out is not None:
        console.print(f"figures: {out / FILE}", soft_wrap=True)
    failed = report["failed"]
    console.print(
        f"{len(failed)} failed{': ' if failed else ''}{'; '.join(failed)} ({report['seconds']:.0f} s)", soft_wrap=True
    )
    sys.exit(int(bool(failed)))


def _leave(lines: Iterable[str]) -> None:
    print("\n  ".join(lines), file=sys.stderr)
    sys.exit(2)


def _versions() -> dict[str, str]:
    found = {"Python": platform.python_version(), "processor": processor()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _save(report: Found, path: Path) -> None:
    with replacing(path) as file:
        file.write((json.dumps(_standard(report), indent=1, allow_nan=False) + "\n").encode())


def _standard(value: Any) -> Any:
    """What JSON has words for: numbers that are not finite as strings, such as "nan"."""
    if isinstance(value, dict):
        return {name: _standard(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_standard(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- without a GPU ---------------------------------------------------------------------------------------------------


def dry_problem() -> str | None:
    """What is not installed of that which compiles and simulates, and how to get it."""
    try:
        for module in (compile_check.COMPILER, SIMULATED_DEVICE):
            import_module(module)
    except ImportError as error:
        return f"what compiles and simulates is not installed ({error}): {compile_check.NEEDED}"
    return None


def _dry(console: Console, report: Found, quick: bool, jobs: int) -> None:
    """Compile, then run norms of arrays on a simulated device."""
    chosen, capabilities = (samples(), CAPABILITIES[-1:]) if quick else (variants(), CAPABILITIES)
    begin = time.monotonic()
    over = compile_check.check(chosen, capabilities, jobs)
    console.print(f"compiled in {time.monotonic() - begin:.0f} s by {jobs} processes", soft_wrap=True)
    begin = time.monotonic()
    module = import_module(SIMULATED_DEVICE)
    simulated = CudaBackend(module.SimulatedDevice)
    memory: Any = simulated.device_of(0).memory
    put, get = memory.tensor, module.Tensor.numpy
    look = partial(gpu_measure.correctness, put=put, get=get, single=checks.SIMULATED)
    report["checks"] = Budget(math.inf).run(
        (check.name, partial(look, check, backend=simulated, runs=1)) for check in checks.dry_checks(quick)
    )
    console.print(error_table("Norms on a simulated GPU", report["checks"]))
    for line in exceptions(report["checks"]):
        console.print(line, soft_wrap=True)
    console.print(f"simulated in {time.monotonic() - begin:.0f} s", soft_wrap=True)
    report["failed"] = [f"{over} kernels over budget"] * bool(over) + _failed(report["checks"])


def samples() -> tuple[Variant, ...]:
    """The first variant of each family."""
    return tuple({variant.family: variant for variant in reversed(variants())}.values())[::-1]


def _failed(found: Iterable[Found]) -> list[str]:
    return [each["name"] for each in found if not each.get("passed", True)]


# ---- with one --------------------------------------------------------------------------------------------------------


def measure(
    console: Console,
    report: Found,
    device: Device,
    budget: Budget,
    *,
    jobs: int,
    cases: tuple[Case, ...] = checks.LARGE,
    graphs: tuple[Case, ...] = gpu_measure.GRAPHS,
    goals: Iterable[gpu_measure.Goal] | None = None,
    copied: int = gpu_measure.COPY_BYTES,
    pairs: int = gpu_measure.PAIRS,
    tools: tuple[str, ...] = ("memcheck", "racecheck"),
) -> None:
    """The most important first: what the budget does not suffice for is in the report's "skipped"."""
    goals = gpu_measure.goals() if goals is None else list(goals)
    report |= {"device": device.facts(), "budget": budget.seconds, "skipped": budget.skipped, "failed": []}
    report["kernels"] = []
    for name, value in chain(report["device"].items(), report["versions"].items()):
        console.print(f"{name:<16} {value}", soft_wrap=True)
    if jobs > 1 and store.folder() is not None:
        compiling = partial(gpu_measure.compile_all, device.capability, jobs, budget)
        report["kernels"] = budget.run([("kernels", compiling)])
        for each in _done(report["kernels"]):
            done = f"{each['compiled']} of {each['of']} kernels compiled in {each['seconds']:.0f} s by {jobs} processes"
            console.print(done, soft_wrap=True)
    report["copy"] = gpu_measure.copy_bandwidth(device, copied)
    bandwidth = report["copy"]["bytes_per_second"]
    low, median, high = (speed / 1e9 for speed in report["copy"]["quartiles"])
    console.print(f"copy of {copied >> 20} MiB: {median:.0f} GB/s ({low:.0f} to {high:.0f})", soft_wrap=True)

    _check(console, report, device, budget, checks.plain_checks(cases))
    report["graphs"] = budget.run(
        (f"graph of {gpu_measure.name_of(case)}", partial(gpu_measure.graph, device, case, pairs)) for case in graphs
    )
    report["launch"] = budget.run([("launch", partial(gpu_measure.launches, device))])
    report["times"] = budget.run(
        (f"time of {goal.name}", partial(gpu_measure.timing, device, goal, bandwidth, pairs)) for goal in goals
    )
    _check(console, report, device, budget, chain(checks.far_checks(cases), checks.option_checks(cases)))
    report["sanitizer"] = budget.run((tool, partial(gpu_measure.sanitize, tool, budget)) for tool in tools)
    report["compiled"] = budget.run(
        (f"torch.compile of {goal.name}", partial(gpu_measure.beside_compiled, device, goal, pairs))
        for goal in goals
        if goal.compiled
    )

    for part in PARTS:
        report["failed"] += _failed(report[part])
    for table in tables(report):
        console.print(table)
    for line in remarks(report):
        console.print(line, soft_wrap=True)


def subset_checks() -> list[checks.Check]:
    """Small norms of float32 and bfloat16, which reach every family of kernels."""
    return [check for check in checks.plain_checks(checks.SMALL) if check.case.dtype in ("float32", "bfloat16")]


def _check(console: Console, report: Found, device: Device, budget: Budget, chosen: Iterable[checks.Check]) -> None:
    found = budget.run(
        (f"results of {check.name}", partial(gpu_measure.correctness, check, device.put, device.get))
        for check in chosen
    )
    console.print(error_table("Results beside exact ones", found))
    report.setdefault("checks", []).extend(found)
    report.setdefault("failed", []).extend(_failed(found))


# ---- tables ----------------------------------------------------------------------------------------------------------


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(names[0])
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def error_table(title: str, found: Iterable[Found]) -> Table:
    """The worst error of the forward, and of the backward, beside its bound."""
    table = _table(title, "", "forward", "bound", "backward", "bound", "")
    for each in found:
        errors = each.get("errors", {})
        sides = [
            _worst(error for name, error in errors.items() if (name in BACKWARD) == backward)
            for backward in (False, True)
        ]
        verdict = "" if each["passed"] else "ERROR" if "error" in each else "MISSED" if each["same_bits"] else "BITS"
        table.add_row(each["name"], *chain(*sides), verdict)
    return table


def _worst(errors: Iterable[Mapping[str, float]]) -> tuple[str, str]:
    listed = list(errors)
    if not listed:
        return "", ""
    # Not-a-number is above all bounds.
    worst = max(listed, key=lambda each: (not each["error"] <= each["bound"], each["error"] / each["bound"]))
    return f"{worst['error']:.1e}", f"{worst['bound']:.1e}"


def tables(report: Found) -> Iterable[Table]:
    """Of what could be measured."""
    table = _table("Times out of cache", "", "us", "GB/s", "of a copy", "goal", "torch", "goal", "torch.compile")
    compiled = {each["name"]: each for each in _done(report["compiled"])}
    for each in _done(report["times"]):
        torch, other = each["torch"], compiled.get(each["name"], {})
        table.add_row(
            each["name"],
            f"{each['seconds'] * 1e6:.0f}",
            f"{each['bytes_per_second'] / 1e9:.0f}",
            f"{each['fraction']:.2f}",
            f"{each['goal']:.2f}" + " missed" * (not each["met"]),
            f"{torch['ratios'][1]:.2f}",
            f"{torch['goal']:.1f}" + " missed" * (not torch["met"]),
            f"{other['ratios'][1]:.2f}" if "ratios" in other else other.get("unavailable", ""),
        )
    yield table
    table = _table("CUDA graphs", "", "call, us", "replay, us", "bits")
    for each in _done(report["graphs"]):
        times = (f"{each[name] * 1e6:.1f}" for name in ("seconds", "replay"))
        table.add_row(each["name"], *times, "the same" if each["same_bits"] else "OTHERS")
    yield table


def _done(found: Iterable[Found]) -> list[Found]:
    return [each for each in found if "error" not in each]


def remarks(report: Found) -> Iterable[str]:
    """What stands below the tables."""
    yield "torch, torch.compile: their time over nbnorm's, in turn. torch.compile's kernels are Triton's."
    for launch in _done(report["launch"]):
        times = ", ".join(f"{name} {launch[name] * 1e6:.1f} us" for name in ("call", "plan", "torch"))
        missed = " missed" * (not launch["met"])
        yield f"host's time of a small layer norm: {times}; goal {launch['goal'] * 1e6:.0f} us{missed}"
    for found in _done(report["sanitizer"]):
        state = "nothing found" if found.get("passed") else found.get("unavailable") or found["output"]
        yield f"{found['name']}: {state}"
    for part in ("checks", *PARTS):
        yield from exceptions(report[part])
    for name in report["skipped"]:
        yield f"skipped, for want of time: {name}"


def exceptions(found: Iterable[Found]) -> Iterable[str]:
    return (f"{each['name']}:\n{each['error']}" for each in found if "error" in each)
