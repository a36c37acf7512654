"""The experiment of the demo: train with and without batch norm, and time the normalizations on two backends."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import nbnorm
from nbnorm.demo.digits import Digits, load
from nbnorm.demo.network import Network, Statistics, cross_entropy

BATCH = 64
# Not tuned: at 0.02, 0.05, 0.1 and 0.2 both networks train and the one with batch norm is the more accurate, with
# each of three seeds (8 epochs).
LEARNING_RATE = 0.05
MOMENTUM = 0.9


class Track(Protocol):
    """Hands the items on, one by one, and shows how far it is; rich's ``Progress.track`` is one."""

    def __call__(self, sequence: Sequence[NDArray[np.intp]], *, description: str) -> Iterable[NDArray[np.intp]]: ...


def untracked(sequence: Sequence[NDArray[np.intp]], *, description: str) -> Iterable[NDArray[np.intp]]:
    """The items, and nothing shown."""
    return sequence


@dataclass(frozen=True)
class Report:
    """What the demo found.

    Attributes
    ----------
    losses : training loss of each step, by "with batch norm" and "without batch norm"
    correct : test images named correctly, by "running statistics", "batch statistics" and "without batch norm"
    tested : test images
    decisions : how often each dispatch decision was taken
    norm_seconds : time spent in the normalizations of one training, by backend
    first_calls_seconds : the first training step and the first evaluation, with compilation
    seconds : everything
    """

    losses: dict[str, list[float]]
    correct: dict[str, int]
    tested: int
    decisions: Counter[nbnorm.Decision]
    norm_seconds: dict[str, float]
    first_calls_seconds: float
    seconds: float


def run(epochs: int, seed: int, track: Track = untracked) -> Report:
    """Train three times on the same batches: with batch norm, without, and with batch norm on the NumPy backend.

    The last is for its time only, and is left out where NumPy ran the first already.

    Parameters
    ----------
    epochs : int
    seed : int
        Of the initial weights and of the order of the images.
    track : Track
        Shows the progress of each training.

    Returns
    -------
    Report
    """
    begin = time.perf_counter()
    train, test = load()
    batches = shuffled_batches(len(train.labels), epochs, seed)
    with nbnorm.trace() as decisions:
        first_calls_seconds = _first_calls(train, track(batches[:1], description="first calls, with compilation"))
        normed = Network(seed, batch_norm=True)
        losses = {"with batch norm": fit(normed, train, track(batches, description="with batch norm"))}
        backend = str(decisions[-1].chosen)
        norm_seconds = {backend: normed.norm_seconds}  # read before the evaluations add theirs
        correct = {
            "running statistics": count_correct(normed, test, "running"),
            "batch statistics": count_correct(normed, test, "batch"),
        }
    plain = Network(seed, batch_norm=False)
    losses["without batch norm"] = fit(plain, train, track(batches, description="without batch norm"))
    correct["without batch norm"] = count_correct(plain, test)
    if backend != "numpy":
        again = Network(seed, batch_norm=True)
        tracked = track(batches, description="with batch norm on numpy, for its time")
        # In a context of its own: a trace around the demo shall list what it runs, not what that is compared with.
        Context().run(_fit_on, "numpy", again, train, tracked)
        norm_seconds["numpy"] = again.norm_seconds
    return Report(
        losses,
        correct,
        len(test.labels),
        Counter(decisions),
        norm_seconds,
        first_calls_seconds,
        seconds=time.perf_counter() - begin,
    )


def shuffled_batches(count: int, epochs: int, seed: int) -> list[NDArray[np.intp]]:
    """The rows of each step: every epoch in an order of its own, the rest that fills no batch left out."""
    rng = np.random.default_rng(seed)
    whole = count - count % BATCH
    return [batch for _ in range(epochs) for batch in rng.permutation(count)[:whole].reshape(-1, BATCH)]


def fit(network: Network, digits: Digits, batches: Iterable[NDArray[np.intp]]) -> list[float]:
    """Gradient descent with momentum; the loss of each step."""
    velocities = [np.zeros_like(parameter) for parameter in network.parameters]
    losses = []
    for rows in batches:
        loss, dlogits = cross_entropy(network.forward(digits.images[rows]), digits.labels[rows])
        network.backward(dlogits)
        for parameter, gradient, velocity in zip(network.parameters, network.gradients, velocities, strict=True):
            velocity *= MOMENTUM
            velocity -= LEARNING_RATE * gradient
            parameter += velocity
        losses.append(loss)
    return losses


def _fit_on(backend: str, network: Network, digits: Digits, batches: Iterable[NDArray[np.intp]]) -> None:
    with nbnorm.use_backend(backend):
        fit(network, digits, batches)


def count_correct(network: Network, digits: Digits, statistics: Statistics = "running") -> int:
    """How many of the digits the network names correctly, seen in batches."""
    correct = 0
    for start in range(0, len(digits.labels), BATCH):
        rows = slice(start, start + BATCH)
        named = network.forward(digits.images[rows], statistics).argmax(axis=1)
        correct += int((named == digits.labels[rows]).sum())
    return correct


def _first_calls(digits: Digits, batches: Iterable[NDArray[np.intp]]) -> float:
    """Seconds for normalizations of every kind, in a network that is thrown away: a backend may compile in them."""
    network = Network(0, batch_norm=True)
    for rows in batches:
        fit(network, digits, [rows])
        for statistics in ("running", "batch"):
            network.forward(digits.images[rows], statistics)
    return network.norm_seconds
