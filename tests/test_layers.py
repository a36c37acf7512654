"""Layers: parameters, modes, gradients and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm

X, DY = np.random.default_rng(0).normal(size=(2, 6, 4, 5)).astype("f4")


def make(name: str) -> Any:
    return {
        "batch": lambda: nbnorm.BatchNorm(4),
        "instance": lambda: nbnorm.InstanceNorm(4, affine=True),
        "layer": lambda: nbnorm.LayerNorm(5),
        "rms": lambda: nbnorm.RMSNorm(5),
        "group": lambda: nbnorm.GroupNorm(2, 4),
    }[name]()


FUNCTIONS = {
    "batch": lambda layer: (nbnorm.batch_norm, (None, None, layer.weight, layer.bias, True)),
    "instance": lambda layer: (nbnorm.instance_norm, (None, None, layer.weight, layer.bias)),
    "layer": lambda layer: (nbnorm.layer_norm, (5, layer.weight, layer.bias)),
    "rms": lambda layer: (nbnorm.rms_norm, (5, layer.weight)),
    "group": lambda layer: (nbnorm.group_norm, (2, layer.weight, layer.bias)),
}


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_layer_is_its_function(name: str, masked: bool) -> None:
    layer = make(name)
    layer.weight[:] = np.linspace(0.5, 2, layer.weight.size)
    if layer.bias is not None:
        layer.bias[:] = np.linspace(-1, 1, layer.bias.size)
    op, args = FUNCTIONS[name](layer)
    mask = np.arange(5) < 4 if masked else None
    y, pullback = nbnorm.vjp(op, X, *args, mask=mask)
    grads = pullback(DY)
    np.testing.assert_array_equal(layer(X, mask=mask), y)
    np.testing.assert_array_equal(layer.backward(DY), grads.x)
    np.testing.assert_array_equal(layer.grads["weight"], grads.weight)
    if layer.bias is not None:
        np.testing.assert_array_equal(layer.grads["bias"], grads.bias)


def test_train_and_eval() -> None:
    layer = nbnorm.BatchNorm(4, momentum=0.5)
    assert layer.train() is layer
    for _ in range(3):
        layer(X)
    assert layer.num_batches_tracked == 3
    mean = X.astype("f8").mean(axis=(0, 2))
    np.testing.assert_allclose(layer.running_mean, mean * (1 - 0.5**3), rtol=1e-5)
    before = layer.state_dict()
    assert layer.eval() is layer
    y = layer(X)
    expected = nbnorm.batch_norm(X, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    np.testing.assert_array_equal(y, expected)
    for key, value in layer.state_dict().items():
        np.testing.assert_array_equal(value, before[key])


def test_a_failed_call_counts_nothing() -> None:
    layer = nbnorm.BatchNorm(4)
    with pytest.raises(ValueError, match="weight must have shape"):
        layer(X[:, :3])
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


def test_state_dict_goes_round_and_is_a_copy() -> None:
    layer, other = nbnorm.BatchNorm(4), nbnorm.BatchNorm(4)
    layer(X)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    other.load_state_dict(state)
    state["weight"][:] = 7
    assert (layer.weight == 1).all()
    assert (other.weight == 1).all()
    np.testing.assert_array_equal(other.running_mean, layer.running_mean)
    assert other.num_batches_tracked == 1
    assert list(nbnorm.LayerNorm(5).state_dict()) == ["weight", "bias"]
    assert nbnorm.GroupNorm(2, 4, affine=False).state_dict() == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": np.ones(3)}, r"state\['weight'\] must have shape \(4,\); got \(3,\)"),
        (
            {"running_var": np.ones(4, complex)},
            r"state\['running_var'\] must be of dtype float64, .* got complex128",
        ),
        ({"weight": np.ma.masked_array(np.ones(4))}, r"state\['weight'\] must be a plain array; got a masked one"),
        ({"extra": np.ones(4)}, "state must have the keys"),
    ],
)
def test_a_wrong_state_changes_nothing(change: dict[str, Any], message: str) -> None:
    layer = nbnorm.BatchNorm(4)
    state = {name: value + 1 for name, value in layer.state_dict().items()} | change
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    assert (layer.weight == 1).all()
    assert layer.num_batches_tracked == 0


def test_a_state_of_the_layers_own_arrays() -> None:
    layer = nbnorm.LayerNorm(3)
    layer.load_state_dict({"weight": layer.bias, "bias": layer.weight})
    assert not layer.weight.any()
    assert layer.bias.all()


def test_state_of_torch_layers() -> None:
    """PyTorch's own state loads, and gives PyTorch's own eval output."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    theirs = torch.nn.BatchNorm1d(4)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 2)
        theirs(torch.from_numpy(X))
    ours = nbnorm.BatchNorm(4)
    ours.load_state_dict({name: value.numpy() for name, value in theirs.state_dict().items()})
    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(ours.eval()(X), expected, atol=1e-6)


def test_backward_before_a_call() -> None:
    with pytest.raises(RuntimeError, match="backward needs a call"):
        nbnorm.LayerNorm(5).backward(DY)


def test_copies_and_pickles_begin_before_the_first_call() -> None:
    import copy
    import pickle

    layer = nbnorm.BatchNorm(4)
    layer(X)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(twin.running_mean, layer.running_mean)
        with pytest.raises(RuntimeError, match="backward needs a call"):
            twin.backward(DY)
        twin(X)
        assert twin.num_batches_tracked == 2
    assert layer.num_batches_tracked == 1
    layer.backward(DY)


def test_without_parameters() -> None:
    layer = nbnorm.BatchNorm(4, affine=False)
    layer(X)
    layer.backward(DY)
    assert layer.weight is None
    assert layer.grads == {}


@pytest.mark.parametrize("axis", [1, -1])
def test_channel_axis(axis: int) -> None:
    x = np.moveaxis(X, 1, axis)
    for layer in (nbnorm.BatchNorm(4, channel_axis=axis), nbnorm.GroupNorm(2, 4, channel_axis=axis)):
        first = type(layer)(*((4,) if isinstance(layer, nbnorm.BatchNorm) else (2, 4)))
        np.testing.assert_allclose(np.moveaxis(layer(x), axis, 1), first(X), atol=2e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_array_kinds(name: str, kind: str) -> None:
    """What goes in comes out, forward and backward, with the same numbers as NumPy's."""
    library = pytest.importorskip(kind, reason=f"{kind} is not installed (it comes with the test-all extra)")
    given = library.from_numpy if kind == "torch" else library.numpy.asarray
    ours, theirs = make(name), make(name)
    y, dx = theirs(given(X)), theirs.backward(given(DY))
    assert type(y) is type(dx) is type(given(X))
    np.testing.assert_array_equal(np.asarray(y), ours(X))
    np.testing.assert_array_equal(np.asarray(dx), ours.backward(DY))
    np.testing.assert_array_equal(theirs.grads["weight"], ours.grads["weight"])


def test_a_derived_layer_loads_its_bases_state() -> None:
    class Named(nbnorm.BatchNorm):
        """One of a user's own."""

    layer = nbnorm.BatchNorm(4)
    layer(X)
    named = Named(4)
    named.load_state_dict(layer.state_dict())
    np.testing.assert_array_equal(named.running_mean, layer.running_mean)
