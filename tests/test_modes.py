"""Train, eval, frozen: three switches, their named settings, and what each makes a call do."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm

RNG = np.random.default_rng(5)
X, DY = RNG.normal(3.0, 2.0, (2, 6, 4, 5))
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def trained(**keys: Any) -> Any:
    """A layer that has seen a batch, and whose parameters are not 1 and 0."""
    layer = nbnorm.BatchNorm(4, dtype=np.float64, **keys)
    layer(X - 1.0)
    layer.weight[:], layer.bias[:] = np.linspace(0.5, 2, 4), np.linspace(-1, 1, 4)
    return layer


def switches(layer: Any) -> tuple[str, bool, bool]:
    return layer.statistics, layer.tracking, layer.trainable


@pytest.mark.parametrize(
    ("statistics", "tracking", "trainable"), list(itertools.product(["batch", "running"], [True, False], [True, False]))
)
def test_each_switch_is_its_own(statistics: str, tracking: bool, trainable: bool, backend: str) -> None:
    """All eight settings: the statistics that normalize, the update, and the gradients, each against the oracle."""
    layer = trained()
    layer.statistics, layer.tracking, layer.trainable = statistics, tracking, trainable
    assert switches(layer) == (statistics, tracking, trainable)
    mean, var = layer.running_mean, layer.running_var
    fixed = (mean, var) if statistics == "running" else None
    expected = norm("batch_norm", X, layer.weight, layer.bias, 1e-5, DY, fixed=fixed)
    with nbnorm.use_backend(backend):
        y = layer(X)
        dx = layer.backward(DY)
    np.testing.assert_allclose(y, expected.y.astype(float), **CLOSE)
    np.testing.assert_allclose(dx, expected.dx.astype(float), **CLOSE)
    if tracking:
        new_mean, new_var = X.mean(axis=(0, 2)), X.var(axis=(0, 2), ddof=1)
        np.testing.assert_allclose(layer.running_mean, 0.9 * mean + 0.1 * new_mean, **CLOSE)
        np.testing.assert_allclose(layer.running_var, 0.9 * var + 0.1 * new_var, **CLOSE)
    else:
        assert layer.running_mean is mean
        assert layer.running_var is var
    if trainable:
        np.testing.assert_allclose(layer.grads["weight"], expected.dweight.astype(float), **CLOSE)
        np.testing.assert_allclose(layer.grads["bias"], expected.dbias.astype(float), **CLOSE)
    else:
        assert layer.grads == {}


def test_named_settings() -> None:
    layer = trained()
    assert switches(layer) == ("batch", True, True)
    assert switches(layer.eval()) == ("running", False, True)
    assert not layer.training
    assert switches(layer.train()) == ("batch", True, True)
    layer.trainable = False
    assert switches(layer.train()) == ("batch", True, False)  # train and eval leave weight and bias alone


def test_frozen_until_unfreeze() -> None:
    layer = trained()
    assert layer.freeze() is layer
    assert layer.frozen
    for _ in range(2):
        layer.train()
        assert switches(layer) == ("running", False, False)
    before = layer.state_dict()
    layer(X)
    layer.backward(DY)
    assert layer.grads == {}
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
    assert layer.unfreeze() is layer
    assert not layer.frozen
    assert switches(layer) == ("batch", True, True)


def test_unfreeze_goes_to_what_was_asked_for_since() -> None:
    layer = trained().freeze()
    layer.freeze().eval()
    assert switches(layer.unfreeze()) == ("running", False, True)
    assert switches(layer.unfreeze()) == ("running", False, True)


def test_freeze_all_but_the_affine_parameters() -> None:
    layer = trained().freeze(affine=False).train()
    assert switches(layer) == ("running", False, True)
    layer(X)
    layer.backward(DY)
    assert set(layer.grads) == {"weight", "bias"}
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize(
    "layer",
    [nbnorm.LayerNorm(5), nbnorm.RMSNorm(5), nbnorm.GroupNorm(2, 4), nbnorm.InstanceNorm(4, affine=True)],
    ids=lambda layer: type(layer).__name__,
)
def test_norms_without_running_statistics_freeze_too(layer: Any) -> None:
    x = X.astype("f4")
    before = layer.train()(x)
    np.testing.assert_array_equal(layer.eval()(x), before)
    layer.freeze().train()(x)
    layer.backward(x)
    assert layer.grads == {}
    layer.unfreeze()(x)
    layer.backward(x)
    assert "weight" in layer.grads


def test_instance_norm_with_running_statistics_is_torchs() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    theirs = torch.nn.InstanceNorm1d(4, affine=True, track_running_stats=True, dtype=torch.float64)
    ours = nbnorm.InstanceNorm(4, affine=True, track_running_stats=True, dtype=np.float64)
    for x in (X, DY):
        with torch.no_grad():
            np.testing.assert_allclose(ours(x), theirs(torch.from_numpy(x)).numpy(), **CLOSE)
    np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), **CLOSE)
    np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), **CLOSE)
    with torch.no_grad():
        np.testing.assert_allclose(ours.eval()(X), theirs.eval()(torch.from_numpy(X)).numpy(), **CLOSE)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_training_is_torchs_step_by_step() -> None:
    """Train, eval and a cumulative average, with PyTorch's own layer beside it."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    for momentum in (0.3, None):
        theirs = torch.nn.BatchNorm1d(4, momentum=momentum, dtype=torch.float64)
        ours = nbnorm.BatchNorm(4, momentum=momentum, dtype=np.float64)
        for step, training in enumerate([True, True, False, True, False]):
            x = X[: 6 - step]
            with torch.no_grad():
                expected = theirs.train(training)(torch.from_numpy(x)).numpy()
            np.testing.assert_allclose(ours.train(training)(x), expected, **CLOSE)
        for name, value in theirs.state_dict().items():
            np.testing.assert_allclose(ours.state_dict()[name], value.numpy(), **CLOSE)


def test_batch_norm_without_running_statistics() -> None:
    layer = nbnorm.BatchNorm(4, track_running_stats=False, dtype=np.float64)
    np.testing.assert_array_equal(layer.eval()(X), layer.train()(X))
    assert (layer.running, layer.running_mean, layer.num_batches_tracked, layer.tracking) == (None, None, 0, False)
    assert list(layer.state_dict()) == ["weight", "bias"]
    for name, value in (("statistics", "running"), ("tracking", True)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            setattr(layer, name, value)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: setattr(trained(), "statistics", "runing"), ValueError, "statistics must be one of batch, running"),
        (lambda: setattr(trained(), "tracking", 1), TypeError, "tracking must be True or False; got 1"),
        (lambda: setattr(trained(), "trainable", None), TypeError, "trainable must be True or False; got None"),
        (lambda: setattr(trained(), "training", False), AttributeError, "training"),
        (lambda: trained().train("no"), TypeError, "mode must be True or False; got 'no'"),
        (lambda: trained().freeze(affine=0), TypeError, "affine must be True or False; got 0"),
        (lambda: trained()(X, update="yes"), TypeError, "update must be True or False; got 'yes'"),
        (lambda: trained()(X, token=3), TypeError, "token must be a nbnorm.Token; got int"),
        (lambda: trained(momentum=1.5), ValueError, "momentum must be from 0 to 1, or None; got 1.5"),
        (lambda: trained(nonfinite="ignore"), ValueError, "nonfinite must be one of raise, skip, skip_channel"),
        (lambda: nbnorm.RMSNorm(()), ValueError, "normalized_shape must have at least one length"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_nothing_ambient() -> None:
    """The switches of one layer are no other's, and a mode that was set outlives whatever runs between."""
    one, other = trained(), trained()
    one.freeze()
    assert switches(other) == ("batch", True, True)
    with nbnorm.use_backend("numpy"):
        other(X)
    assert switches(one) == ("running", False, False)


def test_group_norm_in_its_place() -> None:
    layer = trained()
    group = layer.to_group_norm(2)
    expected = norm("group_norm", X, layer.weight, layer.bias, 1e-5, num_groups=2)
    np.testing.assert_allclose(group(X), expected.y.astype(float), **CLOSE)
    group.weight[:] = 0
    assert layer.weight.all()
    assert [nbnorm.BatchNorm(c).to_group_norm().num_groups for c in (64, 48, 7, 37)] == [32, 24, 7, 1]
    assert nbnorm.BatchNorm(4, affine=False).to_group_norm().weight is None
    with pytest.raises(ValueError, match=re.escape("num_groups must divide num_channels 4; got 3")):
        layer.to_group_norm(3)
