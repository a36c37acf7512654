"""Activations after a norm, against the standard library's own functions and finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.special import expit, ndtr

import nbnorm
from nbnorm.backend import ACTIVATIONS
from oracle import norm

DEFINITIONS = {
    "relu": lambda z: max(z, 0.0),
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "silu": lambda z: z / (1 + math.exp(-z)),
    "gelu": lambda z: z * 0.5 * math.erfc(-z / math.sqrt(2)),
    "gelu_tanh": lambda z: z / (1 + math.exp(-2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),  # 1 + tanh cancels
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "tanh": math.tanh,
}
RNG = np.random.default_rng(0)
X, DY = RNG.normal(size=(2, 3, 4, 5)) * 3
WEIGHT, BIAS = RNG.normal(size=(2, 4))
OPS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "batch": (nbnorm.batch_norm, {"training": True}, {}),
    "group": (nbnorm.group_norm, {"num_groups": 2}, {"num_groups": 2}),
    "instance": (nbnorm.instance_norm, {}, {}),
}


def test_every_activation_is_tested() -> None:
    assert set(DEFINITIONS) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("op", OPS)
def test_forward(op: str, activation: str, backend: str) -> None:
    call, keys, oracle = OPS[op]
    y = call(X, weight=WEIGHT, bias=BIAS, activation=activation, backend=backend, **keys)
    expected = np.vectorize(DEFINITIONS[activation])(norm(call.__name__, X, WEIGHT, BIAS, **oracle).y.astype(float))
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.slow("numba")
@pytest.mark.parametrize("training", [True, False])
def test_gradients(activation: str, training: bool, backend: str) -> None:
    fixed = () if training else (np.full(4, 0.3), np.full(4, 2.0))
    inputs = {"x": X, "weight": WEIGHT, "bias": BIAS}
    keys = dict(zip(("running_mean", "running_var"), fixed, strict=False)) | {"training": training, "backend": backend}

    def loss(**changed: Any) -> float:
        return float((nbnorm.batch_norm(**(inputs | changed), **keys, activation=activation) * DY).sum())

    arguments = {name: value for name, value in inputs.items() if name != "x"}
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, X, **arguments, **keys, activation=activation)
    grads = pullback(DY)
    for name, value in inputs.items():
        for index in np.ndindex(value.shape):
            high, low = value.copy(), value.copy()
            high[index] += 1e-6
            low[index] -= 1e-6
            numeric = (loss(**{name: high}) - loss(**{name: low})) / 2e-6
            assert getattr(grads, name)[index] == pytest.approx(numeric, rel=1e-5, abs=1e-6), (name, index)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow("numba"))])
@pytest.mark.parametrize("axis", [0, pytest.param(1, marks=pytest.mark.slow("numba"))])
def test_relative_accuracy_far_out(axis: int, dtype: str, activation: str, backend: str) -> None:
    """Evaluation with mean 0 and variance 1, so that z is x: in the tails too, every digit counts."""
    x = np.concatenate([np.linspace(-13, 13, 5000), np.geomspace(1e-30, 1, 100)]).astype(dtype).reshape(2, -1)
    mean, var = np.zeros((2, x.shape[axis]), dtype)
    var += 1
    y = nbnorm.batch_norm(x, mean, var, eps=0.0, channel_axis=axis, activation=activation, backend=backend)
    exact = np.vectorize(DEFINITIONS[activation])(x.astype(float))
    precision = {"float32": 6e-7, "float64": 5e-14}[dtype]
    if activation == "gelu_tanh":  # its exponent reaches 180, and so many times its rounding error
        precision *= 30
    np.testing.assert_allclose(y, exact, rtol=precision, atol=1e-37)


# What the Numba backend computes in float32, and its slope, in float64: (value, slope, sum of the slope's terms).
SLOPE_OF_INNER = 2 * math.sqrt(2 / math.pi)


def product(z: Any, s: Any, slope: Any) -> tuple[Any, Any, Any]:
    """Of z * s(z)."""
    term = np.where(slope == 0, 0, z * slope)
    return z * s, s + term, s + np.abs(term)


def wide(activation: str, z: Any) -> tuple[Any, Any, Any]:
    if activation == "gelu":
        return product(z, ndtr(z), np.exp(-z * z / 2) / math.sqrt(2 * math.pi))
    if activation == "gelu_tanh":
        u, rate = SLOPE_OF_INNER * (z + 0.044715 * z**3), SLOPE_OF_INNER * (1 + 3 * 0.044715 * z * z)
        return product(z, expit(u), rate * expit(u) * expit(-u))
    inner = expit(z) * expit(-z)
    if activation == "silu":
        return product(z, expit(z), inner)
    if activation == "sigmoid":
        return expit(z), inner, inner
    slope = 4 * expit(2 * z) * expit(-2 * z)
    return np.tanh(z), slope, slope


# In units of 2^-24 of the value, and of the terms of the slope. The exponent of gelu_tanh reaches 88, as its rounding
# errors do.
UNITS = {"silu": (4, 7), "gelu": (8, 10), "gelu_tanh": (250, 250), "sigmoid": (4, 7), "tanh": (4, 7)}


@pytest.mark.parametrize("activation", UNITS)
def test_units_in_float32(activation: str, backend: str) -> None:
    """A million of the finite float32, of each exponent and sign, and more where functions bend."""
    if backend != "numba":
        pytest.skip("others compute in float64")
    numba = pytest.importorskip("numba")
    from nbnorm_backends.numba_cpu.activations import TAGS, activate, slope

    @numba.njit(fastmath={"contract"})
    def both(tag: Any, x: Any, y: Any, d: Any) -> None:
        for i in range(x.size):
            y[i] = activate(tag, x, x[i])
            d[i] = slope(tag, x, x[i])

    x = np.arange(0, 2**32, 4001, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x[np.isfinite(x)], np.linspace(-100, 100, 500_001, dtype=np.float32)])
    found = np.empty((2, x.size), np.float32)
    both(TAGS[activation], x, *found)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        value, rate, terms = wide(activation, x.astype(float))
    floor = 2.0**-118  # exponentials below float32's normal numbers count as 0
    for got, exact, size, units in zip(found, (value, rate), (np.abs(value), terms), UNITS[activation], strict=True):
        assert (np.abs(got - exact) <= units * 2.0**-24 * size + floor).all()
    special = np.array([np.nan, np.inf, 0.0, 1e-45, -1e-39], np.float32)
    found = np.empty((2, special.size), np.float32)
    both(TAGS[activation], special, *found)
    at_zero = {"sigmoid": (0.5, 0.25), "tanh": (0.0, 1.0)}.get(activation, (0.0, 0.5))
    assert np.isnan(found[:, 0]).all()
    assert found[0, 1] == (1.0 if activation in ("sigmoid", "tanh") else np.inf)
    np.testing.assert_allclose(found[:, 2:], np.broadcast_to(np.array(at_zero)[:, None], (2, 3)), atol=2e-39)
    if activation == "gelu":
        distant = np.array([-np.inf, -1e30, -100, -13.5], np.float32)
        found = np.ones((2, distant.size), np.float32)
        both(TAGS[activation], distant, *found)
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("last", [True, False])
def test_long_rows_have_the_bits_of_short_ones(last: bool, dtype: str, backend: str) -> None:
    """Loops of known length, and what is left behind them: the same arithmetic."""
    x = RNG.normal(size=(6, 1000)).astype(dtype)

    def call(part: Any) -> Any:
        channels = part.shape[1] if last else 6
        keys = {"running_mean": np.zeros(channels, "f4"), "running_var": np.ones(channels, "f4"), "activation": "gelu"}
        return nbnorm.batch_norm(part if last else part[None], **keys, backend=backend).reshape(part.shape)

    parts = [call(np.ascontiguousarray(x[:, begin : begin + 50])) for begin in range(0, 1000, 50)]
    np.testing.assert_array_equal(call(x), np.concatenate(parts, axis=1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_out_and_layer_norms(dtype: str, backend: str) -> None:
    x = X.astype(dtype)
    out = np.empty_like(x)
    y = nbnorm.layer_norm(x, 5, activation="gelu", out=out, backend=backend)
    assert y is out
    z = norm("layer_norm", x, axes=(2,)).y.astype(float)
    bound = 1e-6 if dtype == "float32" else 4e-3
    np.testing.assert_allclose(y.astype(float), np.vectorize(DEFINITIONS["gelu"])(z), atol=bound)
    y = nbnorm.rms_norm(x, 5, activation="silu", backend=backend)
    z = norm("rms_norm", x, eps=float(np.finfo("f4").eps), axes=(2,)).y.astype(float)
    np.testing.assert_allclose(y.astype(float), np.vectorize(DEFINITIONS["silu"])(z), atol=bound)


@pytest.mark.parametrize(
    "activation",
    [pytest.param(name, marks=[pytest.mark.slow("numba")] * (name not in ("relu", "gelu"))) for name in ACTIVATIONS],
)
def test_halves_are_rounded_once(activation: str, backend: str) -> None:
    """What stands between norm and activation is not rounded to half: the error is that of one rounding, and a few in
    float32, each 1/8192 of a unit."""
    x = (RNG.normal(size=(64, 33)) * 2).astype("f2")
    y = nbnorm.layer_norm(x, 33, activation=activation, backend=backend)
    z = norm("layer_norm", x, axes=(1,)).y.astype(float)
    exact = np.vectorize(DEFINITIONS[activation])(z)
    assert (np.abs(y.astype(float) - exact) <= 0.501 * np.spacing(np.abs(exact).astype("f2")).astype(float)).all()


def test_in_place(backend: str) -> None:
    x = X.copy()
    expected = nbnorm.layer_norm(X, 5, activation="tanh", backend=backend)
    assert nbnorm.layer_norm(x, 5, activation="tanh", out=x, backend=backend) is x
    np.testing.assert_array_equal(x, expected)


def test_unknown_activation_names_those_that_exist() -> None:
    for call in (
        lambda name: nbnorm.layer_norm(X, 5, activation=name),
        lambda name: nbnorm.rms_norm(X, 5, activation=name),
        lambda name: nbnorm.group_norm(X, 2, activation=name),
        lambda name: nbnorm.batch_norm(X, training=True, activation=name),
        lambda name: nbnorm.instance_norm(X, activation=name),
    ):
        with pytest.raises(ValueError, match=r"activation must be one of relu, leaky_relu, silu.*; got 'swish'"):
            call("swish")
