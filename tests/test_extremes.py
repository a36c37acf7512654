"""Values at the ends of what float32 holds, in evaluation, forward and backward: where coefficients overflow first."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from oracle import norm

LAYOUTS = ("runs", "columns")


def laid(values: Any, layout: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Groups (groups, elements) as an array to call: rows for layer norm, or columns for batch norm."""
    if layout == "runs":
        return values, nbnorm.layer_norm, {"normalized_shape": values.shape[1]}, {"axes": (1,)}
    return np.ascontiguousarray(values.T), nbnorm.batch_norm, {"training": True}, {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("elements", [4, 256])
@pytest.mark.parametrize(
    ("scale", "eps", "size"),
    [
        (1e-21, 1e-45, 1.0),
        (1e-6, 1e-14, 1e30),
        (3e-3, 1e-5, 3e34),
        (1e-30, 1e-70, 1e-20),
        (1e22, 1e-5, 1.0),
        (1e30, 1e-5, 1e31),
        (1e37, 1e-5, 3e37),
        (1e-29, 1e-70, 1e-20),
    ],
)
def test_gradients_of_extreme_data(
    scale: float, eps: float, size: float, elements: int, layout: str, backend: str
) -> None:
    """Relative to the largest gradient: rstd**2 and its products with dy would leave float32's range."""
    rng = np.random.default_rng(0)
    values, dy = (rng.normal(size=(2, 3, elements)) * np.array([scale, size])[:, None, None]).astype("f4")
    x, op, call, oracle = laid(values, layout)
    cotangent = laid(dy, layout)[0]
    _, pullback = nbnorm.vjp(op, x, eps=eps, backend=backend, **call)
    expected = norm(op.__name__, x, eps=eps, dy=cotangent, **oracle).dx
    error = np.abs(pullback(cotangent).x - expected).max() / np.abs(expected).max()
    assert error < 1e-6


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [1e25, 3e38, float(np.finfo("f4").max), -3.402e38, -1e20, 1e-40, 1e-45])
@pytest.mark.parametrize(("eps", "gain"), [(1e-70, 1.0), (1e-5, 1e29)])
def test_equal_values_give_the_bias(value: float, eps: float, gain: float, layout: str, backend: str) -> None:
    x, op, call, _ = laid(np.full((3, 16), value, "f4"), layout)
    size = 16 if layout == "runs" else 3
    weight, bias = np.full(size, gain, "f4"), np.full(size, 0.5, "f4")
    np.testing.assert_array_equal(op(x, weight=weight, bias=bias, eps=eps, backend=backend, **call), 0.5)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2)])
@pytest.mark.parametrize("mean", [0.0, 0.3])
def test_a_variance_of_zero_in_evaluation(mean: float, shape: tuple[int, ...], backend: str) -> None:
    x = np.array([-1, 2], "f4").reshape(shape)
    y = nbnorm.batch_norm(x, np.full(1, mean), np.zeros(1), eps=0.0, backend=backend)
    assert y.ravel().tolist() == [-np.inf, np.inf]


@pytest.mark.parametrize("shape", [(2, 1), (1, 1, 2)])
def test_statistics_beyond_the_type_of_x(shape: tuple[int, ...], backend: str) -> None:
    x = np.ones(shape, "f4")
    y = nbnorm.batch_norm(x, np.array([1e150]), np.array([1e300]), eps=0.0, backend=backend)
    np.testing.assert_array_equal(y, -1)


def test_large_equal_values_of_float64(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    x = np.full((16, 3), 3e307)
    assert not nbnorm.layer_norm(x, 3, backend=backend).any()
    assert not nbnorm.batch_norm(x, training=True, backend=backend).any()
    assert (nbnorm.moments(x, 0, backend=backend).mean == 3e307).all()
    assert [str(w.message) for w in recwarn.list] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_variance_of_a_few_values(layout: str, backend: str) -> None:
    """Rounding errors of equal values do not cancel; a border of zeros is the worst place for a pivot."""
    rng, worst = np.random.default_rng(0), 0.0
    for _ in range(40):
        elements, levels = int(rng.integers(128, 5000)), int(rng.integers(2, 5))
        choice = rng.choice(levels, size=(20, elements), p=rng.dirichlet(np.ones(levels) / 2))
        values = np.take_along_axis(rng.normal(size=(20, levels)).astype("f4"), np.sort(choice, axis=1), 1)
        x = np.ascontiguousarray(values.T) if layout == "columns" else values[None]
        mean, var = np.zeros(20), np.zeros(20)
        nbnorm.batch_norm(x, mean, var, training=True, momentum=1.0, eps=1e-30, backend=backend)
        exact = values.astype(np.longdouble).var(axis=1, ddof=1)
        some = exact > 0
        worst = max(worst, float(np.abs(var[some] / exact[some] - 1).max(initial=0)))
    assert worst <= 1e-12


@pytest.mark.slow("numba")
def test_no_warning_where_gradients_overflow(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    x = np.ones((100, 4), "f2") * np.arange(4, dtype="f2")
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 4, np.ones(4, "f2"), np.zeros(4, "f2"), backend=backend)
    assert np.isinf(pullback(np.full((100, 4), 1000, "f2")).bias).all()
    assert [str(w.message) for w in recwarn.list] == []


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of NumPy, for the signalling ones
@pytest.mark.parametrize("word", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_of_any_bits_reaches_bfloat16(layout: str, word: int, backend: str) -> None:
    """0x7fffffff is what a GPU makes, 0xffffffff memory that was filled: rounded as numbers are, both would be 0."""
    x = np.random.default_rng(0).normal(size=(4, 6, 2, 8)).astype(ml_dtypes.bfloat16)
    axis = 1 if layout == "runs" else -1
    ones, nan = np.ones(x.shape[axis], "f4"), np.ones(x.shape[axis], "f4")
    nan.view("u4")[3] = word
    spoilt = np.arange(x.shape[axis]) == 3
    for name in ("weight", "bias", "running_mean", "running_var"):
        keys = {"running_mean": ones, "running_var": ones, "weight": ones, "bias": ones, name: nan}
        y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, **keys, channel_axis=axis, backend=backend)
        for found in (y, pullback(x).x) if name in ("weight", "running_var") else (y,):
            isnan = np.isnan(np.moveaxis(found, axis, -1).astype("f4"))
            assert (isnan == spoilt).all(), name
