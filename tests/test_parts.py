"""Batch norm of channels that the Numba backend cuts into parts: one that is alone, and ones in pieces far apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm

pytest.importorskip("numba")

from nbnorm_backends.numba_cpu import cuts

ALONE = 100, 1, 60, 60  # samples in 50 parts, of 2 each
FAR_APART = 5000, 20, 8, 8
PARTS = {ALONE: 50, FAR_APART: 50}
RNG = np.random.default_rng(0)


def parts_of(x: Any) -> int:
    return cuts.parts_of_group((1, x.shape[0], x.shape[1], 1, x[0, 0].size))


def test_which_are_cut() -> None:
    for shape, parts in PARTS.items():
        assert parts_of(np.broadcast_to(0.0, shape)) == parts
    for whole in ((60, 1, 60, 60), (100, 2, 60, 60), (1000, 64, 30, 30), (8209, 20, 8, 8), (5000, 2, 8, 8)):
        assert parts_of(np.broadcast_to(0.0, whole)) == 1
    assert cuts.parts_of_group((2, 100, 1, 1, 3600)) == 1


@pytest.mark.parametrize("dtype", ["f4", "f8", pytest.param("f2", marks=pytest.mark.slow)])
def test_against_the_oracle(dtype: str) -> None:
    """Mean 1e4 and standard deviation 1 (100 for float16), which grow over the samples: no two parts have the same."""
    noise = 100.0 if dtype == "f2" else 1.0
    drift = np.linspace(0, noise, ALONE[0]).reshape(-1, 1, 1, 1)
    x = (1e4 + drift + noise * RNG.normal(size=ALONE)).astype(dtype)
    dy, (w, b) = RNG.normal(size=ALONE).astype(dtype), np.array([[1.5], [-0.5]], dtype)
    mean, var = np.zeros(1, "f8" if dtype == "f8" else "f4"), np.ones(1, "f8" if dtype == "f8" else "f4")
    y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, mean, var, w, b, training=True, momentum=1.0, backend="numba")
    exact = norm("batch_norm", x, w, b, dy=dy)
    bound = {"f8": 1e-11, "f4": 4e-7, "f2": 1e-3}[dtype]
    assert (np.abs(y - exact.y) <= bound * np.maximum(1, np.abs(exact.y))).all()
    ((m, v),) = zip(exact.mean.values(), exact.var.values(), strict=True)
    count = x.size
    np.testing.assert_allclose([mean[0], var[0]], [float(m), float(v) * count / (count - 1)], rtol=1.2e-7)
    grads = pullback(dy)
    assert (np.abs(grads.x - exact.dx) <= bound * exact.dx_size).all()
    for found, reference in ((grads.weight, exact.dweight), (grads.bias, exact.dbias)):
        np.testing.assert_allclose(found, reference.reshape(1).astype("f8"), rtol=2 * bound)


OPTIONS: dict[str, dict[str, Any]] = {
    "mask": {"mask": RNG.random(ALONE) > 0.3},
    "mask of samples": {"mask": (np.arange(100) // 2 % 3 > 0).reshape(100, 1, 1, 1)},  # whole parts have no element
    "act_norm": {"activation": "relu", "order": "act_norm"},
    "residual": {"activation": "silu", "residual": RNG.normal(size=ALONE).astype("f4")},
    "given statistics": {"running_mean": np.full(1, 0.3, "f4"), "running_var": np.full(1, 2.0, "f4")},
}


@pytest.mark.parametrize(
    "name", [name if name == "mask of samples" else pytest.param(name, marks=pytest.mark.slow) for name in OPTIONS]
)
def test_options(name: str) -> None:
    """Beside the NumPy backend, which cuts nothing."""
    keys = {"training": name != "given statistics", "weight": np.full(1, 1.5, "f4")} | OPTIONS[name]
    x, dy = RNG.normal(size=ALONE).astype("f4") + 3, RNG.normal(size=ALONE).astype("f4")
    results = []
    for backend in ("numba", "numpy"):
        y, pullback = nbnorm.vjp(nbnorm.batch_norm, x, **keys, backend=backend)
        results.append((y, *pullback(dy)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


def test_pieces_far_apart() -> None:
    """With the bits of any number of threads, and of calls that are made again; NaN stays in its channel."""
    x = RNG.standard_normal(FAR_APART, np.float32) + np.arange(20, dtype="f4").reshape(-1, 1, 1)
    x[-1, 3, 0, 0] = np.nan
    with nbnorm.threads(1):
        y = nbnorm.batch_norm(x, training=True, backend="numba")
    for _ in range(2):
        assert nbnorm.batch_norm(x, training=True, backend="numba").tobytes() == y.tobytes()
    wide = x.astype("f8")
    exact = (wide - wide.mean((0, 2, 3), keepdims=True)) / np.sqrt(wide.var((0, 2, 3), keepdims=True) + 1e-5)
    others = np.arange(20) != 3
    assert np.isnan(y[:, 3]).all()
    assert (np.abs(y - exact)[:, others] <= 4e-7 * np.maximum(1, np.abs(exact[:, others]))).all()
