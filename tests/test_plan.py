"""Calls that are made again: what is remembered of them, and plans."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm.dispatch import registry
from oracle import norm

RNG = np.random.default_rng(0)
X, OTHER = RNG.normal(size=(2, 4, 6, 5, 3)).astype("f4")
W, B = np.linspace(0.5, 2, 6).astype("f4"), np.linspace(-1, 1, 6).astype("f4")
ROW_W, ROW_B = np.linspace(0.5, 2, 3).astype("f4"), np.linspace(-1, 1, 3).astype("f4")
CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "layer": (nbnorm.layer_norm, {"normalized_shape": 3, "weight": ROW_W, "bias": ROW_B}),
    "layer, weight alone": (nbnorm.layer_norm, {"normalized_shape": 3, "weight": ROW_W}),
    "layer over axis 1": (nbnorm.layer_norm, {"axis": 1, "weight": W, "bias": B}),
    "rms": (nbnorm.rms_norm, {"normalized_shape": (5, 3), "activation": "silu"}),
    "rms, act first": (nbnorm.rms_norm, {"normalized_shape": 3, "activation": "relu", "order": "act_norm"}),
    "batch": (nbnorm.batch_norm, {"training": True, "weight": W, "bias": B}),
    "batch, last": (nbnorm.batch_norm, {"training": True, "channel_axis": -1, "bias": ROW_B}),
    "group": (nbnorm.group_norm, {"num_groups": 2, "weight": W, "bias": B}),
    "instance": (nbnorm.instance_norm, {"weight": W}),
    "with a mask": (nbnorm.layer_norm, {"normalized_shape": 3, "mask": OTHER > 0}),
    "with a residual": (nbnorm.instance_norm, {"residual": OTHER, "activation": "gelu"}),
    "moments": (nbnorm.layer_norm, {"normalized_shape": 3, "return_moments": True}),
}


@pytest.fixture(autouse=True)
def forgetful() -> None:
    registry.calls.clear()


def first_of(result: Any) -> Any:
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("name", CALLS)
def test_later_calls_give_the_same_bits(name: str, backend: str) -> None:
    op, keys = CALLS[name]
    expected = [first_of(op(x, **keys, backend=backend)) for x in (X, OTHER)]
    remembered = len(registry.calls)
    assert remembered == (0 if name in ("with a mask", "with a residual", "moments") else 1)
    registry.calls.clear()
    fresh = [first_of(op(x, **keys, backend=backend)) for x in (OTHER, X)][::-1]
    plan = nbnorm.plan(op, X, **keys, backend=backend)
    out, alias = np.empty_like(X), X.copy()
    found = [first_of(plan(x)) for x in (X, OTHER)]
    assert first_of(plan(X, out=out)) is out
    assert first_of(plan(alias, out=alias)) is alias
    for ours in (fresh, found, (out, expected[1]), (alias, expected[1])):
        for a, b in zip(ours, expected, strict=True):
            assert a.tobytes() == b.tobytes()
    assert len(registry.calls) == remembered


@pytest.mark.parametrize("name", CALLS)
def test_later_calls_with_out_give_the_same_bits(name: str, backend: str) -> None:
    op, keys = CALLS[name]
    expected = first_of(op(OTHER, **keys, backend=backend)).tobytes()
    registry.calls.clear()
    out, apart, alias = np.empty_like(X), np.empty_like(X), OTHER.copy()
    op(X, **keys, out=out, backend=backend)
    remembered = len(registry.calls)
    for x, target in ((OTHER, apart), (alias, alias)):
        assert first_of(op(x, **keys, out=target, backend=backend)) is target
        assert target.tobytes() == expected
    assert len(registry.calls) == remembered


@pytest.mark.parametrize("statistics", [False, True])
def test_out_is_checked_anew(statistics: bool, backend: str) -> None:
    memory = np.linspace(0.5, 2, 3 * X.size, dtype="f4")
    x, over = memory[: X.size].reshape(X.shape), memory[1 : X.size + 1].reshape(X.shape)
    weight = memory[2 * X.size : 2 * X.size + X.shape[1]]
    keys: dict[str, Any] = {"weight": weight, "backend": backend}
    op, keys = (nbnorm.batch_norm, keys | {"training": True}) if statistics else (nbnorm.instance_norm, keys)
    if statistics:
        keys |= {"running_mean": np.zeros(X.shape[1], "f4"), "running_var": np.ones(X.shape[1], "f4")}
    op(x, **keys, out=np.empty_like(X))
    before = memory.copy()
    with pytest.raises(ValueError, match="overlaps x in part"):
        op(x, **keys, out=over)
    with pytest.raises(ValueError, match="out must not overlap weight"):
        op(x, **keys, out=memory[X.size + 5 : 2 * X.size + 5].reshape(X.shape))
    assert memory.tobytes() == before.tobytes()


@pytest.mark.parametrize("dtype", ["f8", "f2", ml_dtypes.bfloat16])
@pytest.mark.parametrize("param", ["same", "f4"])
def test_dtypes(dtype: Any, param: str, backend: str) -> None:
    x, other = X.astype(dtype), OTHER.astype(dtype)
    w = ROW_W.astype(dtype if param == "same" or dtype == "f8" else param)
    expected = nbnorm.layer_norm(other, 3, w, backend=backend)
    registry.calls.clear()
    nbnorm.layer_norm(x, 3, w, backend=backend)
    plan = nbnorm.plan(nbnorm.layer_norm, x, 3, w, backend=backend)
    for y in (nbnorm.layer_norm(other, 3, w, backend=backend), plan(other)):
        assert y.dtype == x.dtype
        assert y.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["f2", ml_dtypes.bfloat16])
def test_weights_of_half_types_take_the_short_way(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls and plans, and both see what is written to the weight between two calls."""
    pytest.importorskip("numba")
    from nbnorm_backends.numba_cpu import runs

    x, w, b = X.astype(dtype), ROW_W.astype(dtype), ROW_B.astype(dtype)
    expected = [nbnorm.layer_norm(x, 3, weight, b, backend="numba") for weight in (w, w + w)]
    plan = nbnorm.plan(nbnorm.layer_norm, x, 3, w, b, backend="numba")
    monkeypatch.setattr(runs, "forward", None)
    for y in expected:
        assert nbnorm.layer_norm(x, 3, w, b, backend="numba").tobytes() == y.tobytes()
        assert plan(x).tobytes() == y.tobytes()
        w += w
    memory = np.zeros(x.size + 3, dtype)
    plan = nbnorm.plan(nbnorm.layer_norm, x, 3, memory[:3], b, backend="numba")
    with pytest.raises(ValueError, match="out must not overlap weight"):
        plan(x, out=memory[: x.size].reshape(x.shape))


def test_a_plan_sees_what_is_written_to_its_parameters(backend: str) -> None:
    weight, mean, var = np.ones(6, "f4"), np.zeros(6, "f4"), np.ones(6, "f4")
    plan = nbnorm.plan(nbnorm.batch_norm, X, mean, var, weight, training=True, backend=backend)
    plan(X)
    weight *= 2
    y = plan(OTHER)
    np.testing.assert_allclose(y, norm("batch_norm", OTHER, weight).y.astype("f4"), atol=2e-6)
    wanted_mean, wanted_var = np.zeros(6, "f4"), np.ones(6, "f4")
    for x in (X, OTHER):
        nbnorm.batch_norm(x, wanted_mean, wanted_var, training=True, backend=backend)
    np.testing.assert_array_equal(mean, wanted_mean)
    np.testing.assert_array_equal(var, wanted_var)
    rows = np.ones(3, "f4")
    plan = nbnorm.plan(nbnorm.layer_norm, X, 3, rows, backend=backend)
    rows *= 3
    np.testing.assert_array_equal(plan(X), nbnorm.layer_norm(X, 3, rows, backend=backend))


def test_arrays_swapped_between_calls(backend: str) -> None:
    """Weight and bias are found by name, also where one array was given for both."""
    nbnorm.layer_norm(X, 3, ROW_W, ROW_W, backend=backend)
    y = nbnorm.layer_norm(X, 3, ROW_W, ROW_B, backend=backend)
    assert len(registry.calls) == 1
    np.testing.assert_allclose(y, norm("layer_norm", X, ROW_W, ROW_B, axes=(3,)).y.astype("f4"), atol=2e-6)


def test_what_differs_is_checked_anew() -> None:
    nbnorm.layer_norm(X, 3, ROW_W, eps=1, backend="numba")
    for bad in (
        {"normalized_shape": 3.0},
        {"eps": True},
        {"weight": ROW_W[:2]},
        {"weight": ROW_W.astype("f8")},
        {"backend": "nothing"},
        {"activation": "relu6"},
    ):
        keys = {"normalized_shape": 3, "weight": ROW_W, "eps": 1, "backend": "numba", **bad}
        with pytest.raises((ValueError, TypeError, nbnorm.BackendError)):
            nbnorm.layer_norm(X, **keys)
    strided = nbnorm.layer_norm(np.asfortranarray(X), 3, ROW_W, eps=1, backend="numba")
    np.testing.assert_allclose(strided, nbnorm.layer_norm(X, 3, ROW_W, eps=1), atol=1e-6)


def test_a_tuple_of_other_numbers_is_checked_anew() -> None:
    nbnorm.layer_norm(X, (3,), backend="numba")
    with pytest.raises(TypeError, match="normalized_shape"):
        nbnorm.layer_norm(X, (3.0,), backend="numba")
    nbnorm.layer_norm(X, [3], backend="numba")
    assert len(registry.calls) == 1


def test_numbers_that_may_change_are_read_anew() -> None:
    class Number:
        value = 2

        def __index__(self) -> int:
            return self.value

    x, number = RNG.normal(size=(3, 4, 5)).astype("f4"), Number()
    for groups in (2, 4):
        number.value = groups
        expected = nbnorm.group_norm(x, groups, backend="numba")
        for same in (np.array(groups), number, np.int64(groups)):
            np.testing.assert_array_equal(nbnorm.group_norm(x, same, backend="numba"), expected)
    for axis in (1, 2):
        expected = nbnorm.layer_norm(x, axis=axis, backend="numba")
        np.testing.assert_array_equal(nbnorm.layer_norm(x, axis=np.array(axis), backend="numba"), expected)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_plan_with_running_statistics(training: bool, last: bool, backend: str) -> None:
    keys = {"training": training, "channel_axis": -1 if last else 1, "backend": backend}
    x = RNG.normal(1, 2, size=(6, 3, 7, 3)).astype("f4")
    found, expected = ([np.zeros(3, "f4"), np.ones(3, "f4")] for _ in range(2))
    plan = nbnorm.plan(nbnorm.batch_norm, x, *found, **keys)
    for scale in (1, 2, 3):
        y = nbnorm.batch_norm(scale * x, *expected, **keys)
        np.testing.assert_array_equal(plan(scale * x), y)
        np.testing.assert_array_equal(found, expected)
    assert training == (expected[0] != 0).any()


def test_a_plan_refuses_an_x_that_holds_its_statistics(backend: str) -> None:
    memory = RNG.normal(size=200).astype("f4")
    x, mean, var = memory[:60].reshape(20, 3), memory[6:9], np.ones(3, "f4")
    plan = nbnorm.plan(nbnorm.batch_norm, x + 1, mean, var, training=True, backend=backend)
    before = memory.copy()
    with pytest.raises(ValueError, match="running_mean must not overlap x"):
        plan(x)
    np.testing.assert_array_equal(memory, before)


def test_unaligned_arrays_are_copied_as_ever(backend: str) -> None:
    memory = np.zeros(X.nbytes + 1, np.uint8)
    unaligned = memory[1:].view("f4").reshape(X.shape)
    unaligned[...] = X
    expected = nbnorm.layer_norm(X, 3, backend=backend)
    np.testing.assert_array_equal(nbnorm.layer_norm(unaligned, 3, backend=backend), expected)
    assert len(registry.calls) == 1
    plan = nbnorm.plan(nbnorm.layer_norm, X, 3, backend=backend)
    np.testing.assert_array_equal(plan(unaligned), expected)
    assert plan(X, out=unaligned) is unaligned
    np.testing.assert_array_equal(unaligned, expected)


def test_preference_and_trace_are_heard() -> None:
    nbnorm.layer_norm(X, 3, backend=None)
    with nbnorm.trace() as decisions:
        nbnorm.layer_norm(X, 3, backend=None)
        with nbnorm.use_backend("numpy"):
            nbnorm.layer_norm(X, 3, backend=None)
    assert [decision.chosen for decision in decisions] == ["numba", "numpy"]
    nbnorm.layer_norm(X, 3, backend=None)
    assert len(registry.calls) == 1
    registry.rescan()
    assert not registry.calls


@pytest.mark.parametrize("call", [lambda op, *args: op(*args), nbnorm.vjp])
@pytest.mark.parametrize("op", [nbnorm.layer_norm, nbnorm.batch_norm])
def test_nothing_of_the_callers_is_kept(op: Any, call: Any) -> None:

    class Watched(np.ndarray):
        pass

    memory = RNG.normal(size=(6, 4, 3)).astype("f4").view(Watched)
    watch = weakref.ref(memory)
    x, (weight, bias) = np.asarray(memory), np.asarray(memory)[:2, 0]
    result = call(op, x, 3, weight, bias) if op is nbnorm.layer_norm else call(op, x[0], weight, bias)
    assert len(registry.calls) == 1
    if call is nbnorm.vjp:
        result[1](np.ones_like(result[0]))
    del memory, x, weight, bias, result
    gc.collect()
    assert watch() is None


def test_bad_input_of_a_plan(backend: str) -> None:
    plan = nbnorm.plan(nbnorm.layer_norm, X, 3, ROW_W, backend=backend)
    sealed = np.empty_like(X)
    sealed.flags.writeable = False
    pair = np.zeros((2, *X.shape), "f4").reshape(-1)
    part = pair[1 : 1 + X.size].reshape(X.shape)
    first = pair[: X.size].reshape(X.shape)
    for error, match, x, out in (
        (ValueError, "x must have the first x's shape", X[:2], None),
        (ValueError, "x must have the first x's shape", X.astype("f8"), None),
        (TypeError, "x must be an array", [1.0], None),
        (ValueError, "out must have x's shape", X, np.empty((4, 6, 5), "f4")),
        (ValueError, "out must be writable", X, sealed),
        (ValueError, "out must be writable", sealed, sealed),
        (ValueError, "out must be x itself or memory apart", first, part),
    ):
        with pytest.raises(error, match=match):
            plan(x, out=out)
    assert not pair.any()
    for call in (
        lambda: nbnorm.plan(nbnorm.layer_norm, X, 3, out=np.empty_like(X)),
        lambda: nbnorm.plan(nbnorm.moments, X),
        lambda: nbnorm.plan(len, X),
    ):
        with pytest.raises(TypeError):
            call()
    addend, mean, var = X.copy(), np.zeros(X.size, "f4"), np.ones(6, "f4")
    plan = nbnorm.plan(nbnorm.add_layer_norm, X, addend, 3, backend=backend)
    with pytest.raises(ValueError, match="out must not overlap residual"):
        plan(X, out=addend)
    for keys in ({"training": True}, {"training": False}, {"training": True, "return_moments": True}):
        for op in (nbnorm.batch_norm, nbnorm.batch_renorm):
            plan = nbnorm.plan(op, X, mean[:6], var, backend=backend, **keys)
            if op is nbnorm.batch_norm and "return_moments" in keys:
                continue  # it has no use for them
            with pytest.raises(ValueError, match="out must not overlap running_mean"):
                plan(X, out=mean.reshape(X.shape))
    np.testing.assert_array_equal(addend, X)
    assert not mean.any()
    whole = np.zeros(X.size, "f4")
    plan = nbnorm.plan(nbnorm.layer_norm, X, 3, whole[:3], backend=backend)
    with pytest.raises(ValueError, match="out must not overlap weight"):
        plan(X, out=whole.reshape(X.shape))
