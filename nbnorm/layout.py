"""The five-axis view (n, r, g, c, s) that every norm is run in, and how an array's axes map onto it.

Statistics live on (n, g), the reduction runs over (r, c, s), weight and bias lie on a subset of (r, g, c).
The order of the axes in memory decides the view, not their names: an NCHW-shaped array that lies channels-last
is viewed channels-last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

N, R, G, C, S = range(5)


class Layout(NamedTuple):
    """Lengths of the five axes.

    Examples
    --------
    >>> plan(batch((32, 64, 56, 56), 1), (0, 1, 2, 3)).layout
    Layout(n=1, r=32, g=64, c=1, s=3136)
    """

    n: int
    r: int
    g: int
    c: int
    s: int


@dataclass(frozen=True, slots=True)
class Axes:
    """What each axis of an array means to a norm.

    Attributes
    ----------
    shape : the array's shape, where a norm needs it with the channels split in (groups, channels per group), or the
        samples in (ghost batches, samples per ghost batch).
    kept : axes whose indices select one statistic; all others are reduced.
    params : axes that weight and bias have, ascending.
    split : the array's axis that became two, if any.
    """

    shape: tuple[int, ...]
    kept: tuple[int, ...]
    params: tuple[int, ...]
    split: int | None = None

    @property
    def count(self) -> int:
        """Elements that one statistic is made of."""
        return math.prod(n for axis, n in enumerate(self.shape) if axis not in self.kept)

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.kept)

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.params)


@lru_cache(maxsize=4096)
def batch(shape: tuple[int, ...], channel_axis: int) -> Axes:
    """Batch norm: one statistic per channel."""
    return Axes(shape, (channel_axis,), (channel_axis,))


@lru_cache(maxsize=4096)
def ghost(shape: tuple[int, ...], size: int, channel_axis: int) -> Axes:
    """Batch norm over ghost batches: one statistic per `size` samples and channel."""
    split = (shape[0] // size, size, *shape[1:])
    return Axes(split, (0, channel_axis + 1), (channel_axis + 1,), 0)


@lru_cache(maxsize=4096)
def instance(shape: tuple[int, ...], channel_axis: int) -> Axes:
    """Instance norm: one statistic per sample and channel."""
    return Axes(shape, (0, channel_axis), (channel_axis,))


@lru_cache(maxsize=4096)
def group(shape: tuple[int, ...], num_groups: int, channel_axis: int) -> Axes:
    """Group norm: one statistic per sample and group of channels."""
    per_group = shape[channel_axis] // num_groups
    split = (*shape[:channel_axis], num_groups, per_group, *shape[channel_axis + 1 :])
    return Axes(split, (0, channel_axis), (channel_axis, channel_axis + 1), channel_axis)


@lru_cache(maxsize=4096)
def over(shape: tuple[int, ...], axes: tuple[int, ...], *, params: bool = True) -> Axes:
    """Layer and RMS norm, and plain moments: statistics over `axes`, parameters (if any) on the same axes."""
    kept = tuple(axis for axis in range(len(shape)) if axis not in axes)
    return Axes(shape, kept, axes if params else ())


@dataclass(frozen=True, slots=True)
class Plan:
    """How to view one array: transpose its (split) axes by `order`, then reshape to `layout`.

    Attributes
    ----------
    param_order : the same permutation restricted to the parameters' axes.
    kept_order : the same permutation restricted to the kept axes.
    param_shape : five axes, each 1 or full.
    """

    layout: Layout
    order: tuple[int, ...]
    param_order: tuple[int, ...]
    kept_order: tuple[int, ...]
    param_shape: tuple[int, int, int, int, int]


@lru_cache(maxsize=4096)
def plan(axes: Axes, order: tuple[int, ...]) -> Plan | None:
    """The five-axis view of an array whose axes lie in memory in `order` (outermost first), or None if it has none."""
    segments: list[list[int]] = []  # [kept, carries parameters, length], neighbours of one role merged
    for axis in order:
        length = axes.shape[axis]
        if length == 1:
            continue
        role = [axis in axes.kept, axis in axes.params]
        if segments and segments[-1][:2] == role:
            segments[-1][2] *= length
        else:
            segments.append([*role, length])
    slots = _slots([(bool(kept), bool(param)) for kept, param, _ in segments])
    if slots is None:
        return None
    sizes, param_sizes = [1] * 5, [1] * 5
    for slot, (_, param, length) in zip(slots, segments, strict=True):
        sizes[slot] = length
        if param:
            param_sizes[slot] = length
    return Plan(
        Layout(*sizes),
        order,
        _restrict(order, axes.params),
        _restrict(order, axes.kept),
        (param_sizes[0], param_sizes[1], param_sizes[2], param_sizes[3], param_sizes[4]),
    )


def _slots(roles: list[tuple[bool, bool]]) -> list[int] | None:
    """Assign (kept, param) segments, in memory order, to ascending slots of (n, r, g, c, s)."""
    slots: list[int] = []
    last_kept = max((i for i, (kept, _) in enumerate(roles) if kept), default=-1)
    for i, (kept, param) in enumerate(roles):
        if kept:
            slot = N if i == 0 and not param else G
        elif i < last_kept or (not param and any(carries for _, carries in roles[i + 1 :])):
            slot = R
        else:
            slot = C if param else S
        if slots and slot <= slots[-1]:
            return None
        slots.append(slot)
    return slots


def _restrict(order: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that `order` makes of `axes` alone."""
    return tuple(axes.index(axis) for axis in order if axis in axes)


def memory_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Axes from the outermost in memory to the innermost; axes of length 1 stay in place among equals."""
    return tuple(sorted(range(len(shape)), key=lambda axis: -abs(strides[axis])))


@lru_cache(maxsize=4096)
def logical_plan(axes: Axes) -> Plan:
    """The plan for an array in C order; where even that has none, for a copy with the kept axes first."""
    order = tuple(range(len(axes.shape)))
    reduced = tuple(axis for axis in order if axis not in axes.kept)
    found = plan(axes, order) or plan(axes, axes.kept + reduced)
    assert found is not None, axes  # kept first, then reduced: one or two segments, which always have slots
    return found


@lru_cache(maxsize=4096)
def inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    """The permutation that undoes `order`."""
    back = [0] * len(order)
    for position, axis in enumerate(order):
        back[axis] = position
    return tuple(back)
