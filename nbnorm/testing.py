"""The conformance kit: what a backend must do, checked on small and large five-axis views.

The reference is written here from the definitions, group by group in extended precision, and shares no code with any
backend. Run it from a plugin's own tests: ``nbnorm.testing.check_backend(MyBackend())``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import HALF, bfloat16
from nbnorm.backend import ACTIVATIONS, Backend, Epilogue, Grads, Request, Saved

View = NDArray[Any]
Wide = np.longdouble

# Allowed error, relative to max(1, |reference|): a few units in the last place, times the sums of a gradient.
TOLERANCE = {"float64": 1e-11, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class Case:
    """One view: its lengths, the axes that carry parameters, and how its memory lies."""

    name: str
    op: str
    shape: tuple[int, int, int, int, int]
    params: str
    strided: int = 1  # step along the outermost axis that is not 1

    @property
    def param_shape(self) -> tuple[int, ...]:
        return tuple(n if axis in self.params else 1 for axis, n in zip("nrgcs", self.shape, strict=True))

    def request(self, dtype: str, center: bool, device: str) -> Request:
        axes = tuple(axis for axis, n in zip("nrgcs", self.param_shape, strict=True) if n > 1)
        return Request(self.op, device, dtype, center, axes, self.shape[1] > 1 and self.shape[4] > 1)


CASES = (
    Case("batch, channels first", "batch_norm", (1, 4, 3, 1, 10), "g"),
    Case("batch, channels last", "batch_norm", (1, 36, 5, 1, 1), "g"),
    Case("batch, one channel", "batch_norm", (1, 1, 1, 1, 30), "g"),
    Case("batch, large, channels first", "batch_norm", (1, 9, 8, 1, 2001), "g"),
    Case("batch, large, channels last", "batch_norm", (1, 1501, 97, 1, 1), "g"),
    Case("batch, wide", "batch_norm", (1, 3, 2500, 1, 1), "g"),
    Case("batch, prime rows", "batch_norm", (1, 101, 3, 1, 1), "g"),
    Case("batch, strided", "batch_norm", (1, 6, 4, 1, 5), "g", strided=2),
    Case("instance, channels first", "instance_norm", (3, 1, 4, 1, 9), "g"),
    Case("instance, channels last", "instance_norm", (3, 9, 4, 1, 1), "g"),
    Case("group, channels first", "group_norm", (3, 1, 2, 3, 7), "gc"),
    Case("group, channels last", "group_norm", (3, 8, 2, 3, 1), "gc"),
    Case("group, channels last, strided", "group_norm", (3, 8, 2, 3, 1), "gc", strided=2),
    Case("group, no space", "group_norm", (5, 1, 3, 4, 1), "gc"),
    Case("layer", "layer_norm", (6, 1, 1, 11, 1), "c"),
    Case("layer, one row", "layer_norm", (1, 1, 1, 13, 1), "c"),
    Case("layer, large", "layer_norm", (300, 1, 1, 513, 1), "c"),
    Case("layer, strided", "layer_norm", (6, 1, 1, 11, 1), "c", strided=2),
    Case("layer, backwards", "layer_norm", (6, 1, 1, 11, 1), "c", strided=-1),
    Case("layer over an outer axis", "layer_norm", (3, 5, 4, 1, 1), "r"),
    Case("layer over an outer axis, large", "layer_norm", (3, 37, 1201, 1, 1), "r"),
    Case("layer over both sides", "layer_norm", (1, 5, 4, 3, 1), "rc"),
)


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and what the backend refused and why."""

    checked: int
    refused: tuple[tuple[str, str], ...]


def check_backend(backend: Backend, *, dtypes: tuple[str, ...] = ("float32", "float64", *HALF)) -> Report:
    """Run every conformance case on a host backend.

    Parameters
    ----------
    backend : Backend
    dtypes : names of the dtypes to try; one that the backend refuses is counted as refused
        bfloat16 needs the ml_dtypes package.

    Returns
    -------
    Report

    Raises
    ------
    AssertionError
        Naming the case, the method, and by how much which bound was missed.

    Examples
    --------
    >>> from nbnorm.testing import check_backend
    >>> from nbnorm_backends.numpy_ref import NumpyBackend
    >>> report = check_backend(NumpyBackend(), dtypes=("float32",))
    >>> report.checked, report.refused
    (44, ())
    """
    checked, refused = 0, []
    for case, dtype, center in itertools.product(CASES, dtypes, (True, False)):
        label = f"{case.name}, {dtype}, {'centred' if center else 'about zero'}"
        reason = backend.reject(case.request(dtype, center, backend.device))
        if reason is not None:
            assert isinstance(reason, str), f"{label}: reject gave {reason!r}, not a reason"
            assert reason, f"{label}: refused without a reason"
            refused.append((label, reason))
            continue
        for check in (_check_forward, _check_backward, _check_activation, _check_hard_values):
            check(backend, case, dtype, center, label)
        checked += 1
    assert checked, f"{backend.name} refuses everything: {refused[0][1] if refused else 'no dtypes given'}"
    return Report(checked, tuple(refused))


# ---- the reference ---------------------------------------------------------------------------------------------------


def _groups(x: View) -> Iterator[tuple[tuple[int, int], tuple[Any, ...]]]:
    for i, j in np.ndindex(x.shape[0], x.shape[2]):
        yield (i, j), (i, slice(None), j)


def _spread(param: View | None, x: View, absent: float) -> Any:
    return np.full(x.shape, absent, Wide) if param is None else np.broadcast_to(param.astype(Wide), x.shape)


def _reference_moments(x: View, center: bool) -> tuple[Any, Any]:
    """(mean, m2) of every group; about zero without centring."""
    mean, m2 = np.zeros((2, x.shape[0], x.shape[2]), Wide)
    for stat, index in _groups(x):
        values = x[index].astype(Wide)
        mean[stat] = values.mean() if center else 0
        m2[stat] = ((values - mean[stat]) ** 2).sum()
    return mean, m2


def _reference_xhat(x: View, mean: Any, rstd: Any) -> Any:
    xhat = np.empty(x.shape, Wide)
    for stat, index in _groups(x):
        xhat[index] = (x[index].astype(Wide) - mean[stat]) * rstd[stat]
    return xhat


def _reference_sums(values: Any) -> Any:
    total = np.zeros((values.shape[0], values.shape[2]), Wide)
    for stat, index in _groups(values):
        total[stat] = values[index].sum()
    return total


# ---- the checks ------------------------------------------------------------------------------------------------------


def _check_forward(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    x, weight, bias, _ = _data(case, dtype)
    before, eps = x.copy(), 1e-3
    mean, m2 = _reference_moments(x, center)
    rstd = 1 / np.sqrt(m2 / _count(x) + eps)
    found = backend.moments(x, center=center)
    _close(found.mean, mean, "float64", f"{label}: moments, mean")
    _close(found.m2, m2, "float64", f"{label}: moments, m2", scale=float(m2.max()))
    assert np.all(np.asarray(found.count) == _count(x)), f"{label}: moments, count {found.count} is not {_count(x)}"
    xhat = _reference_xhat(x, mean, rstd)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        expected = xhat * _spread(w, x, 1.0) + _spread(b, x, 0.0)
        y, batch, root = backend.forward(x, w, b, eps, center=center)
        _result(y, expected, x, dtype, f"{label}: forward")
        assert batch is not None, f"{label}: forward gave no moments"
        _close(root, rstd, "float64", f"{label}: forward, rstd")
        out = np.full(x.shape, 7, x.dtype)
        backend.forward(x, w, b, eps, center=center, out=out)
        _result(out, expected, x, dtype, f"{label}: forward, out")
        given = (found.mean if center else None, root)
        y, batch, _ = backend.forward(x, w, b, eps, center=center, stats=given)
        _result(y, expected, x, dtype, f"{label}: forward with given statistics")
        assert batch is None, f"{label}: forward with given statistics gave moments"
        out = np.full(x.shape, 7, x.dtype)
        y = backend.apply(x, *given, w, b, out=out)
        assert np.shares_memory(y, out), f"{label}: apply did not write to out"
        _result(out, expected, x, dtype, f"{label}: apply, out")
    assert _same_bits(x, before), f"{label}: forward wrote to x"
    inplace = np.array(x, order="C")
    backend.forward(_frozen(inplace), weight, bias, eps, center=center, out=inplace)
    _result(inplace, xhat * _spread(weight, x, 1.0) + _spread(bias, x, 0.0), x, dtype, f"{label}: in place")


def _check_backward(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    x, weight, _, dy = _data(case, dtype)
    mean, m2 = _reference_moments(x, center)
    rstd = 1 / np.sqrt(m2 / _count(x) + 1e-3)
    xhat, wide = _reference_xhat(x, mean, rstd), dy.astype(Wide)
    shared = tuple(axis for axis, n in enumerate(case.param_shape) if n == 1)
    dweight, dbias = ((v).sum(axis=shared, keepdims=True) for v in (wide * xhat, wide))
    statistics = np.asarray(mean, np.float64) if center else None, np.asarray(rstd, np.float64)
    root = rstd[:, None, :, None, None]
    for w, param_shape, fixed in itertools.product((weight, None), (case.param_shape, None), (False, True)):
        if w is not None and param_shape is None:
            continue
        g = wide * _spread(w, x, 1.0)
        s1, s2 = _reference_sums(g), _reference_sums(g * xhat)
        k1 = s1 / _count(x) if center and not fixed else np.zeros_like(s1)
        k2 = s2 / _count(x) if not fixed else np.zeros_like(s2)
        dx = root * (g - k1[:, None, :, None, None] - xhat * k2[:, None, :, None, None])
        found = backend.backward(dy, Saved(x, *statistics, w, param_shape, fixed))
        assert isinstance(found, Grads), f"{label}: backward gave {type(found).__name__}, not Grads"
        _result(found.x, dx, x, dtype, f"{label}: backward")
        _param_grads(found[1:3], (dweight, dbias), param_shape, f"{label}: backward")
        t1, t2, *grads = backend.backward_sums(dy, x, *statistics, w, param_shape)
        _close(t1, s1, "float64", f"{label}: backward_sums, s1", scale=_count(x))
        _close(t2, s2, "float64", f"{label}: backward_sums, s2", scale=_count(x))
        _param_grads(grads, (dweight, dbias), param_shape, f"{label}: backward_sums")
        ks = [np.asarray(k, np.float64) for k in (k1, k2)] if not fixed else [None, None]
        _result(backend.backward_apply(dy, x, *statistics, w, *ks), dx, x, dtype, f"{label}: backward_apply")


def _check_activation(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    """One activation, which one depends on the case, on top of the backend's own norm and gradient; and with a half
    type, parameters in float32. Every sixth pair of case and dtype: a backend may compile anew for each of them."""
    place = CASES.index(case)
    if (place + 5 * tuple(TOLERANCE).index(dtype)) % 6:
        return
    x, weight, bias, dy = _data(case, dtype)
    if dtype in HALF:
        weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    name = ACTIVATIONS[place % len(ACTIVATIONS)]
    reason = backend.reject(case.request(dtype, center, backend.device)._replace(activation=name, order="norm_act"))
    if reason is not None:
        return
    mean, m2 = _reference_moments(x, center)
    rstd = 1 / np.sqrt(m2 / _count(x) + 1e-3)
    z = _reference_xhat(x, mean, rstd) * _spread(weight, x, 1.0) + _spread(bias, x, 0.0)
    expected, slope = _reference_activation(name, z)
    y, _, root = backend.forward(x, weight, bias, 1e-3, center=center, epilogue=Epilogue(name))
    _result(y, expected, x, dtype, f"{label}: forward, {name}")
    statistics = np.asarray(mean, np.float64) if center else None, root
    saved = Saved(x, *statistics, weight, case.param_shape, True, bias, None, Epilogue(name))
    found = backend.backward(dy, saved)
    dz = dy.astype(Wide) * slope
    _result(
        found.x, dz * _spread(weight, x, 1.0) * rstd[:, None, :, None, None], x, dtype, f"{label}: backward, {name}"
    )
    shared = tuple(axis for axis, n in enumerate(case.param_shape) if n == 1)
    dbias = dz.sum(axis=shared, keepdims=True)
    single = "float32" if dtype in HALF else dtype
    _close(found.bias, dbias, single, f"{label}: backward, {name}, dbias", scale=float(np.abs(dbias).max()) + 1)


def _reference_activation(name: str, z: Any) -> tuple[Any, Any]:
    """The activation and its derivative, from the definitions; erf by the standard library."""
    bell = np.exp(-z * z / 2) / np.sqrt(2 * Wide(np.pi))
    area = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)), otypes=[float])(z.astype(float))
    sigmoid, k = 1 / (1 + np.exp(-z)), np.sqrt(2 / Wide(np.pi))
    t = np.tanh(k * (z + 0.044715 * z**3))
    return {
        "relu": (np.where(z > 0, z, 0), np.where(z > 0, 1, 0)),
        "leaky_relu": (np.where(z > 0, z, 0.01 * z), np.where(z > 0, 1, 0.01)),
        "silu": (z * sigmoid, sigmoid + z * sigmoid * (1 - sigmoid)),
        "gelu": (z * area, area + z * bell),
        "gelu_tanh": (z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) / 2 * k * (1 + 0.134145 * z * z)),
        "sigmoid": (sigmoid, sigmoid * (1 - sigmoid)),
        "tanh": (np.tanh(z), 1 - np.tanh(z) ** 2),
    }[name]


def _check_hard_values(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    """Constant groups, far offsets, an outlier in first place, and values that are not finite."""
    x, _, bias, _ = _data(case, dtype)
    if center:
        y, moments, _ = backend.forward(_frozen(np.full(x.shape, 3.7, x.dtype)), None, bias, 1e-5, center=True)
        assert moments is not None, f"{label}: forward gave no moments"
        assert not np.any(moments.m2), f"{label}: a constant group has m2 {np.max(moments.m2)}, not 0"
        assert np.array_equal(y, np.broadcast_to(bias, x.shape)), f"{label}: a constant group does not give its bias"
    offset = {"float16": 100.0, "bfloat16": 10.0, "float32": 1e6, "float64": 1e4}[dtype]
    shifted = (x.astype(np.float64) + offset).astype(x.dtype)
    shifted[0, 0, 0, 0, 0] = 2 * offset
    mean, m2 = _reference_moments(shifted, center)
    rstd = 1 / np.sqrt(m2 / _count(x) + 1e-5)
    expected = _reference_xhat(shifted, mean, rstd)
    # A mean in float64 is known to 1e-16 of itself, and its error is multiplied by rstd.
    scale = offset * float(rstd.max()) * 1e-4 if dtype == "float64" else 1.0
    y = backend.forward(_frozen(shifted), None, None, 1e-5, center=center)[0]
    _result(y, expected, x, dtype, f"{label}: offset", scale)
    spoilt = x.copy()
    clean = backend.forward(_frozen(spoilt), None, None, 1e-5, center=center)[0]
    spoilt[0, 0, 0, 0, 0] = np.nan
    y = backend.forward(_frozen(spoilt), None, None, 1e-5, center=center)[0]
    assert np.isnan(y[0, :, 0].astype(np.float32)).all(), f"{label}: a NaN did not spread to its whole group"
    others = np.ones(x.shape, bool)
    others[0, :, 0] = False
    assert _same_bits(y[others], clean[others]), f"{label}: a NaN changed another group"


def _data(case: Case, dtype: str) -> tuple[View, View, View, View]:
    """x, weight, bias, dy of one case; the same every time."""
    rng = np.random.default_rng(20)
    kind = bfloat16() if dtype == "bfloat16" else np.dtype(dtype)
    n, r, *rest = case.shape
    step, many = case.strided, abs(case.strided)
    if r == 1:
        x = (rng.standard_normal((n * many, r, *rest)) * 2 + 1).astype(kind)[::step]
    else:
        x = (rng.standard_normal((n, r * many, *rest)) * 2 + 1).astype(kind)[:, ::step]
    weight, bias = (rng.standard_normal(case.param_shape).astype(kind) for _ in range(2))
    return _frozen(x), weight, bias, _frozen(rng.standard_normal(case.shape).astype(kind))


def _frozen(array: View) -> View:
    """A read-only view, as the engine passes its inputs."""
    view = array.view()
    view.flags.writeable = False
    return view


def _count(x: View) -> int:
    return int(x.shape[1] * x.shape[3] * x.shape[4])


def _result(found: Any, expected: Any, x: View, dtype: str, label: str, scale: float = 1.0) -> None:
    """A result of x's size: dtype, shape, order and values."""
    assert found.shape == x.shape, f"{label}: shape {found.shape} is not {x.shape}"
    assert found.dtype == x.dtype, f"{label}: dtype {found.dtype} is not {x.dtype}"
    assert found.flags.c_contiguous, f"{label}: the result is not C-contiguous"
    _close(found, expected, dtype, label, scale)


def _param_grads(found: Any, expected: Any, param_shape: tuple[int, ...] | None, label: str) -> None:
    for grad, reference, name in zip(found, expected, ("dweight", "dbias"), strict=True):
        if param_shape is None:
            assert grad is None, f"{label}: {name} was not asked for"
        else:
            assert grad.shape == param_shape, f"{label}: {name} has shape {grad.shape}, not {param_shape}"
            _close(grad, reference, "float64", f"{label}: {name}", scale=float(np.abs(reference).max()) + 1)


def _close(found: Any, expected: Any, dtype: str, label: str, scale: float = 1.0) -> None:
    values = np.asarray(found).astype(Wide)
    assert values.shape == expected.shape, f"{label}: shape {values.shape} is not {expected.shape}"
    error = np.abs(values - expected) / np.maximum(np.abs(expected), max(scale, 1.0))
    worst = float(error.max())
    assert worst <= TOLERANCE[dtype], f"{label}: off by {worst:.2g}, more than {TOLERANCE[dtype]:.0e}"


def _same_bits(a: View, b: View) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
