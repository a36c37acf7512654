"""Second derivatives: the pullback of a pullback, against central differences of the first derivative in float64, and
through a mask against the call on the valid elements alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm import Grads
from test_options import halved

RNG = np.random.default_rng(7)
X = (3, 4, 5)
CASES: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "batch": (nbnorm.batch_norm, (4,), {"training": True}),
    "batch channels last": (nbnorm.batch_norm, (5,), {"training": True, "channel_axis": -1}),
    "batch eval": (
        nbnorm.batch_norm,
        (4,),
        {"running_mean": RNG.normal(size=4), "running_var": RNG.uniform(1, 2, size=4)},
    ),
    "ghost": (nbnorm.batch_norm, (4,), {"training": True, "ghost_batch_size": 2}),
    "instance": (nbnorm.instance_norm, (4,), {}),
    "instance eval": (
        nbnorm.instance_norm,
        (4,),
        {"running_mean": RNG.normal(size=4), "running_var": RNG.uniform(1, 2, size=4), "use_input_stats": False},
    ),
    "group": (nbnorm.group_norm, (4,), {"num_groups": 2}),
    "layer": (nbnorm.layer_norm, (5,), {"axis": 2}),
    "layer over channels": (nbnorm.layer_norm, (4,), {"axis": 1}),
    "rms": (nbnorm.rms_norm, (4, 5), {"axis": (1, 2), "weight_offset": 1.0}),
}
NORMS = pytest.mark.parametrize("name", CASES)


def arrays(name: str, *, residual: bool = False) -> dict[str, Any]:
    _, params, _ = CASES[name]
    weight, bias = RNG.normal(size=(2, *params))
    found = {"x": RNG.normal(size=X) * 2, "weight": weight}
    found |= {} if name == "rms" else {"bias": bias}
    return found | ({"residual": RNG.normal(size=X)} if residual else {})


def first(name: str, inputs: dict[str, Any], dy: Any, **keys: Any) -> Grads:
    op, _, call = CASES[name]
    return nbnorm.vjp(op, **inputs, **call, eps=1e-2, **keys)[1](dy)


def second(name: str, inputs: dict[str, Any], dy: Any, cotangents: Grads, **keys: Any) -> tuple[Any, Grads]:
    op, _, call = CASES[name]
    _, pullback = nbnorm.vjp(op, **inputs, **call, eps=1e-2, **keys)
    grads, pullback2 = pullback.vjp(dy)
    for mine, theirs in zip(grads, pullback(dy), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    return pullback2(cotangents)


def cotangents_of(inputs: dict[str, Any]) -> Grads:
    return Grads(**{name: RNG.normal(size=value.shape) for name, value in inputs.items()})


def differences(value: Any, loss: Any) -> Any:
    """The gradient of loss at value."""
    found = np.empty(value.shape)
    for index in np.ndindex(value.shape):
        high, low = value.copy(), value.copy()
        high[index] += 1e-5
        low[index] -= 1e-5
        found[index] = (loss(high) - loss(low)) / 2e-5
    return found


@pytest.mark.slow("numba")
@pytest.mark.parametrize(("name", "masked"), halved(list(CASES), [True, False]))
def test_against_differences(name: str, masked: bool, backend: str) -> None:
    inputs, dy = arrays(name, residual=True), RNG.normal(size=X)
    mask = RNG.random(X) < 0.7 if masked else None
    cotangents = cotangents_of(inputs)
    keys = {"backend": backend, "mask": mask}
    ddy, grads = second(name, inputs, dy, cotangents, **keys)

    def loss(dy: Any, **changed: Any) -> float:
        found = first(name, inputs | changed, dy, **keys)
        return sum(float(np.sum(f * v)) for f, v in zip(found, cotangents, strict=True) if v is not None)

    np.testing.assert_allclose(ddy, differences(dy, loss), rtol=1e-7, atol=1e-7)
    for key, value in inputs.items():
        expected = differences(value, lambda changed, key=key: loss(dy, **{key: changed}))
        np.testing.assert_allclose(getattr(grads, key), expected, rtol=1e-7, atol=1e-7, err_msg=key)


@pytest.mark.slow("numba")
@NORMS
def test_one_cotangent_at_a_time(name: str, backend: str) -> None:
    """The map is linear: the answers to single cotangents add up to that to all, and to none it is zero."""
    inputs, dy = arrays(name, residual=True), RNG.normal(size=X)
    cotangents = cotangents_of(inputs)
    whole = second(name, inputs, dy, cotangents, backend=backend)
    parts = [
        second(
            name,
            inputs,
            dy,
            Grads(*(v if f == field else None for f, v in cotangents._asdict().items())),
            backend=backend,
        )
        for field in inputs
    ]
    np.testing.assert_allclose(sum(ddy for ddy, _ in parts), whole[0], rtol=1e-9, atol=1e-12)
    for key in inputs:
        total = sum(getattr(grads, key) for _, grads in parts)
        np.testing.assert_allclose(total, getattr(whole[1], key), rtol=1e-9, atol=1e-12)
    ddy, grads = second(name, inputs, dy, Grads(None), backend=backend)
    assert not ddy.any()
    assert not any(grad.any() for grad in grads if grad is not None)


@pytest.mark.slow("numba")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_narrow_dtypes_under_a_mask_of_anything(dtype: str, backend: str) -> None:
    inputs, dy = arrays("batch"), RNG.normal(size=X)
    cotangents = cotangents_of(inputs)
    mask = RNG.random(X) < 0.7
    expected = second("batch", inputs, dy, cotangents, backend="numpy", mask=mask)

    def narrow(array: Any) -> Any:
        if array is None:
            return None
        found = array.astype(dtype)
        return np.where(mask, found, np.array([np.nan], dtype)) if array.shape == X else found

    keys = {"backend": backend, "mask": mask}
    inputs = {name: narrow(value) for name, value in inputs.items()}
    ddy, grads = second("batch", inputs, narrow(dy), Grads(*map(narrow, cotangents)), **keys)
    bound = {"float32": 2e-6, "float16": 2e-2}[dtype]
    for found, exact in ((ddy, expected[0]), (grads.x, expected[1].x), (grads.weight, expected[1].weight)):
        assert found.dtype == dtype
        np.testing.assert_allclose(found.astype(float), exact, rtol=bound, atol=bound * 8)
    assert not ddy[~mask].any()
    assert not grads.x[~mask].any()


def test_a_gradient_penalty_of_torch() -> None:
    """The gradient of the squared norm of dx, beside the one that torch's double backward gives."""
    torch = pytest.importorskip("torch")
    x, weight, dy = RNG.normal(size=(6, 3, 4)), RNG.normal(size=3), RNG.normal(size=(6, 3, 4))
    leaf = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.batch_norm(leaf, None, None, torch.tensor(weight), training=True)
    (dx,) = torch.autograd.grad(y, leaf, torch.tensor(dy), create_graph=True)
    (expected,) = torch.autograd.grad((dx * dx).sum(), leaf)
    _, pullback = nbnorm.vjp(nbnorm.batch_norm, x, weight=weight, training=True)
    grads, pullback2 = pullback.vjp(dy)
    _, found = pullback2(Grads(2 * grads.x))
    np.testing.assert_allclose(found.x, expected.numpy(), rtol=1e-9, atol=1e-12)


def test_refusals() -> None:
    x, numpy = np.ones((2, 3)), {"backend": "numpy"}
    for call in (
        lambda: nbnorm.vjp(nbnorm.layer_norm, x, 3, activation="relu", **numpy)[1].vjp(x),
        lambda: nbnorm.vjp(nbnorm.add_layer_norm, x, x, 3, **numpy)[1].vjp((x, x)),
        lambda: nbnorm.vjp(nbnorm.normalize, x, **numpy)[1].vjp(x),
        lambda: nbnorm.vjp(nbnorm.batch_renorm, x, np.zeros(3), np.ones(3), training=True, **numpy)[1].vjp(x),
    ):
        with pytest.raises(TypeError, match="has no second derivatives"):
            call()
    _, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 3, weight=np.ones(3), **numpy)
    _, pullback2 = pullback.vjp(x)
    with pytest.raises(TypeError, match="cotangents must be Grads; got ndarray"):
        pullback2(x)
    with pytest.raises(ValueError, match=r"cotangents\.bias must be None, as there is no bias"):
        pullback2(Grads(x, bias=np.ones(3)))
    with pytest.raises(ValueError, match=r"cotangents.weight must have weight's shape \(3,\)"):
        pullback2(Grads(x, np.ones(4)))
