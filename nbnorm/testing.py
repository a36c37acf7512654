"""The conformance kit: what a backend must do, checked on small and large five-axis views.

The reference is written here from the definitions, group by group in extended precision, and shares no code with any
backend. Run it from a plugin's own tests: ``nbnorm.testing.check_backend(MyBackend())``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import HALF, bfloat16
from nbnorm.backend import ACTIVATIONS, PLAIN, Backend, Epilogue, Grads, Request, Saved
from nbnorm.statistics import Moments

View = NDArray[Any]
Wide = np.longdouble
Item = TypeVar("Item")

EPS = 1e-3
# Allowed error, relative to max(1, |reference|): a few units in the last place, times the sums of a gradient.
DTYPES = ("float32", "float64", *HALF)
TOLERANCE = {"float64": 1e-11, "sums": 4e-7, "float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


# ---- what is tried ---------------------------------------------------------------------------------------------------


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

    @property
    def small(self) -> bool:
        return math.prod(self.shape) < 10_000

    @property
    def unusual(self) -> bool:
        return self.strided != 1 or "r" in self.params

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
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True, slots=True)
class Trial:
    """What is joined to a norm, and the names of the cases that are tried with it."""

    cases: tuple[str, ...] = ()
    mask: bool = False
    residual: bool = False
    activation: str | None = None
    order: str = "norm_act"

    def request(self, plain: Request) -> Request:
        order = None if self.activation is None else self.order
        return plain._replace(activation=self.activation, order=order, residual=self.residual, mask=self.mask)

    def __str__(self) -> str:
        before = self.order == "act_norm"
        parts = "residual" if self.residual else "", f"{self.activation} before" if before else self.activation
        return ", ".join(part for part in parts if part)


TRIALS = (
    Trial(("batch, channels first", "batch, one channel", "group, channels first", "layer", "layer, large"), mask=True),
    Trial(("batch, channels last", "instance, channels last"), residual=True, activation="sigmoid", order="act_norm"),
    Trial(("batch, channels last", "batch, wide", "group, channels last"), mask=True, activation="silu"),
    Trial(("batch, channels first", "group, no space", "layer"), residual=True),
    Trial(("layer over an outer axis", "layer over both sides"), mask=True, residual=True, activation="tanh"),
    Trial(("instance, channels first", "group, no space"), mask=True, activation="gelu", order="act_norm"),
    Trial(("group, channels last, strided",), mask=True, residual=True, activation="relu"),
    Trial(("instance, channels last", "batch, prime rows"), residual=True, activation="gelu_tanh"),
)
MASKED_AXES = ("nrgcs", "nr", "gc", "s")  # where a mask is full; elsewhere its length is 1
ACTIVATED = "batch, channels last"  # tried with every activation
ADDED = ("layer", "group, channels last, strided")  # tried with add_forward


@dataclass(frozen=True, slots=True)
class Whole:
    """A view (outer, axis, inner) for one of the whole ops."""

    op: str
    shape: tuple[int, int, int]
    strided: int = 1  # step along the outer axis

    def __str__(self) -> str:
        return f"{self.op} of {self.shape}" + ("" if self.strided == 1 else ", strided")


WHOLE = (
    Whole("normalize", (6, 11, 1)),
    Whole("local_response_norm", (3, 7, 5)),
    Whole("normalize", (3, 6, 40), strided=2),
    Whole("local_response_norm", (4, 9, 1), strided=2),
)
P_NORMS = (2.0, 1.0, 0.0, math.inf, -math.inf, 3.0, 0.5, -1.0)
# Window, alpha, beta, k: windows of one element, wider than the axis and not symmetric; powers with roots and without.
RESPONSES = (
    ((1, 1), 0.3, 0.75, 1.0),
    ((2, 1), 0.5, 0.5, 2.0),
    ((0, 0), 1.0, 1.0, 0.5),
    ((20, 19), 0.1, 1.7, 1.5),
    ((1, 1), 0.7, 0.0, 0.5),
)


# ---- the kit ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Report:
    """What was checked, and what the backend refused and why."""

    checked: int
    refused: tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Record:
    """A report in the making."""

    backend: Backend
    checked: int = 0
    refused: list[tuple[str, str]] = field(default_factory=list)

    def takes(self, request: Request, label: str) -> bool:
        """Whether the backend takes the request; either is put down."""
        reason = self.backend.reject(request)
        if reason is not None:
            assert isinstance(reason, str), f"{label}: reject gave {reason!r}, not a reason"
            assert reason, f"{label}: refused without a reason"
            self.refused.append((label, reason))
            return False
        fused = self.backend.fuses(request)
        assert isinstance(fused, bool), f"{label}: fuses gave {fused!r}, not a bool"
        self.checked += 1
        return True


def check_backend(backend: Backend, *, dtypes: tuple[str, ...] = DTYPES) -> Report:
    """Run every conformance case on a host backend.

    Norms are tried in every dtype. Strided views, parameters along r, options, sums and whole ops take turns with the
    dtypes, as a backend may compile anew for each pair: name one dtype to try all of them in it.

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
    (99, ())
    """
    record = Record(backend)
    taken = _check_norms(record, dtypes)
    reason = record.refused[0][1] if record.refused else "no dtypes given"
    assert taken, f"{backend.name} refuses everything: {reason}"
    for check in (_check_trials, _check_activations, _check_sums, _check_whole_ops):
        check(record, taken)
    return Report(record.checked, tuple(record.refused))


def _check_norms(record: Record, dtypes: Sequence[str]) -> list[str]:
    """Norms with nothing joined to them. The dtypes that the backend takes."""
    usual, unusual = ([case for case in CASES if case.unusual is which] for which in (False, True))
    taken = [dtype for dtype in dtypes if sum(_check_norm(record, case, dtype) for case in usual)]
    turns = (taken, taken) if len(taken) < 3 else (taken[::2], taken[1::2])
    for case in unusual:
        for dtype in turns[case.strided == 1]:
            _check_norm(record, case, dtype)
    return taken


def _check_norm(record: Record, case: Case, dtype: str) -> int:
    """With centring and without; how many of the two the backend takes."""
    taken = 0
    for center in (True, False):
        label = _label(case, dtype, center)
        if record.takes(case.request(dtype, center, record.backend.device), label):
            taken += 1
            for check in (_check_forward, _check_backward, _check_wide_parameters, _check_hard_values):
                check(record.backend, case, dtype, center, label)
    return taken


def _check_trials(record: Record, dtypes: Sequence[str]) -> None:
    for trial, dtype in _in_turn(TRIALS, dtypes):
        for name, center in itertools.product(trial.cases, (True, False)):
            case = BY_NAME[name]
            label = ", ".join(part for part in (_label(case, dtype, center), str(trial)) if part)
            masked = f"{label}, masked" if trial.mask else label
            if record.takes(trial.request(case.request(dtype, center, record.backend.device)), masked):
                for axes in _masked_axes(case) if trial.mask else ("",):
                    given = _given(case, dtype, center, trial, axes)
                    _check_options(record.backend, given, dtype, f"{label}, mask over {axes}" if axes else label)


def _check_activations(record: Record, dtypes: Sequence[str]) -> None:
    """Every second one in the widest dtype, as precisions may differ; trials have them in others."""
    case, widest = BY_NAME[ACTIVATED], min(dtypes, key=tuple(TOLERANCE).index)
    others = itertools.cycle([dtype for dtype in dtypes if dtype != widest] or [widest])
    for place, name in enumerate(ACTIVATIONS):
        dtype, trial = next(others) if place % 2 else widest, Trial(activation=name)
        label = f"{_label(case, dtype, True)}, {name}"
        if record.takes(trial.request(case.request(dtype, True, record.backend.device)), label):
            _check_activation(record.backend, _given(case, dtype, True, trial), dtype, label)


def _check_sums(record: Record, dtypes: Sequence[str]) -> None:
    for (name, dtype), center in itertools.product(_in_turn(ADDED, dtypes), (True, False)):
        case = BY_NAME[name]
        label = f"{_label(case, dtype, center)}, x + addend"
        if record.takes(case.request(dtype, center, record.backend.device), label):
            _check_sum(record.backend, case, dtype, center, label)


def _check_whole_ops(record: Record, dtypes: Sequence[str]) -> None:
    checks = {"normalize": _check_normalize, "local_response_norm": _check_local_response_norm}
    unknown = record.backend.whole_ops - checks.keys()
    assert not unknown, f"whole_ops names {sorted(unknown)}, of which nothing is known"
    for whole, dtype in _in_turn(WHOLE, dtypes):
        label = f"{whole}, {dtype}"
        request = Request(whole.op, record.backend.device, dtype, center=True, param_axes=(), split=False)
        if whole.op in record.backend.whole_ops and record.takes(request, label):
            checks[whole.op](record.backend, whole, dtype, label)


def _in_turn(items: Sequence[Item], dtypes: Sequence[str]) -> Iterator[tuple[Item, str]]:
    """Every item, and every dtype, at least once."""
    for place in range(max(len(items), len(dtypes))):
        yield items[place % len(items)], dtypes[place % len(dtypes)]


def _label(case: Case, dtype: str, center: bool) -> str:
    return f"{case.name}, {dtype}, {'centred' if center else 'about zero'}"


# ---- the data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """The arguments of one call."""

    case: Case
    center: bool
    x: View
    weight: View
    bias: View
    dy: View
    mask: View | None = None
    epilogue: Epilogue = PLAIN

    @property
    def valid(self) -> View:
        return np.broadcast_to(True if self.mask is None else self.mask, self.x.shape)

    def spoilt(self) -> Given:
        """The same with NaN, Inf and a large number under the mask, in everything of x's size."""
        residual = self.epilogue.residual
        if residual is not None:
            residual = self._spoilt(residual)
        x = _laid_out(self._spoilt(self.x), self.case.strided)
        return replace(self, x=x, dy=self._spoilt(self.dy), epilogue=self.epilogue._replace(residual=residual))

    def _spoilt(self, array: View) -> View:
        bad = np.resize([np.nan, np.inf, -np.inf, 3e4], array.shape)
        return _frozen(np.where(self.valid, array, bad.astype(array.dtype)))


def _given(case: Case, dtype: str, center: bool, trial: Trial, mask_axes: str = "") -> Given:
    """The arguments of a trial; with a half type, parameters in float32."""
    x, weight, bias, dy = _data(case, dtype)
    if dtype in HALF:
        weight, bias = weight.astype(np.float32), bias.astype(np.float32)
    residual = _frozen(np.flip(dy).copy()) if trial.residual else None
    mask = _mask(case, mask_axes) if mask_axes else None
    return Given(case, center, x, weight, bias, dy, mask, Epilogue(trial.activation, trial.order, residual))


def _data(case: Case, dtype: str) -> tuple[View, View, View, View]:
    """x, weight, bias, dy of one case; the same every time."""
    rng, kind = np.random.default_rng(20), _kind(dtype)
    x = (rng.standard_normal(case.shape) * 2 + 1).astype(kind)
    weight, bias = (rng.standard_normal(case.param_shape).astype(kind) for _ in range(2))
    return _laid_out(x, case.strided), weight, bias, _frozen(rng.standard_normal(case.shape).astype(kind))


def _kind(dtype: str) -> np.dtype[Any]:
    return bfloat16() if dtype == "bfloat16" else np.dtype(dtype)


def _laid_out(values: View, step: int) -> View:
    """The same values, read-only, with that step along the outermost axis that is not 1, and NaN in between."""
    axis = 1 if values.ndim == 5 and values.shape[1] > 1 else 0
    shape = list(values.shape)
    shape[axis] *= abs(step)
    memory = np.full(shape, np.nan, values.dtype)
    view = np.moveaxis(np.moveaxis(memory, axis, 0)[::step], 0, axis)
    view[...] = values
    return _frozen(view)


def _frozen(array: View) -> View:
    """A read-only view, as the engine passes its inputs."""
    view = array.view()
    view.flags.writeable = False
    return view


def _masked_axes(case: Case) -> Iterator[str]:
    """Axes on which a mask of the case is full, the whole of it first; a large case has that alone."""
    long = {axis for axis, n in zip("nrgcs", case.shape, strict=True) if n > 1}
    seen = []
    for axes in MASKED_AXES if case.small else MASKED_AXES[:1]:
        if (full := long & set(axes)) not in seen:
            seen.append(full)
            yield axes


def _mask(case: Case, axes: str) -> View:
    """Where x is to count: at random, with an empty group and one with a single element where there are many."""
    shape = [n if axis in axes else 1 for axis, n in zip("nrgcs", case.shape, strict=True)]
    mask = np.random.default_rng(21).random(shape) < 0.6
    if math.prod(shape) == 1:
        mask[:] = True
    elif "n" in axes and "g" in axes and case.shape[0] * case.shape[2] > 2:
        mask[0, :, 0] = mask[-1, :, -1] = False
        mask[-1, -1, -1, -1, -1] = True
    return _frozen(mask)


# ---- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Expected:
    """What a forward gives, and what its gradients are made of."""

    count: Any  # like mean, m2 and rstd, on (n, g)
    mean: Any
    m2: Any
    rstd: Any
    xhat: Any  # like the rest, of x's size, and 0 under the mask
    y: Any
    slope: Any  # derivative of the activation after the norm
    bend: Any  # and of the one before it

    @property
    def stats(self) -> tuple[Any, Any, Any]:
        """count, mean, rstd as a backend takes them."""
        return self.count.astype(np.int64), self.mean.astype(np.float64), self.rstd.astype(np.float64)


def _reference_forward(given: Given) -> Expected:
    x = np.where(given.valid, given.x, given.x.dtype.type(0)).astype(Wide)
    u, bend = _reference_activation(given.epilogue.before, x)
    mean, m2 = _reference_moments(u, given.center, given.valid)
    count = _reference_sums(given.valid.astype(Wide))
    rstd = np.where(count > 0, 1 / np.sqrt(m2 / np.maximum(count, 1) + EPS), 0)
    xhat = np.where(given.valid, _reference_xhat(u, mean, rstd), 0)
    z = xhat * _spread(given.weight, x, 1.0) + _spread(given.bias, x, 0.0)
    if given.epilogue.residual is not None:
        z = z + given.epilogue.residual.astype(Wide)
    y, slope = _reference_activation(given.epilogue.after, z)
    return Expected(count, mean, m2, rstd, xhat, *(np.where(given.valid, part, 0) for part in (y, slope, bend)))


def _reference_gradients(given: Given, forward: Expected, fixed: bool) -> Grads:
    dz = given.dy.astype(Wide) * forward.slope
    g = dz * _spread(given.weight, given.x, 1.0)
    count = np.maximum(forward.count, 1)
    k1, k2 = _reference_sums(g) / count, _reference_sums(g * forward.xhat) / count
    if fixed or not given.center:
        k1 = 0 * k1
    if fixed:
        k2 = 0 * k2
    du = _on_x(forward.rstd) * (g - _on_x(k1) - forward.xhat * _on_x(k2))
    dweight, dbias = _reference_param_grads(given.case, dz, forward.xhat)
    return Grads(du * forward.bend, dweight, dbias, dz)


def _reference_param_grads(case: Case, dz: Any, xhat: Any) -> tuple[Any, Any]:
    shared = tuple(axis for axis, n in enumerate(case.param_shape) if n == 1)
    return (dz * xhat).sum(axis=shared, keepdims=True), dz.sum(axis=shared, keepdims=True)


def _groups(x: View) -> Iterator[tuple[tuple[int, int], tuple[Any, ...]]]:
    for i, j in np.ndindex(x.shape[0], x.shape[2]):
        yield (i, j), (i, slice(None), j)


def _spread(param: View | None, x: View, absent: float) -> Any:
    return np.full(x.shape, absent, Wide) if param is None else np.broadcast_to(param.astype(Wide), x.shape)


def _on_x(stat: Any) -> Any:
    return stat[:, None, :, None, None]


def _reference_moments(x: View, center: bool, valid: View | None = None) -> tuple[Any, Any]:
    """(mean, m2) of every group's valid elements; about zero without centring, and 0 where there are none."""
    mean, m2 = np.zeros((2, x.shape[0], x.shape[2]), Wide)
    for stat, index in _groups(x):
        values = (x[index] if valid is None else x[index][valid[index]]).astype(Wide)
        if values.size:
            mean[stat] = values.mean() if center else 0
            m2[stat] = ((values - mean[stat]) ** 2).sum()
    return mean, m2


def _reference_xhat(x: View, mean: Any, rstd: Any) -> Any:
    return (x.astype(Wide) - _on_x(mean)) * _on_x(rstd)


def _reference_sums(values: Any) -> Any:
    total = np.zeros((values.shape[0], values.shape[2]), Wide)
    for stat, index in _groups(values):
        total[stat] = values[index].sum()
    return total


def _reference_activation(name: str | None, z: Any) -> tuple[Any, Any]:
    """The activation and its derivative."""
    return (z, np.ones_like(z)) if name is None else DEFINITIONS[name](z)


def _gelu(z: Any) -> tuple[Any, Any]:
    """erf is the standard library's."""
    area = np.vectorize(lambda value: 0.5 * math.erfc(-value / math.sqrt(2)), otypes=[float])(z.astype(float))
    return z * area, area + z * np.exp(-z * z / 2) / np.sqrt(2 * Wide(np.pi))


def _gelu_tanh(z: Any) -> tuple[Any, Any]:
    k = np.sqrt(2 / Wide(np.pi))
    t = np.tanh(k * (z + 0.044715 * z**3))
    return z * (1 + t) / 2, (1 + t) / 2 + z * (1 - t * t) / 2 * k * (1 + 0.134145 * z * z)


def _sigmoid(z: Any) -> Any:
    return 1 / (1 + np.exp(-z))


DEFINITIONS: dict[str, Callable[[Any], tuple[Any, Any]]] = {
    "relu": lambda z: (np.where(z > 0, z, 0), np.where(z > 0, 1, 0)),
    "leaky_relu": lambda z: (np.where(z > 0, z, 0.01 * z), np.where(z > 0, 1, 0.01)),
    "silu": lambda z: (z * _sigmoid(z), _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "sigmoid": lambda z: (_sigmoid(z), _sigmoid(z) * (1 - _sigmoid(z))),
    "tanh": lambda z: (np.tanh(z), 1 - np.tanh(z) ** 2),
}


def _reference_normalize(x: Any, dy: Any, p: float, eps: float) -> tuple[Any, Any]:
    """y and dx, by the quotient rule; a norm below eps is a constant."""
    size = np.abs(x)
    with np.errstate(all="ignore"):
        if p == 0:
            norm, slope = np.sum(size != 0, axis=1, keepdims=True), np.zeros_like(x)
        elif math.isinf(p):
            norm = np.max(size, axis=1, keepdims=True) if p > 0 else np.min(size, axis=1, keepdims=True)
            slope = (size == norm) / np.sum(size == norm, axis=1, keepdims=True, dtype=Wide)
        else:
            norm = np.sum(size ** Wide(p), axis=1, keepdims=True) ** (1 / Wide(p))
            slope = np.where(size == 0, 0, (size / norm) ** (Wide(p) - 1))
        bound = np.maximum(norm, Wide(eps))
        change = np.sum(dy * x, axis=1, keepdims=True) / bound**2 * np.sign(x) * slope
        return x / bound, dy / bound - np.where(norm >= eps, change, 0)


def _reference_response(
    x: Any, dy: Any, window: tuple[int, int], alpha: float, beta: float, k: float
) -> tuple[Any, Any]:
    """y and dx: each element gives to its own gradient and to that of every element in its window."""
    y, dx = np.empty_like(x), np.zeros_like(x)
    for i in range(x.shape[1]):
        near = range(max(0, i - window[0]), min(x.shape[1], i + window[1] + 1))
        energy = k + alpha * sum(x[:, j] * x[:, j] for j in near)
        y[:, i] = x[:, i] / energy ** Wide(beta)
        dx[:, i] += dy[:, i] / energy ** Wide(beta)
        for j in near:
            dx[:, j] -= dy[:, i] * y[:, i] / energy * beta * alpha * 2 * x[:, j]
    return y, dx


# ---- the required methods, and forward and backward without options --------------------------------------------------


def _check_forward(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    x, weight, bias, _ = _data(case, dtype)
    before = x.copy()
    mean, m2 = _reference_moments(x, center)
    count = np.full(mean.shape, _count(x))
    rstd = 1 / np.sqrt(m2 / count + EPS)
    found = backend.moments(x, center=center)
    _check_moments(found, (count, mean, m2), f"{label}: moments")
    _check_moments(backend.statistics(x, center=center), (count, mean, m2), f"{label}: statistics")
    xhat = _reference_xhat(x, mean, rstd)
    for w, b in ((weight, bias), (weight, None), (None, bias), (None, None)):
        expected = xhat * _spread(w, x, 1.0) + _spread(b, x, 0.0)
        y, batch, root = backend.forward(x, w, b, EPS, center=center)
        _result(y, expected, x, dtype, f"{label}: forward")
        assert batch is not None, f"{label}: forward gave no moments"
        _check_moments(batch, (count, mean, m2), f"{label}: forward, moments", "float64")
        _close(root, rstd, "float64", f"{label}: forward, rstd")
        out = np.full(x.shape, 7, x.dtype)
        backend.forward(x, w, b, EPS, center=center, out=out)
        _result(out, expected, x, dtype, f"{label}: forward, out")
        given = (found.mean if center else None, root)
        y, batch, _ = backend.forward(x, w, b, EPS, center=center, stats=given)
        _result(y, expected, x, dtype, f"{label}: forward with given statistics")
        assert batch is None, f"{label}: forward with given statistics gave moments"
        out = np.full(x.shape, 7, x.dtype)
        y = backend.apply(x, *given, w, b, out=out)
        assert np.shares_memory(y, out), f"{label}: apply did not write to out"
        _result(out, expected, x, dtype, f"{label}: apply, out")
    assert _same_bits(x, before), f"{label}: forward wrote to x"
    inplace = np.array(x, order="C")
    backend.forward(_frozen(inplace), weight, bias, EPS, center=center, out=inplace)
    _result(inplace, xhat * _spread(weight, x, 1.0) + _spread(bias, x, 0.0), x, dtype, f"{label}: in place")


def _check_backward(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    x, weight, _, dy = _data(case, dtype)
    mean, m2 = _reference_moments(x, center)
    rstd = 1 / np.sqrt(m2 / _count(x) + EPS)
    xhat, wide = _reference_xhat(x, mean, rstd), dy.astype(Wide)
    params = _reference_param_grads(case, wide, xhat)
    statistics = np.asarray(mean, np.float64) if center else None, np.asarray(rstd, np.float64)
    for w, param_shape in ((weight, case.param_shape), (None, case.param_shape), (None, None)):
        g = wide * _spread(w, x, 1.0)
        s1, s2 = _reference_sums(g), _reference_sums(g * xhat)
        t1, t2, *grads = backend.backward_sums(dy, x, *statistics, w, param_shape)
        _close(t1, s1, "float64", f"{label}: backward_sums, s1", scale=_count(x))
        _close(t2, s2, "float64", f"{label}: backward_sums, s2", scale=_count(x))
        _param_grads(grads, params, param_shape, f"{label}: backward_sums")
        for fixed in (False, True):
            k1 = s1 / _count(x) if center and not fixed else np.zeros_like(s1)
            k2 = s2 / _count(x) if not fixed else np.zeros_like(s2)
            dx = _on_x(rstd) * (g - _on_x(k1) - xhat * _on_x(k2))
            found = backend.backward(dy, Saved(x, *statistics, w, param_shape, fixed))
            assert isinstance(found, Grads), f"{label}: backward gave {type(found).__name__}, not Grads"
            _result(found.x, dx, x, dtype, f"{label}: backward")
            of = "float64" if dtype == "float64" else "sums"  # they will be rounded to float32
            _param_grads(found[1:3], params, param_shape, f"{label}: backward", of)
            assert found.residual is None, f"{label}: backward, residual: was not asked for"
            ks = [None, None] if fixed else [np.asarray(k, np.float64) for k in (k1, k2)]
            _result(backend.backward_apply(dy, x, *statistics, w, *ks), dx, x, dtype, f"{label}: backward_apply")


def _check_wide_parameters(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    """weight and bias in float64, as the engine makes them where it computes them."""
    if dtype == "float64" or not center or not case.small:
        return
    x, _, _, dy = _data(case, dtype)
    given = Given(case, center, x, *_data(case, "float64")[1:3], dy)
    _check_options(backend, given, dtype, f"{label}, float64 weight and bias")


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


# ---- options ---------------------------------------------------------------------------------------------------------


def _check_options(backend: Backend, given: Given, dtype: str, label: str) -> None:
    """Statistics, forward and backward of one call, and that nothing depends on what lies under its mask."""
    expected = _reference_forward(given)
    _check_joined_forward(backend, given, expected, dtype, label)
    _check_joined_backward(backend, given, expected, dtype, label)
    if given.mask is not None:
        clean, spoilt = (_everything(backend, one, expected) for one in (given, given.spoilt()))
        for name, values in clean.items():
            assert _same_bits(spoilt[name], values), f"{label}: {name} depends on what lies under the mask"
        _check_equal_values(backend, given, label)


def _check_joined_forward(backend: Backend, given: Given, expected: Expected, dtype: str, label: str) -> None:
    x, single = given.x, _single(dtype) if given.epilogue.before else "float64"
    moments = expected.count, expected.mean, expected.m2
    found = backend.statistics(x, center=given.center, mask=given.mask, epilogue=given.epilogue)
    _check_moments(found, moments, f"{label}: statistics", single)
    y, batch, rstd = _forward(backend, given)
    assert batch is not None, f"{label}: forward gave no moments"
    _check_moments(batch, moments, f"{label}: forward, moments", single)
    _close(rstd, expected.rstd, single, f"{label}: forward, rstd")
    _check_masked(y, given, f"{label}: forward")
    _result(y, expected.y, x, dtype, f"{label}: forward")
    _, mean, root = expected.stats
    out = np.full(x.shape, 7, x.dtype)
    _, batch, _ = _forward(backend, given, stats=(mean if given.center else None, root), out=out)
    assert batch is None, f"{label}: forward with given statistics gave moments"
    _check_masked(out, given, f"{label}: forward with given statistics")
    _result(out, expected.y, x, dtype, f"{label}: forward with given statistics, out")


def _check_joined_backward(backend: Backend, given: Given, expected: Expected, dtype: str, label: str) -> None:
    for fixed, param_shape in ((False, given.case.param_shape), (True, given.case.param_shape), (True, None)):
        where = f"{label}: backward{', fixed' if fixed else ''}"
        grads = _reference_gradients(given, expected, fixed)
        found = backend.backward(given.dy, _saved(given, expected, fixed, param_shape))
        _check_masked(found.x, given, f"{where}, x")
        _result(found.x, grads.x, given.x, dtype, f"{where}, x")
        _param_grads(found[1:3], grads[1:3], param_shape, where, _single(dtype))
        if given.epilogue.residual is None:
            assert found.residual is None, f"{where}, residual: was not asked for"
        else:
            assert found.residual is not None, f"{where}, residual: there is none"
            _check_masked(found.residual, given, f"{where}, residual")
            _result(found.residual, grads.residual, given.x, dtype, f"{where}, residual")


def _check_equal_values(backend: Backend, given: Given, label: str) -> None:
    """Equal values have no spread, whatever lies between them."""
    if given.center and given.epilogue.before is None:
        equal = replace(given, x=np.full(given.x.shape, 3.7, given.x.dtype)).spoilt()
        found = backend.statistics(equal.x, center=True, mask=given.mask, epilogue=given.epilogue)
        assert not np.any(found.m2), f"{label}: statistics, equal values have m2 {np.max(found.m2)}, not 0"


def _check_activation(backend: Backend, given: Given, dtype: str, label: str) -> None:
    """An activation and its slope alone, with channels where it is flat or straight."""
    bias = np.resize([0, 1000, -1000, 30, -30], given.bias.shape).astype(given.bias.dtype)
    given = replace(given, bias=bias)
    expected = _reference_forward(given)
    y, _, _ = _forward(backend, given, stats=expected.stats[1:])
    _result(y, expected.y, given.x, dtype, f"{label}: forward")
    dx = backend.backward(given.dy, _saved(given, expected, True, None)).x
    _result(dx, _reference_gradients(given, expected, True).x, given.x, dtype, f"{label}: backward")


def _forward(backend: Backend, given: Given, **keys: Any) -> tuple[View, Moments | None, View]:
    options: dict[str, Any] = {"mask": given.mask, "epilogue": given.epilogue}
    return backend.forward(given.x, given.weight, given.bias, EPS, center=given.center, **options, **keys)


def _saved(given: Given, expected: Expected, fixed: bool, param_shape: tuple[int, ...] | None) -> Saved:
    """As the engine saves it: given statistics come without counts."""
    count, mean, rstd = expected.stats
    valid = None if given.mask is None or fixed else count
    center = mean if given.center else None
    return Saved(given.x, center, rstd, given.weight, param_shape, fixed, given.bias, given.mask, given.epilogue, valid)


def _everything(backend: Backend, given: Given, expected: Expected) -> dict[str, View]:
    """All that a backend finds, by name."""
    y, moments, rstd = _forward(backend, given)
    assert moments is not None
    grads = backend.backward(given.dy, _saved(given, expected, False, given.case.param_shape))
    found = {"forward, mean": moments.mean, "forward, m2": moments.m2, "forward, rstd": rstd, "forward, y": y}
    for name, grad in zip(Grads._fields, grads, strict=True):
        if grad is not None:
            found[f"backward, {name}"] = grad
    moments = backend.statistics(given.x, center=given.center, mask=given.mask, epilogue=given.epilogue)
    return found | {"statistics, mean": moments.mean, "statistics, m2": moments.m2}


# ---- the norm of a sum -----------------------------------------------------------------------------------------------


def _check_sum(backend: Backend, case: Case, dtype: str, center: bool, label: str) -> None:
    """So far out that the rounding of the total is seen in its norm, except in float64."""
    x, weight, bias, dy = _data(case, dtype)
    offset = {"float16": 1e3, "bfloat16": 300.0, "float32": 1e7, "float64": 1e3}[dtype]
    x = _laid_out((x.astype(np.float64) + offset).astype(x.dtype), case.strided)
    addend = _frozen(np.flip(dy) * dy.dtype.type(2))
    exact = (x.astype(np.float64) + addend.astype(np.float64)).astype(x.dtype)
    given = Given(case, center, _frozen(exact), weight, bias, dy)
    expected, out = _reference_forward(given), np.full(x.shape, 7, x.dtype)
    y, total, moments, rstd = backend.add_forward(x, addend, weight, bias, EPS, center=center)
    assert total.dtype == x.dtype, f"{label}: add_forward, the total has dtype {total.dtype}, not {x.dtype}"
    assert _same_bits(total, exact), f"{label}: add_forward, the total is not x + addend as {dtype} rounds it"
    _result(y, expected.y, x, dtype, f"{label}: add_forward")
    _check_moments(moments, (expected.count, expected.mean, expected.m2), f"{label}: add_forward, moments")
    _close(rstd, expected.rstd, "float64", f"{label}: add_forward, rstd")
    backend.add_forward(x, addend, weight, bias, EPS, center=center, out=out)
    _result(out, expected.y, x, dtype, f"{label}: add_forward, out")
    dtotal = _frozen(np.flip(addend))
    grads = _reference_gradients(given, expected, False)
    found = backend.backward(dy, _saved(given, expected, False, case.param_shape), addend=dtotal)
    _result(found.x, grads.x + dtotal.astype(Wide), x, dtype, f"{label}: backward, addend")
    _param_grads(found[1:3], grads[1:3], case.param_shape, f"{label}: backward, addend", _single(dtype))


# ---- whole ops -------------------------------------------------------------------------------------------------------


def _check_normalize(backend: Backend, whole: Whole, dtype: str, label: str) -> None:
    """With zeros, elements that share the largest size, a vector of zeros and short vectors."""
    x, dy = _whole_data(whole, dtype)
    x[0, :, 0], x[1, 0], x[1, 1], x[1, 2] = 0, 0, 8, -8
    x[2] *= x.dtype.type(1e-5)
    x = _laid_out(x, whole.strided)
    for p in P_NORMS:
        y, dx = _reference_normalize(x.astype(Wide), dy.astype(Wide), p, EPS)
        named = f"{label}, p={p:g}: normalize"
        _check_whole(backend, whole, (x, dy), (p, EPS), (y, dx), dtype, named)
    if dtype == "float64":  # squares of these have no place in float64
        far = _laid_out(x * 2.0**600, whole.strided)
        y = _reference_normalize(far.astype(Wide), dy.astype(Wide), 2.0, EPS)[0]
        _result(backend.normalize(far, 2.0, EPS), y, x, dtype, f"{label}, large: normalize")


def _check_local_response_norm(backend: Backend, whole: Whole, dtype: str, label: str) -> None:
    x, dy = _whole_data(whole, dtype)
    x = _laid_out(x, whole.strided)
    for args in RESPONSES:
        expected = _reference_response(x.astype(Wide), dy.astype(Wide), *args)
        _check_whole(backend, whole, (x, dy), args, expected, dtype, f"{label}, {args}: local_response_norm")


def _check_whole(
    backend: Backend, whole: Whole, data: tuple[View, View], args: Any, expected: Any, dtype: str, label: str
) -> None:
    (x, dy), (y, dx) = data, expected
    forward, backward = getattr(backend, whole.op), getattr(backend, f"{whole.op}_backward")
    _result(forward(x, *args), y, x, dtype, label)
    out = np.full(x.shape, 7, x.dtype)
    forward(x, *args, out=out)
    _result(out, y, x, dtype, f"{label}, out")
    if x.flags.c_contiguous:
        inplace = x.copy()
        forward(_frozen(inplace), *args, out=inplace)
        _result(inplace, y, x, dtype, f"{label}, in place")
    _result(backward(dy, x, *args), dx, x, dtype, f"{label}_backward")


def _whole_data(whole: Whole, dtype: str) -> tuple[View, View]:
    """x, away from 0, where the gradients of p-norms below 1 have no place in float16; and dy."""
    x, dy = np.random.default_rng(22).standard_normal((2, *whole.shape))
    return (x + np.sign(x)).astype(_kind(dtype)), _frozen(dy.astype(_kind(dtype)))


# ---- comparisons -----------------------------------------------------------------------------------------------------


def _count(x: View) -> int:
    return int(x.shape[1] * x.shape[3] * x.shape[4])


def _single(dtype: str) -> str:
    """What is computed from an activation of a half type is computed in float32 or more."""
    return "float32" if dtype in HALF else dtype


def _check_moments(found: Moments, expected: tuple[Any, Any, Any], label: str, dtype: str = "float64") -> None:
    count, mean, m2 = expected
    _close(found.mean, mean, dtype, f"{label}, mean")
    _close(found.m2, m2, dtype, f"{label}, m2", scale=float(m2.max()))
    counted = np.broadcast_to(found.count, count.shape)
    wrong = np.argwhere(counted != count)
    if wrong.size:
        at = tuple(wrong[0])
        raise AssertionError(f"{label}, count {counted[at]} is not {int(count[at])}")


def _check_masked(found: View, given: Given, label: str) -> None:
    assert not np.any(found[~given.valid]), f"{label} is not 0 under the mask"


def _result(found: Any, expected: Any, x: View, dtype: str, label: str, scale: float = 1.0) -> None:
    """A result of x's size: dtype, shape, order and values."""
    assert found.shape == x.shape, f"{label}: shape {found.shape} is not {x.shape}"
    assert found.dtype == x.dtype, f"{label}: dtype {found.dtype} is not {x.dtype}"
    assert found.flags.c_contiguous, f"{label}: the result is not C-contiguous"
    _close(found, expected, dtype, label, scale)


def _param_grads(
    found: Any, expected: Any, param_shape: tuple[int, ...] | None, label: str, dtype: str = "float64"
) -> None:
    for grad, reference, name in zip(found, expected, ("dweight", "dbias"), strict=True):
        if param_shape is None:
            assert grad is None, f"{label}: {name} was not asked for"
        else:
            assert grad.shape == param_shape, f"{label}: {name} has shape {grad.shape}, not {param_shape}"
            _close(grad, reference, dtype, f"{label}: {name}", scale=float(np.abs(reference).max()) + 1)


def _close(found: Any, expected: Any, dtype: str, label: str, scale: float = 1.0) -> None:
    """Compared in float64: its rounding is far below every tolerance, and it is several times faster."""
    values, exact = np.asarray(found).astype(np.float64), np.asarray(expected).astype(np.float64)
    assert values.shape == exact.shape, f"{label}: shape {values.shape} is not {exact.shape}"
    with np.errstate(invalid="ignore"):
        error = np.abs(values - exact) / np.maximum(np.abs(exact), max(scale, 1.0))
    worst = float(error.max())
    assert worst <= TOLERANCE[dtype], f"{label}: off by {worst:.2g}, more than {TOLERANCE[dtype]:.0e}"


def _same_bits(a: View, b: View) -> bool:
    return np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes()
