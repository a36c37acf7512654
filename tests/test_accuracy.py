"""What the numbers are good for: far offsets, extremes, constants, outliers, values that are not finite."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm


def float64_result(op: str, x: Any, **oracle: Any) -> Any:
    return norm(op, x.astype("f8"), **oracle).y.astype("f8")


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize(
    ("op", "shape", "call", "oracle"),
    [
        (nbnorm.layer_norm, (64, 768), {"normalized_shape": 768}, {"axes": (1,)}),
        (nbnorm.batch_norm, (8, 16, 14, 14), {"training": True}, {}),
        (nbnorm.batch_norm, (8, 14, 14, 16), {"training": True, "channel_axis": -1}, {"channel_axis": -1}),
        (nbnorm.batch_norm, (256, 64), {"training": True}, {}),
        (nbnorm.group_norm, (8, 16, 14, 14), {"num_groups": 4}, {"num_groups": 4}),
        (nbnorm.instance_norm, (8, 16, 14, 14), {}, {}),
    ],
    ids=["layer", "batch NCHW", "batch NHWC", "batch 2-D", "group", "instance"],
)
def test_float32_at_far_offsets(op: Any, shape: Any, call: Any, oracle: Any, offset: float, backend: str) -> None:
    """Mean 1e6 and standard deviation 1 in float32: within 1e-5 of the float64 result on the same input."""
    x = (np.random.default_rng(0).normal(size=shape) + offset).astype("f4")
    y = op(x, backend=backend, **call)
    assert np.abs(y - float64_result(op.__name__, x, **oracle)).max() < 1e-5 / 4


def test_float32_at_1e8(backend: str) -> None:
    x = (np.random.default_rng(0).normal(size=(32, 4096)) * 100 + 1e8).astype("f4")
    y = nbnorm.layer_norm(x, 4096, backend=backend)
    assert np.abs(y - float64_result("layer_norm", x, axes=(1,))).max() < 1e-6


@pytest.mark.parametrize("scale", [3e38, 1e-38, 1e-44])
def test_extremes_of_float32(scale: float, backend: str) -> None:
    x = (np.random.default_rng(0).uniform(-1, 1, size=(4, 64, 5)) * scale).astype("f4")
    for op, call, oracle in (
        (nbnorm.layer_norm, {"normalized_shape": 5}, {"axes": (2,)}),
        (nbnorm.rms_norm, {"normalized_shape": 5}, {"axes": (2,)}),
        (nbnorm.batch_norm, {"training": True}, {}),
        (nbnorm.group_norm, {"num_groups": 8}, {"num_groups": 8}),
    ):
        eps = 1e-30 if scale > 1 else 1e-100
        y = op(x, eps=eps, backend=backend, **call)
        expected = norm(op.__name__, x, eps=eps, **oracle).y
        np.testing.assert_allclose(y.astype("f8"), expected.astype("f8"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [1, -1])
def test_constant_channels_give_exactly_bias(axis: int, backend: str) -> None:
    x = np.full((6, 7, 7, 7), 0.1, "f4")
    weight, bias = np.random.default_rng(0).normal(size=(2, 7)).astype("f4")
    mean, var = np.zeros(7, "f8"), np.ones(7, "f8")
    y = nbnorm.batch_norm(x, mean, var, weight, bias, True, 1.0, channel_axis=axis, backend=backend)
    np.testing.assert_array_equal(np.moveaxis(y, axis, 1), np.broadcast_to(bias[:, None, None], x.shape))
    np.testing.assert_array_equal(var, 0)
    np.testing.assert_array_equal(mean, np.float32(0.1).astype("f8"))


def test_outlier_first(backend: str) -> None:
    """The first element is the pivot of the sums; a bad one must not cost accuracy."""
    x = np.random.default_rng(0).normal(size=(8, 1024)).astype("f4")
    x[:, 0] = 1e6
    for op, array in ((nbnorm.layer_norm, x), (nbnorm.batch_norm, np.ascontiguousarray(x.T))):
        call = {"normalized_shape": 1024} if op is nbnorm.layer_norm else {"training": True}
        oracle = {"axes": (1,)} if op is nbnorm.layer_norm else {}
        expected = float64_result(op.__name__, array, **oracle)
        np.testing.assert_allclose(op(array, backend=backend, **call), expected, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_stays_in_its_group(bad: float, backend: str) -> None:
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, 4, 6, 5, 5)).astype("f4")
    for op, call, group in (
        (nbnorm.batch_norm, {"training": True}, (slice(None), 2)),
        (nbnorm.group_norm, {"num_groups": 3}, (1, slice(2, 4))),
        (nbnorm.instance_norm, {}, (1, 2)),
        (nbnorm.layer_norm, {"normalized_shape": 5}, (1, 2, 3)),
    ):
        spoilt = x.copy()
        spoilt[1, 2, 3, 4] = bad
        others = np.ones(x.shape, bool)
        others[group] = False
        clean, clean_pullback = nbnorm.vjp(op, x, backend=backend, **call)
        y, pullback = nbnorm.vjp(op, spoilt, backend=backend, **call)
        np.testing.assert_array_equal(y[others], clean[others])
        np.testing.assert_array_equal(pullback(dy).x[others], clean_pullback(dy).x[others])
        assert not np.isfinite(y[1, 2, 3, 4])


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


def test_error_of_float64(backend: str) -> None:
    """|y - exact| <= 4 * 2^-52 * (1 + |xhat| + |mean| * rstd), against the oracle in extended precision."""
    for offset in (0.0, 1e3, 1e8):
        x = np.random.default_rng(0).normal(size=(16, 300)) + offset
        expected = norm("layer_norm", x, axes=(1,))
        y = nbnorm.layer_norm(x, 300, backend=backend)
        rows = range(16)
        mean = np.array([expected.mean[(i,)] for i in rows])[:, None]
        rstd = 1 / np.sqrt(np.array([expected.var[(i,)] for i in rows]) + 1e-5)[:, None]
        bound = 4 * 2.0**-52 * (1 + np.abs(expected.y) + np.abs(mean) * rstd)
        assert (np.abs(y - expected.y) <= bound).all()


def test_running_statistics_overflow_in_silence(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    x = (np.random.default_rng(0).normal(size=(8, 3)) * 20000).astype("f2")
    mean, var = np.zeros(3, "f2"), np.ones(3, "f2")
    nbnorm.batch_norm(x, mean, var, training=True, backend=backend)
    assert np.isfinite(mean).all()
    assert np.isinf(var).all()
    assert [str(w.message) for w in recwarn.list] == []
