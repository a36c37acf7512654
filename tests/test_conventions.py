"""Conventions: what other systems do, beside the real ones, and what a state becomes in another."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm import conventions
from nbnorm.conventions import State

RNG = np.random.default_rng(7)
BATCHES = RNG.normal(2.0, 3.0, (5, 8, 4))
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def trained(name: str, batches: Any = BATCHES, **arguments: Any) -> Any:
    layer = nbnorm.BatchNorm.with_convention(name, 4, dtype=np.float64, **arguments).train()
    for x in batches:
        layer(x)
    return layer


# ---- defaults and arguments ------------------------------------------------------------------------------------------


def test_defaults_are_those_of_torch() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    theirs, ours = torch.nn.BatchNorm1d(4), nbnorm.BatchNorm.with_convention("torch", 4)
    assert (ours.eps, ours.momentum, ours.channel_axis) == (theirs.eps, theirs.momentum, 1)
    assert set(conventions.CONVENTIONS["torch"].arguments) < set(inspect.signature(torch.nn.BatchNorm1d).parameters)


def test_defaults_are_those_of_keras(keras: Any) -> None:
    theirs, ours = keras.layers.BatchNormalization(), conventions.CONVENTIONS["keras"]
    assert (ours.eps, ours.momentum, ours.channel_axis) == (theirs.epsilon, theirs.momentum, theirs.axis)
    parameters = set(inspect.signature(keras.layers.BatchNormalization).parameters)
    assert set(ours.arguments) - {"trainable"} < parameters  # `trainable` is one of every layer


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("scale", [True, False])
def test_training_is_that_of_keras(keras: Any, steps: int, scale: bool) -> None:
    """Keras computes in float32; a biased and an unbiased variance of 8 elements differ by a seventh."""
    theirs = keras.layers.BatchNormalization(momentum=0.8, epsilon=1e-2, scale=scale)
    ours = trained("keras", BATCHES[:0], momentum=0.8, epsilon=1e-2, scale=scale)
    for x in BATCHES[:steps]:
        np.testing.assert_allclose(ours(x), np.asarray(theirs(x, training=True)), atol=1e-6)
    np.testing.assert_allclose(ours.running_mean, np.asarray(theirs.moving_mean), rtol=1e-6)
    np.testing.assert_allclose(ours.running_var, np.asarray(theirs.moving_variance), rtol=1e-6)
    theirs.trainable = False  # freezing, in Keras's sense: training=True does not update any more
    ours.freeze().train()
    np.testing.assert_allclose(ours(x), np.asarray(theirs(x, training=True)), atol=1e-6)
    np.testing.assert_allclose(ours.running_mean, np.asarray(theirs.moving_mean), rtol=1e-6)


def test_training_is_that_of_onnx() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed (it comes with the test extra)")
    from onnx.reference import ReferenceEvaluator

    x = BATCHES[0].astype("f4")
    names = ["x", "scale", "b", "mean", "var"]
    node = onnx.helper.make_node(
        "BatchNormalization", names, ["y", "m", "v"], training_mode=1, momentum=0.8, epsilon=1e-2
    )
    infos = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in (*names, "y", "m", "v")]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", infos[:5], infos[5:]))
    ones, zeros = np.ones(4, "f4"), np.zeros(4, "f4")
    y, mean, var = ReferenceEvaluator(model).run(None, dict(zip(names, (x, ones, zeros, zeros, ones), strict=True)))
    layer = nbnorm.BatchNorm.with_convention("onnx", 4, momentum=0.8, epsilon=1e-2, training_mode=1)
    np.testing.assert_allclose(layer(x), y, atol=1e-5)
    np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, var, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "arguments", "training", "frozen", "trainable", "ddof"),
    [
        ("torch", {}, True, False, True, 1),
        ("keras", {}, True, False, True, 0),
        ("keras", {"trainable": False}, True, True, False, 0),
        ("tf1", {}, False, False, True, 1),
        ("tf1", {"training": True, "trainable": False, "fused": False}, True, False, False, 0),
        ("flax", {"use_running_average": True}, False, False, True, 0),
        ("flax", {"use_running_average": None}, True, False, True, 0),
        ("onnx", {}, False, False, True, 0),
        ("onnx", {"training_mode": 1}, True, False, True, 0),
    ],
)
def test_what_freezing_means(
    name: str, arguments: dict[str, Any], training: bool, frozen: bool, trainable: bool, ddof: int
) -> None:
    layer = nbnorm.BatchNorm.with_convention(name, 4, **arguments)
    assert (layer.training, layer.frozen, layer.trainable, layer.running.ddof) == (training, frozen, trainable, ddof)
    assert layer.tracking == (training and not frozen)


def test_arguments_without_scale_or_center() -> None:
    layer = nbnorm.BatchNorm.with_convention("flax", 4, use_scale=False, axis=1)
    assert layer.weight is None
    assert layer.bias is not None
    assert layer.channel_axis == 1
    assert next(iter(layer.state_dict())) == "bias"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: nbnorm.BatchNorm.with_convention("caffe", 3),
            ValueError,
            "convention must be one of torch, keras, tf1",
        ),
        (
            lambda: nbnorm.BatchNorm.with_convention("torch", 3, epsilon=1),
            TypeError,
            "torch has no argument 'epsilon' that matters here; it has momentum, eps",
        ),
        (lambda: nbnorm.BatchNorm.with_convention("keras", 3, momentum=99), ValueError, "momentum must be from 0 to 1"),
        (lambda: nbnorm.BatchNorm.with_convention("keras", 3, scale="x"), TypeError, "scale must be True or False"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_table_has_every_convention(capsys: pytest.CaptureFixture[str]) -> None:
    conventions.table()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(conventions.CONVENTIONS)
    assert max(map(len, lines)) <= 120


# ---- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["torch", "keras", "tf1", "flax", "onnx"])
@pytest.mark.parametrize("target", ["torch", "keras", "tf1", "flax", "onnx"])
def test_converted_is_as_trained_there(source: str, target: str) -> None:
    """The same batches through a layer of each: converting one state gives the other."""
    one = trained(source, momentum=0.2 if source == "torch" else 0.8)
    other = trained(target, momentum=0.2 if target == "torch" else 0.8)
    found, expected = conventions.convert(one.state_dict(), target), other.state_dict()
    assert found.metadata["momentum"] == expected.metadata["momentum"]
    assert found.metadata["convention"] == target
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, **CLOSE)
    back = conventions.convert(found, source)
    assert back.metadata["momentum"] == one.state_dict().metadata["momentum"]
    np.testing.assert_allclose(back["running_var"], one.running_var, **CLOSE)
    there = nbnorm.BatchNorm.from_state(back)
    assert (there.momentum, there.eps, there.convention.name) == (one.momentum, one.eps, source)


@pytest.mark.parametrize("momentum", [0.1, 0.01, 0.3, 0.001, 1.0, 0.0])
def test_momentum_is_exact(momentum: float) -> None:
    keras = conventions.CONVENTIONS["keras"]
    assert keras.weight_of_new(keras.weight_of_new(momentum)) == momentum
    assert [keras.weight_of_new(m) for m in (0.99, 0.9, 0.7)] == [0.01, 0.1, 0.3]
    assert keras.weight_of_new(None) is None


def test_conversion_says_what_is_missing() -> None:
    unequal = trained("torch", [BATCHES[0], BATCHES[1][:5]]).state_dict()
    with pytest.raises(nbnorm.StateError, match="elements_per_batch is missing"):
        conventions.convert(unequal, "keras")
    conventions.convert(unequal, "tf1")  # unbiased too: exact
    state = trained("keras").state_dict()
    del state.metadata["elements_per_batch"], state.metadata["initial_weight"]
    with pytest.raises(nbnorm.StateError, match="elements_per_batch is missing"):
        conventions.convert(state, "torch")
    with pytest.raises(nbnorm.StateError, match="the weight of its initial value is missing"):
        conventions.convert(state, "torch", elements_per_batch=8)
    found = conventions.convert(state, "torch", elements_per_batch=8, num_batches=5)
    expected = trained("torch", momentum=0.01)
    np.testing.assert_allclose(found["running_var"], expected.running_var, **CLOSE)
    with pytest.raises(nbnorm.StateError, match="elements_per_batch must be 8, as the statistics know; got 9"):
        conventions.convert(trained("keras").state_dict(), "torch", elements_per_batch=9)
    with pytest.raises(nbnorm.StateError, match="num_batches must be None, as the state knows its history; got 5"):
        conventions.convert(trained("keras").state_dict(), "torch", num_batches=5)
    with pytest.raises(nbnorm.StateError, match="state must say its convention in its metadata"):
        conventions.convert(State({}), "torch")


def test_a_fresh_state_converts() -> None:
    state = nbnorm.BatchNorm(4).state_dict()
    assert conventions.convert(state, "keras")["running_var"].tolist() == [1.0] * 4


# ---- what a layer refuses to load ------------------------------------------------------------------------------------


def spoilt(**changes: Any) -> State:
    """A state of float32 parameters, with some arrays or metadata changed."""
    state = trained("torch").state_dict()
    for name in ("weight", "bias"):
        state[name] = state[name].astype("f4")
    for name, value in changes.items():
        where: Any = state.metadata if isinstance(value, str) else state
        where[name] = value
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (trained("keras").state_dict(), "state's eps must be 1e-05, as the layer's; got 0.001"),
        (trained("keras", epsilon=1e-5).state_dict(), "state's convention must be torch, as the layer's; got keras"),
        (spoilt(ddof="0"), "state's ddof must be 1, as the layer's; got 0"),
        (spoilt(layer="GroupNorm"), "state's layer must be BatchNorm, as the layer's; got GroupNorm"),
        (spoilt(running_var=-np.ones(4)), "var must not be negative; got -1.0 in channel 0"),
        (spoilt(running_mean=np.full(4, np.nan)), r"state\['running_mean'\] must be finite; got NaN or Inf"),
        (spoilt(weight=np.full(4, np.inf, "f4")), r"state\['weight'\] must be finite"),
        (spoilt(weight=np.ones(5)), r"state\['weight'\] must have shape \(4,\); got \(5,\)"),
        (spoilt(weight=np.ones(4, "f8")), r"state\['weight'\] must be of dtype float32, as the layer's; got float64"),
        (spoilt(weight=np.ones(4, int)), r"state\['weight'\] must be of dtype float32, as the layer's; got int64"),
        (spoilt(weight=[[1.0], [1.0, 2.0]]), r"state\['weight'\] must be an array"),
        (spoilt(batches="-3"), "batches must be whole numbers from 0"),
        (spoilt(num_batches_tracked=np.array(3.5)), r"state\['num_batches_tracked'\] must be of dtype int64"),
        (spoilt(batches="[[1"), "batches must be JSON; got '\\[\\[1'"),
        (spoilt(batches="[1, 2, 3]"), "state's running statistics are no such thing"),
        (spoilt(batches="{}"), "state's running statistics are no such thing"),
        (spoilt(initial_weight='"x"'), "state's running statistics are no such thing"),
        (spoilt(elements_per_batch="2.5"), "state's running statistics are no such thing"),
        (spoilt(extra=np.ones(4)), "state must have the keys"),
    ],
)
def test_a_wrong_state_changes_nothing(state: State, message: str) -> None:
    layer = nbnorm.BatchNorm(4)
    layer(BATCHES[0].astype("f4"), update=False)
    running, pending = layer.running, layer.pending
    with pytest.raises(nbnorm.StateError, match=message):
        layer.load_state_dict(state)
    assert layer.running is running
    assert layer.pending is pending
    assert (layer.weight == 1).all()
    assert not layer.bias.any()


def test_a_state_without_metadata_is_pytorchs() -> None:
    plain = dict(trained("torch").state_dict())
    nbnorm.BatchNorm(4, dtype=np.float64).load_state_dict(plain)
    with pytest.raises(nbnorm.StateError, match="state's convention must be keras, as the layer's; got torch"):
        nbnorm.BatchNorm.with_convention("keras", 4, dtype=np.float64).load_state_dict(plain)


def test_statistics_where_a_layer_has_none_and_none_where_it_has() -> None:
    bare, state = nbnorm.BatchNorm(4, track_running_stats=False), nbnorm.BatchNorm(4).state_dict()
    with pytest.raises(nbnorm.StateError, match="state's convention must be None, as the layer's; got torch"):
        bare.load_state_dict(state)
    with pytest.raises(nbnorm.StateError, match="state must have the keys"):
        bare.load_state_dict(dict(state))
    with pytest.raises(nbnorm.StateError, match="state must have the keys"):
        nbnorm.BatchNorm(4).load_state_dict(bare.state_dict())
    bare.load_state_dict(bare.state_dict())


def test_state_goes_round_through_arrays_and_text() -> None:
    """What files keep: arrays, and metadata apart from them."""
    layer = trained("keras", nonfinite="skip_channel")
    holes = BATCHES[0].copy()
    holes[0, 1] = np.nan
    layer(holes)
    state = layer.state_dict()
    assert all(type(text) is str for text in state.metadata.values())
    other = nbnorm.BatchNorm.with_convention("keras", 4, dtype=np.float64)
    other.load_state_dict(dict(state), state.metadata)
    for name in ("mean", "var", "batches", "initial_weight"):
        np.testing.assert_array_equal(getattr(other.running, name), getattr(layer.running, name))
    assert other.running.batches[0].tolist() == [6, 5, 6, 6]
    assert other.running.elements_per_batch == 8


def test_from_state_needs_what_makes_a_layer() -> None:
    state = trained("torch").state_dict()
    del state.metadata["eps"]
    with pytest.raises(nbnorm.StateError, match="state must say its eps in its metadata; got None"):
        nbnorm.BatchNorm.from_state(state)
    with pytest.raises(nbnorm.StateError, match="state must say its convention"):
        nbnorm.BatchNorm.from_state(State(dict(state)))
