"""Batch norm with statistics by key: one set for each time step, domain or task."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import Array
from nbnorm.checks import check_flag, check_index, check_number
from nbnorm.conventions import RUNNING, State
from nbnorm.errors import StateError
from nbnorm.layers import Pullback, Statistics
from nbnorm.running import RunningStatistics
from nbnorm.tracking import BatchNorm, Token

Unseen = Literal["raise", "last", "merged"]
Key = int | str


class StatsBank:
    """Batch norms that differ in their running statistics, each found by a key.

    Parameters
    ----------
    num_features : int
        Channels.
    shared : bool
        One weight and bias for all keys; with False each key has its own.
    unseen : "raise", "last" or "merged"
        What normalizes, by running statistics, a key that no batch has entered: nothing, which is a KeyError; the
        statistics of the largest number below it that was seen, or, below all of them, of the smallest, for sequences
        longer than those trained on; or those of all keys `merged`.
    weight_init : float
        What the weight begins with. Recurrent nets need less than 1, so that tanh does not saturate: Cooijmans et al.
        take 0.1.
    **arguments
        Of every `BatchNorm`: eps, momentum, affine, channel_axis, zero_debias, nonfinite, dtype.

    Attributes
    ----------
    layers : dict from key to BatchNorm
        Of the keys that were called in training.
    weight, bias : ndarray or None
        With `shared`, those of every layer: the same arrays.
    grads : dict
        Gradients of weight and bias, added up over all calls of `backward` since `zero_grads`; under the names of
        `parameters`.
    training, frozen : bool

    Notes
    -----
    Cooijmans, Ballas, Laurent, Gülçehre and Courville, "Recurrent Batch Normalization" (2017), keep statistics for each
    time step, and use the last one's beyond it.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> bank = nbnorm.StatsBank(1, unseen="last", momentum=1.0, dtype=np.float64)
    >>> steps = np.array([[[1.0], [3.0]], [[10.0], [30.0]]])  # (time, batch, channels)
    >>> for t, x in enumerate(steps):
    ...     y = bank(x, t)
    >>> y = bank.eval()(steps[1], 7)  # longer than any sequence seen: by the statistics of step 1
    >>> bank.layers[1].running_mean.tolist(), y.round(4).tolist()
    ([20.0], [[-0.7071], [0.7071]])
    >>> bank.merged().mean.tolist()
    [11.0]
    """

    def __init__(
        self,
        num_features: int,
        *,
        shared: bool = True,
        unseen: Unseen = "raise",
        weight_init: float = 1.0,
        **arguments: Any,
    ) -> None:
        if unseen not in get_args(Unseen):
            raise ValueError(f"unseen must be one of {', '.join(get_args(Unseen))}; got {unseen!r}")
        self.shared, self.unseen = check_flag("shared", shared), unseen
        if unseen == "merged" and not shared:
            raise ValueError('unseen="merged" needs shared=True: there is no one weight and bias without it')
        self._blank = BatchNorm(num_features, **arguments)  # what a new key begins with; it has the bank's modes
        if self._blank.running is None:
            raise ValueError("track_running_stats must be True in a bank of statistics; got False")
        if self._blank.weight is not None:
            self._blank.weight[...] = check_number("weight_init", weight_init)
        self.layers: dict[Key, BatchNorm] = {}
        self.grads: dict[str, Array] = {}
        self._pullbacks: dict[Key, tuple[Key, Pullback]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the pullbacks, as layers."""
        return self.__dict__ | {"_pullbacks": {}}

    def __call__(
        self, x: Array, key: Key, *, mask: Array | None = None, update: bool = True, token: Token | None = None
    ) -> Array:
        """Normalize x as the batch norm of a key does, and keep what `backward` needs until the key's next call.

        Parameters
        ----------
        x, mask, update, token
            As for `BatchNorm`. For sequences that are padded to one length, ``mask=(lengths > t)[:, None]`` leaves out
            those that have ended; a step that no sequence reaches updates nothing.
        key : int or str
            A time step, or the name of a domain or task.

        Returns
        -------
        y : array like x

        Raises
        ------
        KeyError
            If running statistics normalize, the key has none, and `unseen` has no others for it.
        """
        key = _checked(key)
        owner, layer = self._layer(key)
        y = layer(x, mask=mask, update=update, token=token)
        if layer.tracking or self.statistics == "batch":
            self.layers.setdefault(key, layer)
        assert layer._pullback is not None
        self._pullbacks[key] = owner, layer._pullback
        return y

    def backward(self, dy: Array, key: Key) -> Array:
        """The gradient of x for the last call with a key; those of weight and bias are added to `grads`.

        Raises
        ------
        RuntimeError
            If there was no call with the key.
        """
        key = _checked(key)
        if key not in self._pullbacks:
            raise RuntimeError(f"backward needs a call with key {key!r} before it")
        owner, pullback = self._pullbacks[key]
        found = pullback(dy)
        for name, grad in (("weight", found.weight), ("bias", found.bias)) if self.trainable else ():
            if grad is not None:
                place = name if self.shared else f"{owner}.{name}"
                self.grads[place] = self.grads[place] + grad if place in self.grads else grad
        return found.x

    def zero_grads(self) -> None:
        """Begin the sums in `grads` anew."""
        self.grads = {}

    @property
    def parameters(self) -> dict[str, NDArray[Any]]:
        """The arrays that train, under the names that `grads` and `state_dict` have for them."""
        if self.shared:
            return _affine(self._blank)
        return {f"{key}.{name}": array for key, layer in self.layers.items() for name, array in _affine(layer).items()}

    @property
    def seen(self) -> list[Key]:
        """Keys with statistics: a batch has entered every channel, or they were put there."""
        return [key for key, layer in self.layers.items() if _has_statistics(layer)]

    def merged(self, keys: Iterable[Key] | None = None, weights: Sequence[float] | None = None) -> RunningStatistics:
        """The statistics of several keys as those of one population.

        Parameters
        ----------
        keys : keys that were seen; None for all of them
        weights : numbers from 0
            Share of each key; without them by the batches that have entered.

        Returns
        -------
        RunningStatistics
            The variance has the differences between the means in it.

        Raises
        ------
        KeyError
            If a key has no statistics, or there is none.
        """
        seen = self.seen
        chosen = seen if keys is None else [_checked(key) for key in keys]
        if not chosen or any(key not in seen for key in chosen):
            raise KeyError(f"keys must have statistics, as {seen} have; got {chosen}")
        return RunningStatistics.mixture([_running(self.layers[key]) for key in chosen], weights)

    def _layer(self, key: Key) -> tuple[Key, BatchNorm]:
        """The batch norm for a key, which may be that of another, with that one's key."""
        found = self.layers.get(key)
        if found is not None and (self.statistics == "batch" or self.tracking or _has_statistics(found)):
            return key, found
        if self.statistics == "batch" or self.tracking:
            if str(key) in map(str, self.layers):
                raise ValueError(f"key must not read as another one does; got {key!r} beside {list(self.layers)}")
            return key, self._new()
        seen = self.seen
        if self.unseen == "raise" or not seen:
            raise KeyError(f"key must be one that was seen, {seen}, as running statistics normalize; got {key!r}")
        if self.unseen == "merged":
            layer = self._new()
            layer.running = self.merged()
            return key, layer
        return (other := _nearest_before(key, seen)), self.layers[other]

    def _new(self) -> BatchNorm:
        layer = copy.deepcopy(self._blank)
        return self._share(layer) if self.shared else layer

    def _share(self, layer: BatchNorm) -> BatchNorm:
        layer.weight, layer.bias = self._blank.weight, self._blank.bias
        return layer

    # ---- modes and transactions: those of every layer, and of layers to come -----------------------------------------

    def _all(self) -> list[BatchNorm]:
        return [self._blank, *self.layers.values()]

    @property
    def weight(self) -> NDArray[Any] | None:
        """The one weight of all keys; None without `shared`."""
        return self._blank.weight if self.shared else None

    @property
    def bias(self) -> NDArray[Any] | None:
        """The one bias of all keys; None without `shared`."""
        return self._blank.bias if self.shared else None

    @property
    def training(self) -> bool:
        """As for `BatchNorm`."""
        return self._blank.training

    @property
    def frozen(self) -> bool:
        """As for `BatchNorm`."""
        return self._blank.frozen

    @property
    def statistics(self) -> Statistics:
        """As for `BatchNorm`."""
        return self._blank.statistics

    @statistics.setter
    def statistics(self, value: Statistics) -> None:
        for layer in self._all():
            layer.statistics = value

    @property
    def tracking(self) -> bool:
        """As for `BatchNorm`."""
        return self._blank.tracking

    @tracking.setter
    def tracking(self, value: bool) -> None:
        for layer in self._all():
            layer.tracking = value

    @property
    def trainable(self) -> bool:
        """As for `BatchNorm`."""
        return self._blank.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for layer in self._all():
            layer.trainable = value

    def train(self, mode: bool = True) -> Self:
        """As for `BatchNorm`, for all keys."""
        for layer in self._all():
            layer.train(mode)
        return self

    def eval(self) -> Self:
        """As for `BatchNorm`, for all keys."""
        return self.train(False)

    def freeze(self, affine: bool = True) -> Self:
        """As for `BatchNorm`, for all keys."""
        for layer in self._all():
            layer.freeze(affine)
        return self

    def unfreeze(self) -> Self:
        """As for `BatchNorm`, for all keys."""
        for layer in self._all():
            layer.unfreeze()
        return self

    def commit(self) -> None:
        """As for `BatchNorm`, for all keys."""
        for layer in self._all():
            layer.commit()

    def discard(self) -> None:
        """As for `BatchNorm`, for all keys."""
        for layer in self._all():
            layer.discard()

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Copies of all arrays, those of a key under ``"key.name"``, and in the metadata what they mean."""
        arrays: dict[str, NDArray[Any]] = _affine(self._blank) if self.shared else {}
        metadata = {"layer": "StatsBank", "keys": json.dumps(list(self.layers)), "shared": json.dumps(self.shared)}
        for key, layer in self.layers.items():
            own = layer.state_dict()
            arrays |= {f"{key}.{name}": own[name] for name in self._own_names()}
            metadata |= {f"{key}.{name}": text for name, text in own.metadata.items()}
        return State({name: np.copy(array) for name, array in arrays.items()}, metadata)

    def load_state_dict(self, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        """Take over a `state_dict`; its keys take the place of those that are here.

        Raises
        ------
        StateError
            As for `BatchNorm`; nothing has been changed then.
        """
        said = dict(getattr(state, "metadata", {}) if metadata is None else metadata)
        keys = self._keys_in(said)
        common = list(_affine(self._blank)) if self.shared else []
        expected = {*common, *(f"{key}.{name}" for key in keys for name in self._own_names())}
        if set(state) != expected:
            raise StateError(f"state must have the keys {sorted(expected)}; got {sorted(state)}")
        shared = {name: state[name] for name in common}
        checked = copy.deepcopy(self._blank)
        checked.load_state_dict(dict(checked.state_dict()) | shared)
        layers = {}
        for key in keys:
            layer = layers[key] = copy.deepcopy(self._blank)
            own = {name: state[f"{key}.{name}"] for name in self._own_names()}
            start = f"{key}."
            layer.load_state_dict(
                shared | own, {name.removeprefix(start): text for name, text in said.items() if name.startswith(start)}
            )
        for name, array in _affine(self._blank).items() if self.shared else ():
            array[...] = _affine(checked)[name]
        self.layers = {key: self._share(layer) if self.shared else layer for key, layer in layers.items()}
        self._pullbacks = {}

    def _own_names(self) -> list[str]:
        """Names of the arrays that each key has to itself."""
        affine = [] if self.shared else list(_affine(self._blank))
        return [*affine, *RUNNING]

    def _keys_in(self, metadata: Mapping[str, str]) -> list[Key]:
        if metadata.get("layer") != "StatsBank" or metadata.get("shared") != json.dumps(self.shared):
            came = metadata.get("layer"), metadata.get("shared")
            raise StateError(f"state must be of a StatsBank with shared={self.shared}; got {came[0]}, shared={came[1]}")
        try:
            keys = [_checked(key) for key in json.loads(metadata["keys"])]
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"state's keys must be a JSON list; got {metadata.get('keys')!r}") from error
        if len({str(key) for key in keys}) != len(keys):
            raise StateError(f"state's keys must differ; got {keys}")
        return keys


def _checked(key: Any) -> Key:
    return key if isinstance(key, str) else check_index("key", key)


def _affine(layer: BatchNorm) -> dict[str, NDArray[Any]]:
    return {name: array for name, array in (("weight", layer.weight), ("bias", layer.bias)) if array is not None}


def _running(layer: BatchNorm) -> RunningStatistics:
    assert layer.running is not None  # the bank makes no others
    return layer.running


def _has_statistics(layer: BatchNorm) -> bool:
    running = _running(layer)
    return bool(((running.batches > 0) | (running.initial_weight != 1)).all())


def _nearest_before(key: Key, seen: list[Key]) -> Key:
    """The largest number below the key, or the smallest where all are above."""
    numbers = [other for other in seen if not isinstance(other, str)]
    if isinstance(key, str) or len(numbers) < len(seen):
        raise TypeError(f'keys must be numbers with unseen="last"; got {key!r} beside {seen}')
    return max((other for other in numbers if other < key), default=min(numbers))
