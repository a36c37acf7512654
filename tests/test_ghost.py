"""Ghost batches: each is a batch norm of its own, and the running statistics are those of the whole batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm
from test_options import WIDE

RNG = np.random.default_rng(3)


def stretches(samples: int, size: int) -> list[slice]:
    return [slice(begin, begin + size) for begin in range(0, samples, size)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("axis", [1, pytest.param(2, marks=pytest.mark.slow("numba"))])
def test_each_is_a_batch_norm(size: int, axis: int, backend: str) -> None:
    x, dy = RNG.normal(size=(2, 7, 3, 4)) + 5
    channels = x.shape[axis]
    weight, bias = RNG.normal(size=(2, channels))
    mean, var = np.zeros(channels), np.ones(channels)
    keys = {"training": True, "channel_axis": axis, "ghost_batch_size": size, "eps": 1e-3, "backend": backend}
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, mean, var, weight, bias, **keys)
    grads = pullback(dy)
    parts = [
        norm("batch_norm", x[rows], weight, bias, 1e-3, dy[rows], channel_axis=axis) for rows in stretches(7, size)
    ]
    close = {"rtol": 1e-11, "atol": 1e-12}
    np.testing.assert_allclose(y, np.concatenate([part.y for part in parts]).astype(float), **close)
    np.testing.assert_allclose(grads.x, np.concatenate([part.dx for part in parts]).astype(float), **close)
    np.testing.assert_allclose(grads.weight, sum(part.dweight for part in parts).astype(float), **close)
    np.testing.assert_allclose(grads.bias, sum(part.dbias for part in parts).astype(float), **close)
    others = (0, 3 - axis)
    np.testing.assert_allclose(mean, 0.1 * x.mean(axis=others), rtol=1e-13)
    np.testing.assert_allclose(var, 0.9 + 0.1 * x.var(axis=others, ddof=1), rtol=1e-13)


@pytest.mark.slow("numba")
@pytest.mark.parametrize("order", ["norm_act", "act_norm"])
def test_with_every_option(order: str, backend: str) -> None:
    x, dy, residual = RNG.normal(size=(3, 5, 2, 6))
    mask = RNG.random((5, 2, 6)) < 0.6
    mask[2:4] = False  # a ghost batch without a valid element
    keys: dict[str, Any] = {"training": True, "activation": "silu", "order": order, "backend": backend}
    spoilt = np.where(mask, x, np.nan)
    found, pullback = nbnorm.vjp(
        nbnorm.batch_norm, spoilt, mask=mask, residual=residual, ghost_batch_size=2, return_moments=True, **keys
    )
    y, moments = found
    grads = pullback(dy)
    for rows in stretches(5, 2):
        part, alone = nbnorm.vjp(nbnorm.batch_norm, spoilt[rows], mask=mask[rows], residual=residual[rows], **keys)
        np.testing.assert_allclose(y[rows], part, rtol=1e-13, atol=1e-14)
        expected = alone(dy[rows])
        np.testing.assert_allclose(grads.x[rows], expected.x, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(grads.residual[rows], expected.residual, rtol=1e-12, atol=1e-14)
    u = WIDE["silu"](x).astype(float) if order == "act_norm" else x
    counted = np.ma.masked_array(u, ~mask)
    np.testing.assert_array_equal(moments.count, mask.sum(axis=(0, 2)))
    np.testing.assert_allclose(moments.mean, counted.mean(axis=(0, 2)).data, rtol=1e-12)
    np.testing.assert_allclose(moments.var(), counted.var(axis=(0, 2)).data, rtol=1e-12)
    assert not y[~mask].any()


def test_far_from_zero_the_running_variance_is_that_of_the_batch(backend: str) -> None:
    x = RNG.normal(size=(64, 2, 8)) + 1e8
    mean, var = np.zeros(2), np.zeros(2)
    nbnorm.batch_norm(x, mean, var, training=True, momentum=1.0, ghost_batch_size=5, backend=backend)
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(var, exact.var(axis=(0, 2), ddof=1).astype(float), rtol=1e-12)


@pytest.mark.parametrize("size", [2, 4])
def test_out_memory_order_and_kind(size: int, backend: str) -> None:
    x = RNG.normal(size=(7, 4, 3)).transpose(0, 2, 1)
    keys = {"training": True, "ghost_batch_size": size, "backend": backend}
    y = nbnorm.batch_norm(x, **keys)
    assert y.strides == x.strides
    out = np.empty_like(x)
    assert nbnorm.batch_norm(x, out=out, **keys) is out
    np.testing.assert_array_equal(out, y)
    assert nbnorm.batch_norm(x, out=x, **keys) is x
    np.testing.assert_array_equal(x, y)


def test_evaluation_ignores_it(backend: str) -> None:
    x, mean, var = RNG.normal(size=(5, 3)), RNG.normal(size=3), RNG.uniform(1, 2, size=3)
    y = nbnorm.batch_norm(x, mean, var, ghost_batch_size=2, backend=backend)
    np.testing.assert_array_equal(y, nbnorm.batch_norm(x, mean, var, backend=backend))


def test_empty_batch(backend: str) -> None:
    x, mean, var = np.empty((0, 3, 4)), np.zeros(3), np.ones(3)
    y, pullback = nbnorm.vjp(
        nbnorm.batch_norm, x, mean, var, weight=np.ones(3), training=True, ghost_batch_size=2, backend=backend
    )
    assert y.shape == x.shape
    grads = pullback(x)
    assert grads.x.shape == x.shape
    assert not grads.weight.any()
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"ghost_batch_size": 0}, ValueError, "ghost_batch_size must be at least 1; got 0"),
        ({"ghost_batch_size": 2.0}, TypeError, "ghost_batch_size must be an integer; got 2.0"),
        (
            {"ghost_batch_size": 1},
            ValueError,
            r"more than 1 value per channel in each ghost batch.*got 1 for x \(5, 3\)",
        ),
        (
            {"ghost_batch_size": 2},
            ValueError,
            r"more than 1 value per channel in each ghost batch.*got 2 for x \(5, 3\)",
        ),
        ({"ghost_batch_size": 2, "channel_axis": 0}, ValueError, "ghost_batch_size needs the samples on axis 0"),
    ],
)
def test_bad_input(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    x = np.ones((5, 3))
    size = x.shape[keys.get("channel_axis", 1)]
    mean, var = np.zeros(size), np.ones(size)
    with pytest.raises(error, match=message):
        nbnorm.batch_norm(x, mean, var, training=True, **keys)
    assert not mean.any()


def test_a_plain_call_says_who_runs_it() -> None:
    x = np.ones((5, 3, 2), np.float32)
    decision = nbnorm.explain(nbnorm.batch_norm, x, training=True, ghost_batch_size=2, backend="numpy")
    assert decision.chosen == "numpy"
    assert [copy.partition(" bytes): ")[0] for copy in decision.copies] == ["y (120"]
