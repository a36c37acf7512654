"""Statistics of a whole data set in the place of running averages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

from nbnorm.checks import check_flag, check_installed
from nbnorm.layers import Mode
from nbnorm.running import RunningStatistics
from nbnorm.statistics import Moments
from nbnorm.tracking import BatchNorm

T = TypeVar("T")


def recalibrate(
    forward: Callable[[T], Any], layers: Iterable[BatchNorm], batches: Iterable[T], *, progress: bool | None = None
) -> None:
    """Replace the running statistics of batch norms by those of all elements that reach each of them in a data set.

    Every layer normalizes with the statistics of the batch meanwhile, as in training. What reaches a layer depends on
    the batches through the layers before it, and for these inputs its mean and variance are exact: batches may be of
    different sizes, and the variance, that of the data set itself, has that between them. An average of the batches'
    statistics has neither.

    Parameters
    ----------
    forward : function of a batch
        Calls the layers. It is called once for each batch, and what it returns is ignored.
    layers : BatchNorm
        Frozen ones too.
    batches : iterable
        Read once.
    progress : bool or None
        Show a progress bar on standard error, which needs the package rich. None shows it where that is there and
        standard error is a terminal.

    Raises
    ------
    ValueError
        If a layer saw fewer than 2 elements of a channel.
    FloatingPointError
        If a statistic is not finite and a layer's `nonfinite` is "raise".
        After any error, also in `forward` or `batches`, all layers are as before.

    Notes
    -----
    `num_batches_tracked` becomes the number of batches, for a cumulative average that goes on; what was pending is
    discarded. One pass over the data. `forward` leaves modes alone: what it sets is undone.
    Wu and Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.2, have this as "PreciseBN".

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer = nbnorm.BatchNorm(1)
    >>> batches = [np.array([[1.0], [3.0], [5.0], [7.0]], np.float32), np.array([[10.0], [12.0]], np.float32)]
    >>> nbnorm.recalibrate(layer, [layer], batches)
    >>> layer.running_mean.round(4).tolist(), layer.running_var.round(4).tolist()  # of 1, 3, 5, 7, 10, 12
    ([6.3333], [14.5556])
    """
    chosen = list(dict.fromkeys(layers))
    for layer in chosen:
        if not isinstance(layer, BatchNorm) or layer.running is None:
            raise TypeError(f"layers must be BatchNorm with running statistics; got {layer!r}")
    with contextlib.ExitStack() as stack:
        seen = [stack.enter_context(_collecting(layer)) for layer in chosen]
        for batch in stack.enter_context(_shown(batches, progress)):
            forward(batch)
    found = [_statistics(layer, whole, f"layers[{place}]") for place, (layer, whole) in enumerate(zip(chosen, seen))]
    for layer, running in zip(chosen, found, strict=True):
        layer.running, layer.pending = running, None


@dataclass
class _Collected:
    """The moments of all calls of a layer, merged."""

    moments: Moments | None = None
    calls: int = 0

    def __call__(self, batch: Moments) -> None:
        self.moments = batch if self.moments is None else self.moments.merge(batch)
        self.calls += 1


@contextlib.contextmanager
def _collecting(layer: BatchNorm) -> Iterator[_Collected]:
    """The layer normalizes with batch statistics, and hands them over in place of updating its own."""
    before = layer._mode, layer._thawed, layer._training, layer._pullback
    layer._collector = found = _Collected()
    layer._mode = Mode("batch", tracking=True, trainable=layer.trainable)
    try:
        yield found
    finally:
        layer._collector = None
        layer._mode, layer._thawed, layer._training, layer._pullback = before


def _statistics(layer: BatchNorm, seen: _Collected, name: str) -> RunningStatistics:
    assert layer.running is not None
    try:
        if seen.moments is None:
            raise ValueError("forward did not call it, while it tracked, with a batch that counts")
        return RunningStatistics.of(seen.moments, layer.running.ddof, seen.calls)
    except ValueError as error:
        raise ValueError(f"{name} has no statistics: {error}") from error


@contextlib.contextmanager
def _shown(batches: Iterable[T], progress: bool | None) -> Iterator[Iterable[T]]:
    """The batches, with a bar on standard error as they are taken."""
    if progress is None:
        progress = sys.stderr.isatty() and find_spec("rich") is not None
    if not check_flag("progress", progress):
        yield batches
        return
    check_installed("rich", "cli", "progress=True needs")
    from rich.console import Console  # noqa: PLC0415  an extra
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        total = len(batches) if isinstance(batches, Sized) else None
        yield bar.track(batches, total, description="recalibrating")
