"""Batch norm over ghost batches: each stretch of the batch has statistics of its own, and the running ones are updated
once, from all of them merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine, layout
from nbnorm.backend import Grads
from nbnorm.engine import Call, Operand, Pullback, Ran
from nbnorm.statistics import Moments

Rows = slice


@dataclass(slots=True)
class GhostCall:
    """A batch norm in training, checked, whose samples are normalized `size` at a time; the last ones may be fewer."""

    whole: Call
    size: int

    def forward(self) -> Any:
        """What `Call.forward` returns."""
        return self._run()[0]

    def vjp(self) -> tuple[Any, Pullback]:
        """What `Call.vjp` returns."""
        self.whole.check_inputs_survive()
        result, ran = self._run()
        return result, Pullback(self.whole, ran)

    def explain(self) -> dispatch.Decision:
        """The decision for the first part, with the copies of both."""
        first, *rest = (part.explain() for _, part in self._parts(self.whole))
        copies = [copy for decision in (first, *rest) for copy in decision.copies]
        if rest:
            copies.append(
                f"y ({self.whole.x.view.nbytes} bytes): the last ghost batch is smaller, and joined to the others"
            )
        return replace(first, copies=tuple(copies))

    def _run(self) -> tuple[Any, GhostRan]:
        parts = self._parts(engine.begin(self.whole))
        ran: list[tuple[Rows, Ran]] = []
        results: list[NDArray[Any]] = []
        batch: Moments | None = None
        for rows, part in parts:
            y, _, found, forward = engine.compute(part)
            assert found is not None  # as `_part` asks for them
            results.append(y)
            ran.append((rows, forward))
            if self.whole.running is not None or self.whole.return_moments:
                batch = _merged(found, batch)
        y = _joined(results)
        return engine.finish(self.whole, y, y, batch), GhostRan(ran)

    def _parts(self, call: Call) -> list[tuple[Rows, Call]]:
        """The ghost batches of full size as one call, and what is left as another."""
        samples = call.x.view.shape[0]
        head = samples - samples % self.size
        if head in (0, samples):
            return [(slice(None), _part(call, slice(None), max(1, min(self.size, samples)), call.out))]
        bounds = slice(0, head), slice(head, samples)
        return [(rows, _part(call, rows, size, None)) for rows, size in zip(bounds, (self.size, samples - head))]


@dataclass(slots=True)
class GhostRan:
    """What `Ran` is to a call, for the parts of one."""

    parts: list[tuple[Rows, Ran]]

    def gradients(self, dy: NDArray[Any], dtotal: None) -> Grads:
        return _whole([ran.gradients(dy[rows], None) for rows, ran in self.parts])

    def second(self, dy: NDArray[Any], cotangents: Grads) -> tuple[NDArray[Any], Grads]:
        found = []
        for rows, ran in self.parts:
            x, residual = (None if v is None else v[rows] for v in (cotangents.x, cotangents.residual))
            found.append(ran.second(dy[rows], cotangents._replace(x=x, residual=residual)))
        return _joined([ddy for ddy, _ in found]), _whole([grads for _, grads in found])


def _part(call: Call, rows: Rows, size: int, out: Operand | None) -> Call:
    """Some samples of the call, `size` of which share a statistic."""
    x = _cut(call.x, rows)
    (channel,) = call.axes.kept
    axes = layout.ghost(x.view.shape, size, channel)
    mask = None if call.mask is None else call.mask[rows] if call.mask.shape[0] > 1 else call.mask
    residual = None if call.residual is None else _cut(call.residual, rows)
    keys: dict[str, Any] = {"x": x, "axes": axes, "mask": mask, "residual": residual, "out": out}
    return replace(call, **keys, running=None, return_moments=True, dropout=None)


def _cut(operand: Operand, rows: Rows) -> Operand:
    return Operand(operand.given, operand.adapter, operand.view[rows])


def _joined(parts: list[NDArray[Any]]) -> NDArray[Any]:
    """The samples of all parts, in the order of their memory."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _whole(parts: list[Grads]) -> Grads:
    """Gradients of x and residual side by side, those of the parameters added."""
    x, weight, bias, residual = zip(*parts, strict=True)
    dweight, dbias = (None if part[0] is None else sum(part) for part in (weight, bias))
    return Grads(_joined(list(x)), dweight, dbias, None if residual[0] is None else _joined(list(residual)))


def _merged(found: Moments, batch: Moments | None) -> Moments:
    """Moments (ghosts, C), and those of the batch so far, as one set for each channel, by halves."""
    shape = found.mean.shape
    fields = [np.broadcast_to(field, shape) for field in (found.count, found.mean, found.m2, found.residual)]
    while len(fields[0]) > 1:
        half = len(fields[0]) // 2
        first, second = (Moments(*(field[rows] for field in fields)) for rows in (np.s_[:half], np.s_[half : 2 * half]))
        both = first.merge(second)
        halves = both.count, both.mean, both.m2, both.residual
        fields = [np.concatenate((one, field[2 * half :])) for one, field in zip(halves, fields, strict=True)]
    nothing = Moments(0, np.zeros(shape[1:]), np.zeros(shape[1:]))
    whole = Moments(*(field[0] for field in fields)) if shape[0] else nothing
    return whole if batch is None else batch.merge(whole)
