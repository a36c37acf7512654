"""Dropout beside a norm: which elements go, what becomes of the others, and the way back."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm import dropout
from nbnorm.dropout import BLOCK, Dropout

RNG = np.random.default_rng(9)
SHAPE = (6, 4, 5)


def kept(shape: tuple[int, ...], p: float, seed: int) -> Any:
    """The choice, from the generator's stream taken in one piece."""
    size = int(np.prod(shape))
    words = np.random.Philox(key=seed).random_raw(size // 2 + 1)
    numbers = np.stack([words & 0xFFFFFFFF, words >> 32], axis=1).reshape(-1)[:size]
    return (numbers >= round(p * 2**32)).reshape(shape)


@pytest.mark.parametrize("shape", [(3,), (2 * BLOCK + 77,), (5, BLOCK // 3, 7)])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_the_choice(shape: tuple[int, ...], p: float) -> None:
    x = RNG.normal(size=shape)
    expected = np.where(kept(shape, p, 2**100 + 3), x / (1 - p), 0) if p < 1 else np.zeros(shape)
    reverse = np.asfortranarray(x)
    for array in (x.copy(), reverse):
        found = Dropout(p, 2**100 + 3)(array)
        assert found is array
        np.testing.assert_allclose(found, expected, rtol=1e-15)


def test_the_share_that_goes() -> None:
    for seed, p in enumerate((0.02, 0.3, 0.9)):
        gone = Dropout(p, seed)(np.ones(400_000)) == 0
        assert abs(gone.mean() - p) < 5 * np.sqrt(p * (1 - p) / gone.size)
        neighbours = (gone[1:] & gone[:-1]).mean()
        assert abs(neighbours - p * p) < 0.005


def test_neighbouring_seeds_choose_apart() -> None:
    first, second = (Dropout(0.5, seed)(np.ones(100_000)) == 0 for seed in (41, 42))
    assert abs((first & second).mean() - 0.25) < 0.01


@pytest.mark.parametrize("dtype", ["float64", ">f4", "float16"])
def test_norm_first(dtype: str, backend: str) -> None:
    x, dy = RNG.normal(size=(2, *SHAPE)).astype(dtype)
    weight = RNG.normal(size=4).astype(dtype)
    keys: dict[str, Any] = {"weight": weight, "training": True, "activation": "relu", "backend": backend}
    y, pullback = nbnorm.vjp(nbnorm.norm_dropout, nbnorm.batch_norm, x, p=0.25, seed=5, **keys)
    choice = kept(SHAPE, 0.25, 5)

    def dropped(array: Any) -> Any:
        return np.where(choice, array.astype(float) * (1 / 0.75), 0).astype(dtype)

    plain, plain_pullback = nbnorm.vjp(nbnorm.batch_norm, x, **keys)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(y, dropped(plain))
    given = dy.copy()
    grads, expected = pullback(dy), plain_pullback(dropped(dy))
    for found, exact in zip(grads, expected, strict=True):
        np.testing.assert_array_equal(found, exact)
    np.testing.assert_array_equal(dy, given)


def test_the_factor_is_not_rounded_to_a_half_type() -> None:
    found = Dropout(0.1, 3)(np.full(1000, 3, "f2"))
    assert set(found.tolist()) == {0.0, float(np.float16(3 / 0.9))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(Dropout(0.99999, 3)(np.full(1000, 3, "f2")).tolist()) == {0.0}
        assert set(Dropout(0.5, 3)(np.full(1000, 60000, "f2")).tolist()) == {0.0, np.inf}


def test_explain_tells_of_the_copy() -> None:
    x = np.ones(SHAPE)
    keys: dict[str, Any] = {"p": 0.5, "seed": 1, "first": "dropout", "backend": "numpy"}
    assert "elements are dropped" in str(nbnorm.explain(nbnorm.norm_dropout, nbnorm.layer_norm, x, 5, **keys))


def test_dropout_first(backend: str) -> None:
    x, dy = RNG.normal(size=(2, *SHAPE))
    x = x.transpose(0, 2, 1)
    given = x.copy()
    y, pullback = nbnorm.vjp(
        nbnorm.norm_dropout, nbnorm.layer_norm, x, 4, p=0.5, seed=6, first="dropout", backend=backend
    )
    dropped = np.where(kept(x.shape, 0.5, 6), 2 * x, 0)
    plain, plain_pullback = nbnorm.vjp(nbnorm.layer_norm, dropped, 4, backend=backend)
    np.testing.assert_allclose(y, plain, rtol=1e-13, atol=1e-14)
    dy = dy.transpose(0, 2, 1)
    expected = np.where(kept(x.shape, 0.5, 6), 2 * plain_pullback(dy).x, 0)
    np.testing.assert_allclose(pullback(dy).x, expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_array_equal(x, given)


def test_every_kind_of_call(backend: str) -> None:
    x, residual = RNG.normal(size=(2, *SHAPE))
    choice = kept(SHAPE, 0.5, 7)
    keys: dict[str, Any] = {"p": 0.5, "seed": 7, "backend": backend}
    y, h = nbnorm.norm_dropout(nbnorm.add_rms_norm, x, residual, 5, **keys)
    plain, _ = nbnorm.add_rms_norm(x, residual, 5, backend=backend)
    np.testing.assert_array_equal(h, x + residual)
    np.testing.assert_array_equal(y, np.where(choice, 2 * plain, 0))
    y, moments = nbnorm.norm_dropout(
        nbnorm.batch_norm, x, training=True, ghost_batch_size=4, return_moments=True, **keys
    )
    plain = nbnorm.batch_norm(x, training=True, ghost_batch_size=4, backend=backend)
    np.testing.assert_array_equal(y, np.where(choice, 2 * plain, 0))
    np.testing.assert_allclose(moments.mean, x.mean(axis=(0, 2)))
    out = np.empty_like(x)
    assert nbnorm.norm_dropout(nbnorm.instance_norm, x, out=out, **keys) is out
    plain = nbnorm.instance_norm(x, backend=backend)
    np.testing.assert_array_equal(out, np.where(choice, 2 * plain, 0))
    assert nbnorm.norm_dropout(nbnorm.instance_norm, x, out=x, **keys) is x
    np.testing.assert_array_equal(x, out)
    np.testing.assert_array_equal(
        nbnorm.norm_dropout(nbnorm.instance_norm, out, p=0.0, seed=1, backend=backend),
        nbnorm.instance_norm(out, backend=backend),
    )


def test_the_same_bits_with_one_thread() -> None:
    x = np.random.default_rng(1).normal(size=(700, 300)).astype("f4")
    found = set()
    for threads in (1, 2):
        with nbnorm.threads(threads):
            y, pullback = nbnorm.vjp(nbnorm.norm_dropout, nbnorm.layer_norm, x, 300, p=0.3, seed=8, backend="numba")
            found.add(y.tobytes() + pullback(x).x.tobytes())
    assert len(found) == 1


def test_dropout_before_batch_norm_warns_once() -> None:
    x = RNG.normal(size=SHAPE)
    dropout.warn_of_variance_shift.cache_clear()
    keys: dict[str, Any] = {"training": True, "p": 0.5, "seed": 1, "first": "dropout"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbnorm.explain(nbnorm.norm_dropout, nbnorm.batch_norm, x, **keys)
        nbnorm.norm_dropout(nbnorm.batch_norm, x, **(keys | {"p": 0.0}))
        mean, var = np.zeros(4), np.ones(4)
        nbnorm.norm_dropout(nbnorm.batch_norm, x, mean, var, **(keys | {"training": False}))
    for ghosts in (None, 4):
        dropout.warn_of_variance_shift.cache_clear()
        with pytest.warns(UserWarning, match="dropout before batch norm: .* variance that is too large") as caught:
            nbnorm.vjp(nbnorm.norm_dropout, nbnorm.batch_norm, x, **keys, ghost_batch_size=ghosts)
        assert caught[0].filename == __file__
    dropout.warn_of_variance_shift.cache_clear()
    with pytest.warns(UserWarning, match="dropout before batch norm") as caught:
        nbnorm.norm_dropout(nbnorm.batch_norm, x, **keys)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbnorm.norm_dropout(nbnorm.batch_norm, x, **keys)
        nbnorm.norm_dropout(nbnorm.layer_norm, x, 5, p=0.5, seed=1, first="dropout")
        nbnorm.norm_dropout(nbnorm.batch_norm, x, training=True, p=0.5, seed=1)


def test_the_reason_that_the_warning_gives(backend: str) -> None:
    """Behind dropout, the running variance exceeds that of the data that evaluation sees."""
    x = RNG.normal(size=(4000, 2)) + 1
    ratios = {}
    for first in ("norm", "dropout"):
        mean, var = np.zeros(2), np.ones(2)
        keys: dict[str, Any] = {"training": True, "momentum": 1.0, "backend": backend}
        nbnorm.norm_dropout(nbnorm.batch_norm, x, mean, var, p=0.5, seed=3, first=first, **keys)
        ratios[first] = var / x.var(axis=0, ddof=1)
    np.testing.assert_allclose(ratios["norm"], 1, rtol=1e-12)
    np.testing.assert_allclose(ratios["dropout"], 3, rtol=0.1)  # sigma^2 + p / (1 - p) * (sigma^2 + mu^2)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"p": 1.5, "seed": 0}, ValueError, "p must be from 0 to 1; got 1.5"),
        ({"p": float("nan"), "seed": 0}, ValueError, "p must be"),
        ({"p": "half", "seed": 0}, TypeError, "p must be"),
        ({"p": 0.5, "seed": -1}, ValueError, r"seed must be from 0, below 2\*\*128; got -1"),
        ({"p": 0.5, "seed": 2**128}, ValueError, "seed must be from 0"),
        ({"p": 0.5, "seed": 0.5}, TypeError, "seed must be an integer"),
        ({"p": 0.5, "seed": 0, "first": "act"}, ValueError, "first must be norm or dropout; got 'act'"),
    ],
)
def test_bad_input(keys: dict[str, Any], error: type[Exception], message: str) -> None:
    x = np.ones((3, 4))
    mean, var = np.zeros(4), np.ones(4)
    with pytest.raises(error, match=message):
        nbnorm.norm_dropout(nbnorm.batch_norm, x, mean, var, training=True, **keys)
    assert not mean.any()


def test_what_it_cannot_follow() -> None:
    x = np.ones((3, 4))
    with pytest.raises(TypeError, match=r"op must be a norm by mean and variance; got nbnorm\.local_response_norm"):
        nbnorm.norm_dropout(nbnorm.local_response_norm, x, 3, p=0.5, seed=0)
    with pytest.raises(TypeError, match=r"op must be a norm by mean and variance; got nbnorm\.norm_dropout"):
        nbnorm.norm_dropout(nbnorm.norm_dropout, nbnorm.layer_norm, x, 4, p=0.5, seed=0)
    with pytest.raises(TypeError, match=r"op must be a norm by mean and variance; got nbnorm\.moments"):
        nbnorm.norm_dropout(nbnorm.moments, x, p=0.5, seed=0)
    with pytest.raises(ValueError, match=r"first must be norm for nbnorm\.add_layer_norm"):
        nbnorm.norm_dropout(nbnorm.add_layer_norm, x, x, 4, p=0.5, seed=0, first="dropout")
    with pytest.raises(TypeError, match="dropout has no second derivatives"):
        nbnorm.vjp(nbnorm.norm_dropout, nbnorm.layer_norm, x, 4, p=0.5, seed=0)[1].vjp(x)
