"""The norms on shapes of all kinds: how nbnorm is called on each, how the oracle, and data for both."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

import nbnorm


@dataclass(frozen=True)
class Norm:
    """One norm on one shape: how nbnorm is called, and how the oracle."""

    name: str
    op: Any
    shape: tuple[int, ...]
    params: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)
    oracle: dict[str, Any] = field(default_factory=dict)


def batch(name: str, shape: tuple[int, ...], axis: int = 1) -> Norm:
    keys = {"channel_axis": axis}
    return Norm(name, nbnorm.batch_norm, shape, (shape[axis],), {"training": True} | keys, keys)


def group(name: str, shape: tuple[int, ...], groups: int, axis: int = 1) -> Norm:
    keys = {"num_groups": groups, "channel_axis": axis}
    return Norm(name, nbnorm.group_norm, shape, (shape[axis],), keys, keys)


def instance(name: str, shape: tuple[int, ...], axis: int = 1) -> Norm:
    keys = {"channel_axis": axis}
    return Norm(name, nbnorm.instance_norm, shape, (shape[axis],), keys, keys)


def layer(name: str, op: Any, shape: tuple[int, ...], trailing: int) -> Norm:
    normalized = shape[len(shape) - trailing :]
    axes = tuple(range(len(shape) - trailing, len(shape)))
    return Norm(name, op, shape, normalized, {"normalized_shape": normalized}, {"axes": axes})


def over(name: str, op: Any, shape: tuple[int, ...], axes: tuple[int, ...]) -> Norm:
    return Norm(name, op, shape, tuple(shape[a] for a in axes), {"axis": axes}, {"axes": axes})


NORMS = [
    batch("batch 2-D", (7, 5)),
    batch("batch NCL", (3, 4, 9)),
    batch("batch NCHW", (3, 6, 4, 5)),
    batch("batch NHWC", (3, 4, 5, 6), -1),
    batch("batch NCDHW", (2, 3, 2, 3, 4)),
    batch("batch, channels in the middle", (2, 3, 5, 4), 2),
    batch("batch, channels outermost", (4, 3, 5), 0),
    batch("batch, one channel", (6, 1, 5)),
    batch("batch, one sample", (1, 6, 3, 3)),
    group("group NCHW", (3, 6, 4, 5), 3),
    group("group NHWC", (3, 4, 5, 6), 2, -1),
    group("group 2-D", (4, 6), 2),
    group("group, one group", (3, 4, 5), 1),
    group("group NHWC, one group", (3, 4, 5, 6), 1, -1),
    group("group, one channel each", (3, 4, 5), 4),
    instance("instance NCHW", (3, 4, 5, 6)),
    instance("instance NHWC", (3, 5, 6, 4), 3),
    instance("instance NCL", (2, 3, 7)),
    layer("layer", nbnorm.layer_norm, (6, 11), 1),
    layer("layer over CHW", nbnorm.layer_norm, (3, 4, 5, 2), 3),
    layer("layer over everything", nbnorm.layer_norm, (3, 4), 2),
    layer("layer NTC", nbnorm.layer_norm, (2, 3, 8), 1),
    layer("layer, one axis", nbnorm.layer_norm, (9,), 1),
    layer("layer over one value", nbnorm.layer_norm, (5, 1), 1),
    over("layer over channels", nbnorm.layer_norm, (3, 5, 4, 2), (1,)),
    over("layer over outer axes", nbnorm.layer_norm, (3, 5, 4), (0, 1)),
    over("layer over alternate axes", nbnorm.layer_norm, (3, 4, 2, 5), (1, 3)),
    layer("rms", nbnorm.rms_norm, (6, 11), 1),
    layer("rms over two axes", nbnorm.rms_norm, (4, 3, 5), 2),
    over("rms over channels", nbnorm.rms_norm, (3, 5, 4, 2), (1,)),
]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def data(case: Norm, dtype: str = "float64") -> tuple[Any, Any, Any, Any]:
    """x, weight, bias, dy."""
    rng = np.random.default_rng(7)
    x, dy = rng.normal(size=(2, *case.shape))
    weight, bias = rng.normal(size=(2, *case.params))
    return tuple(a.astype(dtype_of(dtype)) for a in (x * 2 + 1, weight, bias, dy))  # type: ignore[return-value]


def has_bias(case: Norm) -> bool:
    return case.op is not nbnorm.rms_norm
