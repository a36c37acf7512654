"""Statistics as transactions: pending, tokens, what is not finite, and how batches are averaged."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest

import nbnorm
from nbnorm.statistics import Moments

RNG = np.random.default_rng(6)
X = RNG.normal(3.0, 2.0, (24, 3, 5))
PARTS = np.split(X, [5, 6, 15])
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def layer_of(**keys: Any) -> Any:
    return nbnorm.BatchNorm(3, dtype=np.float64, **keys)


def is_untouched(layer: Any) -> bool:
    return not layer.running_mean.any() and bool((layer.running_var == 1).all()) and layer.num_batches_tracked == 0


# ---- pending ---------------------------------------------------------------------------------------------------------


def test_pending_waits_for_commit() -> None:
    waiting, at_once = layer_of(), layer_of()
    np.testing.assert_array_equal(waiting(X, update=False), at_once(X))
    assert is_untouched(waiting)
    assert waiting.pending.count == 24 * 5
    waiting.commit()
    assert waiting.pending is None
    np.testing.assert_array_equal(waiting.running_mean, at_once.running_mean)
    np.testing.assert_array_equal(waiting.running_var, at_once.running_var)
    assert waiting.num_batches_tracked == 1
    waiting.commit()  # nothing is pending: nothing happens
    assert waiting.num_batches_tracked == 1


def test_discard_forgets() -> None:
    layer = layer_of()
    layer(X, update=False)
    layer.discard()
    layer.commit()
    assert is_untouched(layer)


def test_pending_calls_are_one_batch() -> None:
    """Micro-batches enter as the batch that they make together: once, with the variance between them."""
    layer = layer_of()
    for part in PARTS:
        layer(part, update=False)
    layer.commit()
    np.testing.assert_allclose(layer.running_mean, 0.1 * X.mean(axis=(0, 2)), **CLOSE)
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * X.var(axis=(0, 2), ddof=1), **CLOSE)
    assert layer.num_batches_tracked == 1


def test_pending_of_instance_norm_averages_all_samples() -> None:
    layer = nbnorm.InstanceNorm(3, track_running_stats=True, dtype=np.float64)
    for part in PARTS:
        layer(part, update=False)
    layer.commit()
    np.testing.assert_allclose(layer.running_mean, 0.1 * X.mean(axis=2).mean(axis=0), **CLOSE)
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * X.var(axis=2, ddof=1).mean(axis=0), **CLOSE)


def test_nothing_is_pending_where_nothing_is_tracked() -> None:
    layer = layer_of().eval()
    layer(X, update=False)
    assert layer.pending is None


def test_function_and_layer_agree() -> None:
    """The functional way, for arrays that cannot be written: the same numbers as the layer."""
    layer = layer_of()
    mean, var = np.zeros(3), np.ones(3)
    for part in PARTS:
        layer(part)
        _, found = nbnorm.batch_norm(part, training=True, return_moments=True)
        mean, var = found.update(mean, var, 0.1)
    np.testing.assert_array_equal(layer.running_mean, mean)
    np.testing.assert_array_equal(layer.running_var, var)


def test_a_failed_call_changes_nothing() -> None:
    layer = layer_of()
    layer(PARTS[0], update=False)
    pending, running = layer.pending, layer.running
    for bad in (X[:, :2], X.astype(int), X[:1, :, :1]):
        with pytest.raises((ValueError, TypeError)):
            layer(bad, update=False)
    assert layer.pending is pending
    assert layer.running is running


def test_running_arrays_cannot_be_written_by_accident() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match="read-only"):
        layer.running_mean[0] = 3.0
    with pytest.raises(AttributeError):
        layer.running_mean = np.ones(3)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def test_a_token_updates_once() -> None:
    """As under activation checkpointing: forwards of all parts, then each again, in another order."""
    layer, other = layer_of(), layer_of()
    tokens = [nbnorm.Token() for _ in PARTS]
    first = [layer(part, token=token) for part, token in zip(PARTS, tokens, strict=True)]
    once = layer.running
    for part, token, y in reversed(list(zip(PARTS, tokens, first, strict=True))):
        np.testing.assert_array_equal(layer(part, token=token), y)
        layer.backward(part)  # of the forward that was computed again
    assert layer.running is once
    assert layer.num_batches_tracked == len(PARTS)
    other(X, token=tokens[0])  # each layer of the network takes its own
    assert other.num_batches_tracked == 1


@pytest.mark.parametrize("with_token", [True, False])
def test_torchs_activation_checkpointing(with_token: bool) -> None:
    """The real one: it runs the forward again in the backward."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    layer = layer_of()
    token = nbnorm.Token() if with_token else None

    class Norm(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return layer(x.detach(), token=token)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> Any:
            return layer.backward(dy)

    x, w = torch.from_numpy(X).requires_grad_(), torch.linspace(-1, 1, 5, dtype=torch.float64)
    y = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(Norm.apply(x)) * w, x, use_reentrant=False)
    y.sum().backward()
    assert layer.num_batches_tracked == (1 if with_token else 2)
    reference = torch.from_numpy(X).requires_grad_()
    (torch.tanh(torch.nn.functional.batch_norm(reference, None, None, training=True)) * w).sum().backward()
    np.testing.assert_allclose(x.grad.numpy(), reference.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_a_token_and_pending() -> None:
    layer, token = layer_of(), nbnorm.Token()
    for _ in range(3):
        layer(X, token=token, update=False)
    assert layer.pending.count == 24 * 5
    layer.commit()
    layer(X, token=token)
    assert layer.num_batches_tracked == 1


def test_a_failed_call_does_not_use_up_the_token() -> None:
    layer, token = layer_of(), nbnorm.Token()
    with pytest.raises(FloatingPointError):
        layer(np.where(X > 5, np.inf, X), token=token)
    layer(X, token=token)
    assert layer.num_batches_tracked == 1


# ---- what is not finite ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("update", [True, False])
def test_what_is_not_finite(bad: float, update: bool) -> None:
    """1e300 is finite, and its square is not."""
    x = X.copy()
    x[3, 1, 2] = bad
    loud, skips, spares = (layer_of(nonfinite=policy) for policy in ("raise", "skip", "skip_channel"))
    with pytest.raises(FloatingPointError, match=r"NaN, Inf or an overflow in channels \[1\]"):
        loud(x, update=update)
    skips(x, update=update)
    skips.commit()
    assert is_untouched(loud)
    assert is_untouched(skips)
    spares(x, update=update)
    spares.commit()
    expected = 0.1 * X.mean(axis=(0, 2))
    expected[1] = 0.0
    np.testing.assert_allclose(spares.running_mean, expected, **CLOSE)
    assert spares.running_var[1] == 1
    assert spares.running.batches[:, 0].tolist() == [1, 1]
    assert spares.running.batches[:, 1].tolist() == [0, 0]


def test_a_skipped_channel_averages_what_it_has_seen() -> None:
    layer = layer_of(momentum=None, nonfinite="skip_channel")
    spoilt = PARTS[0].copy()
    spoilt[0, 2, 0] = np.nan
    for part in (spoilt, *PARTS[1:]):
        layer(part)
    means = np.stack([part.mean(axis=(0, 2)) for part in PARTS])
    np.testing.assert_allclose(layer.running_mean[:2], means[:, :2].mean(axis=0), **CLOSE)
    np.testing.assert_allclose(layer.running_mean[2], means[1:, 2].mean(), **CLOSE)


def test_evaluation_does_not_mind() -> None:
    layer = layer_of().eval()
    assert np.isnan(layer(np.where(X > 5, np.nan, X))).any()


def test_a_bad_part_does_not_spoil_what_is_pending() -> None:
    layer = layer_of(nonfinite="skip")
    layer(PARTS[0], update=False)
    layer(np.full_like(PARTS[1], np.nan), update=False)
    layer(PARTS[2], update=False)
    layer.commit()
    both = np.concatenate((PARTS[0], PARTS[2]))
    np.testing.assert_allclose(layer.running_var, 0.9 + 0.1 * both.var(axis=(0, 2), ddof=1), **CLOSE)


# ---- averages --------------------------------------------------------------------------------------------------------


def by_hand(weights: np.ndarray, initial: float) -> tuple[np.ndarray, np.ndarray]:
    """Weighted sums of the parts' statistics, and of the initial ones."""
    means = np.stack([part.mean(axis=(0, 2)) for part in PARTS])
    variances = np.stack([part.var(axis=(0, 2), ddof=1) for part in PARTS])
    return weights @ means, weights @ variances + initial


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, 1e-6])
def test_exponential_average(momentum: float) -> None:
    layer, debiased = layer_of(momentum=momentum), layer_of(momentum=momentum, zero_debias=True)
    for part in PARTS:
        layer(part)
        debiased(part)
    weights = momentum * (1 - momentum) ** np.arange(len(PARTS))[::-1]
    for found, expected in (
        (layer.running, by_hand(weights, (1 - momentum) ** len(PARTS))),
        (debiased.running, by_hand(weights / weights.sum(), 0.0)),
    ):
        np.testing.assert_allclose(found.mean, expected[0], rtol=1e-9)
        np.testing.assert_allclose(found.var, expected[1], rtol=1e-9)
    np.testing.assert_allclose(layer.running.initial_weight, (1 - momentum) ** len(PARTS), rtol=1e-12)
    assert not debiased.running.initial_weight.any()


def test_cumulative_average() -> None:
    layer = layer_of(momentum=None)
    for part in PARTS:
        layer(part)
    expected = by_hand(np.full(4, 0.25), 0.0)
    np.testing.assert_allclose(layer.running_mean, expected[0], **CLOSE)
    np.testing.assert_allclose(layer.running_var, expected[1], **CLOSE)


def test_a_bfloat16_model_does_not_stall() -> None:
    """In bfloat16 the average would stop where 0.1 of the distance is below half a unit in the last place."""
    bfloat16 = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16
    layer = nbnorm.BatchNorm(1, momentum=0.01, dtype=bfloat16)
    x = np.array([[99.0], [101.0]], bfloat16)
    stalled = bfloat16(0.0)
    for _ in range(1500):
        assert layer(x).dtype == bfloat16
        stalled = bfloat16(bfloat16(0.99) * stalled + bfloat16(0.01) * bfloat16(100.0))
    assert layer.running_mean[0] == pytest.approx(100 * (1 - 0.99**1500), rel=1e-12)
    assert abs(float(stalled) - 100) > 20


def test_empty_batches_change_nothing() -> None:
    layer = layer_of(momentum=None)
    layer(X)
    before = layer.running
    for empty in (X[:0], X[:, :, :0]):
        assert layer(empty).shape == empty.shape
        layer(empty, update=False)
    layer(X, mask=np.zeros((1, 1, 1), bool))
    assert layer.running is before
    assert layer.pending is None
    assert not layer.backward(np.ones_like(X)).any()


def test_masked_channels() -> None:
    """None valid: the channel keeps both; a single valid element: it keeps its variance."""
    mask = np.ones((24, 3, 5), bool)
    mask[:, 1] = False
    mask[:, 2] = False
    mask[0, 2, 0] = True
    layer = layer_of()
    layer(X, mask=mask)
    assert layer.running_mean.tolist() == [0.1 * X[:, 0].mean(), 0.0, 0.1 * X[0, 2, 0]]
    assert layer.running_var[1:].tolist() == [1.0, 1.0]
    assert layer.running.batches.tolist() == [[1, 0, 1], [1, 0, 0]]


def test_copies_keep_the_statistics() -> None:
    layer = layer_of()
    layer(X)
    layer(X, update=False)
    layer.freeze()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.frozen
        np.testing.assert_array_equal(twin.running_var, layer.running_var)
        twin.commit()
        assert twin.num_batches_tracked == 2
    assert layer.num_batches_tracked == 1


# ---- the statistics themselves ---------------------------------------------------------------------------------------


def test_mixture_is_of_the_pooled_data() -> None:
    """With biased variances and shares by size, the mixture is that of all data together."""
    parts = [nbnorm.RunningStatistics.of(nbnorm.moments(part, (0, 2)), ddof=0) for part in PARTS]
    whole = nbnorm.RunningStatistics.mixture(parts, [len(part) for part in PARTS])
    np.testing.assert_allclose(whole.mean, X.mean(axis=(0, 2)), **CLOSE)
    np.testing.assert_allclose(whole.var, X.var(axis=(0, 2)), **CLOSE)
    assert whole.num_batches_tracked == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"mean": [[1.0]], "var": [[1.0]]}, "mean and var must have one shape"),
        ({"mean": [1.0], "var": [1.0, 2.0]}, "mean and var must have one shape"),
        ({"mean": [np.nan], "var": [1.0]}, "mean must be finite; got nan in channel 0"),
        ({"mean": [1.0, 1.0], "var": [1.0, -1.0]}, "var must not be negative; got -1.0 in channel 1"),
        ({"ddof": 2}, "ddof must be 0 or 1; got 2"),
        ({"batches": -1}, "batches must be whole numbers from 0; got -1"),
        ({"batches": 1.5}, "batches must be whole numbers from 0; got 1.5"),
        ({"initial_weight": 2.0}, "initial_weight must be from 0 to 1, or NaN; got 2.0"),
        ({"elements_per_batch": 1}, "elements_per_batch must be at least 2, or None; got 1"),
    ],
)
def test_bad_statistics(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nbnorm.RunningStatistics(**({"mean": [0.0], "var": [1.0]} | keys))


def test_statistics_refuse_what_makes_no_sense() -> None:
    start = nbnorm.RunningStatistics.initial(3)
    with pytest.raises(ValueError, match=r"running statistics must have shape \(2,\), as the moments have; got \(3,\)"):
        start.update(Moments(4, np.zeros(2), np.zeros(2)))
    with pytest.raises(ValueError, match="mean must be finite; got nan in channel 0"):
        start.update(Moments(4, np.full(3, np.nan), np.zeros(3)))
    with pytest.raises(ValueError, match=r"channels \[0, 1, 2\] have fewer"):
        nbnorm.RunningStatistics.of(Moments(1, np.zeros(3), np.zeros(3)))
    for parts, weights in (([], None), ([start, nbnorm.RunningStatistics.initial(2)], None), ([start], [-1.0])):
        with pytest.raises(ValueError, match="must"):
            nbnorm.RunningStatistics.mixture(parts, weights)


def test_other_statistics_in_a_layer() -> None:
    layer = layer_of()
    layer.running = nbnorm.RunningStatistics(np.ones(3), np.full(3, 4.0))
    np.testing.assert_allclose(layer.eval()(X), (X - 1.0) / np.sqrt(4.0 + 1e-5), **CLOSE)
    for value, error in ((None, TypeError), (nbnorm.RunningStatistics.initial(2), ValueError)):
        with pytest.raises(error, match="running must"):
            layer.running = value
    with pytest.raises(ValueError, match="running must be None"):
        layer_of(track_running_stats=False).running = layer.running


@pytest.mark.parametrize("kind", [nbnorm.BatchNorm, nbnorm.InstanceNorm])
def test_running_statistics_normalize_and_follow(kind: Any) -> None:
    """Both switches on: the old statistics normalize, then the batch's enter; also masked."""
    mask = RNG.random((24, 1, 5)) < 0.7
    mask[:, :, :2] = True
    layer, other = (kind(3, track_running_stats=True, dtype=np.float64) for _ in range(2))
    layer.statistics = "running"
    y = layer(X, mask=mask)
    other(X, mask=mask)
    np.testing.assert_allclose(y, np.where(mask, X / np.sqrt(1 + 1e-5), 0.0), **CLOSE)
    np.testing.assert_allclose(layer.running_mean, other.running_mean, **CLOSE)
    np.testing.assert_allclose(layer.running_var, other.running_var, **CLOSE)


def test_order_of_micro_batches_is_rounding() -> None:
    found = []
    for order in itertools.permutations(PARTS):
        layer = layer_of()
        for part in order:
            layer(part, update=False)
        layer.commit()
        found.append(layer.running_var)
    np.testing.assert_allclose(found, np.broadcast_to(found[0], (24, 3)), rtol=1e-14)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_of_running_statistics_cannot_be_written_either(copied: Any) -> None:
    layer = nbnorm.BatchNorm(2)
    layer(np.array([[1.0, 2.0], [3.0, 5.0]], np.float32))
    other = copied(layer)
    assert (other.running_mean == layer.running_mean).all()
    assert other.running.history() == layer.running.history()
    for array in (other.running_mean, other.running_var, other.running.batches):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_a_negative_sum_of_squares_does_not_enter() -> None:
    layer = nbnorm.BatchNorm(2)
    layer.pending = nbnorm.Moments(5, np.zeros(2), -np.ones(2))
    with pytest.raises(ValueError, match=r"m2 of at least 0; got -1\.0"):
        layer.commit()
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("count", [-1, 7])
def test_a_count_that_contradicts_the_history_is_refused(count: int) -> None:
    layer = nbnorm.BatchNorm(2)
    layer(np.array([[1.0, 2.0], [3.0, 5.0]], np.float32))
    state = layer.state_dict()
    state["num_batches_tracked"] = np.array(count)
    with pytest.raises(nbnorm.StateError, match="num_batches_tracked must be 1"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("momentum", ["zz", "2"])
def test_a_momentum_that_is_none_is_refused(momentum: str) -> None:
    layer = nbnorm.BatchNorm(2)
    state = layer.state_dict()
    state.metadata["momentum"] = momentum
    with pytest.raises(nbnorm.StateError, match="momentum must be a number"):
        layer.load_state_dict(state)


def test_parts_may_come_from_a_generator() -> None:
    layer, x = nbnorm.BatchNorm(2), np.arange(8, dtype=np.float32).reshape(4, 2)
    ys = layer.micro_batches(part for part in (x[:2], x[2:]))
    np.testing.assert_allclose(np.concatenate(ys), nbnorm.BatchNorm(2)(x), atol=1e-6)
