"""Norms of a sum, standardized kernels, and masks of padded sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("axis", [1, 2, (0, 2)])
@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("float64", marks=pytest.mark.slow("numba")),
        pytest.param("float16", marks=pytest.mark.slow("numba")),
    ],
)
def test_add_norms(axis: Any, dtype: str, backend: str) -> None:
    x, residual, dy, dh = RNG.normal(size=(4, 3, 5, 7)).astype(dtype)
    axes = axis if isinstance(axis, tuple) else (axis,)
    weight, bias = RNG.normal(size=(2, *(x.shape[a] for a in axes))).astype(dtype)
    bound = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-3}[dtype]
    for op, plain, params in (
        (nbnorm.add_layer_norm, "layer_norm", {"weight": weight, "bias": bias}),
        (nbnorm.add_rms_norm, "rms_norm", {"weight": weight}),
    ):
        (y, h), pullback = nbnorm.vjp(op, x, residual, axis=axis, eps=1e-2, backend=backend, **params)
        np.testing.assert_array_equal(h, x + residual)
        expected = norm(plain, h, weight, params.get("bias"), 1e-2, dy, axes=axes)
        np.testing.assert_allclose(y.astype(float), expected.y.astype(float), rtol=bound, atol=bound)
        grads = pullback((dy, dh))
        dx = (expected.dx + dh).astype(float)
        np.testing.assert_allclose(grads.x.astype(float), dx, rtol=bound, atol=bound)
        np.testing.assert_array_equal(grads.residual, grads.x)
        scale = bound * float(np.abs(expected.dweight).max() + 1)
        np.testing.assert_allclose(
            grads.weight.astype(float), expected.dweight.reshape(weight.shape).astype(float), atol=scale
        )
        alone = pullback((dy, None))
        np.testing.assert_allclose(alone.x.astype(float), expected.dx.astype(float), rtol=bound, atol=bound)


def test_add_norm_refuses() -> None:
    x = np.ones((2, 3))
    with pytest.raises(ValueError, match=r"residual must have x's shape \(2, 3\).*got \(3,\)"):
        nbnorm.add_layer_norm(x, np.ones(3), 3)
    _, pullback = nbnorm.vjp(nbnorm.add_layer_norm, x, x, 3)
    with pytest.raises(TypeError, match=r"dy must be the pair \(dy, dh\)"):
        pullback(x)
    with pytest.raises(ValueError, match=r"dh must have x's shape \(2, 3\)"):
        pullback((x, np.ones((3, 2))))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_weight_standardization(axis: int, backend: str) -> None:
    kernel, dy = RNG.normal(size=(2, 4, 3, 2, 2))
    y, pullback = nbnorm.vjp(nbnorm.weight_standardization, kernel, 1e-3, axis=axis, backend=backend)
    axes = tuple(a for a in range(4) if a != axis % 4)
    expected = norm("layer_norm", kernel, eps=1e-3, dy=dy, axes=axes)
    np.testing.assert_allclose(y, expected.y.astype(float), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(pullback(dy).x, expected.dx.astype(float), rtol=1e-12, atol=1e-13)
    for _ in range(3):  # the later calls are remembered
        again = nbnorm.weight_standardization(kernel, 1e-3, axis=axis, backend=backend)
        np.testing.assert_array_equal(again, y)


def test_lengths_to_mask() -> None:
    np.testing.assert_array_equal(nbnorm.lengths_to_mask(np.array([1, 3]), 4), [[1, 0, 0, 0], [1, 1, 1, 0]])
    assert nbnorm.lengths_to_mask([]).shape == (0, 0)
    for lengths, longest, error, message in (
        ([1, 5], 4, ValueError, "lengths must be from 0 to 4; got 1 to 5"),
        ([-1, 2], None, ValueError, "lengths must be from 0 to 2; got -1 to 2"),
        ([1.0], None, TypeError, "lengths must be whole numbers; got dtype float64"),
        ([[1]], None, ValueError, r"lengths must have one axis; got shape \(1, 1\)"),
    ):
        with pytest.raises(error, match=message):
            nbnorm.lengths_to_mask(lengths, longest)


def test_padded_sequences_give_what_the_unpadded_give(backend: str) -> None:
    lengths = [4, 2, 7]
    sequences = [RNG.normal(size=(length, 3)) for length in lengths]
    mask = nbnorm.lengths_to_mask(lengths)
    x = np.full((3, 7, 3), np.nan)
    x[mask] = np.concatenate(sequences)
    y = nbnorm.batch_norm(x, training=True, channel_axis=-1, mask=mask[..., None], backend=backend)
    expected = norm("batch_norm", np.concatenate(sequences)).y.astype(float)
    np.testing.assert_allclose(y[mask], expected, rtol=1e-12, atol=1e-13)
    assert not y[~mask].any()


def renormed(x: Any, mean: Any, var: Any, weight: Any, bias: Any, factors: Any, eps: float) -> tuple[Any, Any]:
    """y and (r, d) on (N, C), from the paper's algorithm 1; `factors` are r and d where they are held constant."""
    batch_mean, batch_std = x.mean(axis=0), np.sqrt(x.var(axis=0) + eps)
    std = np.sqrt(var + eps)
    r, d = factors or (np.clip(batch_std / std, 1 / 1.5, 1.5), np.clip((batch_mean - mean) / std, -0.5, 0.5))
    return ((x - batch_mean) / batch_std * r + d) * weight + bias, (r, d)


def test_batch_renorm(backend: str) -> None:
    x, dy = RNG.normal(size=(2, 6, 4)) * np.array([0.3, 1, 1, 4]) + np.array([0, 0, 2, 0.1])
    weight, bias, mean = RNG.normal(size=(3, 4))
    var = np.ones(4)
    inputs = {"x": x, "weight": weight, "bias": bias}
    running = mean.copy(), var.copy()
    y, pullback = nbnorm.vjp(
        nbnorm.batch_renorm, x, *running, weight, bias, training=True, eps=1e-3, r_max=1.5, d_max=0.5, backend=backend
    )
    expected, factors = renormed(x, mean, var, weight, bias, None, 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(running[0], 0.9 * mean + 0.1 * x.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(running[1], 0.9 + 0.1 * x.var(axis=0, ddof=1), rtol=1e-13)
    grads = pullback(dy)
    for name, value in inputs.items():
        numeric = np.empty(value.shape)
        for index in np.ndindex(value.shape):
            high, low = value.copy(), value.copy()
            high[index] += 1e-6
            low[index] -= 1e-6
            up, down = (
                renormed(**(inputs | {name: moved}), mean=mean, var=var, factors=factors, eps=1e-3)[0]
                for moved in (high, low)
            )
            numeric[index] = ((up - down) * dy).sum() / 2e-6
        np.testing.assert_allclose(getattr(grads, name), numeric, rtol=1e-6, atol=1e-7, err_msg=name)


def test_batch_renorm_at_its_limits(backend: str) -> None:
    x, mean, var = RNG.normal(size=(3, 4, 5)), RNG.normal(size=4), RNG.uniform(1, 2, 4)
    keys = {"backend": backend, "return_moments": True}
    batch = nbnorm.batch_renorm(x, mean, var, training=True, r_max=1.0, d_max=0.0, **keys)[0]
    np.testing.assert_allclose(batch, nbnorm.batch_norm(x, training=True, backend=backend), rtol=1e-12)
    free = nbnorm.batch_renorm(x, mean, var, training=True, r_max=1e9, d_max=1e9, **keys)[0]
    evaluated = nbnorm.batch_renorm(x, mean, var, backend=backend)
    np.testing.assert_allclose(free, evaluated, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(evaluated, nbnorm.batch_norm(x, mean, var, backend=backend))
    for limits, message in (({"r_max": 0.5}, "r_max must be at least 1"), ({"d_max": -1}, "d_max must not be neg")):
        with pytest.raises(ValueError, match=message):
            nbnorm.batch_renorm(x, mean, var, training=True, **limits)
    with pytest.raises(ValueError, match="batch_renorm needs running_mean and running_var"):
        nbnorm.batch_renorm(x, None, None, training=True)
