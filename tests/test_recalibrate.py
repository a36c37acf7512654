"""Statistics of a whole data set, from batches of any sizes."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest

import nbnorm

RNG = np.random.default_rng(9)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def alternating(middle: float, size: int) -> np.ndarray:
    """m - 1, m + 1, m - 1 and so on, in one channel."""
    return (middle + np.where(np.arange(size) % 2, 1.0, -1.0))[:, None].astype("f4")


UNEVEN = [alternating(middle, size) for middle, size in ((0, 64), (10, 64), (100, 2))]


def test_unequal_batches_are_weighed_by_size() -> None:
    layer = nbnorm.BatchNorm(1)
    nbnorm.recalibrate(layer, [layer], UNEVEN)
    everything = np.concatenate(UNEVEN).astype("f8")
    assert layer.running_mean[0] == pytest.approx(6.4615, abs=5e-5)
    assert layer.running_var[0] == pytest.approx(162.33, abs=5e-3)
    np.testing.assert_allclose(layer.running_mean, everything.mean(axis=0), **CLOSE)
    np.testing.assert_allclose(layer.running_var, everything.var(axis=0), **CLOSE)
    assert layer.num_batches_tracked == 3


def test_torchs_update_bn_weighs_batches_alike() -> None:
    """What the figures are compared with: each batch counts once, and the variance between them is not there."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
    torch.optim.swa_utils.update_bn([torch.from_numpy(batch) for batch in UNEVEN], module)
    assert module[0].running_mean.item() == pytest.approx(36.67, abs=5e-3)
    assert module[0].running_var.item() == pytest.approx(1.344, abs=5e-4)


def test_each_layer_is_exact_for_what_reaches_it() -> None:
    """Two norms with a ReLU and a product between them: the second's inputs come of the first by batch statistics."""
    first, second = nbnorm.BatchNorm(3, dtype=np.float64), nbnorm.BatchNorm(2, momentum=None, dtype=np.float64)
    first.weight[:], first.bias[:] = [1.0, 2.0, 0.5], [0.1, 0.0, -0.2]
    mixing = RNG.normal(size=(3, 2))
    batches = [RNG.normal(middle, 2.0, (size, 3)) for middle, size in ((0, 7), (4, 20), (-3, 2))]
    reached = []

    def forward(x: np.ndarray) -> np.ndarray:
        y = first(x)
        reached.append(np.maximum(y, 0) @ mixing)
        return second(reached[-1])

    second.freeze()
    first.eval()
    nbnorm.recalibrate(forward, [first, second], iter(batches))
    for layer, inputs in ((first, batches), (second, reached)):
        whole = np.concatenate(inputs)
        np.testing.assert_allclose(layer.running_mean, whole.mean(axis=0), **CLOSE)
        np.testing.assert_allclose(layer.running_var, whole.var(axis=0), **CLOSE)
    for x, y in zip(batches, reached, strict=True):  # by batch statistics indeed
        xhat = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
        np.testing.assert_allclose(y, np.maximum(xhat * first.weight + first.bias, 0) @ mixing, rtol=1e-10, atol=1e-10)
    assert (first.statistics, first.tracking, first.training) == ("running", False, False)
    assert second.frozen
    assert second.statistics == "running"


def test_a_layer_that_is_called_twice() -> None:
    layer, x = nbnorm.BatchNorm(1, dtype=np.float64), RNG.normal(size=(8, 1))
    nbnorm.recalibrate(lambda batch: (layer(batch), layer(3 * batch, update=False)), [layer, layer], [x])
    np.testing.assert_allclose(layer.running_var, np.concatenate([x, 3 * x]).var(axis=0), **CLOSE)
    assert layer.pending is None


def test_the_variance_of_a_data_set_is_the_same_in_every_convention() -> None:
    for convention in ("torch", "keras"):
        layer = nbnorm.BatchNorm.with_convention(convention, 1)
        nbnorm.recalibrate(layer, [layer], UNEVEN)
        for target in ("torch", "keras"):
            converted = nbnorm.conventions.convert(layer.state_dict(), target)
            assert converted["running_var"][0] == layer.running_var[0] == pytest.approx(162.33, abs=5e-3)
        layer(UNEVEN[0])
        assert layer.running.elements_per_batch is None


def failing(batch: np.ndarray) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("forward", "batches", "error", "message"),
    [
        (None, [], ValueError, r"layers\[0\] has no statistics: forward did not call it"),
        (None, [UNEVEN[0][:0]], ValueError, r"layers\[0\] has no statistics: forward did not call it"),
        (
            None,
            [*UNEVEN, np.full((4, 1), np.nan, "f4")],
            FloatingPointError,
            r"NaN, Inf or an overflow in channels \[0\]",
        ),
        (failing, UNEVEN, KeyboardInterrupt, "^$"),
        (None, [np.ones((4, 2), "f4")], ValueError, r"weight must have shape \(2,\)"),
    ],
)
def test_after_an_error_all_is_as_before(
    forward: Any, batches: list[Any], error: type[BaseException], message: str
) -> None:
    layer, other = nbnorm.BatchNorm(1), nbnorm.BatchNorm(1).eval()
    layer(UNEVEN[0])
    running = layer.running
    with pytest.raises(error, match=message):
        nbnorm.recalibrate(forward or layer, [layer, other], batches)
    assert layer.running is running
    assert layer.pending is None
    layer(UNEVEN[1])
    assert layer.num_batches_tracked == 2
    assert (other.statistics, other.tracking, other.num_batches_tracked) == ("running", False, 0)


def test_what_cannot_be_recalibrated() -> None:
    for layer in (nbnorm.LayerNorm(3), nbnorm.BatchNorm(3, track_running_stats=False)):
        with pytest.raises(TypeError, match="layers must be BatchNorm with running statistics"):
            nbnorm.recalibrate(layer, [layer], [])


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich", reason="rich is not installed (it comes with the cli extra)")
    layer = nbnorm.BatchNorm(1)
    nbnorm.recalibrate(layer, [layer], UNEVEN, progress=True)
    assert "recalibrating" in (shown := capsys.readouterr().err)
    assert "3/3" in shown
    nbnorm.recalibrate(layer, [layer], iter(UNEVEN), progress=True)
    nbnorm.recalibrate(layer, [layer], UNEVEN, progress=False)
    assert math.isclose(layer.running_var[0], 162.33, abs_tol=5e-3)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["train", "eval", "freeze", "unfreeze"])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_that_forward_sets_are_undone(name: str, fails: bool) -> None:
    def forward(x: Any) -> None:
        layer(x)
        getattr(layer, name)()
        if fails:
            raise KeyError(name)

    def modes() -> tuple[Any, ...]:
        return layer.training, layer.frozen, layer.statistics, layer.tracking, layer.trainable

    for set_up in ("train", "eval", "freeze"):
        layer = getattr(nbnorm.BatchNorm(2), set_up)()
        before, running = modes(), layer.running
        with pytest.raises(KeyError) if fails else contextlib.nullcontext():
            nbnorm.recalibrate(forward, [layer], [RNG.normal(size=(8, 2)).astype("f4")])
        assert modes() == before
        assert (layer.running is running) == fails
        layer.unfreeze()
        assert layer.statistics == ("running" if set_up == "eval" else "batch")


def test_what_was_pending_does_not_enter_the_new_statistics() -> None:
    layer, x = nbnorm.BatchNorm(2), RNG.normal(size=(8, 2)).astype("f4")
    layer(x, update=False)
    nbnorm.recalibrate(layer, [layer], [x])
    assert layer.pending is None
