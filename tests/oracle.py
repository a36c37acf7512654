"""What the norms should give, from their definitions: explicit loops over slices, in the axes the caller sees.

Shares nothing with nbnorm: no five-axis view, no shifted sums, no fused formula. Forward in longdouble; gradients by
the chain rule through mean and variance, each written out as the derivative of one step.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np

Wide = np.longdouble


@dataclass
class Result:
    """y, the statistics of each slice by its index, and for a dy the gradients.

    The sizes are those of the terms that y and dx are sums of, at least 1: rounding errors are in proportion to them.
    The far sizes have the mean among these terms, in standard deviations, and one standard deviation: float64 has no
    wider type for the mean, which is rounded before it is subtracted.
    """

    y: Any
    mean: dict[Any, Any]
    var: dict[Any, Any]
    dx: Any = None
    dweight: Any = None
    dbias: Any = None
    y_size: Any = None
    dx_size: Any = None
    dweight_size: Any = None
    dbias_size: Any = None
    y_far: Any = None
    dx_far: Any = None
    dweight_far: Any = None


def slices(x: Any, op: str, *, channel_axis: int = 1, num_groups: int = 1, axes: tuple[int, ...] = ()) -> Any:
    """(index of the statistic, index tuple into x) of every set of elements that share a statistic."""
    everything = [slice(None)] * x.ndim
    if op in ("layer_norm", "rms_norm"):
        kept = [a for a in range(x.ndim) if a not in axes]
        for where in itertools.product(*(range(x.shape[a]) for a in kept)):
            index = list(everything)
            for a, i in zip(kept, where, strict=True):
                index[a] = i
            yield where, tuple(index)
        return
    channels = x.shape[channel_axis]
    samples = [None] if op == "batch_norm" else range(x.shape[0])
    size = {"batch_norm": 1, "instance_norm": 1, "group_norm": channels // num_groups}[op]
    for sample, first in itertools.product(samples, range(0, channels, size)):
        index = list(everything)
        index[channel_axis] = slice(first, first + size)
        if sample is not None:
            index[0] = slice(sample, sample + 1)
        stat = (first // size,) if sample is None else (sample, first // size)
        yield stat, tuple(index)


def _spread(param: Any, x: Any, op: str, channel_axis: int, axes: tuple[int, ...], absent: float) -> Any:
    """A parameter, repeated to the shape of x."""
    if param is None:
        return np.full(x.shape, absent, Wide)
    shape = [1] * x.ndim
    for axis in axes if op in ("layer_norm", "rms_norm") else (channel_axis % x.ndim,):
        shape[axis] = x.shape[axis]
    return np.broadcast_to(np.asarray(param).astype(Wide).reshape(shape), x.shape)


def norm(
    op: str,
    x: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    dy: Any = None,
    *,
    channel_axis: int = 1,
    num_groups: int = 1,
    axes: tuple[int, ...] = (),
    fixed: tuple[Any, Any] | None = None,
) -> Result:
    """Normalize x, and with dy take the gradients. `fixed` = (mean, var) per channel stands for eval."""
    axes = tuple(a % x.ndim for a in axes)
    x = np.asarray(x).astype(Wide)
    w = _spread(weight, x, op, channel_axis, axes, 1.0)
    b = _spread(bias, x, op, channel_axis, axes, 0.0)
    result = Result(np.empty_like(x), {}, {}, None if dy is None else np.empty_like(x))
    xhat, far, dx_size, dx_far = np.empty_like(x), np.empty_like(x), np.ones_like(x), np.zeros_like(x)
    with np.errstate(all="ignore"):
        for stat, index in slices(x, op, channel_axis=channel_axis, num_groups=num_groups, axes=axes):
            values = x[index]
            if fixed is not None:
                channel = stat[-1]
                mean, var = Wide(fixed[0][channel]), Wide(fixed[1][channel])
            elif op == "rms_norm":
                mean, var = Wide(0), (values * values).sum() / values.size
            else:
                mean = values.sum() / values.size
                var = ((values - mean) ** 2).sum() / values.size
            root = np.sqrt(var + Wide(eps))
            result.mean[stat], result.var[stat] = mean, var
            xhat[index] = (values - mean) / root
            far[index] = 1 + abs(xhat[index]) + abs(mean) / root
            if dy is not None:
                g = np.asarray(dy).astype(Wide)[index] * w[index]
                dx = g / root  # through the numerator
                if fixed is None:
                    droot = -(g * (values - mean)).sum() / root**2
                    dvar = droot / (2 * root)
                    if op == "rms_norm":
                        dx = dx + dvar * 2 * values / values.size
                    else:
                        dmean = -g.sum() / root  # the variance does not change with the mean: sum(x - mean) = 0
                        dx = dx + dvar * 2 * (values - mean) / values.size + dmean / values.size
                result.dx[index] = dx
                size, size_far = abs(g), abs(g)
                if fixed is None:
                    size = size + abs(g).mean() * (op != "rms_norm")
                    size_far = size + far[index] * abs(g * far[index]).mean()
                    size = size + abs(xhat[index]) * abs(g * xhat[index]).mean()
                dx_size[index], dx_far[index] = size / root, size_far / root
        result.y = xhat * w + b
        result.y_size, result.dx_size = np.maximum(abs(xhat * w) + abs(b), 1), np.maximum(dx_size, 1)
        result.y_far, result.dx_far = far * abs(w) + abs(b), dx_far
    if dy is not None:
        wide = np.asarray(dy).astype(Wide)
        carrying = axes if op in ("layer_norm", "rms_norm") else (channel_axis % x.ndim,)
        others = tuple(a for a in range(x.ndim) if a not in carrying)
        result.dweight, result.dbias = (wide * xhat).sum(axis=others), wide.sum(axis=others)
        result.dweight_size = abs(wide * np.maximum(abs(xhat), 1)).sum(axis=others)
        result.dweight_far, result.dbias_size = abs(wide * far).sum(axis=others), abs(wide).sum(axis=others)
    return result
