"""Moments and Welford: merged over any split they are the moments of the whole."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nbnorm
from nbnorm.statistics import Moments, from_statistics


def exact(values: Any) -> tuple[float, float]:
    """Mean and biased variance by exact rational arithmetic."""
    fractions = [Fraction(float(v)) for v in values]
    mean = sum(fractions) / len(fractions)
    return float(mean), float(sum((f - mean) ** 2 for f in fractions) / len(fractions))


def split(x: Any, cuts: list[int]) -> list[Any]:
    return np.split(x, sorted(cuts))


def merged(parts: list[Any], backend: str | None = None) -> Moments:
    found = Moments(0, np.zeros(parts[0].shape[1:]), np.zeros(parts[0].shape[1:]))
    for part in parts:
        found = found.merge(nbnorm.moments(part, axis=0, backend=backend))
    return found


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e8])
@pytest.mark.parametrize("cuts", [[500], [1], [999], [3, 3, 4, 700], list(range(0, 1000, 7)), list(range(1000))])
def test_merged_over_any_split_equals_the_whole(offset: float, cuts: list[int], backend: str) -> None:
    x = np.random.default_rng(0).normal(size=(1000, 2)) + offset
    found = merged(split(x, cuts), backend)
    whole = nbnorm.moments(x, axis=0, backend=backend)
    assert found.count == whole.count == 1000
    for channel in range(2):
        mean, var = exact(x[:, channel])
        for moments in (found, whole):
            assert moments.mean[channel] == pytest.approx(mean, rel=1e-15 if offset else 1e-12)
            assert moments.var()[channel] == pytest.approx(var, rel=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    offset=st.sampled_from([0.0, 1e3, 1e8, -1e8]),
    spread=st.sampled_from([1e-3, 1.0, 100.0]),
    cuts=st.lists(st.integers(0, 200), max_size=12),
    seed=st.integers(0, 2**32),
)
def test_merge_by_property(offset: float, spread: float, cuts: list[int], seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(200, 1)) * spread + offset
    mean, var = exact(x[:, 0])
    found = merged(split(x, cuts), "numpy")
    assert found.var()[0] == pytest.approx(var, rel=1e-12)
    assert found.mean[0] == pytest.approx(mean, rel=1e-15, abs=1e-13 * spread)


@settings(deadline=None, max_examples=40)
@given(order=st.permutations(range(8)), offset=st.sampled_from([1e3, 1e8]))
def test_equal_counts_in_any_order(order: list[int], offset: float) -> None:
    x = np.random.default_rng(1).normal(size=(8, 25, 3)) + offset
    parts = [nbnorm.moments(part, axis=0, backend="numpy") for part in x]
    straight, shuffled = parts[0], parts[order[0]]
    for i in range(1, 8):
        straight, shuffled = straight.merge(parts[i]), shuffled.merge(parts[order[i]])
    np.testing.assert_allclose(shuffled.mean, straight.mean, rtol=1e-15)
    np.testing.assert_allclose(shuffled.m2, straight.m2, rtol=1e-13)


def test_merge_is_symmetric_and_has_an_identity() -> None:
    x = np.random.default_rng(2).normal(size=(30, 4)) + 1e8
    a, b = nbnorm.moments(x[:11], axis=0), nbnorm.moments(x[11:], axis=0)
    zero = Moments(0, np.zeros(4), np.zeros(4))
    np.testing.assert_allclose(a.merge(b).m2, b.merge(a).m2, rtol=1e-14)
    for same in (a.merge(zero), zero.merge(a)):
        assert same.count == 11
        for name in ("mean", "m2", "residual"):
            np.testing.assert_array_equal(getattr(same, name), getattr(a, name))


def test_merge_by_channel_counts() -> None:
    """Counts may differ by channel, and be zero in some: there the other side stands, to the last bit."""
    a = Moments(np.array([0, 3]), np.array([np.nan, 2.0]), np.array([np.nan, 6.0]))
    b = Moments(np.array([4, 0]), np.array([1.5, np.nan]), np.array([5.0, np.nan]))
    found = a.merge(b)
    assert found.count.tolist() == [4, 3]
    assert found.mean.tolist() == [1.5, 2.0]
    assert found.m2.tolist() == [5.0, 6.0]


def test_nan_and_inf_stay_in_their_channel() -> None:
    x = np.random.default_rng(2).normal(size=(30, 3))
    x[3, 0], x[20, 1] = np.nan, np.inf
    found = merged(split(x, [10, 25]))
    assert np.isnan(found.mean[0])
    assert not np.isfinite(found.mean[1])
    assert found.var()[2] == pytest.approx(x[:, 2].var(), rel=1e-13)


@pytest.mark.parametrize("axis", [None, 0, 1, -1, (0, 2), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_moments_over_axes(axis: Any, dtype: str, backend: str) -> None:
    x = np.random.default_rng(3).normal(size=(5, 4, 6)).astype(dtype)
    found = nbnorm.moments(x, axis, backend=backend)
    wide = x.astype("f8")
    np.testing.assert_allclose(found.mean, wide.mean(axis=axis), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(found.var(), wide.var(axis=axis), rtol=1e-12)
    assert found.mean.dtype == np.float64
    assert found.count * found.mean.size == x.size


def test_moments_of_nothing_and_of_one(backend: str) -> None:
    empty = nbnorm.moments(np.zeros((0, 3), "f4"), axis=0, backend=backend)
    assert empty.count == 0
    assert not empty.mean.any()
    assert np.isnan(empty.var()).all()
    scalar = nbnorm.moments(np.array(7.0), backend=backend)
    assert (int(scalar.count), float(scalar.mean), float(scalar.m2)) == (1, 7.0, 0.0)
    assert math.isnan(scalar.var(ddof=1))


def test_var_and_std() -> None:
    found = nbnorm.moments(np.array([1.0, 2, 3, 4]))
    assert float(found.var()) == 1.25
    assert float(found.var(ddof=1)) == pytest.approx(5 / 3)
    assert float(found.std()) == pytest.approx(1.25**0.5)


def test_update_gives_new_arrays_and_knows_small_counts() -> None:
    mean, var = np.array([1.0, 1, 1]), np.array([2.0, 2, 2])
    found = Moments(np.array([0, 1, 5]), np.array([0.0, 3, 3]), np.array([0.0, 0, 8]))
    new_mean, new_var = found.update(mean, var, 0.5)
    assert new_mean.tolist() == [1, 2, 2]
    assert new_var.tolist() == [2, 2, 2]
    assert mean.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="running statistics must have shape"):
        found.update(np.zeros(2), np.zeros(2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Moments(-1, np.zeros(2), np.zeros(2)), ValueError, "count must not be negative; got -1"),
        (lambda: Moments(1.5, np.zeros(2), np.zeros(2)), TypeError, "count must be whole numbers; got dtype float64"),
        (lambda: Moments(1, np.zeros(2), np.zeros(3)), ValueError, r"mean and m2 must have one shape; got \(2,\)"),
        (
            lambda: Moments(1, np.zeros(2), np.zeros(2)).merge(Moments(1, np.zeros(3), np.zeros(3))),
            ValueError,
            r"other must have shape \(2,\)",
        ),
        (lambda: from_statistics([1.0], [-1.0], 3), ValueError, "var must not be negative; got -1.0"),
        (lambda: nbnorm.Welford.from_moments([1.0], [1.0, 2.0], 3), ValueError, "mean and var must have one shape"),
        (
            lambda: Moments(1, np.zeros(2), np.zeros(2)).update(np.zeros(2, int), np.zeros(2)),
            TypeError,
            "running_mean must be of dtype .*; got int64",
        ),
        (lambda: nbnorm.Welford().merge(3), TypeError, "other must be a Welford; got int"),
        (lambda: Moments(1, np.zeros(2), np.zeros(2)).merge(3), TypeError, "other must be Moments; got int"),
        (
            lambda: Moments(1, np.zeros(2), np.zeros(2)).update(np.zeros(2), np.zeros(2), np.inf),
            ValueError,
            "momentum must be finite",
        ),
        (
            lambda: Moments(1, np.zeros(2), np.zeros(2)).update(np.array(0.0), np.zeros(2)),
            ValueError,
            "running_mean and running_var must have one shape",
        ),
        (lambda: nbnorm.Welford().mean, ValueError, "no batch yet"),
        (lambda: nbnorm.Welford().update(np.array([1, 2])), TypeError, "x must be of dtype"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("offset", [1e3, 1e8])
def test_welford_streams(offset: float) -> None:
    x = np.random.default_rng(4).normal(size=(500, 3)) + offset
    whole, left, right = nbnorm.Welford(), nbnorm.Welford(), nbnorm.Welford()
    for batch in split(x, [64, 128, 130]):
        whole.update(batch)
    left.update(x[:200])
    right.update(x[200:])
    left.merge(right)
    left.merge(nbnorm.Welford())
    for found in (whole, left):
        assert found.count == 500
        for channel in range(3):
            mean, var = exact(x[:, channel])
            assert found.mean[channel] == pytest.approx(mean, rel=1e-15)
            assert found.var()[channel] == pytest.approx(var, rel=1e-12)


def test_welford_from_moments_and_empty_batches() -> None:
    known = nbnorm.Welford.from_moments(np.array([2.0]), np.array([4.0]), 8)
    known.update(np.zeros((0, 1)))
    known.update(np.array([[2.0], [2.0]]))
    assert known.count == 10
    assert known.mean.tolist() == [2.0]
    assert known.var().tolist() == [3.2]


def test_welford_refuses_another_shape_and_stays_as_it_was() -> None:
    stream = nbnorm.Welford()
    stream.update(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"other must have shape \(3,\)"):
        stream.update(np.ones((4, 2)))
    assert stream.count == 4
