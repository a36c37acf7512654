"""The demo's data, network and experiment; the command around them is tested in test_cli.py."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import nbnorm
from nbnorm.demo import digits, picture, training
from nbnorm.demo.network import Network, cross_entropy

# Images of each digit in the test part of the data set, as its description lists them.
CLASS_COUNTS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_digits_file_holds_the_published_images() -> None:
    with np.load(files("nbnorm.demo") / "digits.npz", allow_pickle=False) as data:
        images, labels = data["images"], data["labels"]
    assert (images.shape, images.dtype) == ((1797, 8, 8), np.uint8)
    assert (images.min(), images.max(), images.sum(dtype=int)) == (0, 16, 561718)
    assert np.bincount(labels).tolist() == CLASS_COUNTS


def test_digits_name_their_source_and_licence() -> None:
    text = (files("nbnorm.demo") / "DIGITS_LICENSE.md").read_text()
    assert "10.24432/C50P49" in text
    assert "CC BY 4.0" in text


def test_load_splits_without_losing_or_sharing_an_image() -> None:
    train, test = digits.load()
    assert (len(train.images), len(test.images)) == (1413, 384)
    for part in (train, test):
        assert part.images.shape == (len(part.labels), 1, 8, 8)
        assert part.images.dtype == np.float32
        assert (part.images.min(), part.images.max()) == (0.0, 1.0)
    counts = np.bincount(np.concatenate([train.labels, test.labels]))
    assert counts.tolist() == CLASS_COUNTS


@pytest.mark.parametrize("batch_norm", [True, False])
def test_gradients_agree_with_finite_differences(batch_norm: bool) -> None:
    rng = np.random.default_rng(0)
    network = Network(1, batch_norm=batch_norm, dtype=np.float64)
    images, labels = rng.uniform(0, 1, (4, 1, 8, 8)), np.array([3, 1, 4, 1])
    for parameter in network.parameters:  # off the initial zeros and ones
        parameter += 0.1 * rng.standard_normal(parameter.shape)

    _, dlogits = cross_entropy(network.forward(images), labels)
    dimages = network.backward(dlogits)
    arrays, gradients = [images, *network.parameters], [dimages, *network.gradients]
    assert len(arrays) == (11 if batch_norm else 7)

    def loss_after(array: np.ndarray, step: np.ndarray) -> float:
        kept = array.copy()
        array += step
        loss, _ = cross_entropy(network.forward(images), labels)
        array[...] = kept
        return loss

    size = 1e-7  # at 1e-6 a unit crosses the corner of its ReLU, and slopes agree to 1e-4 only
    for array, gradient in zip(arrays, gradients, strict=True):
        direction = rng.standard_normal(array.shape)
        slope = (loss_after(array, size * direction) - loss_after(array, -size * direction)) / (2 * size)
        assert slope == pytest.approx(np.sum(gradient * direction), rel=1e-6, abs=3e-8)


def test_cross_entropy_of_equal_logits() -> None:
    loss, dlogits = cross_entropy(np.zeros((2, 10), np.float32), np.array([0, 9]))
    assert loss == pytest.approx(np.log(10))
    assert dlogits.dtype == np.float32
    expected = np.full((2, 10), 0.05)
    expected[[0, 1], [0, 9]] -= 0.5
    np.testing.assert_allclose(dlogits, expected, atol=1e-7)


def test_one_seed_gives_one_set_of_weights_with_and_without_batch_norm() -> None:
    normed, plain = Network(7, batch_norm=True), Network(7, batch_norm=False)
    shared = [array for array in normed.parameters if array.ndim == 2]
    assert len(shared) == 3
    for mine, theirs in zip(shared, [array for array in plain.parameters if array.ndim == 2], strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_batch_statistics_leave_the_running_ones_alone() -> None:
    train, _ = digits.load()
    images = train.images[:64]
    network, twin = Network(0, batch_norm=True), Network(0, batch_norm=True)
    by_batch = network.forward(images, "batch")
    for layer in network.norms:
        assert not layer.norm.running_mean.any()
        assert layer.norm.num_batches_tracked == 0
    np.testing.assert_array_equal(by_batch, twin.forward(images, "training"))
    assert all(layer.norm.running_mean.any() for layer in twin.norms)
    assert not np.allclose(by_batch, network.forward(images, "running"), atol=0.01)


def test_batches_of_an_epoch_take_each_row_at_most_once() -> None:
    batches = training.shuffled_batches(1413, 2, seed=3)
    assert len(batches) == 44
    epochs = np.reshape(batches, (2, 22 * 64))
    for epoch in epochs:
        assert len(np.unique(epoch)) == epoch.size
    assert (epochs[0] != epochs[1]).any()
    np.testing.assert_array_equal(batches, training.shuffled_batches(1413, 2, seed=3))
    assert (np.array(batches) != training.shuffled_batches(1413, 2, seed=4)).any()


def test_every_backend_trains_to_the_same_losses(backend: str) -> None:
    """Against float64 on NumPy: rounding in float32 moved the first ten losses by 1e-7 at most."""
    train, _ = digits.load()
    batches = training.shuffled_batches(len(train.labels), 1, seed=0)[:10]

    def losses(name: str, dtype: type) -> list[float]:
        data = digits.Digits(train.images.astype(dtype), train.labels)
        with nbnorm.use_backend(name), nbnorm.trace() as decisions:
            found = training.fit(Network(0, batch_norm=True, dtype=dtype), data, batches)
        assert {decision.chosen for decision in decisions} == {name}
        return found

    np.testing.assert_allclose(losses(backend, np.float32), losses("numpy", np.float64), rtol=1e-5)


def test_run_reports_what_the_ordinary_dispatch_chose() -> None:
    shown: list[tuple[str, int]] = []

    def track(sequence, *, description):
        shown.append((description, len(sequence)))
        return sequence

    expected = nbnorm.explain(nbnorm.batch_norm, np.zeros((2, 1), np.float32), training=True).chosen
    report = training.run(2, 0, track)

    assert {decision.chosen for decision in report.decisions} == {expected}
    # Two norms: a warm-up with three kinds of call, 44 steps of training, six batches evaluated in two ways.
    assert report.decisions.total() == 2 * (3 + 44 + 12)
    compared = list(dict.fromkeys([expected, "numpy"]))
    assert list(report.norm_seconds) == compared
    assert all(0 < seconds < report.seconds for seconds in report.norm_seconds.values())
    assert [steps for _, steps in shown] == [1, 44, 44, 44][: 2 + len(compared)]

    assert report.tested == 384
    # Seeds 0 to 2 gave 89 to 91 % with batch norm and 85 to 88 % without; chance is 10 %.
    assert report.correct["running statistics"] > 0.8 * report.tested
    assert report.correct["batch statistics"] > 0.8 * report.tested
    assert report.correct["without batch norm"] > 0.65 * report.tested
    for steps in report.losses.values():
        assert len(steps) == 44
        assert np.mean(steps[-10:]) < 0.5 * np.mean(steps[:10])


def test_run_on_numpy_compares_nothing() -> None:
    with nbnorm.use_backend("numpy"):
        report = training.run(1, 0)
    assert list(report.norm_seconds) == ["numpy"]
    assert {(decision.chosen, decision.source) for decision in report.decisions} == {("numpy", "use_backend")}


@pytest.mark.parametrize(("epochs", "least"), [(1, 40), (3, 1000)])  # one epoch is a single marker
def test_picture_shows_both_curves(tmp_path: Path, epochs: int, least: int) -> None:
    falling = np.geomspace(2, 0.01, 10 * epochs).tolist()
    path = tmp_path / "curves.png"
    picture.save_loss_curves({"with": falling, "without": [2 * loss for loss in falling]}, epochs, path)
    pixels = matplotlib.image.imread(path)
    assert pixels.shape == (675, 1200, 4)
    red, _, blue, _ = np.moveaxis(pixels[150:], -1, 0)  # below the legend
    assert (blue - red > 0.5).sum() > least
    assert (red - blue > 0.5).sum() > least


def test_trace_around_the_demo_lists_numba_for_every_normalization() -> None:
    with nbnorm.trace() as decisions:
        report = training.run(epochs=1, seed=0)
    assert {decision.chosen for decision in decisions} == {"numba"}
    assert len(decisions) == sum(report.decisions.values())
    assert set(report.norm_seconds) == {"numba", "numpy"}
