"""Masks, activations in both orders and residuals, against a forward written from the definitions, slice by slice over
the valid elements alone, and against its central differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm.backend import ACTIVATIONS, ORDERS
from oracle import Wide, slices
from test_activations import DEFINITIONS

RNG = np.random.default_rng(11)
K = math.sqrt(2 / math.pi)
# Wide counterparts of the definitions in test_activations, for differences that float64 would drown in rounding.
WIDE: dict[str, Callable[[Any], Any]] = {
    "relu": lambda z: np.where(z > 0, z, 0),
    "leaky_relu": lambda z: np.where(z > 0, z, Wide(0.01) * z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "gelu": lambda z: np.vectorize(DEFINITIONS["gelu"], otypes=[float])(z.astype(float)).astype(Wide),
    "gelu_tanh": lambda z: z * (1 + np.tanh(Wide(K) * (z + Wide(0.044715) * z**3))) / 2,
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "tanh": np.tanh,
}


@dataclass(frozen=True)
class Case:
    """One norm on one shape, and the layout that the oracle's slices need."""

    name: str
    op: Any
    shape: tuple[int, ...]
    params: tuple[int, ...]
    call: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("batch NCL", nbnorm.batch_norm, (3, 4, 5), (4,), {"training": True}),
    Case("batch NLC", nbnorm.batch_norm, (3, 5, 4), (4,), {"training": True, "channel_axis": 2}, {"channel_axis": 2}),
    Case("group", nbnorm.group_norm, (2, 6, 5), (6,), {"num_groups": 2}, {"num_groups": 2}),
    Case(
        "group NLC",
        nbnorm.group_norm,
        (2, 5, 6),
        (6,),
        {"num_groups": 3, "channel_axis": 2},
        {"num_groups": 3, "channel_axis": 2},
    ),
    Case("instance", nbnorm.instance_norm, (3, 2, 7), (2,)),
    Case("layer", nbnorm.layer_norm, (3, 4, 5), (5,), {"axis": 2}, {"axes": (2,)}),
    Case("layer over channels", nbnorm.layer_norm, (3, 4, 5), (4,), {"axis": 1}, {"axes": (1,)}),
    Case("layer over both sides", nbnorm.layer_norm, (3, 4, 5), (3, 5), {"axis": (0, 2)}, {"axes": (0, 2)}),
    Case("rms", nbnorm.rms_norm, (3, 4, 5), (4, 5), {"axis": (1, 2)}, {"axes": (1, 2)}),
]


def halved(first: list[Any], second: Any) -> list[Any]:
    """All pairs, three of four slow: each pair may be a compilation of its own."""
    return [
        pytest.param(a, b, marks=[pytest.mark.slow] if (i + j) % 4 else [], id=f"{getattr(a, 'name', a)}-{b}")
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]


def spread(case: Case, param: Any, x: Any) -> Any:
    """A parameter in the axes of x."""
    axes = case.layout.get("axes", (case.layout.get("channel_axis", 1),))
    shape = [n if axis in axes else 1 for axis, n in enumerate(x.shape)]
    return np.asarray(param).astype(Wide).reshape(shape)


def reference(
    case: Case,
    x: Any,
    weight: Any,
    bias: Any,
    residual: Any = None,
    *,
    mask: Any = None,
    activation: str | None = None,
    order: str = "norm_act",
    fixed: tuple[Any, Any] | None = None,
    eps: float = 1e-2,
) -> Any:
    """y, from the definition."""
    x = np.asarray(x).astype(Wide)
    valid = np.ones(x.shape, bool) if mask is None else np.broadcast_to(mask, x.shape)
    act = WIDE[activation] if activation else lambda z: z
    u = act(np.where(valid, x, 0)) if order == "act_norm" else x
    xhat = np.zeros_like(x)
    for stat, index in slices(x, case.op.__name__, **case.layout):
        counted = u[index][valid[index]]
        if not counted.size:
            continue
        mean = Wide(0) if case.op is nbnorm.rms_norm else counted.sum() / counted.size
        var = ((counted - mean) ** 2).sum() / counted.size
        if fixed is not None:
            mean, var = Wide(fixed[0][stat[-1]]), Wide(fixed[1][stat[-1]])
        xhat[index] = (u[index] - mean) / np.sqrt(var + Wide(eps))
    z = xhat * spread(case, weight, x) + (0 if bias is None else spread(case, bias, x))
    if residual is not None:
        z = z + np.asarray(residual).astype(Wide)
    return np.where(valid, act(z) if order == "norm_act" else z, 0)


def masks(shape: tuple[int, ...]) -> dict[str, Any]:
    """None, one for every element, and some that are constant along axes."""
    dense = RNG.random(shape) < 0.6
    dense[0] = True
    lengths = np.arange(shape[1])[None, :, None] < np.array([shape[1], 2, 0, 0][: shape[0]])[:, None, None]
    return {"no mask": None, "dense": dense, "lengths": lengths, "last axis": np.arange(shape[2]) > 0}


def inputs(case: Case) -> dict[str, Any]:
    weight, bias = RNG.normal(size=(2, *case.params))
    found = {"x": RNG.normal(size=case.shape) * 2, "weight": weight, "residual": RNG.normal(size=case.shape)}
    return found | ({} if case.op is nbnorm.rms_norm else {"bias": bias})


def run(case: Case, arrays: dict[str, Any], backend: str, dy: Any, **options: Any) -> tuple[Any, Any]:
    y, pullback = nbnorm.vjp(case.op, **arrays, eps=1e-2, backend=backend, **case.call, **options)
    return y, pullback(dy)


def spoilt(array: Any, mask: Any) -> Any:
    """NaN and infinities where the mask is False."""
    if mask is None:
        return array
    found = np.where(mask, array, np.nan)
    found.flat[::2] = np.where(np.broadcast_to(mask, array.shape).flat[::2], array.flat[::2], np.inf)
    return found


def check(case: Case, backend: str, mask: Any, activation: str | None, order: str, residual: bool) -> None:
    arrays = inputs(case)
    if not residual:
        del arrays["residual"]
    dy = RNG.normal(size=case.shape)
    given = {name: spoilt(a, mask) if a.shape == case.shape else a for name, a in arrays.items()}
    y, grads = run(case, given, backend, spoilt(dy, mask), mask=mask, activation=activation, order=order)
    positional = (arrays.get(name) for name in ("x", "weight", "bias", "residual"))
    options = {"mask": mask, "activation": activation, "order": order}
    np.testing.assert_allclose(y, reference(case, *positional, **options).astype(float), rtol=1e-12, atol=1e-13)
    valid = np.ones(case.shape, bool) if mask is None else np.broadcast_to(mask, case.shape)
    counted = np.where(valid, dy, 0).astype(Wide)

    def loss(**changed: Any) -> Any:
        positional = ((arrays | changed).get(name) for name in ("x", "weight", "bias", "residual"))
        return (reference(case, *positional, **options) * counted).sum()

    for name, value in arrays.items():
        step = Wide(1e-5)
        numeric = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            high, low = value.astype(Wide), value.astype(Wide)
            high[index] += step
            low[index] -= step
            numeric[index] = (loss(**{name: high}) - loss(**{name: low})) / (2 * step)
        tolerance = 1e-6 if activation == "gelu" else 1e-8  # its definition is in float64
        np.testing.assert_allclose(getattr(grads, name), numeric, rtol=tolerance, atol=tolerance, err_msg=name)
        if value.shape == case.shape:
            assert not getattr(grads, name)[~valid].any()
    assert not y[~valid].any()


@pytest.mark.slow("numba")
@pytest.mark.parametrize(("case", "kind"), halved(CASES, ["dense", "lengths", "last axis"]))
def test_masked_equals_gathered(case: Case, kind: str, backend: str) -> None:
    check(case, backend, masks(case.shape)[kind], None, "norm_act", residual=False)


@pytest.mark.parametrize(("order", "activation"), halved(list(ORDERS), ACTIVATIONS))
@pytest.mark.parametrize(
    "case", [CASES[1], pytest.param(CASES[5], marks=pytest.mark.slow("numba"))], ids=lambda case: case.name
)
def test_activation_and_residual(case: Case, activation: str, order: str, backend: str) -> None:
    check(case, backend, None, activation, order, residual=True)


@pytest.mark.slow("numba")
@pytest.mark.parametrize(("case", "order"), halved(CASES, ORDERS))
def test_everything_at_once(case: Case, order: str, backend: str) -> None:
    check(case, backend, masks(case.shape)["dense"], "silu", order, residual=True)


@pytest.mark.slow("numba")
@pytest.mark.parametrize("axis", [1, 2])
def test_eval_under_a_mask(axis: int, backend: str) -> None:
    x, dy = RNG.normal(size=(2, 3, 4, 4))
    mean, var, weight = RNG.normal(size=4), RNG.uniform(1, 2, size=4), RNG.normal(size=4)
    mask = RNG.random((3, 4, 4)) < 0.5
    keys = {"channel_axis": axis, "mask": mask, "activation": "tanh", "backend": backend}
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, spoilt(x, mask), mean, var, weight, **keys)
    grads = pullback(spoilt(dy, mask))
    shape = [1, 1, 1]
    shape[axis] = 4
    scale = (weight / np.sqrt(var + 1e-5)).reshape(shape)
    z = (x - mean.reshape(shape)) * scale
    np.testing.assert_allclose(y, np.where(mask, np.tanh(z), 0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grads.x, np.where(mask, dy * (1 - np.tanh(z) ** 2) * scale, 0), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("axis", [1, 2])
def test_running_statistics_of_valid_elements(axis: int, backend: str) -> None:
    """One channel full, one with a single element, one with none."""
    x = RNG.normal(size=(3, 3, 3))
    mask = np.zeros((3, 3, 3), bool)
    by_channel = np.moveaxis(mask, axis, 0)
    by_channel[0] = True
    by_channel[1, 0, 1] = True
    mean, var = np.full(3, 0.5), np.full(3, 2.0)
    keys = {"training": True, "channel_axis": axis, "backend": backend}
    y = nbnorm.batch_norm(spoilt(x, mask), mean, var, mask=mask, bias=np.array([0.0, 7.0, 9.0]), **keys)
    channels = np.moveaxis(x, axis, 0)
    np.testing.assert_allclose(mean, [0.45 + 0.1 * channels[0].mean(), 0.45 + 0.1 * channels[1, 0, 1], 0.5])
    np.testing.assert_allclose(var, [1.8 + 0.1 * channels[0].var(ddof=1), 2.0, 2.0])
    assert np.moveaxis(y, axis, 0)[1, 0, 1] == 7.0
    assert not y[~mask].any()


def test_moments_under_a_mask(backend: str) -> None:
    x = RNG.normal(size=(5, 4, 3)) + 1e6
    mask = RNG.random((5, 4, 3)) < 0.5
    mask[:, 1] = False
    for axis in ((0, 2), (0, 1), 1, None):
        found = nbnorm.moments(spoilt(x, mask), axis, mask=mask, backend=backend)
        counted = np.ma.masked_array(x - 1e6, ~mask)
        np.testing.assert_array_equal(found.count, counted.count(axis))
        some = found.count > 0
        np.testing.assert_allclose(found.mean[some] - 1e6, np.ma.getdata(counted.mean(axis))[some], atol=1e-9)
        np.testing.assert_allclose(found.var()[some], np.ma.getdata(counted.var(axis))[some], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation must be one of relu, .*; got 'swish'"),
        ({"order": "act"}, ValueError, "order must be one of norm_act, act_norm; got 'act'"),
        ({"mask": np.ones((3, 4), bool)}, ValueError, r"mask must broadcast to x \(2, 3, 5\); got shape \(3, 4\)"),
        ({"mask": np.ones((1, 2, 3, 5), bool)}, ValueError, r"mask must broadcast to x \(2, 3, 5\)"),
        ({"mask": np.ones((2, 3, 5))}, TypeError, "mask must be of dtype bool"),
        ({"residual": np.ones((3, 5))}, ValueError, r"residual must have x's shape \(2, 3, 5\).*got \(3, 5\)"),
        ({"residual": np.ones((2, 3, 5), "f4")}, ValueError, "residual must have x's shape.*float64; got.*float32"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    x = np.ones((2, 3, 5))
    mean, var = np.zeros(3), np.ones(3)
    with pytest.raises(error, match=message):
        nbnorm.batch_norm(x, mean, var, training=True, **options)
    with pytest.raises(error, match=message):
        nbnorm.rms_norm(x, 5, **options)
    assert not mean.any()


def test_weight_offset(backend: str) -> None:
    x, weight, dy = RNG.normal(size=(4, 6)), RNG.normal(size=6), RNG.normal(size=(4, 6))
    y, pullback = nbnorm.vjp(nbnorm.rms_norm, x, 6, weight, weight_offset=1.0, backend=backend)
    expected, expected_pullback = nbnorm.vjp(nbnorm.rms_norm, x, 6, weight + 1.0, backend=backend)
    np.testing.assert_allclose(y, expected, rtol=1e-14)
    grads, expected_grads = pullback(dy), expected_pullback(dy)
    np.testing.assert_allclose(grads.x, expected_grads.x, rtol=1e-13)
    np.testing.assert_allclose(grads.weight, expected_grads.weight, rtol=1e-13)
    with pytest.raises(ValueError, match="weight_offset is added to weight, which must be given"):
        nbnorm.rms_norm(x, 6, weight_offset=1.0)
