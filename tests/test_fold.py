"""A batch norm folded into the map before it: the same results from one operation less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import nbnorm

RNG = np.random.default_rng(14)


def layer_of(channels: int, dtype: Any = np.float64, **keys: Any) -> Any:
    """In evaluation, with parameters and statistics that are not those of a new layer."""
    layer = nbnorm.BatchNorm(channels, dtype=dtype, **keys)
    layer(RNG.normal(3.0, 2.0, (9, channels)).astype(dtype))
    for param in (layer.weight, layer.bias):
        if param is not None:
            param[:] = RNG.normal(size=channels)
    return layer.eval()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear(affine: bool, with_bias: bool) -> None:
    x, weight = RNG.normal(size=(7, 5)), RNG.normal(size=(4, 5))
    bias = RNG.normal(size=4) if with_bias else None
    layer = layer_of(4, affine=affine)
    expected = layer(x @ weight.T + (0 if bias is None else bias))
    folded, shift = nbnorm.fold_batch_norm(weight, bias, layer)
    np.testing.assert_allclose(x @ folded.T + shift, expected, rtol=1e-12, atol=1e-12)
    last, again = nbnorm.fold_batch_norm(weight.T, bias, layer, output_axis=-1)
    np.testing.assert_array_equal(last, folded.T)
    np.testing.assert_array_equal(again, shift)


@pytest.mark.parametrize(("transposed", "padding"), [(False, 0), (False, 1), (True, 1)])
def test_torchs_convolutions(transposed: bool, padding: int) -> None:
    """With padding too: the norm comes after the map, so the zeros at the border stay zeros."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    conv, norm = kind(3, 6, 3, stride=2, padding=padding), torch.nn.BatchNorm2d(6)
    x = torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        norm(conv(x) * 3 + 1)
        norm.weight.uniform_(0.5, 2)
        expected = norm.eval()(conv(x))
        layer = nbnorm.BatchNorm.from_state(nbnorm.exchange.read_torch(norm.state_dict())).eval()
        weight, bias = nbnorm.fold_batch_norm(conv.weight, conv.bias, layer, output_axis=int(transposed))
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    assert type(weight) is torch.Tensor
    assert weight.dtype is torch.float32


def test_the_demos_network() -> None:
    """Both blocks of the trained network, folded: the same logits without its norms."""
    from nbnorm.demo.network import BatchNorm, Convolution, Network

    network = Network(0, batch_norm=True, dtype=np.float64)
    images = RNG.normal(size=(8, 1, 8, 8))
    for _ in range(3):
        network.forward(images + RNG.normal(size=images.shape))
    expected = network.forward(images, "running")
    for conv, norm in zip(network.layers, network.layers[1:]):
        if isinstance(conv, Convolution) and isinstance(norm, BatchNorm):
            conv.weight, conv.bias = nbnorm.fold_batch_norm(conv.weight, conv.bias, norm.norm)
    network.layers = [layer for layer in network.layers if layer not in network.norms]
    np.testing.assert_allclose(network.forward(images), expected, rtol=1e-10, atol=1e-10)


def test_float16_is_rounded_once() -> None:
    weight = RNG.normal(size=(4, 5)).astype("f2")
    layer = layer_of(4, np.float32)
    folded, bias = nbnorm.fold_batch_norm(weight, None, layer)
    wide, _ = nbnorm.fold_batch_norm(weight.astype("f8"), None, layer)
    assert folded.dtype == bias.dtype == np.float16
    np.testing.assert_array_equal(folded, wide.astype("f2"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation must be None: .*; got 'relu'"),
        ({"layer": nbnorm.BatchNorm(4)}, ValueError, r"call eval\(\); got batch statistics"),
        ({"layer": nbnorm.BatchNorm(4, track_running_stats=False).eval()}, ValueError, "got batch statistics"),
        ({"layer": nbnorm.LayerNorm(4)}, TypeError, "layer must be a BatchNorm; got LayerNorm"),
        ({"layer": nbnorm.BatchNorm(3).eval()}, ValueError, r"weight must have 3 outputs on axis 0, .* got \(4, 5\)"),
        ({"output_axis": 2}, ValueError, r"output_axis must be an axis of weight \(4, 5\); got 2"),
        ({"bias": np.ones(5)}, ValueError, r"bias must have shape \(4,\), as layer has channels; got \(5,\)"),
        ({"weight": np.ones((4, 5), int)}, TypeError, "weight must be of dtype"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"weight": np.ones((4, 5)), "bias": None, "layer": layer_of(4)} | change
    with pytest.raises(error, match=message):
        nbnorm.fold_batch_norm(**arguments)


def test_what_does_not_fit_is_refused() -> None:
    layer = nbnorm.BatchNorm(3).eval()
    layer.running = nbnorm.RunningStatistics(np.zeros(3), np.full(3, 1e-8))
    with pytest.raises(ValueError, match="weight must be finite when folded, and fit into float16"):
        nbnorm.fold_batch_norm(np.full((3, 2), 6e4, "f2"), None, layer)
