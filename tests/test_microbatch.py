"""Batch norm of a batch in parts: as of the whole, forward, backward and in its running statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm

RNG = np.random.default_rng(10)
X, DY = RNG.normal(size=(2, 13, 3, 4, 2)) * [[[[[1.0]], [[5.0]], [[0.1]]]]] + 20.0
CUTS = [1, 1, 6, 12]  # parts of 1, 0, 5, 6 and 1 samples
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def parameters(layer: Any) -> Any:
    layer.weight[:], layer.bias[:] = np.linspace(0.5, 2, 3), np.linspace(-1, 1, 3)
    return layer


@pytest.mark.parametrize("axis", [1, -1, 0])
def test_parts_are_as_the_whole(axis: int, backend: str) -> None:
    x, dy = np.moveaxis(X, 1, axis), np.moveaxis(DY, 1, axis)
    samples = 1 if axis == 0 else 0
    weight, bias = np.linspace(0.5, 2, 3), np.linspace(-1, 1, 3)
    expected = norm("batch_norm", x, weight, bias, 1e-5, dy, channel_axis=axis)
    xs, dys = np.split(x, CUTS, samples), np.split(dy, CUTS, samples)
    micro = nbnorm.MicroBatchNorm(weight, bias, channel_axis=axis, backend=backend)
    for part in xs:
        micro.measure(part)
    ys = [micro.normalize(part) for part in xs]
    for part, cotangent in zip(xs, dys, strict=True):
        micro.measure_gradient(part, cotangent)
    dxs = [micro.gradient(part, cotangent) for part, cotangent in zip(xs, dys, strict=True)]
    np.testing.assert_allclose(np.concatenate(ys, samples), expected.y.astype(float), **CLOSE)
    np.testing.assert_allclose(np.concatenate(dxs, samples), expected.dx.astype(float), **CLOSE)
    np.testing.assert_allclose(micro.grads["weight"], expected.dweight.astype(float), **CLOSE)
    np.testing.assert_allclose(micro.grads["bias"], expected.dbias.astype(float), **CLOSE)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_other_dtypes_and_memory_orders(dtype: str) -> None:
    """Parts that lie in memory in different ways; results have the whole's error of rounding."""
    x, dy = X.astype(dtype), DY.astype(dtype)
    xs, dys = np.split(x, [4, 9]), np.split(dy, [4, 9])
    xs[1] = np.asfortranarray(xs[1])
    xs[2] = np.moveaxis(np.ascontiguousarray(np.moveaxis(xs[2], 1, -1)), -1, 1)
    layer, whole = (parameters(nbnorm.BatchNorm(3)) for _ in range(2))
    expected = norm("batch_norm", x, whole.weight, whole.bias, 1e-5, dy)
    unit = np.finfo(dtype).eps
    ys, dxs = layer.micro_batches(xs), layer.backward(dys)
    assert {y.dtype for y in (*ys, *dxs)} == {np.dtype(dtype)}
    assert (abs(np.concatenate(ys) - expected.y) <= 2 * unit * expected.y_size).all()
    assert (abs(np.concatenate(dxs) - expected.dx) <= 4 * unit * expected.dx_size).all()
    whole(x)
    np.testing.assert_allclose(layer.running_mean, whole.running_mean, rtol=1e-12)
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=1e-10)
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("keys", [{}, {"affine": False}, {"momentum": None, "channel_axis": 1}], ids=str)
def test_layer_of_parts(keys: dict[str, Any]) -> None:
    layer, whole = (nbnorm.BatchNorm(3, dtype=np.float64, **keys) for _ in range(2))
    xs, dys = np.split(X, CUTS), np.split(DY, CUTS)
    token = nbnorm.Token()
    for mode in (True, True, False):
        ys = layer.train(mode).micro_batches(xs, token=token)
        np.testing.assert_allclose(np.concatenate(ys), whole.train(mode)(X, token=token), **CLOSE)
        for _ in range(2):  # backward may be asked for again
            np.testing.assert_allclose(np.concatenate(layer.backward(dys)), whole.backward(DY), **CLOSE)
            assert layer.grads.keys() == whole.grads.keys()
            for name, grad in whole.grads.items():
                np.testing.assert_allclose(layer.grads[name], grad, **CLOSE)
    assert layer.num_batches_tracked == 1
    np.testing.assert_allclose(layer.running_var, whole.running_var, rtol=1e-12)


def test_pending_and_frozen() -> None:
    layer = nbnorm.BatchNorm(3, dtype=np.float64)
    layer.micro_batches(np.split(X, [5]), update=False)
    assert layer.pending.count == X.size / 3
    layer.discard()
    layer.freeze().micro_batches(np.split(X, [5]))
    layer.backward(np.split(DY, [5]))
    assert layer.grads == {}
    layer.unfreeze()
    layer.statistics = "running"  # and tracking: normalized by the old, which then take the batch in
    layer.micro_batches(np.split(X, [5]))
    np.testing.assert_allclose(layer.running_mean, 0.1 * X.mean(axis=(0, 2, 3)), rtol=1e-12)


def test_torch_tensors() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    layer = nbnorm.BatchNorm(3, dtype=np.float64)
    xs = torch.from_numpy(X).split(5)
    reference = torch.from_numpy(X).requires_grad_()
    y = torch.nn.functional.batch_norm(reference, None, None, training=True)
    y.backward(torch.from_numpy(DY))
    np.testing.assert_allclose(torch.cat(layer.micro_batches(xs)).numpy(), y.detach().numpy(), **CLOSE)
    dx = torch.cat(layer.backward(torch.from_numpy(DY).split(5)))
    np.testing.assert_allclose(dx.numpy(), reference.grad.numpy(), **CLOSE)


class Net:
    """Two products with a batch norm and a ReLU between them, that takes a batch in parts."""

    def __init__(self, exact: bool) -> None:
        rng = np.random.default_rng(11)
        self.first, self.second = rng.normal(size=(5, 8)), rng.normal(size=(8, 2))
        self.norm, self.exact = nbnorm.BatchNorm(8, dtype=np.float64), exact

    def step(self, xs: list[Any], targets: list[Any]) -> None:
        """One step of gradient descent on the squared error, with gradients accumulated over the parts."""
        hidden = [x @ self.first for x in xs]
        if self.exact:
            normed = self.norm.micro_batches(hidden)
            pullback = self.norm.backward
        else:  # each part normalizes itself
            done = [nbnorm.vjp(nbnorm.batch_norm, h, weight=self.norm.weight, training=True) for h in hidden]
            normed = [y for y, _ in done]
            pullback = lambda dys: [back(dy).x for (_, back), dy in zip(done, dys, strict=True)]  # noqa: E731
        active = [np.maximum(y, 0) for y in normed]
        errors = [a @ self.second - target for a, target in zip(active, targets, strict=True)]
        dnormed = [(e @ self.second.T) * (y > 0) for e, y in zip(errors, normed, strict=True)]
        dsecond = sum(a.T @ e for a, e in zip(active, errors, strict=True))
        dfirst = sum(x.T @ dh for x, dh in zip(xs, pullback(dnormed), strict=True))
        self.first -= 1e-3 * dfirst
        self.second -= 1e-3 * dsecond


def test_gradient_accumulation() -> None:
    """Ten steps over five parts end where steps over the whole batch end; parts on their own do not."""
    whole, parts, naive = Net(True), Net(True), Net(False)
    rng = np.random.default_rng(12)
    for _ in range(10):
        x, target = rng.normal(size=(20, 5)), rng.normal(size=(20, 2))
        whole.step([x], [target])
        for net in (parts, naive):
            net.step(np.split(x, 5), np.split(target, 5))
    np.testing.assert_allclose(parts.first, whole.first, rtol=1e-10)
    np.testing.assert_allclose(parts.second, whole.second, rtol=1e-10)
    np.testing.assert_allclose(parts.norm.running_var, whole.norm.running_var, rtol=1e-12)
    assert parts.norm.num_batches_tracked == 10
    assert abs(naive.first - whole.first).max() > 1e-3


def measured(*xs: Any) -> Any:
    micro = nbnorm.MicroBatchNorm()
    for x in xs:
        micro.measure(x)
    return micro


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: measured().normalize(X), RuntimeError, "normalize needs measure of all parts before it"),
        (lambda: measured(X).gradient(X, DY), RuntimeError, "gradient needs measure_gradient of all parts before it"),
        (lambda: (m := measured(X)).normalize(X) is m.measure(X), RuntimeError, "measure must come before all else"),
        (lambda: measured(X[:1, :, :1, :1]).normalize(X), ValueError, "must have more than 1 value per channel"),
        (lambda: measured(X, X[:, :2]), ValueError, r"other must have shape \(3,\)"),
        (lambda: measured(X).normalize(X[:, :2]), ValueError, r"running_mean must have shape \(2,\)"),
        (lambda: measured(X).measure_gradient(X, DY[:3]), ValueError, "dy must have x's shape"),
        (lambda: nbnorm.MicroBatchNorm(channel_axis=7).measure(X), ValueError, "channel_axis must be an axis of x"),
        (lambda: nbnorm.BatchNorm(3).micro_batches([]), ValueError, "xs must have at least one part"),
        (lambda: two_parts().backward([DY]), ValueError, "dy must be a sequence of 2 parts, as x was; got 1"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def two_parts() -> Any:
    layer = nbnorm.BatchNorm(3, dtype=np.float64)
    layer.micro_batches([X, X])
    return layer
