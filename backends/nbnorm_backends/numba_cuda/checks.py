"""Norms of drawn inputs, what they should give, and how far from that a result may be.

The exact results are NumPy's, in float64, and of float64 in longdouble, from the definitions: a reshape splits the
groups, means are taken over axes, and gradients go by the chain rule. They share no code with the kernels, nor with how
those see an array. On a platform whose longdouble is float64, what is exact for float64 is not known.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import nbnorm
from nbnorm import activations
from nbnorm.backend import ACTIVATIONS, ORDERS, Backend
from nbnorm.peers import EPS, ROW_NORMS, TRACKED_NORMS, Case, call, dtype_of

Array = NDArray[Any]
KINDS = ("float32", "bfloat16", "float16", "float64")
MOMENTUM = 0.1

# What a result may be off by, of the terms that it is a sum of. In the simulator, with its exact elementary functions,
# what docs/numerics.md allows the CPU. A GPU's rsqrtf, tanhf, erff and __fdividef have 2 units in the last place, which
# is 2.4e-7 of a term each (CUDA C++ Programming Guide, "Mathematical Functions").
SIMULATED, DEVICE = 4e-7, 1e-6
DOUBLE = 4 * 2.0**-52
# An activation adds its own error and that of its slope, and its exponential has 2 + 1.17 |z| units in the last place.
ACTIVATED = 4

# (mean, standard deviation) by type. A half type would round values about such a mean to a single one.
SPREADS = {
    "float32": ((0.0, 1.0), (1e4, 1.0), (1e6, 1.0)),
    "float64": ((0.0, 1.0), (1e4, 1.0), (1e6, 1.0)),
    "float16": ((0.0, 1.0), (1e4, 32.0)),
    "bfloat16": ((0.0, 1.0), (1e4, 256.0), (1e6, 2.0**15)),
}


@dataclass(frozen=True)
class Check:
    """A norm and its gradient, of normal values.

    Attributes
    ----------
    case : Case
        `backward` is not looked at: both are taken.
    mean, std : float
    order : str
    residual : bool
    mask : str, optional
        "dense", four of five elements at random; "lengths", the begin of the last axis without channels, of the first
        sample nothing.
    """

    case: Case
    mean: float = 0.0
    std: float = 1.0
    order: str = "norm_act"
    residual: bool = False
    mask: str | None = None

    @property
    def name(self) -> str:
        case = self.case
        parts = [f"{case.op} {case.shape} {case.dtype}"]
        if case.channel == len(case.shape) - 1 and len(case.shape) > 2:
            parts.append("channels last")
        if not case.training:
            parts.append("eval")
        if self.mean:
            parts.append(f"mean {self.mean:.0e}")
        if case.activation:
            parts.append(f"{case.activation}, {self.order}")
        parts += ["residual"] * self.residual + ([f"{self.mask} mask"] if self.mask else [])
        return ", ".join(parts)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """(shape, dtype) of each input, by name."""
        case, kind = self.case, dtype_of(self.case.dtype)
        wide = np.dtype(np.float64 if kind == np.float64 else np.float32)
        found = dict.fromkeys(("x", "dy", *(["residual"] if self.residual else [])), (case.shape, kind))
        found |= dict.fromkeys(("weight", "bias", "running_mean", "running_var"), ((case.shape[case.channel],), wide))
        if self.mask:
            found["mask"] = self._mask_shape, np.dtype(bool)
        return found

    @property
    def _length_axis(self) -> int:
        case = self.case
        return len(case.shape) - 1 - (case.channel == len(case.shape) - 1 and len(case.shape) > 2)

    @property
    def _mask_shape(self) -> tuple[int, ...]:
        kept = range(len(self.case.shape)) if self.mask == "dense" else (0, self._length_axis)
        return tuple(length if axis in kept else 1 for axis, length in enumerate(self.case.shape))

    def inputs(self) -> dict[str, Array]:
        """Of the public API, by name. What the mask hides is NaN."""
        case, rng = self.case, np.random.default_rng(zlib.crc32(self.name.encode()))
        (_, kind), ((channels,), wide) = self.arrays["x"], self.arrays["weight"]
        found: dict[str, Array] = {
            "x": (rng.normal(size=case.shape) * self.std + self.mean).astype(kind),
            "dy": rng.normal(size=case.shape).astype(kind),
            "weight": rng.normal(size=channels).astype(wide),
            "bias": rng.normal(size=channels).astype(wide),
            "running_mean": (rng.normal(size=channels) + self.mean).astype(wide),
            "running_var": (np.exp(rng.normal(size=channels)) * self.std**2).astype(wide),
        }
        if self.residual:
            found["residual"] = rng.normal(size=case.shape).astype(kind)
        if self.mask == "dense":
            found["mask"] = rng.random(case.shape) < 0.8
        if self.mask == "lengths":
            length = case.shape[self._length_axis]
            begins = rng.integers(1, length + 1, size=case.shape[0])
            begins[0] = 0
            found["mask"] = (np.arange(length) < begins[:, None]).reshape(self._mask_shape)
        if self.mask:
            hidden = np.broadcast_to(~found["mask"], case.shape)
            for name in ("x", "dy", "residual"):
                if name in found:
                    found[name][hidden] = np.nan
        return found


def run(
    check: Check,
    inputs: Mapping[str, Array],
    put: Callable[[Array], Any],
    get: Callable[[Any], Array] = lambda result: result,
    backend: Backend | None = None,
) -> dict[str, Array]:
    """What the public API gives for copies of the inputs, which `put` makes; `get` reads results."""
    given = {name: put(array) for name, array in inputs.items()}
    op, keys = call(check.case, *(given[name] for name in ("weight", "bias", "running_mean", "running_var")))
    keys |= {name: given[name] for name in ("residual", "mask") if name in given}
    y, pullback = nbnorm.vjp(op, given["x"], **keys, order=check.order, backend=backend)
    grads = pullback(given["dy"])
    found = {"y": y, "running_mean": given["running_mean"], "running_var": given["running_var"], "dx": grads.x}
    found |= {"dweight": grads.weight, "dbias": grads.bias, "dresidual": grads.residual}
    return {name: get(array) for name, array in found.items() if array is not None}


class Exact(NamedTuple):
    """A result, and the terms that it is a sum of; `far` has the mean among them, which float64 has no wider type
    for."""

    value: Array
    size: Array
    far: Array


def exact(check: Check, inputs: Mapping[str, Array]) -> dict[str, Exact]:
    """y, dx, dweight, dbias and dresidual, and running_mean and running_var after the call."""
    case = check.case
    real = np.longdouble if case.dtype == "float64" else np.float64
    one = np.ones(1, real)
    split = inputs["x"].reshape(case.split).shape
    carrying = range(case.channel, case.channel + len(split) - len(case.shape) + 1)
    along = [length if axis in carrying else 1 for axis, length in enumerate(split)]
    before = case.activation if check.order == "act_norm" else None
    after = case.activation if check.order == "norm_act" else None
    center = case.op != "rms_norm"
    valid = np.broadcast_to(inputs.get("mask", np.True_), case.shape).reshape(split)
    count = np.maximum(valid.sum(axis=case.axes, keepdims=True), 1)

    def wide(name: str) -> Array:
        return np.where(valid, inputs[name].astype(real).reshape(split), 0)

    def parameter(name: str) -> Array:
        return inputs[name].astype(real).reshape(along)

    def mean_of(values: Array) -> Array:
        return np.asarray(np.where(valid, values, 0).sum(axis=case.axes, keepdims=True) / count)

    def total_of(values: Array) -> Array:
        """Sums over all axes but the parameters'."""
        summed = tuple(axis for axis in range(len(split)) if axis not in carrying)
        return np.asarray(np.where(valid, values, 0).sum(axis=summed).reshape(-1))

    x, dy, w = wide("x"), wide("dy"), parameter("weight")
    b = parameter("bias") if center else 0 * one
    other = wide("residual") if check.residual else 0 * one
    a = _activate(before, x)
    mean, var = parameter("running_mean"), parameter("running_var")
    if case.training:
        mean = mean_of(a) if center else 0 * one
        var = mean_of((a - mean) ** 2)
    root = np.sqrt(var + real(EPS))
    xhat = (a - mean) / root
    z = xhat * w + b + (other if check.order == "norm_act" else 0)
    y = _activate(after, z) + (other if check.order == "act_norm" else 0)

    g = dy * _slope(after, z)
    t = g * w
    dx = t
    if case.training:
        dx = t - (mean_of(t) if center else 0) - xhat * mean_of(t * xhat)
    dx = dx / root * _slope(before, x)

    # Terms: of a the activated x, of g the slope's z.
    far = 1 + abs(xhat) + abs(mean) / root
    near = abs(xhat) + (abs(a) / root if before else 0)
    y_size, y_far = (np.maximum(terms * abs(w) + abs(b) + abs(other), 1) for terms in (near, far))
    sizes: dict[str, list[Array]] = {"y": [y_size, y_far]}
    for terms, outer, least in ((near, y_size, 1), (far, y_far, 0)):
        g_size = abs(g) + (abs(dy) * outer if after else 0)
        t_size = g_size * abs(w)
        dx_size = t_size
        if case.training:
            dx_size = t_size + (mean_of(t_size) if center else 0) + terms * mean_of(t_size * terms)
        sizes.setdefault("dx", []).append(np.maximum(dx_size / root, least))
        sizes.setdefault("dweight", []).append(np.maximum(total_of(g_size * np.maximum(terms, least)), least))
        sizes.setdefault("dbias", []).append(np.maximum(total_of(g_size), least))
        sizes.setdefault("dresidual", []).append(np.maximum(g_size, least))
    values = {
        "y": y,
        "dx": dx,
        "dweight": total_of(g * xhat),
        "dbias": total_of(g),
        "dresidual": g,
    }
    found = {}
    for name, value in values.items():
        if name in ("y", "dx", "dresidual"):
            value, *rest = (
                np.where(valid, np.broadcast_to(part, split), hidden).reshape(case.shape)
                for part, hidden in zip((value, *sizes[name]), (0, 1, 1))
            )
            found[name] = Exact(value, *rest)
        else:
            found[name] = Exact(value, *sizes[name])
    if not center:
        del found["dbias"]
    if not check.residual:
        del found["dresidual"]
    if case.op == "batch_norm" and case.training:
        unbiased = var * count / np.maximum(count - 1, 1)
        for name, new in (("running_mean", mean), ("running_var", unbiased)):
            moved = (1 - real(MOMENTUM)) * parameter(name) + real(MOMENTUM) * new
            known = valid.sum(axis=case.axes, keepdims=True) > (name == "running_var")
            value = np.where(known, moved, parameter(name)).reshape(-1)
            size = np.maximum(abs(value), 1)
            found[name] = Exact(value, size, size)
    return found


def _activate(name: str | None, z: Array) -> Array:
    return z if name is None else activations.activate(name, z).astype(z.dtype)


def _slope(name: str | None, z: Array) -> Any:
    return 1 if name is None else activations.derivative(name, z).astype(z.dtype)


class Error(NamedTuple):
    """The difference of the element that is furthest off, for what is allowed there, and what is allowed."""

    difference: float
    bound: float

    @property
    def within(self) -> bool:
        """Also tells NaN from what is small."""
        return self.difference <= self.bound


def errors(check: Check, expected: Mapping[str, Exact], found: Mapping[str, Array], single: float) -> dict[str, Error]:
    """Of each result; `single` is `SIMULATED` or `DEVICE`."""
    return {name: _error(check, each, found[name], single) for name, each in expected.items()}


def _error(check: Check, expected: Exact, found: Array, single: float) -> Error:
    found = found.reshape(expected.value.shape)
    factor = ACTIVATED if check.case.activation else 1
    if found.dtype == np.float64:
        allowed = DOUBLE * factor * expected.far
    else:
        allowed = single * factor * expected.size
        if found.dtype.itemsize == 2:
            allowed = allowed + np.spacing(abs(expected.value).astype(found.dtype)).astype(float)
    differences = abs(found.astype(expected.value.dtype) - expected.value)
    multiples = np.divide(differences, allowed, out=np.zeros_like(differences), where=differences != 0)
    worst = int(np.argmax(multiples))  # of NaN, if there is one
    return Error(float(differences.flat[worst]), float(np.broadcast_to(allowed, differences.shape).flat[worst]))


# ---- which norms are checked -----------------------------------------------------------------------------------------

# For the simulator, of the fewest elements that meet vectors, rests, several rows and blocks.
SMALL = (
    Case("layer_norm", (5, 264)),
    Case("layer_norm", (3, 131)),
    Case("rms_norm", (5, 264)),
    Case("rms_norm", (3, 131)),
    Case("batch_norm", (3, 4, 4, 6)),
    Case("batch_norm", (3, 5, 5, 16), channel_axis=-1),
    Case("group_norm", (3, 6, 4, 4), num_groups=3),
    Case("group_norm", (2, 7, 3, 16), channel_axis=-1, num_groups=4),
    Case("instance_norm", (3, 4, 4, 6)),
    Case("instance_norm", (3, 5, 6, 4), channel_axis=-1),
)
# For a GPU: each size class of rows, of odd length too, and rows that no registers hold; images as in ResNet-50. A test
# has all kernels that there are among those that these need.
LARGE = (
    *(Case("layer_norm", shape) for shape in ((4096, 64), (2048, 256), (512, 1024), (256, 2048), (128, 4096))),
    *(Case("layer_norm", shape) for shape in ((64, 8192), (32, 16384), (16, 40000))),
    *(Case("layer_norm", shape) for shape in ((2049, 37), (1025, 131), (513, 513), (515, 1031))),
    Case("rms_norm", (512, 1024)),
    Case("rms_norm", (128, 4096)),
    Case("rms_norm", (515, 1031)),
    Case("batch_norm", (16, 64, 28, 28)),
    Case("batch_norm", (8, 61, 31, 31)),
    Case("batch_norm", (4096, 512)),
    Case("batch_norm", (16, 28, 28, 64), channel_axis=-1),
    Case("batch_norm", (8, 31, 31, 61), channel_axis=-1),
    Case("group_norm", (8, 128, 28, 28), num_groups=32),
    Case("group_norm", (8, 28, 28, 128), channel_axis=-1, num_groups=32),
    Case("instance_norm", (8, 64, 32, 32)),
    Case("instance_norm", (8, 32, 32, 64), channel_axis=-1),
)


def plain_checks(cases: tuple[Case, ...]) -> Iterator[Check]:
    """Every norm in training and evaluation, every type, about a mean of zero."""
    for kind, case in itertools.product(KINDS, cases):
        yield Check(replace(case, dtype=kind))
        if case.op in TRACKED_NORMS:
            yield Check(replace(case, dtype=kind, training=False))


def far_checks(cases: tuple[Case, ...]) -> Iterator[Check]:
    """Every norm and type about means that are large beside the standard deviation."""
    for kind, case in itertools.product(KINDS, cases):
        for mean, std in SPREADS[kind][1:]:
            yield Check(replace(case, dtype=kind), mean, std)


def option_checks(cases: tuple[Case, ...]) -> Iterator[Check]:
    """Every activation in both orders, spread over the norms, types, masks and residuals; rows of every type and given
    statistics under masks."""
    for i, (activation, order) in enumerate(itertools.product((*ACTIVATIONS, None), ORDERS)):
        for j in range(2):
            case = replace(cases[(2 * i + 5 * j) % len(cases)], dtype=KINDS[(i + j) % 2], activation=activation)
            mask = (None, "dense", "lengths")[(i + 2 * j) % 3]
            yield Check(case, order=order, residual=(i + j) % 3 > 0, mask=mask)
    rows = next(case for case in cases if case.op in ROW_NORMS)
    for i, kind in enumerate(KINDS):
        yield Check(replace(rows, dtype=kind), mask=("lengths", "dense")[i % 2])
    for i, case in enumerate(case for case in cases if case.op in TRACKED_NORMS):
        yield Check(replace(case, dtype=KINDS[i % 2], training=False), mask=("dense", "lengths")[i % 2])


def dry_checks(quick: bool) -> list[Check]:
    """For the simulator: all of them, or every norm of float32 and some options."""
    plain, options = plain_checks(SMALL), option_checks(SMALL)
    if not quick:
        return [*plain, *far_checks(SMALL), *options]
    return [*(check for check in plain if check.case.dtype == "float32"), *itertools.islice(options, 0, None, 8)]
