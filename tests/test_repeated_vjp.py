"""Gradients of calls that are made again: the remembered way gives the bits of the checked one."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import nbnorm
from nbnorm.dispatch import registry
from nbnorm.operation import prepared
from nbnorm.repeat import RememberedVjp
from oracle import norm
from test_plan import CALLS, OTHER, ROW_B, ROW_W, B, W, X

DY = np.random.default_rng(1).normal(size=X.shape).astype("f4")
MEAN, VAR = np.linspace(-1, 1, 6).astype("f4"), np.linspace(0.5, 2, 6).astype("f4")
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    **{name: case for name, case in CALLS.items() if name not in ("with a mask", "with a residual", "moments")},
    "batch, given statistics": (nbnorm.batch_norm, {"running_mean": MEAN, "running_var": VAR, "weight": W, "bias": B}),
    "batch, given statistics alone": (nbnorm.batch_norm, {"running_mean": MEAN, "running_var": VAR}),
    "batch, with gelu": (nbnorm.batch_norm, {"training": True, "weight": W, "activation": "gelu"}),
    "batch, bias alone": (nbnorm.batch_norm, {"training": True, "bias": B}),
    "rms, weight": (nbnorm.rms_norm, {"normalized_shape": 3, "weight": ROW_W}),
}


@pytest.fixture(autouse=True)
def forgetful() -> None:
    registry.calls.clear()


def same_bits(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None
        else:
            assert (ours.dtype, ours.shape, ours.tobytes()) == (theirs.dtype, theirs.shape, theirs.tobytes())


def checked(op: Any, x: Any, keys: dict[str, Any]) -> tuple[Any, Any]:
    """The way of calls that nothing was remembered of."""
    return prepared(op, (x,), keys).vjp()


PLAIN = ("layer", "layer, weight alone", "batch", "batch, last", "batch, given statistics", "group", "instance")


@pytest.mark.parametrize(
    "name", [name if name in PLAIN else pytest.param(name, marks=pytest.mark.slow("numba")) for name in CASES]
)
def test_later_gradients_have_the_same_bits(name: str, backend: str) -> None:
    op, given = CASES[name]
    keys = given | {"backend": backend}
    y, pullback = checked(op, OTHER, keys)
    expected = pullback(DY)
    nbnorm.vjp(op, X, **keys)
    (found,) = registry.calls.values()
    assert isinstance(found, RememberedVjp) == (backend == "numba" and name != "layer over axis 1")  # weights along r
    out = np.empty_like(X)
    for more in ({}, {}, {"out": out}, {"out": out}):
        ours, again = nbnorm.vjp(op, OTHER, **keys, **more)
        same_bits((ours, *again(DY)), (y, *expected))
    spread = np.repeat(DY, 2, axis=-1)[..., ::2]
    same_bits(again(spread), expected)
    same_bits(again(DY.astype(">f4")), expected)


@pytest.mark.parametrize("name", ["layer", "batch", "batch, last", "batch, given statistics"])
def test_second_derivatives_of_later_calls(name: str, backend: str) -> None:
    op, given = CASES[name]
    keys = given | {"backend": backend}
    wanted, pullback2 = checked(op, X, keys)[1].vjp(DY)
    nbnorm.vjp(op, X, **keys)
    grads, again = nbnorm.vjp(op, X, **keys)[1].vjp(DY)
    same_bits(grads, wanted)
    expected, found = pullback2(nbnorm.Grads(OTHER)), again(nbnorm.Grads(OTHER))
    same_bits((found[0], *found[1]), (expected[0], *expected[1]))


@pytest.mark.parametrize(
    "dtype", ["f8", *(pytest.param(dtype, marks=pytest.mark.slow("numba")) for dtype in ("f2", ml_dtypes.bfloat16))]
)
@pytest.mark.parametrize("param", ["same", "f4"])
@pytest.mark.parametrize("last", [True, False])
def test_dtypes(last: bool, param: str, dtype: Any, backend: str) -> None:
    x, dy = X.astype(dtype), DY.astype(dtype)
    params = [
        p.astype(dtype if param == "same" or dtype == "f8" else param) for p in ((ROW_W, ROW_B) if last else (W, B))
    ]
    keys = {"training": True, "weight": params[0], "bias": params[1], "channel_axis": -1 if last else 1}
    y, pullback = checked(nbnorm.batch_norm, x, keys | {"backend": backend})
    for _ in range(2):
        ours, again = nbnorm.vjp(nbnorm.batch_norm, x, **keys, backend=backend)
        same_bits((ours, *again(dy)), (y, *pullback(dy)))


@pytest.mark.parametrize("dtype", ["f2", pytest.param(ml_dtypes.bfloat16, marks=pytest.mark.slow("numba"))])
def test_weights_of_half_types_take_the_short_way(dtype: Any) -> None:
    pytest.importorskip("numba")
    x, dy, w, b = (array.astype(dtype) for array in (X, DY, ROW_W, ROW_B))
    y, pullback = checked(nbnorm.layer_norm, x, {"normalized_shape": 3, "weight": w, "bias": b, "backend": "numba"})
    for _ in range(2):
        ours, again = nbnorm.vjp(nbnorm.layer_norm, x, 3, w, b, backend="numba")
        same_bits((ours, *again(dy)), (y, *pullback(dy)))
    (found,) = registry.calls.values()
    assert isinstance(found, RememberedVjp)


def test_running_statistics_move_once_a_call(backend: str) -> None:
    mean, var, wanted_mean, wanted_var = np.zeros(6, "f4"), np.ones(6, "f4"), np.zeros(6, "f4"), np.ones(6, "f4")
    for x in (X, OTHER, X):
        keys = {"training": True, "momentum": 0.3, "weight": W, "backend": backend}
        y, pullback = checked(nbnorm.batch_norm, x, keys | {"running_mean": wanted_mean, "running_var": wanted_var})
        ours, again = nbnorm.vjp(nbnorm.batch_norm, x, mean, var, **keys)
        same_bits((ours, *again(DY)), (y, *pullback(DY)))
        same_bits((mean, var), (wanted_mean, wanted_var))


def test_given_statistics_may_change_before_the_gradient(backend: str) -> None:
    mean, var = MEAN.copy(), VAR.copy()
    for _ in range(2):
        mean[:], var[:] = MEAN, VAR
        expected = checked(nbnorm.batch_norm, X, {"running_mean": MEAN, "running_var": VAR, "backend": backend})[1](DY)
        _, pullback = nbnorm.vjp(nbnorm.batch_norm, X, mean, var, backend=backend)
        mean += 5
        var *= 3
        same_bits(pullback(DY), expected)
        ddy, _ = pullback.vjp(DY)[1](nbnorm.Grads(OTHER))
        np.testing.assert_allclose(ddy, OTHER / np.sqrt(VAR.reshape(6, 1, 1) + 1e-5), rtol=1e-5)


def test_against_the_oracle(backend: str) -> None:
    for _ in range(2):
        _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 3, ROW_W, ROW_B, backend=backend)
        grads = pullback(DY)
        exact = norm("layer_norm", X, ROW_W, ROW_B, dy=DY, axes=(3,))
        for ours, theirs in zip(grads, (exact.dx, exact.dweight, exact.dbias), strict=False):
            np.testing.assert_allclose(ours, theirs.astype("f4"), rtol=1e-5, atol=2e-5)


def test_bad_gradients_are_refused_by_name(backend: str) -> None:
    for _ in range(2):
        _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 3, ROW_W, backend=backend)
        for bad in (DY[:1], DY.astype("f8"), DY.reshape(-1)):
            with pytest.raises(ValueError, match="dy must have x's shape"):
                pullback(bad)
        with pytest.raises(TypeError, match="dy must be an array"):
            pullback([1.0])


def test_out_must_leave_what_the_gradient_needs(backend: str) -> None:
    x, free = X.copy(), np.empty_like(X)
    keys = {"normalized_shape": 3, "weight": ROW_W, "backend": backend}
    nbnorm.vjp(nbnorm.layer_norm, x, **keys, out=free)
    for _ in range(2):
        with pytest.raises(ValueError, match="out must not overlap x"):
            nbnorm.vjp(nbnorm.layer_norm, x, **keys, out=x)
    assert x.tobytes() == X.tobytes()


@pytest.mark.slow("numba")
def test_an_overflow_of_a_parameter_gradient_is_silent(backend: str) -> None:
    """As infinity, of a type that cannot hold it."""
    x, dy = X.astype("f2"), np.full(X.shape, 6e4, "f2")
    w = ROW_W.astype("f2")
    for _ in range(2):
        grads = nbnorm.vjp(nbnorm.layer_norm, x, 3, w, w, backend=backend)[1](dy)
        assert np.isinf(grads.bias).all()


def test_what_is_no_operation_is_named() -> None:
    for bad in (np.sum, [], None):
        with pytest.raises(TypeError, match="op must be one of"):
            nbnorm.vjp(bad, X)


def test_a_large_array_is_shared_by_threads(backend: str) -> None:
    rng = np.random.default_rng(2)
    x, dy = rng.normal(size=(2, 600, 512)).astype("f4")
    w = rng.normal(size=512).astype("f4")
    keys = {"normalized_shape": 512, "weight": w, "bias": w, "backend": backend}
    y, pullback = checked(nbnorm.layer_norm, x, keys)
    for threads in (1, 2):
        with nbnorm.threads(threads):
            for _ in range(2):
                ours, again = nbnorm.vjp(nbnorm.layer_norm, x, **keys)
                same_bits((ours, *again(dy)), (y, *pullback(dy)))


class Reluctant(nbnorm.Backend):
    """Refuses all."""

    name = "reluctant"

    def reject(self, request: Any) -> str:
        return "not today"

    def moments(self, *args: Any, **keys: Any) -> Any: ...
    def apply(self, *args: Any, **keys: Any) -> Any: ...
    def backward_sums(self, *args: Any, **keys: Any) -> Any: ...
    def backward_apply(self, *args: Any, **keys: Any) -> Any: ...


def test_a_refusal_is_not_passed_by() -> None:
    for _ in range(2):
        with pytest.raises(nbnorm.BackendError, match="not today"):
            nbnorm.vjp(nbnorm.layer_norm, X, 3, backend=Reluctant())
        with pytest.raises(nbnorm.BackendError, match="backend 'nowhere'"):
            nbnorm.vjp(nbnorm.layer_norm, X, 3, backend="nowhere")


def test_a_pullback_keeps_its_backend(backend: str) -> None:
    """Whatever dy it gets, and wherever it is called."""
    w = ROW_W * np.float32(1.1)
    with nbnorm.use_backend(backend):
        _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 3, w)
        expected = pullback(DY)
    other = "numpy" if backend == "numba" else "numba"
    with nbnorm.use_backend(other), nbnorm.trace() as decisions:
        same_bits(pullback(np.asfortranarray(DY)), expected)
    assert decisions == []


def test_out_may_become_read_only(backend: str) -> None:
    out = np.empty_like(X)
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 3, out=out, backend=backend)
    out.flags.writeable = False
    same_bits(pullback(np.asfortranarray(DY)), pullback(DY))


def test_a_subclass_has_steps_of_its_own() -> None:
    pytest.importorskip("numba")
    from nbnorm_backends.numba_cpu.backend import NumbaBackend

    class Doubling(NumbaBackend):
        def backward(self, *args: Any, **keys: Any) -> Any:
            grads = super().backward(*args, **keys)
            return grads._replace(x=grads.x * 2)

    expected = nbnorm.vjp(nbnorm.layer_norm, X, 3, backend="numba")[1](DY).x * 2
    for _ in range(2):
        _, pullback = nbnorm.vjp(nbnorm.layer_norm, X, 3, backend=Doubling())
        np.testing.assert_array_equal(pullback(DY).x, expected)


def test_large_arrays_for_what_is_not_given_are_not_kept() -> None:
    pytest.importorskip("numba")
    x = np.ones((2, 1 << 17), "f4")
    nbnorm.layer_norm(x, 1 << 17, bias=x[0], backend="numba")
    tracemalloc.start()
    try:
        nbnorm.layer_norm(x + 1, 1 << 17, bias=x[0], backend="numba")
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 1 << 18
    finally:
        tracemalloc.stop()
