"""States in the files of PyTorch and Keras: the real ones read what is written, and write what is read."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm import checks, conventions, exchange

h5py = pytest.importorskip("h5py", reason="h5py is not installed (it comes with the exchange extra)")
pytest.importorskip("safetensors", reason="safetensors is not installed (it comes with the exchange extra)")

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"
)  # Keras

RNG = np.random.default_rng(8)
X = RNG.normal(2.0, 3.0, (16, 4)).astype("f4")
CLOSE = {"rtol": 0, "atol": 1e-6}


def our_layer(convention: str, **arguments: Any) -> Any:
    """Trained here for some steps."""
    layer = nbnorm.BatchNorm.with_convention(convention, 4, **arguments).train()
    layer.weight[:], layer.bias[:] = np.linspace(0.5, 1.5, 4), np.linspace(-1, 1, 4)
    for seed in range(5):
        layer(np.random.default_rng(seed).normal(2.0, 3.0, (8, 4)).astype(layer.weight.dtype))
    return layer


def torch_module() -> Any:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    with torch.no_grad():
        module[1].weight.uniform_(0.5, 1.5)
        for _ in range(5):
            module[1](torch.from_numpy(X) * 2)
    return module.eval()


def keras_model(keras: Any, **arguments: Any) -> Any:
    """A batch norm between other layers, and one more in a nested model, with statistics of their own."""
    inner = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization(name="inner")], name="nested")
    norm = keras.layers.BatchNormalization(name="norm", momentum=0.8, **arguments)
    model = keras.Sequential([keras.Input((4,)), norm, keras.layers.Dense(4, name="dense"), inner])
    for layer in (norm, inner.layers[0]):
        for step in range(5):
            layer(X * (step + 1), training=True)
    return model


# ---- PyTorch ---------------------------------------------------------------------------------------------------------


def test_from_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    from safetensors.torch import save_file

    module = torch_module()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    with torch.no_grad():
        expected = module[1](torch.from_numpy(X)).numpy()
    for source in (tmp_path / "model.safetensors", module.state_dict()):
        layer = nbnorm.BatchNorm.from_state(exchange.read_torch(source, "1")).eval()
        np.testing.assert_allclose(layer(X), expected, **CLOSE)
        assert layer.num_batches_tracked == 5
        np.testing.assert_allclose(layer.running.initial_weight, 0.9**5)


@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_to_torch(tmp_path: Path, convention: str) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    from safetensors.torch import load_file

    layer, path = our_layer(convention), tmp_path / "norms.safetensors"
    exchange.write_torch(path, {"1": layer.state_dict()})
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4, eps=layer.eps))
    assert module.load_state_dict(load_file(path), strict=False).unexpected_keys == []
    with torch.no_grad():
        found = module.eval()[1](torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, layer.eval()(X), **CLOSE)
    again = nbnorm.BatchNorm.from_state(exchange.read_torch(path, "1"))
    assert (again.convention.name, again.eps, again.momentum) == (convention, layer.eps, layer.momentum)
    np.testing.assert_allclose(again.running_var, layer.running_var, rtol=1e-7)


def test_a_module_in_bfloat16() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    module = torch.nn.BatchNorm1d(4).to(torch.bfloat16).eval()
    layer = nbnorm.BatchNorm.from_state(exchange.read_torch(module.state_dict())).eval()
    x = torch.from_numpy(X).to(torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), module(x), rtol=2**-7, atol=2**-7)
    assert layer.weight.dtype.name == "bfloat16"


def test_numbers_that_a_file_cannot_hold(keras: Any, tmp_path: Path) -> None:
    """A variance of float64 that is Inf in float32: refused, and the file stays."""
    layer, path = our_layer("keras"), tmp_path / "model.weights.h5"
    layer.running = nbnorm.RunningStatistics(np.zeros(4), np.full(4, 1e60), ddof=0)
    keras_model(keras).save_weights(path)
    before = path.read_bytes()
    with pytest.raises(nbnorm.StateError, match=r"norm's running_var must fit into float32; got 1e\+60"):
        exchange.write_keras(path, {"norm": layer.state_dict()})
    assert path.read_bytes() == before
    with pytest.raises(nbnorm.StateError, match=r"running_var must fit into float32"):
        exchange.write_torch(tmp_path / "x.safetensors", {"": layer.state_dict()})
    assert os.listdir(tmp_path) == ["model.weights.h5"]


@pytest.mark.parametrize("package", ["h5py", "safetensors"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    read = exchange.read_keras if package == "h5py" else exchange.read_torch
    with pytest.raises(ImportError, match=rf"needs the package {package}: pip install 'nbnorm\[exchange\]'"):
        read(tmp_path / "any", "norm")


def test_files_keep_their_mode(tmp_path: Path) -> None:
    path, state = tmp_path / "norm.safetensors", our_layer("torch").state_dict()
    exchange.write_torch(path, {"": state})
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    exchange.write_torch(link, {"": state})
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_whole_module_in_float64(tmp_path: Path) -> None:
    layer, path = our_layer("torch", dtype=np.float64), tmp_path / "norm.safetensors"
    exchange.write_torch(path, {"": layer.state_dict()})
    again = exchange.read_torch(path)
    np.testing.assert_array_equal(again["running_var"], layer.running_var)
    assert again.metadata == layer.state_dict().metadata


def test_torch_files_that_are_wrong(tmp_path: Path) -> None:
    path = tmp_path / "norms.safetensors"
    exchange.write_torch(path, {"a.b": our_layer("torch").state_dict()})
    with pytest.raises(nbnorm.StateError, match=r"has no 'c.running_mean'; batch norms lie under .*'a.b'"):
        exchange.read_torch(path, "c")
    whole = path.read_bytes()
    for bad in (whole[:-3], whole[:20], b"", b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(nbnorm.StateError, match=r"norms\.safetensors is no safetensors file"):
            exchange.read_torch(path, "a.b")
    with pytest.raises(FileNotFoundError):
        exchange.read_torch(tmp_path / "none", "a.b")
    state = dict(our_layer("torch").state_dict())
    for name, value, message in (
        ("running_var", -np.ones(4), "var must not be negative"),
        ("running_mean", np.full(4, np.inf), "mean must be finite"),
        ("weight", np.ones(3), "weight must be 4 finite numbers"),
        ("bias", np.full(4, np.nan), "bias must be 4 finite numbers"),
    ):
        with pytest.raises(nbnorm.StateError, match=message):
            exchange.read_torch(state | {name: value})


# ---- Keras -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}], ids=str
)
def test_from_keras(keras: Any, tmp_path: Path, arguments: dict[str, bool]) -> None:
    model, path = keras_model(keras, **arguments), tmp_path / "model.weights.h5"
    model.save_weights(path)
    state = exchange.read_keras(path, "norm", momentum=0.8, **arguments)
    layer = nbnorm.BatchNorm.from_state(state).eval()
    np.testing.assert_allclose(layer(X), np.asarray(model.get_layer("norm")(X, training=False)), **CLOSE)
    assert (layer.momentum, layer.channel_axis) == (0.2, -1)
    inner = nbnorm.BatchNorm.from_state(exchange.read_keras(path, "inner")).eval()
    theirs = model.get_layer("nested").get_layer("inner")
    np.testing.assert_allclose(inner(X), np.asarray(theirs(X, training=False)), **CLOSE)


@pytest.mark.parametrize("convention", ["torch", "keras"])
def test_to_keras(keras: Any, tmp_path: Path, convention: str) -> None:
    layer, path = our_layer(convention), tmp_path / "model.weights.h5"
    model = keras_model(keras, epsilon=layer.eps)
    dense, inner = model.get_layer("dense").get_weights(), model.get_layer("nested").get_weights()
    model.save_weights(path)
    exchange.write_keras(path, {"norm": layer.state_dict()})
    model.load_weights(path)
    np.testing.assert_allclose(np.asarray(model.get_layer("norm")(X, training=False)), layer.eval()(X), **CLOSE)
    for before, after in ((dense, model.get_layer("dense")), (inner, model.get_layer("nested"))):
        for was, now in zip(before, after.get_weights(), strict=True):
            np.testing.assert_array_equal(was, now)


def test_training_goes_on_from_keras(keras: Any, tmp_path: Path) -> None:
    """A step of both after the import: the same statistics; and what the file does not say stays unknown."""
    model, path = keras_model(keras), tmp_path / "model.weights.h5"
    model.save_weights(path)
    layer = nbnorm.BatchNorm.from_state(exchange.read_keras(path, "norm", momentum=0.8)).train()
    theirs = model.get_layer("norm")
    theirs(X, training=True)
    layer(X)
    np.testing.assert_allclose(layer.running_mean, np.asarray(theirs.moving_mean), rtol=1e-6)
    np.testing.assert_allclose(layer.running_var, np.asarray(theirs.moving_variance), rtol=1e-6)
    with pytest.raises(nbnorm.StateError, match="elements_per_batch is missing"):
        conventions.convert(layer.state_dict(), "torch")
    known = exchange.read_keras(path, "norm", momentum=0.8, num_batches=5)
    unbiased = conventions.convert(known, "torch", elements_per_batch=16)["running_var"]
    variances = np.array([(X * (step + 1)).astype("f8").var(axis=0, ddof=1) for step in range(5)])
    expected = 0.8**5 + (0.2 * 0.8 ** np.arange(5)[::-1]) @ variances
    np.testing.assert_allclose(unbiased, expected, rtol=1e-5)


def test_from_torch_to_keras_and_on(keras: Any, tmp_path: Path) -> None:
    """One state through both systems: evaluation stays the same, and training goes on as converted."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    module, path = torch_module(), tmp_path / "model.weights.h5"
    state = exchange.read_torch(module.state_dict(), "1")
    model = keras_model(keras, epsilon=1e-5)
    model.save_weights(path)
    exchange.write_keras(path, {"norm": state})
    model.load_weights(path)
    with torch.no_grad():
        expected = module[1](torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(np.asarray(model.get_layer("norm")(X, training=False)), expected, **CLOSE)
    biased = conventions.convert(state, "keras", elements_per_batch=16)["running_var"]
    np.testing.assert_allclose(biased, 0.9**5 + (1 - 0.9**5) * (X * 2).astype("f8").var(axis=0), rtol=1e-6)


def test_keras_files_that_are_wrong(keras: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.weights.h5"
    keras_model(keras).save_weights(path)
    whole = path.read_bytes()
    with pytest.raises(nbnorm.StateError, match=r"layer must be one of the places or names .*'norm'.*; got 'nrom'"):
        exchange.read_keras(path, "nrom")
    with pytest.raises(nbnorm.StateError, match=r"norm must have 3 variables \(bias, .*\); got 4"):
        exchange.read_keras(path, "norm", scale=False)
    with pytest.raises(nbnorm.StateError, match="variable 0 must be one axis"):
        exchange.read_keras(path, "dense", scale=False, center=False)
    with pytest.raises(nbnorm.StateError, match=r"norm's weight must have shape \(4,\); got \(3,\)"):
        exchange.write_keras(path, {"inner": our_layer("keras").state_dict(), "norm": nbnorm.BatchNorm(3).state_dict()})
    assert path.read_bytes() == whole  # "inner", which would have fitted, has not been written either
    with h5py.File(path, "r+") as file:
        file["layers/batch_normalization/vars/3"][0] = -1.0
    with pytest.raises(nbnorm.StateError, match=r"var must not be negative; got -1\.0 in channel 0"):
        exchange.read_keras(path, "norm")
    for bad in (whole[: len(whole) // 2], whole[:20], b"", b"\xff" * 64):
        path.write_bytes(bad)
        with pytest.raises(nbnorm.StateError, match="cannot be read as HDF5"):
            exchange.read_keras(path, "norm")
    with pytest.raises(FileNotFoundError):
        exchange.read_keras(tmp_path / "none.weights.h5", "norm")
    with pytest.raises(FileNotFoundError):
        exchange.write_keras(tmp_path / "none.weights.h5", {})
    assert os.listdir(tmp_path) == ["model.weights.h5"]  # nothing partial is left


def test_a_flipped_bit_of_a_written_file_is_noticed(tmp_path: Path) -> None:
    path, damaged = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    layer = nbnorm.BatchNorm(2)
    layer(np.array([[1.0, 2.0], [3.0, 5.0]], np.float32))
    state = layer.state_dict()
    exchange.write_torch(path, {"bn": state})
    content, same = path.read_bytes(), 0
    for place in range(len(content)):
        damaged.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        with contextlib.suppress(nbnorm.StateError):
            found = exchange.read_torch(damaged, "bn")
            assert all(np.array_equal(found[name], np.asarray(state[name], found[name].dtype)) for name in found)
            same += 1
    assert same < len(content) // 10


def test_a_state_file_is_not_taken_for_pytorchs(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    nbnorm.state.write_state(path, nbnorm.BatchNorm.with_convention("keras", 2).state_dict())
    with pytest.raises(nbnorm.StateError, match="read_state reads"):
        exchange.read_torch(path)
