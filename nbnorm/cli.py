"""The `nbnorm` command: `nbnorm demo`, `bench`, `info`, `warmup`, and for files `stats` and `apply`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

import nbnorm
from nbnorm import state, stream
from nbnorm.backend import ACTIVATIONS
from nbnorm.bench import Report, Timing, measure, processor, save_picture
from nbnorm.containers import container_of
from nbnorm.demo import picture, training
from nbnorm.dispatch import BUILT_IN_NAMES, BUILT_IN_ORDER, registry
from nbnorm.errors import BackendError, StateError
from nbnorm.files import replacing
from nbnorm.parallel import available_threads, thread_count
from nbnorm.peers import PEERS, ROW_NORMS, TRACKED_NORMS, Case
from nbnorm.warmup import DTYPES, NORMS, gpu_pieces, pieces_of
from nbnorm_backends import store
from nbnorm_backends.numba_cuda import device

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nbnorm {nbnorm.__version__}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Normalization for arrays of any framework."""


# ---- nbnorm demo -----------------------------------------------------------------------------------------------------


def _check_plot(path: Path | None) -> Path | None:
    if path is not None and path.suffix.lower() not in picture.FORMATS:
        raise typer.BadParameter(f"must end in {', '.join(picture.FORMATS)}; got '{path}'")
    return _check_folder(path)


def _check_folder(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not os.access(path.parent, os.W_OK) or not path.parent.is_dir():
        raise typer.BadParameter(f"'{path.parent}' is not a folder that can be written to")
    return path


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="How often each network sees the training images.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the initial weights and of the order of the images.")] = 0,
    plot: Annotated[
        Path,
        typer.Option(callback=_check_plot, dir_okay=False, writable=True, help="Where to save the loss curves."),
    ] = Path("nbnorm-demo.png"),
) -> None:
    """Train a small network on handwritten digits, with and without batch norm."""
    if find_spec("matplotlib") is None:
        sys.exit('nbnorm: the demo needs matplotlib: pip install "nbnorm[demo]"')
    console = _console()
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        report = training.run(epochs, seed, progress.track)
    console.print(_results(report))
    picture.save_loss_curves(report.losses, epochs, plot)
    console.print(f"loss curves: {plot}", soft_wrap=True)


def _results(report: training.Report) -> Table:
    table = Table(title="nbnorm demo: UCI handwritten digits", show_header=False)
    for name, correct in report.correct.items():
        table.add_row(f"test accuracy, {name}", f"{correct / report.tested:.1%} ({correct} of {report.tested})")
    table.add_section()
    for decision, count in report.decisions.items():
        table.add_row(f"backend of {count} normalizations", str(decision))
    table.add_section()
    alone = ", with nothing to compare it to" if len(report.norm_seconds) == 1 else ""
    for backend, seconds in report.norm_seconds.items():
        table.add_row(f"normalization in one training, {backend}", f"{seconds:.2f} s{alone}")
    table.add_row("first calls, with compilation", f"{report.first_calls_seconds:.2f} s")
    table.add_row("whole demo", f"{report.seconds:.1f} s")
    return table


# ---- nbnorm warmup ---------------------------------------------------------------------------------------------------


def _check_each(known: Collection[str]) -> Callable[[list[str]], list[str]]:
    def check(names: list[str]) -> list[str]:
        for name in names:
            if name not in known:
                raise typer.BadParameter(f"must be one of {', '.join(known)}; got {name!r}")
        return names

    return check


@app.command()
def warmup(
    op: Annotated[
        list[str], typer.Option(callback=_check_each(NORMS), help="A norm, repeatable.", show_default="all five")
    ] = list(NORMS),  # noqa: B006  typer copies it
    dtype: Annotated[
        list[str], typer.Option(callback=_check_each(DTYPES), help="A dtype, repeatable.", show_default="float32")
    ] = ["float32"],  # noqa: B006
    gpu: Annotated[bool, typer.Option(help="All kernels of the dtypes for this machine's first GPU, instead.")] = False,
) -> None:
    """Compile the Numba kernels of norms and their gradients, or load them, so that later processes load them."""
    console = _console()
    begin = time.perf_counter()
    columns = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        pieces = gpu_pieces(dtype) if gpu else pieces_of(op, dtype)
    except BackendError as error:
        raise _bad("--gpu", str(error)) from None
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(pieces))
        for name, compile_piece in pieces:
            progress.update(task, description=name)
            compile_piece()
            progress.advance(task)
    console.print(f"ready after {time.perf_counter() - begin:.1f} s")
    console.print(f"cache folder: {_cache()}", soft_wrap=True)


# ---- nbnorm bench ----------------------------------------------------------------------------------------------------

# Shapes by name, channels first: each call's own cost; what caches hold; what they do not.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "rows": {"small": (8, 64), "medium": (1024, 1024), "large": (8192, 4096)},
    "images": {"small": (2, 64, 4, 4), "medium": (16, 64, 32, 32), "large": (32, 256, 64, 64)},
}
FRAMEWORKS = ("torch", "jax", "onnxruntime")  # what is compared with unless something is named
PICTURE = Path("nbnorm-bench.png")
STDOUT = Path("-")


def _check_one(known: Collection[str]) -> Callable[[str | None], str | None]:
    check = _check_each(known)
    return lambda name: name if name is None else check([name])[0]


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=f"'{option}'")


def _check_backend(name: str | None) -> str | None:
    return _check_one([found.name for found in nbnorm.backends()])(name)


def _shape(text: str, op: str, channel_axis: int) -> tuple[int, ...]:
    """The lengths that a text gives or names; those that it names are for this place of the channels."""
    named = SHAPES["rows" if op in ROW_NORMS else "images"]
    if text in named:
        batch, *rest = named[text]
        if op not in ROW_NORMS and channel_axis == -1:
            rest = [*rest[1:], rest[0]]
        return (batch, *rest)
    lengths = text.split(",")
    if not all(length.strip().isdecimal() and int(length) for length in lengths) or len(lengths) < 2:
        shapes = ", ".join(f"{name} {shape}" for name, shape in named.items())
        raise _bad("--shape", f"must be two or more lengths, as 32,64,56,56, or one of {shapes}; got {text!r}")
    return tuple(map(int, lengths))


def _rivals(text: str | None) -> list[str]:
    """The peers and backends to compare with; without any named, the frameworks that are installed."""
    if text is None:
        return [name for name in FRAMEWORKS if not PEERS[name].missing()]
    known = [*PEERS, *(found.name for found in nbnorm.backends())]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise _bad("--against", f"must be of {', '.join(known)}; got {name!r}")
        if name in PEERS and (missing := PEERS[name].missing()):
            raise _bad("--against", f"{name} needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    return list(dict.fromkeys(names))


def _use_threads(count: int | None) -> None:
    """By the affinity of the process: JAX has no other way to be told. Holds for what is loaded from now on."""
    if count is None:
        if not os.environ.get("NBNORM_NUM_THREADS"):
            return
        count = thread_count()
    if count > (most := available_threads()):
        raise _bad("--threads", f"must be at most the {most} processors that this process may use; got {count}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    os.environ["NBNORM_NUM_THREADS"] = str(count)


@app.command()
def bench(
    op: Annotated[str, typer.Option(callback=_check_one(NORMS), help=", ".join(NORMS) + ".")] = "batch_norm",
    shape: Annotated[str, typer.Option(help="Lengths, as 32,64,56,56, or small, medium or large.")] = "medium",
    against: Annotated[
        str | None,
        typer.Option(
            help=f"Peers ({', '.join(PEERS)}) and backends of nbnorm, with commas between them.",
            show_default=f"those of {', '.join(FRAMEWORKS)} that are installed",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(callback=_check_one(DTYPES), help=", ".join(DTYPES) + ".")] = "float32",
    channel_axis: Annotated[int | None, typer.Option(help="The axis of the channels.", show_default="1")] = None,
    channels_last: Annotated[bool, typer.Option("--channels-last", help="As --channel-axis -1.")] = False,
    num_groups: Annotated[
        int | None, typer.Option(help="Of group_norm.", min=1, show_default="32, or fewer that divide the channels")
    ] = None,
    activation: Annotated[
        str | None, typer.Option(callback=_check_one(ACTIVATIONS), help=", ".join(ACTIVATIONS) + ".")
    ] = None,
    mode: Annotated[
        str, typer.Option(callback=_check_one(("train", "eval")), help="train, or eval by running statistics.")
    ] = "train",
    backward: Annotated[bool, typer.Option("--backward", help="Time the gradient in place of the forward.")] = False,
    backend: Annotated[
        str | None, typer.Option(callback=_check_backend, help="Of nbnorm.", show_default="the one that is chosen")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="For nbnorm and its peers.", show_default="all processors")
    ] = None,
    pairs: Annotated[int, typer.Option(min=2, help="How often each pair is timed.")] = 31,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            callback=_check_folder,
            dir_okay=False,
            allow_dash=True,
            help="Where to write the figures; - for standard output, with the table on the other.",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(callback=_check_plot, dir_okay=False, help="Where to save a picture.", show_default=str(PICTURE)),
    ] = None,
) -> None:
    """Time a norm on this machine, in turn with other libraries, and compare each result with float64."""
    rivals = _rivals(against)
    if plot is not None and find_spec("matplotlib") is None:
        sys.exit('nbnorm: --plot needs matplotlib: pip install "nbnorm[demo]"')
    with _failures_in_one_line():
        _use_threads(threads)
        case = _case(op, shape, dtype, channel_axis, channels_last, num_groups, activation, mode, backward)
        console = _console(stderr=json_file == STDOUT)
        report = measure(case, rivals, pairs, backend)
        _print_whole(console, _comparison(report, _title(case)))
        for line in _remarks(report):
            console.print(line, soft_wrap=True)
        if against is None and (absent := [name for name in FRAMEWORKS if name not in rivals]):
            packages = " ".join(package for name in absent for package in PEERS[name].missing())
            console.print(f"left out: {', '.join(absent)}: pip install {packages}", soft_wrap=True)
        if json_file is not None:
            figures = json.dumps(report.as_json(), indent=1) + "\n"
            if json_file == STDOUT:
                sys.stdout.write(figures)
            else:
                json_file.write_text(figures)
            console.print(f"figures: {json_file}", soft_wrap=True)
        if find_spec("matplotlib") is None:
            console.print('no picture: pip install "nbnorm[demo]"')
        else:
            save_picture(report, _title(case), plot or PICTURE)
            console.print(f"picture: {plot or PICTURE}", soft_wrap=True)


def _case(
    op: str,
    shape: str,
    dtype: str,
    channel_axis: int | None,
    channels_last: bool,
    num_groups: int | None,
    activation: str | None,
    mode: str,
    backward: bool,
) -> Case:
    """The case that the options describe; what does not belong to the op is refused."""
    if channels_last and channel_axis not in (None, -1):
        raise _bad("--channel-axis", f"must be -1 with --channels-last; got {channel_axis}")
    if op in ROW_NORMS and (channels_last or channel_axis is not None):
        raise _bad("--channels-last" if channels_last else "--channel-axis", f"{op} is over the last axis")
    if op != "group_norm" and num_groups is not None:
        raise _bad("--num-groups", f"is for group_norm; got {op}")
    if op not in TRACKED_NORMS and mode == "eval":
        raise _bad("--mode", f"{op} has no running statistics; {' and '.join(TRACKED_NORMS)} have")
    axis = -1 if channels_last else 1 if channel_axis is None else channel_axis
    lengths = _shape(shape, op, axis)
    if not -len(lengths) <= axis < len(lengths):
        raise _bad("--channel-axis", f"must be an axis of the shape {lengths}; got {axis}")
    if op == "group_norm" and num_groups is None:
        num_groups = math.gcd(32, lengths[axis])
    return Case(op, lengths, dtype, axis, num_groups or 0, activation, mode == "train", backward)


def _title(case: Case) -> str:
    parts = [f"{case.op} {case.shape} {case.dtype}", "backward" if case.backward else "forward"]
    if case.op not in ROW_NORMS and case.channel != 1:
        parts.append(f"channels on axis {case.channel}")
    if case.op == "group_norm":
        parts.append(f"{case.num_groups} groups")
    if case.op in TRACKED_NORMS:
        parts.append("train" if case.training else "eval")
    return ", ".join(parts + ([case.activation] if case.activation else []))


def _comparison(report: Report, title: str) -> Table:
    table = Table("", title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("time", "ratio (quartiles)", "GB/s", "of a copy", "error"):
        table.add_column(name, justify="right")
    table.add_column("nbnorm is")
    for name, found in {"nbnorm": report.ours, **report.peers}.items():
        if isinstance(found, Timing):
            low, median, high = found.ratios
            table.add_row(
                name,
                _time(found.seconds),
                f"{median:.2f} ({low:.2f} to {high:.2f})",
                f"{found.gigabytes_per_second:.3g}",
                f"{found.copy_fraction:.0%}",
                f"{found.error:.1e}",
                found.verdict,
            )
    return table


def _print_whole(console: Console, table: Table) -> None:
    """As wide as it is: a terminal that breaks its lines shows every figure, a table that fits may cut them."""
    needed = console.measure(table, options=console.options.update(width=1000)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _time(seconds: float) -> str:
    units = (1, "s"), (1e3, "ms"), (1e6, "us")
    scale, unit = next((pair for pair in units if seconds * pair[0] >= 1), units[-1])
    return f"{seconds * scale:.3g} {unit}"


def _remarks(report: Report) -> Iterator[str]:
    """What stands below the table."""
    low, _, high = report.ours.ratios
    for name, found in report.peers.items():
        if not isinstance(found, Timing):
            yield f"{name}: {found}"
    yield f"nbnorm: backend {report.backend}; ratio: time over nbnorm's in {report.pairs} pairs, its own is the noise"
    if report.peers:
        unset = "not set: each library decides what its threads do between calls"
        yield f"OMP_WAIT_POLICY: {os.environ.get('OMP_WAIT_POLICY', unset)}"
    if report.copied_by == "numpy":
        yield "copy: by NumPy, on one thread, for want of Numba"
    if report.noisy:
        yield (
            f"This machine is too noisy to tell small differences: nbnorm's own ratio spreads from {low:.2f} to "
            f"{high:.2f}. End other programs, or give more --pairs."
        )


# ---- nbnorm stats and nbnorm apply -----------------------------------------------------------------------------------

SHOWN = 10  # channels at each end of the table

BFloat16 = Annotated[
    bool, typer.Option("--bfloat16", help="Two-byte elements are bfloat16, for which .npy files have no name.")
]


def _check_state_path(path: Path | None) -> Path | None:
    if path is not None:
        try:
            container_of(path)
        except StateError as error:
            raise typer.BadParameter(str(error)) from error
    return _check_folder(path)


@app.command()
def stats(
    file: Annotated[Path, typer.Argument(help="A .npy file of floating dtype, of any size.")],
    channel_axis: Annotated[int, typer.Option(help="The axis of the channels; negative from the end.")],
    save: Annotated[
        Path | None,
        typer.Option(callback=_check_state_path, help="A .npz or .safetensors file for what nbnorm apply needs."),
    ] = None,
    bfloat16: BFloat16 = False,
    every: Annotated[bool, typer.Option("--all", help="Show all channels, not the first and last ten.")] = False,
) -> None:
    """Count, mean and standard deviation of each channel of a .npy file, read in blocks."""
    console = _console()
    with _failures_in_one_line():
        if save is not None:
            _check_other(save, file)
        source = stream.open_array(file, channel_axis, bfloat16)
        with _bytes_progress(console, "reading", source.nbytes) as advance:
            found = stream.channel_statistics(source, advance)
        console.print(_channels(source, found, every))
        if save is not None:
            _check_finite(found)
            state.write_moments(save, found.moments, {"channel_axis": str(channel_axis)})
            console.print(f"saved: {save}", soft_wrap=True)


@app.command()
def apply(
    file: Annotated[Path, typer.Argument(metavar="IN", help="A .npy file of floating dtype, of any size.")],
    stats: Annotated[Path, typer.Option(help="What nbnorm stats has saved.")],
    out: Annotated[Path, typer.Option(help="The .npy file to write, of the same shape and dtype.", dir_okay=False)],
    eps: Annotated[float, typer.Option(min=0, help="Is added to the variance.")] = 1e-5,
    channel_axis: Annotated[int | None, typer.Option(help="In place of the axis that the statistics name.")] = None,
    bfloat16: BFloat16 = False,
) -> None:
    """Normalize the channels of a .npy file with saved statistics: (x - mean) / sqrt(var + eps), read in blocks."""
    leave_if_stopped = _end_by_exceptions()
    console = _console()
    with _failures_in_one_line():
        if not out.parent.is_dir():
            raise ValueError(f"--out must be in a folder that is there; got {out}")
        for given in (file, stats):
            _check_other(out, given)
        moments, metadata = state.read_moments(stats)
        axis = _saved_axis(stats, metadata) if channel_axis is None else channel_axis
        source = stream.open_array(file, axis, bfloat16)
        stream.check_statistics(source, moments, eps)
        with replacing(out) as target, _bytes_progress(console, "normalizing", source.nbytes) as advance:
            stream.normalize(source, target, moments, eps, lambda size: (advance(size), leave_if_stopped()))
        console.print(f"saved: {out}", soft_wrap=True)


def _end_by_exceptions() -> Callable[[], None]:
    """Have signals end the command by exceptions, so that no half file is left.

    Python swallows an exception that comes while a ``__del__`` runs: what is returned raises it again.
    """
    stopped: list[int] = []

    def leave() -> None:
        if stopped:
            sys.exit(128 + stopped[0])

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        leave()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return leave


@contextlib.contextmanager
def _failures_in_one_line() -> Iterator[None]:
    """What is wrong with a file is said by the message alone."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"nbnorm: {error}")


def _check_other(written: Path, read: Path) -> None:
    if written.exists() and read.exists() and written.samefile(read):
        raise ValueError(f"{written} is the file that is read; name another one to write")


@contextlib.contextmanager
def _bytes_progress(console: Console, name: str, total: int) -> Iterator[stream.Advance]:
    columns = "{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=total)
        yield lambda count: progress.advance(task, count)


def _channels(source: stream.ArrayFile, found: stream.ChannelStatistics, every: bool) -> Table:
    table = Table(title=f"{source.path}: {source.dtype.name} {source.shape}")
    for name in ("channel", "count", "mean", "std", "min", "max", "NaN or Inf"):
        table.add_column(name, justify="right")
    channels = source.view[1]
    numbers = found.moments.mean, found.moments.std(), found.least, found.most
    for channel in range(channels):
        if every or channel < SHOWN or channel >= channels - SHOWN:
            cells = (f"{values[channel]:.6g}" for values in numbers)
            nonfinite = str(found.nonfinite[channel]) if found.nonfinite[channel] else ""
            table.add_row(str(channel), str(found.moments.count[channel]), *cells, nonfinite)
        elif channel == SHOWN:
            table.add_row(f"{channels - 2 * SHOWN} more")
    return table


def _check_finite(found: stream.ChannelStatistics) -> None:
    if not np.any(found.moments.count):
        raise ValueError("nothing saved: the file has no elements")
    bad = np.flatnonzero(found.nonfinite)
    if bad.size:
        names = ", ".join(map(str, bad[:SHOWN])) + (" and more" if bad.size > SHOWN else "")
        raise ValueError(f"nothing saved: there are NaN or Inf in {bad.size} of the channels: {names}")


def _saved_axis(path: Path, metadata: dict[str, str]) -> int:
    try:
        return int(metadata["channel_axis"])
    except (KeyError, ValueError):
        raise ValueError(f"{path} names no channel axis; give --channel-axis") from None


# ---- nbnorm info -----------------------------------------------------------------------------------------------------


@app.command()
def info() -> None:
    """Print versions, processor, threads, cache folder and the state of every backend."""
    console = _console()
    facts = _facts()
    width = max(map(len, facts))
    for name, value in facts.items():
        console.print(f"{name:<{width}}  {value}", soft_wrap=True)
    console.print(_backend_table())


def _facts() -> dict[str, str]:
    return {
        "nbnorm": nbnorm.__version__,
        "Python": platform.python_version(),
        **{package: _version(package) for package in ("numpy", "numba", "scipy", *device.NEEDED.values())},
        "processor": processor(),
        "threads": _threads(),
        "GPUs": device.problem() or device.names(),
        "cache folder": _cache(),
        "dispatch": _dispatch(),
        **{name: value for name, value in sorted(os.environ.items()) if name.startswith("NBNORM_")},
    }


def _version(package: str) -> str:
    """From the metadata: importing Numba takes longer than everything else here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _threads() -> str:
    try:
        return f"{thread_count()} of {available_threads()} usable"
    except ValueError as error:
        return str(error)


def _cache() -> str:
    folder = store.folder()
    if folder is None:
        return "none: kernels are compiled anew in each process"
    files, size = store.usage()
    return f"{folder} ({files} kernels, {size / 1e6:.1f} MB)"


def _dispatch() -> str:
    """What would run a float32 batch norm here and now, and why."""
    try:
        return str(nbnorm.explain(nbnorm.batch_norm, np.zeros((2, 1), np.float32), training=True))
    except BackendError as error:  # NBNORM_BACKEND names a backend that is not there
        return str(error)


def _backend_table() -> Table:
    """Built-in backends are loaded, to know their state; third-party ones are only listed."""
    for found in nbnorm.backends():
        if _is_built_in(found):
            registry.load(found.name)
    table = Table("backend", "distribution", "state", "reason", title="Backends")
    for found in nbnorm.backends():
        missing = device.problem() if found.name == "cuda" else None
        table.add_row(found.name, found.distribution, found.state, found.reason or missing or _when_it_runs(found))
    return table


def _is_built_in(found: nbnorm.BackendInfo) -> bool:
    return found.name in BUILT_IN_NAMES and found.state != "refused"


def _when_it_runs(found: nbnorm.BackendInfo) -> str:
    if not _is_built_in(found):
        return "third-party: runs only where it is named"
    return next(
        f"choice {order.index(found.name) + 1} of the built-in order on {device}"
        for device, order in BUILT_IN_ORDER.items()
        if found.name in order
    )


def _console(stderr: bool = False) -> Console:
    """Text as it is: reasons and paths may hold what rich would take for markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)
