"""Statistics by key: time steps of recurrent nets, domains and tasks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

import nbnorm
from oracle import norm

RNG = np.random.default_rng(13)
STEPS = RNG.normal(size=(5, 16, 3)) * np.arange(1, 6)[:, None, None] + np.arange(5)[:, None, None]
LENGTHS = np.array([5, 5, 4, 4, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 1])
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def bank_of(**keys: Any) -> Any:
    return nbnorm.StatsBank(3, **({"dtype": np.float64, "momentum": 1.0} | keys))


def trained(**keys: Any) -> Any:
    bank = bank_of(**keys)
    for t, x in enumerate(STEPS):
        bank(x, t)
    return bank


# ---- time steps ------------------------------------------------------------------------------------------------------


def test_each_step_has_its_statistics() -> None:
    bank = trained()
    for t, x in enumerate(STEPS):
        np.testing.assert_allclose(bank.layers[t].running_mean, x.mean(axis=0), **CLOSE)
        np.testing.assert_allclose(bank.layers[t].running_var, x.var(axis=0, ddof=1), **CLOSE)
    bank.eval()
    for t, x in enumerate(STEPS):
        fixed = x.mean(axis=0), x.var(axis=0, ddof=1)
        np.testing.assert_allclose(bank(x, t), norm("batch_norm", x, fixed=fixed).y.astype(float), **CLOSE)


def test_longer_sequences_than_seen() -> None:
    bank = trained(unseen="last").eval()
    for later in (5, 6, 100):
        np.testing.assert_array_equal(bank(STEPS[0], later), bank(STEPS[0], 4))
    assert bank.seen == list(range(5))
    del bank.layers[0], bank.layers[2]
    np.testing.assert_array_equal(bank(STEPS[0], 2), bank(STEPS[0], 1))
    np.testing.assert_array_equal(bank(STEPS[0], 0), bank(STEPS[0], 1))
    with pytest.raises(KeyError, match=r"key must be one that was seen, \[0, 1, 2, 3, 4\].*; got 5"):
        trained().eval()(STEPS[0], 5)
    assert len(bank.train()(STEPS[0], 5)) == 16  # in training a longer sequence brings steps of its own
    assert bank.seen == [1, 3, 4, 5]


def test_masked_lengths() -> None:
    """At each step only the sequences that go on count, two at the last; the others' elements may be anything."""
    bank = bank_of(unseen="last")
    for t in range(8):
        x = np.where((t < LENGTHS)[:, None], STEPS[min(t, 4)], np.nan)
        y = bank(x, t, mask=(t < LENGTHS)[:, None])
        assert not y[t >= LENGTHS].any()
    assert bank.seen == [0, 1, 2, 3, 4]  # no sequence reaches steps 5 to 7
    for t, x in enumerate(STEPS):
        np.testing.assert_allclose(bank.layers[t].running_mean, x[t < LENGTHS].mean(axis=0), **CLOSE)
        np.testing.assert_allclose(bank.layers[t].running_var, x[t < LENGTHS].var(axis=0, ddof=1), **CLOSE)
    bank.eval()
    np.testing.assert_array_equal(bank(STEPS[0], 6), bank(STEPS[0], 4))


@pytest.mark.parametrize("shared", [True, False])
def test_recurrent_net_has_torchs_gradients(shared: bool) -> None:
    """h = tanh(norm_t(h W) + x_t) through five steps and back, beside autograd."""
    torch = pytest.importorskip("torch", reason="torch is not installed (it comes with the test-all extra)")
    mixing, start = RNG.normal(size=(3, 3)), RNG.normal(size=(16, 3))
    bank = bank_of(shared=shared, weight_init=0.1)
    states, normed = [start], []
    for t, x in enumerate(STEPS):
        normed.append(bank(states[-1] @ mixing, t))
        states.append(np.tanh(normed[-1] + x))
    bank.zero_grads()
    dh, dmixing = np.ones_like(start), np.zeros_like(mixing)
    for t in reversed(range(5)):
        dproduct = bank.backward(dh * (1 - states[t + 1] ** 2), t)
        dmixing += states[t].T @ dproduct
        dh = dproduct @ mixing.T

    w = torch.from_numpy(mixing).requires_grad_()
    gammas = [torch.full((3,), 0.1, dtype=torch.float64, requires_grad=True) for _ in range(1 if shared else 5)]
    h = torch.from_numpy(start)
    for t, x in enumerate(STEPS):
        gamma = gammas[0 if shared else t]
        h = torch.tanh(torch.nn.functional.batch_norm(h @ w, None, None, gamma, training=True) + torch.from_numpy(x))
    h.sum().backward()
    np.testing.assert_allclose(states[-1], h.detach().numpy(), **CLOSE)
    np.testing.assert_allclose(dmixing, w.grad.numpy(), rtol=1e-8, atol=1e-10)
    names = ["weight"] if shared else [f"{t}.weight" for t in range(5)]
    for name, gamma in zip(names, gammas, strict=True):
        np.testing.assert_allclose(bank.grads[name], gamma.grad.numpy(), rtol=1e-8, atol=1e-10)
    assert bank.grads.keys() == bank.parameters.keys()


def test_backward_of_steps_that_share_statistics() -> None:
    """In evaluation steps 4 and 9 have one set of statistics, and a call each."""
    bank = trained(unseen="last").eval()
    bank(STEPS[0], 4)
    bank(STEPS[1], 9)
    std = np.sqrt(bank.layers[4].running_var + 1e-5)
    xhats = [(x - bank.layers[4].running_mean) / std for x in STEPS[:2]]
    for key in (9, 4):
        np.testing.assert_allclose(bank.backward(STEPS[2], key), STEPS[2] / std, **CLOSE)
    expected = sum((STEPS[2] * xhat).sum(axis=0) for xhat in xhats)
    np.testing.assert_allclose(bank.grads["weight"], expected, **CLOSE)
    bank.zero_grads()
    assert bank.grads == {}


# ---- domains ---------------------------------------------------------------------------------------------------------


def test_domains_and_their_mixture() -> None:
    """Parameters shared, statistics apart; merged, they are those of all the data."""
    bank = nbnorm.StatsBank(3, unseen="merged", momentum=None, dtype=np.float64)
    domains = {"day": STEPS[0], "night": STEPS[4]}
    for _ in range(2):
        for name, x in domains.items():
            bank(x, name)
    both = np.concatenate(list(domains.values()))
    whole = bank.merged()
    np.testing.assert_allclose(whole.mean, both.mean(axis=0), **CLOSE)
    between = (STEPS[0].mean(axis=0) - STEPS[4].mean(axis=0)) ** 2 / 4
    within = (STEPS[0].var(axis=0, ddof=1) + STEPS[4].var(axis=0, ddof=1)) / 2
    np.testing.assert_allclose(whole.var, within + between, **CLOSE)
    assert bank.merged(["day"]).mean.tolist() == bank.layers["day"].running_mean.tolist()
    night = bank.merged(["day", "night"], [0.0, 1.0])
    np.testing.assert_allclose(night.mean, STEPS[4].mean(axis=0), **CLOSE)
    y = bank.eval()(STEPS[2], "dusk")
    np.testing.assert_allclose(y, norm("batch_norm", STEPS[2], fixed=(whole.mean, whole.var)).y.astype(float), **CLOSE)
    assert "dusk" not in bank.layers
    with pytest.raises(KeyError, match=r"keys must have statistics, as \['day', 'night'\] have; got \['dusk'\]"):
        bank.merged(["dusk"])


def test_shared_and_separate_parameters() -> None:
    shared, separate = trained(), trained(shared=False)
    assert all(layer.weight is shared.weight for layer in shared.layers.values())
    assert separate.weight is None
    assert len({id(layer.weight) for layer in separate.layers.values()}) == 5
    separate.layers[0].weight[:] = 3.0
    assert (separate.layers[1].weight == 1).all()
    assert set(separate.parameters) == {f"{t}.{name}" for t in range(5) for name in ("weight", "bias")}


# ---- modes, transactions, state --------------------------------------------------------------------------------------


def test_modes_are_of_all_keys_and_of_new_ones() -> None:
    bank = trained().freeze().train()
    assert bank.frozen
    assert all(layer.frozen for layer in bank.layers.values())
    bank(STEPS[0], 0)
    bank.backward(STEPS[0], 0)
    assert bank.grads == {}
    bank.unfreeze()
    bank.statistics, bank.tracking, bank.trainable = "batch", False, False
    bank(STEPS[0], 99)
    assert bank.layers[99].num_batches_tracked == 0
    assert 99 not in bank.seen
    assert (bank.statistics, bank.tracking, bank.trainable, bank.training) == ("batch", False, False, True)


def test_transactions() -> None:
    bank, token = bank_of(), nbnorm.Token()
    for _ in range(2):
        for t, x in enumerate(STEPS):
            bank(x, t, update=False, token=token)
    assert bank.seen == []
    bank.commit()
    np.testing.assert_allclose(bank.layers[3].running_mean, STEPS[3].mean(axis=0), **CLOSE)
    assert bank.layers[3].num_batches_tracked == 1
    bank(STEPS[0], 0, update=False)
    bank.discard()
    bank.commit()
    assert bank.layers[0].num_batches_tracked == 1


def test_recalibration_of_a_bank() -> None:
    bank = trained()
    nbnorm.recalibrate(lambda x: bank(x, 2), [bank.layers[2]], np.split(STEPS[0], [3, 10]))
    np.testing.assert_allclose(bank.layers[2].running_var, STEPS[0].var(axis=0), **CLOSE)


@pytest.mark.parametrize("shared", [True, False])
def test_state_goes_round(shared: bool) -> None:
    bank, other = trained(shared=shared), bank_of(shared=shared)
    for array in bank.parameters.values():
        array[:] = RNG.normal(size=3)
    kept = other.weight
    other(STEPS[0], "gone")
    other.load_state_dict(bank.state_dict())
    assert list(other.layers) == list(range(5))
    assert other.weight is kept  # an optimizer may hold it
    bank.eval()
    other.eval()
    for t, x in enumerate(STEPS):
        np.testing.assert_array_equal(other(x, t), bank(x, t))
    expected = ["weight", "bias"] if shared else ["0.weight", "0.bias"]
    assert list(bank.state_dict())[:3] == [*expected, "0.running_mean"]
    for twin in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        np.testing.assert_array_equal(twin(STEPS[0], 3), bank(STEPS[0], 3))


@pytest.mark.parametrize(
    ("arrays", "metadata", "message"),
    [
        ({"weight": np.ones(2)}, {}, r"state\['weight'\] must have shape \(3,\); got \(2,\)"),
        ({"3.running_var": -np.ones(3)}, {}, "var must not be negative"),
        ({"3.running_mean": np.full(3, np.nan)}, {}, "must be finite"),
        ({"9.running_var": np.ones(3)}, {}, "state must have the keys"),
        ({}, {"layer": "BatchNorm"}, "state must be of a StatsBank with shared=True; got BatchNorm"),
        ({}, {"shared": "false"}, "state must be of a StatsBank with shared=True"),
        ({}, {"keys": "[0, 1"}, "state's keys must be a JSON list"),
        ({}, {"keys": "[0, 1.5]"}, "state's keys must be a JSON list"),
        ({}, {"keys": '[0, "0"]'}, "state's keys must differ"),
        ({}, {"4.convention": "keras"}, "state's convention must be torch"),
        ({}, {"4.eps": "0.5"}, "state's eps must be 1e-05"),
    ],
)
def test_a_wrong_state_changes_nothing(arrays: dict[str, Any], metadata: dict[str, str], message: str) -> None:
    state, bank = trained().state_dict(), bank_of()
    state["weight"] = np.full(3, 7.0)
    state.update(arrays)
    state.metadata.update(metadata)
    bank(STEPS[0], "own")
    with pytest.raises(nbnorm.StateError, match=message):
        bank.load_state_dict(state)
    assert list(bank.layers) == ["own"]
    assert (bank.weight == 1).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bank_of(unseen="first"), ValueError, "unseen must be one of raise, last, merged; got 'first'"),
        (lambda: bank_of(unseen="merged", shared=False), ValueError, 'unseen="merged" needs shared=True'),
        (lambda: bank_of(track_running_stats=False), ValueError, "track_running_stats must be True"),
        (lambda: trained()(STEPS[0], 1.5), TypeError, "key must be an integer; got 1.5"),
        (lambda: trained()(STEPS[0], "1"), ValueError, "key must not read as another one does; got '1'"),
        (lambda: trained().backward(STEPS[0], 9), RuntimeError, "backward needs a call with key 9 before it"),
        (lambda: trained(unseen="last").eval()(STEPS[0], "x"), TypeError, "keys must be numbers"),
        (lambda: bank_of(unseen="last").eval()(STEPS[0], 0), KeyError, "key must be one that was seen"),
        (lambda: bank_of().merged(), KeyError, "keys must have statistics"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_failed_call_makes_no_key() -> None:
    bank = bank_of()
    with pytest.raises(ValueError, match="weight must have shape"):
        bank(STEPS[0][:, :2], 0)
    assert bank.layers == {}
