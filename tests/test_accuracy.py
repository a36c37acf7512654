"""What the numbers are good for: far offsets, extremes, constants, outliers, values that are not finite."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import bounds
import nbnorm
from cases import Norm, dtype_of
from oracle import norm, slices

TRAINING = {"training": True}
EVERY_NORM = pytest.mark.parametrize("case", bounds.ALL, ids=lambda case: case.name)


# ---- what docs/numerics.md allows ------------------------------------------------------------------------------------


def cases_and_dtypes() -> list[Any]:
    """Every case in every dtype; most are slow, as each compiles anew."""

    def marks(case: Norm, dtype: str) -> list[pytest.MarkDecorator]:
        if dtype in ("float16", "bfloat16"):
            return [pytest.mark.slow]
        plain = dtype == "float32" and case.name in ("layer", "batch NCHW")
        return [] if plain else [pytest.mark.slow("numba")]

    return [
        pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=marks(case, dtype))
        for case in bounds.ALL
        for dtype in bounds.SPREADS
    ]


@pytest.mark.parametrize(("case", "dtype"), cases_and_dtypes())
def test_errors_at_every_offset(case: Norm, dtype: str, backend: str) -> None:
    """Result and gradients, from data around 0 to data whose mean is a million times their spread."""
    for mean, std in bounds.SPREADS[dtype]:
        example = bounds.example(case, bounds.normal(case, dtype, mean, std))
        assert max(example.errors(backend)) <= 1, (mean, std)


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_statistics(dtype: str, layout: str, backend: str) -> None:
    """What a norm normalizes with, as it reaches running statistics."""
    for (mean, std), size in itertools.product(bounds.SPREADS[dtype], (128, 1000, 10_007)):
        values = (np.random.default_rng(size).normal(size=(20, size)) * std + mean).astype(dtype_of(dtype))
        found_mean, found_var = running_statistics(values, layout, backend)
        wide = values.astype(np.longdouble)
        exact_mean, exact_var = wide.mean(axis=1), wide.var(axis=1, ddof=1)
        assert (np.abs(found_var - exact_var) <= bounds.VARIANCE * exact_var).all(), (mean, std, size)
        assert (np.abs(found_mean - exact_mean) <= bounds.VARIANCE * np.sqrt(exact_var) + 2.0**-52 * mean).all()


def running_statistics(values: Any, layout: str, backend: str) -> tuple[Any, Any]:
    """Mean and unbiased variance of rows, which are channels, first or last."""
    mean, var = np.zeros(len(values)), np.zeros(len(values))
    x = values[None] if layout == "rows" else np.ascontiguousarray(values.T)
    nbnorm.batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-30, backend=backend)
    return mean, var


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("levels", [None, 2, 4])
def test_long_sums_of_float64(levels: int | None, layout: str, backend: str) -> None:
    """Rounding errors of many different values cancel; those of a few do not."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 50_000))
    if levels:
        x = np.take_along_axis(x[:, :levels], rng.integers(0, levels, size=x.shape), 1)
    exact = norm("layer_norm", x, axes=(1,))
    if layout == "rows":
        y = nbnorm.layer_norm(x, 50_000, backend=backend)
    else:
        y = nbnorm.batch_norm(np.ascontiguousarray(x.T), training=True, backend=backend).T
    assert bounds.forward(y, exact) <= 1


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6, 1e8])
def test_float64_against_fractions(offset: float, layout: str, backend: str) -> None:
    """Samples, without the oracle: its extended precision has 11 bits more than float64, and on some systems none."""
    rng = np.random.default_rng(0)
    values, dy = rng.normal(size=(2, 6, 301))
    values += offset
    turn = np.transpose if layout == "columns" else np.asarray
    op, call = (nbnorm.layer_norm, {"normalized_shape": 301}) if layout == "rows" else (nbnorm.batch_norm, TRAINING)
    y, pullback = nbnorm.vjp(op, np.ascontiguousarray(turn(values)), eps=2.0**-20, backend=backend, **call)
    dx = turn(pullback(np.ascontiguousarray(turn(dy))).x)
    for row in range(6):
        exact = exact_row(values[row], dy[row], Fraction(2) ** -20)
        for found, parts in ((turn(y)[row], exact["y"]), (dx[row], exact["dx"])):
            for value, (expected, far) in zip(found.tolist(), parts, strict=True):
                assert abs(Fraction(value) - expected) <= Fraction(bounds.DOUBLE) * far


def exact_row(x: Any, dy: Any, eps: Fraction) -> dict[str, list[tuple[Fraction, Fraction]]]:
    """Of a row without weight and bias y and dx, each with the size that float64's error is in proportion to."""
    values, g = ([Fraction(value) for value in row.tolist()] for row in (x, dy))
    n = len(values)
    mean = sum(values) / n
    rstd = 1 / square_root(sum((v - mean) ** 2 for v in values) / n + eps)
    xhat = [(v - mean) * rstd for v in values]
    far = [1 + abs(h) + abs(mean) * rstd for h in xhat]
    k1, k2 = sum(g) / n, sum(t * h for t, h in zip(g, xhat, strict=True)) / n
    k1_size, k2_size = sum(map(abs, g)) / n, sum(abs(t) * f for t, f in zip(g, far, strict=True)) / n
    dx = [(t - k1 - h * k2) * rstd for t, h in zip(g, xhat, strict=True)]
    dx_size = [(abs(t) + k1_size + f * k2_size) * rstd for t, f in zip(g, far, strict=True)]
    return {"y": list(zip(xhat, far, strict=True)), "dx": list(zip(dx, dx_size, strict=True))}


def square_root(value: Fraction) -> Fraction:
    """To 50 digits."""
    scale = 10**100
    return Fraction(math.isqrt(int(value * scale)), 10**50)


# ---- extremes --------------------------------------------------------------------------------------------------------


@EVERY_NORM
@pytest.mark.parametrize(
    ("dtype", "scale", "eps", "gain"),
    [
        ("float32", 3e38, 1e-30, 1e10),
        ("float32", 1e-38, 1e-100, 1e-10),
        ("float32", 1e-44, 1e-100, 1e-10),
        pytest.param("bfloat16", 3e38, 1e-30, 1e10, marks=pytest.mark.slow),
        pytest.param("bfloat16", 1e-38, 1e-100, 1e-10, marks=pytest.mark.slow),
        pytest.param("float16", 65504.0, 1e-5, 1e2, marks=pytest.mark.slow),
    ],
)
def test_ends_of_the_range(case: Norm, dtype: str, scale: float, eps: float, gain: float, backend: str) -> None:
    """Squares leave the range of float32. Gradients, in proportion to gain / scale, are compared with the largest."""
    x = (np.random.default_rng(0).uniform(-1, 1, size=case.shape) * scale).astype(dtype_of(dtype))
    example = bounds.example(case, x, eps=eps, gain=gain)
    y, grads = example.run(backend)
    assert bounds.forward(y, example.exact) <= 1
    unit = {"float32": 1e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for found, exact in ((grads.x, example.exact.dx), (grads.weight, example.exact.dweight)):
        error = np.abs(found.astype(np.longdouble) - exact.reshape(found.shape))
        assert error.max() <= unit * np.abs(exact).max()


@EVERY_NORM
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow("numba"))])
def test_equal_values(case: Norm, dtype: str, backend: str) -> None:
    """The result is exactly the bias; for RMS norm, which does not centre, the weight, nearly."""
    example = bounds.example(case, np.full(case.shape, 0.1, dtype))
    y, grads = example.run(backend)
    if "bias" in example.params:
        np.testing.assert_array_equal(y, example.exact.y.astype(dtype))
    assert bounds.forward(y, example.exact) <= 1
    assert bounds.backward(grads, example.exact) <= 1


@pytest.mark.parametrize("axis", [1, -1])
def test_running_statistics_of_equal_values(axis: int, backend: str) -> None:
    mean, var = np.zeros(7), np.ones(7)
    x = np.full((6, 7, 7, 7), 0.1, "f4")
    nbnorm.batch_norm(x, mean, var, training=True, momentum=1.0, channel_axis=axis, backend=backend)
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(mean, np.float32(0.1).astype("f8"))


@EVERY_NORM
def test_outlier_first(case: Norm, backend: str) -> None:
    """The first elements of a group are the pivot of its sums; a bad one must not cost accuracy."""
    x = bounds.normal(case, "float32", 0.0, 1.0)
    for _, group in slices(x, case.op.__name__, **case.oracle):
        set_element(x[group], 0, 1e6)
    assert max(bounds.example(case, x).errors(backend)) <= 1


def set_element(view: Any, number: int, value: float) -> None:
    view[np.unravel_index(number, view.shape)] = value


@EVERY_NORM
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_stays_in_its_group(case: Norm, bad: float, backend: str) -> None:
    """Of other groups no bit changes, in the result and in the gradient of x."""
    clean = bounds.example(case, bounds.normal(case, "float32", 0.0, 1.0))
    x, others = clean.x.copy(), np.ones(case.shape, bool)
    groups = [group for _, group in slices(x, case.op.__name__, **case.oracle)]
    spoilt = groups[len(groups) // 2]
    set_element(x[spoilt], x[spoilt].size // 3, bad)
    others[spoilt] = False
    y, grads = clean.run(backend)
    found, found_grads = clean._replace(x=x).run(backend)
    np.testing.assert_array_equal(found[others], y[others])
    np.testing.assert_array_equal(found_grads.x[others], grads.x[others])
    assert not np.isfinite(found[x == bad if np.isinf(bad) else np.isnan(x)]).any()


def test_no_warnings_about_numbers(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    """NaN, Inf, overflow and a root of nothing are answers here, not accidents."""
    x = np.array([[np.nan, 1, 2, 3], [np.inf, 1, 2, 3], [3e38, -3e38, 3e38, 0], [0, 0, 0, 0]], "f4")
    for array in (x, np.ascontiguousarray(x.T), x[None].repeat(3, 0)):
        for op, call in (
            (nbnorm.layer_norm, {"normalized_shape": array.shape[-1], "eps": 0.0}),
            (nbnorm.rms_norm, {"normalized_shape": array.shape[-1], "eps": 0.0}),
            (nbnorm.batch_norm, {"training": True}),
        ):
            y, pullback = nbnorm.vjp(op, array, backend=backend, **call)
            pullback(y)
    assert [str(w.message) for w in recwarn.list] == []


def test_running_statistics_overflow_in_silence(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    x = (np.random.default_rng(0).normal(size=(8, 3)) * 20000).astype("f2")
    mean, var = np.zeros(3, "f2"), np.ones(3, "f2")
    nbnorm.batch_norm(x, mean, var, training=True, backend=backend)
    assert np.isfinite(mean).all()
    assert np.isinf(var).all()
    assert [str(w.message) for w in recwarn.list] == []
