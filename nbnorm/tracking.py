"""Layers with running statistics: which statistics normalize, and when a batch's enter the running ones."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Literal, Self, get_args
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.arrays import Array
from nbnorm.backend import Grads
from nbnorm.checks import check_flag, check_index, check_length, check_number
from nbnorm.conventions import (
    Convention,
    State,
    arrays_of,
    convention_named,
    convention_of,
    momentum_of,
    numpy_copy,
    running_of,
    translate,
)
from nbnorm.engine import Call
from nbnorm.errors import StateError
from nbnorm.layers import GroupNorm, Layer, Pullback, Statistics
from nbnorm.microbatch import MicroBatchNorm, axes_but
from nbnorm.operation import prepared, vjp
from nbnorm.ops import batch_norm, instance_norm, moments
from nbnorm.running import RunningStatistics, check_momentum
from nbnorm.statistics import Moments

NonFinite = Literal["raise", "skip", "skip_channel"]


class Token:
    """One forward of a network: however often it is computed, its batch enters each layer's statistics once.

    Activation checkpointing runs a forward again in the backward. Give both runs one token, and each layer takes the
    first, whether its moments enter at once or wait. A layer that a forward calls twice needs two tokens. A token
    remembers the layers, not the other way round: nothing piles up in a layer. It belongs to one process and cannot be
    copied.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer, x, token = nbnorm.BatchNorm(1), np.array([[1.0], [3.0]], np.float32), nbnorm.Token()
    >>> y = layer(x, token=token)
    >>> again = layer(x, token=token)
    >>> layer.running_mean.tolist(), bool((y == again).all())
    ([0.2], True)
    """

    def __init__(self) -> None:
        self._layers: WeakSet[Any] = WeakSet()


class TrackingLayer(Layer):
    """A norm with running statistics."""

    _op: Callable[..., Any]
    _checked_metadata = ("layer", "eps", "convention", "ddof")

    def __init__(
        self,
        num_features: int,
        eps: float,
        momentum: float | None,
        affine: bool,
        track_running_stats: bool,
        *,
        channel_axis: int,
        zero_debias: bool,
        nonfinite: NonFinite,
        dtype: DTypeLike,
    ) -> None:
        super().__init__((check_length("num_features", num_features),), affine, dtype)
        self.eps: float = check_number("eps", eps)
        self.momentum = check_momentum(momentum)
        self.channel_axis = check_index("channel_axis", channel_axis)
        self.zero_debias = check_flag("zero_debias", zero_debias)
        if nonfinite not in get_args(NonFinite):
            raise ValueError(f"nonfinite must be one of {', '.join(get_args(NonFinite))}; got {nonfinite!r}")
        self.nonfinite: NonFinite = nonfinite
        self.num_features = num_features
        self.convention = convention_named("torch")
        tracks = check_flag("track_running_stats", track_running_stats)
        self._running = RunningStatistics.initial(num_features) if tracks else None
        self.pending: Moments | None = None
        self._collector: Callable[[Moments], None] | None = None  # who takes the moments during a recalibration

    @property
    def running(self) -> RunningStatistics | None:
        """The running statistics, which are immutable: set others in their place."""
        return self._running

    @running.setter
    def running(self, value: RunningStatistics) -> None:
        if self._running is None:
            raise ValueError("running must be None in a layer that tracks no running statistics")
        if not isinstance(value, RunningStatistics):
            raise TypeError(f"running must be RunningStatistics; got {type(value).__name__}")
        if value.mean.shape != (self.num_features,):
            raise ValueError(f"running must have {self.num_features} channels; got {value.mean.size}")
        self._running = value

    @property
    def statistics(self) -> Statistics:
        """What normalizes: "batch", the statistics of x itself, or "running"."""
        return "batch" if self.running is None else self._mode.statistics

    @statistics.setter
    def statistics(self, value: Statistics) -> None:
        if value not in get_args(Statistics):
            raise ValueError(f"statistics must be one of {', '.join(get_args(Statistics))}; got {value!r}")
        if value == "running" and self.running is None:
            raise ValueError("statistics must be 'batch' in a layer that tracks no running statistics; got 'running'")
        self._mode = replace(self._mode, statistics=value)

    @property
    def tracking(self) -> bool:
        """Whether the statistics of x enter the running ones."""
        return self.running is not None and self._mode.tracking

    @tracking.setter
    def tracking(self, value: bool) -> None:
        if check_flag("tracking", value) and self.running is None:
            raise ValueError("tracking must be False in a layer that has no running statistics; got True")
        self._mode = replace(self._mode, tracking=value)

    @property
    def running_mean(self) -> NDArray[np.float64] | None:
        """(C,), read-only; None where nothing is tracked."""
        return None if self.running is None else self.running.mean

    @property
    def running_var(self) -> NDArray[np.float64] | None:
        """(C,), read-only; None where nothing is tracked."""
        return None if self.running is None else self.running.var

    @property
    def num_batches_tracked(self) -> int:
        """Batches that have entered the running statistics."""
        return 0 if self.running is None else self.running.num_batches_tracked

    def __call__(
        self, x: Array, *, mask: Array | None = None, update: bool = True, token: Token | None = None
    ) -> Array:
        """Normalize x, and keep what `backward` needs until the next call.

        Parameters
        ----------
        x : array with C channels on `channel_axis`
        mask : array of bool
            As for `batch_norm`.
        update : bool
            With False, where the layer tracks, the moments of x join those in `pending` and wait for `commit`.
        token : Token
            Of the forward that this call belongs to: another call with it normalizes, and updates nothing.

        Returns
        -------
        y : array like x

        Raises
        ------
        FloatingPointError
            If a statistic of x is not finite, it was to be taken in, and `nonfinite` is "raise".
        ValueError, TypeError, BackendError
            As the function does. After an error the layer is as before.
        """
        takes = self._takes(update, token)
        y, pullback, found = self._normalize(x, mask, takes)
        if found is not None:
            self._take_in(found, update, token)
        self._pullback = pullback
        return y

    def commit(self) -> None:
        """Let what is pending enter the running statistics, as one batch; nothing, where nothing is pending."""
        if self.pending is not None:
            self._update(self.pending)
            self.pending = None

    def discard(self) -> None:
        """Forget what is pending."""
        self.pending = None

    def _forward(self, x: Array, mask: Array | None) -> tuple[Array, Pullback]:
        y, pullback, _ = self._normalize(x, mask, takes=False)
        return y, pullback

    def _normalize(self, x: Array, mask: Array | None, takes: bool) -> tuple[Array, Pullback, Moments | None]:
        """The result, its pullback, and the moments of x where they are to be taken in."""
        keys: dict[str, Any] = {"channel_axis": self.channel_axis, "mask": mask}
        params = self.weight, self.bias
        if self.running is not None and self.statistics == "running":
            found = self._moments(x, mask) if takes else None
            y, pullback = vjp(self._op, x, self.running.mean, self.running.var, *params, False, 0.0, self.eps, **keys)
            return y, pullback, found
        call = prepared(self._op, (x, None, None, *params, True, 0.0, self.eps), keys | {"return_moments": True})
        assert isinstance(call, Call)
        (y, batch), pullback = call.vjp()
        return y, pullback, batch if takes else None

    @abstractmethod
    def _moments(self, x: Array, mask: Array | None) -> Moments:
        """The moments that the layer's norm takes of x."""

    @abstractmethod
    def _joined(self, first: Moments, second: Moments) -> Moments:
        """The moments of two batches as those of one."""

    def _takes(self, update: bool, token: Token | None) -> bool:
        """Whether a call takes the moments of x in."""
        check_flag("update", update)
        if token is not None and not isinstance(token, Token):
            raise TypeError(f"token must be a nbnorm.Token; got {type(token).__name__}")
        return self.tracking and (token is None or self not in token._layers)

    def _take_in(self, found: Moments, update: bool, token: Token | None) -> None:
        usable = finite(found, self.nonfinite)
        if np.any(usable.count):
            self._hand_on(usable, update)
        if token is not None:
            token._layers.add(self)

    def _hand_on(self, usable: Moments, update: bool) -> None:
        if self._collector is not None:
            self._collector(usable)
        elif update:
            self._update(usable)
        else:
            self.pending = usable if self.pending is None else self._joined(self.pending, usable)

    def _update(self, batch: Moments) -> None:
        assert self.running is not None  # or nothing would have been taken in
        self.running = self.running.update(batch, self.momentum, zero_debias=self.zero_debias)

    # ---- state -------------------------------------------------------------------------------------------------------

    def _arrays(self) -> dict[str, NDArray[Any]]:
        return super()._arrays() | ({} if self.running is None else arrays_of(self.running))

    def _metadata(self) -> dict[str, str]:
        found = super()._metadata()
        if self.running is not None:
            momentum = repr(self.convention.weight_of_new(self.momentum))
            found |= {"convention": self.convention.name, "momentum": momentum} | self.running.history()
        return found

    def load_state_dict(self, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        said = dict(getattr(state, "metadata", {}) if metadata is None else metadata)
        if self.running is not None:
            said.setdefault("convention", "torch")  # whose key names these are
            if "momentum" in said:
                momentum_of(said)
        super().load_state_dict(state, said)

    load_state_dict.__doc__ = Layer.load_state_dict.__doc__

    def _take_over(self, arrays: dict[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        if self.running is not None:
            self.running = running_of(arrays, {"ddof": str(self.running.ddof)} | dict(metadata))
            self.pending = None
        super()._take_over(arrays, metadata)


class BatchNorm(TrackingLayer):
    """Batch norm with running statistics, in float64.

    Three switches, each an attribute, say what a call does: `statistics` which statistics normalize, `tracking` whether
    those of x enter the running ones, `trainable` whether weight and bias get gradients. `train`, `eval` and `freeze`
    set them together.

    Parameters
    ----------
    num_features : int
        Channels.
    eps : float
        As for `batch_norm`.
    momentum : float from 0 to 1, or None
        Weight of a new batch in the running statistics; None for the plain average of all batches.
    affine : bool
        Have weight and bias.
    track_running_stats : bool
        Have running statistics; without them those of x normalize always.
    channel_axis : int
        Axis of the channels.
    zero_debias : bool
        Leave the initial mean 0 and variance 1 no weight; see `RunningStatistics.update`.
    nonfinite : "raise", "skip" or "skip_channel"
        What happens to statistics that are not finite, which never enter: an error before anything is changed; the
        batch updates nothing; or it updates the other channels.
    dtype : dtype of the parameters

    Attributes
    ----------
    weight, bias : ndarray, or None without `affine`
    statistics : "batch" or "running"
    tracking, trainable, training, frozen : bool
    running : RunningStatistics or None
        Immutable; replace it to set it.
    running_mean, running_var, num_batches_tracked
        Those of `running`.
    pending : Moments or None
        Of calls with ``update=False`` since the last `commit` or `discard`, merged.
    convention : Convention
        What the running variance is made of, and what a state says its momentum means; PyTorch's unless
        `with_convention` made the layer.
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer = nbnorm.BatchNorm(2, dtype=np.float64)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> layer.running_mean.tolist(), layer.num_batches_tracked
    ([0.2, 2.0], 1)
    >>> layer.backward(np.ones((2, 2))).round(6).tolist(), layer.grads["bias"].tolist()
    ([[0.0, 0.0], [0.0, 0.0]], [2.0, 2.0])
    """

    _kind = "BatchNorm"
    _op = staticmethod(batch_norm)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_axis: int = 1,
        zero_debias: bool = False,
        nonfinite: NonFinite = "raise",
        dtype: DTypeLike = np.float32,
    ) -> None:
        keys: dict[str, Any] = {"channel_axis": channel_axis, "zero_debias": zero_debias, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **keys, dtype=dtype)

    @classmethod
    def with_convention(
        cls,
        convention: str,
        num_features: int,
        *,
        zero_debias: bool = False,
        nonfinite: NonFinite = "raise",
        dtype: DTypeLike = np.float32,
        **arguments: Any,
    ) -> Self:
        """A layer made with another system's arguments and defaults, whose running statistics are that system's.

        `momentum` is kept as the weight of the new batch, whatever sense it came in. Arguments that freeze do what they
        do there: ``trainable=False`` freezes a "keras" layer, and stops weight and bias alone in a "tf1" layer.

        Parameters
        ----------
        convention : "torch", "keras", "tf1", "flax" or "onnx"
            `nbnorm.conventions.table` prints how they differ.
        num_features : int
        zero_debias, nonfinite, dtype
            As for the class.
        **arguments
            The system's own: momentum, eps or epsilon, axis, scale, center and so on.

        Raises
        ------
        TypeError
            For an argument that the system does not have.

        Examples
        --------
        >>> import nbnorm
        >>> layer = nbnorm.BatchNorm.with_convention("keras", 3, momentum=0.9, trainable=False)
        >>> layer.momentum, layer.eps, layer.channel_axis, layer.running.ddof, layer.frozen
        (0.1, 0.001, -1, 0, True)
        """
        system = convention_named(convention)
        read = translate(system, arguments)
        made = cls(num_features, **read.arguments, zero_debias=zero_debias, nonfinite=nonfinite, dtype=dtype)
        made.weight = made.weight if read.weight else None
        made.bias = made.bias if read.bias else None
        made._adopt(system, read.ddof)
        made.train(read.training)
        made.trainable = read.trainable
        return made.freeze() if read.frozen else made

    @classmethod
    def from_state(cls, state: State, *, channel_axis: int | None = None) -> Self:
        """A layer with a state, and with the eps, momentum and convention that its metadata name.

        Parameters
        ----------
        state : State
            From `state_dict`, `nbnorm.conventions.convert` or `nbnorm.exchange`.
        channel_axis : int
            Without it, the default of the convention.

        Raises
        ------
        StateError
            If the metadata lack what is needed, or `load_state_dict` refuses the state.
        """
        system, momentum = convention_of(state)
        running = running_of(state)
        try:
            eps = float(state.metadata["eps"])
        except (KeyError, ValueError) as error:
            raise StateError(f"state must say its eps in its metadata; got {state.metadata.get('eps')!r}") from error
        axis = system.channel_axis if channel_axis is None else channel_axis
        params = {name: state[name] for name in ("weight", "bias") if name in state}
        dtype = next((numpy_copy(value, name).dtype for name, value in params.items()), np.dtype(np.float32))
        made = cls(running.mean.size, eps, system.weight_of_new(momentum), channel_axis=axis, dtype=dtype)
        made.weight = made.weight if "weight" in params else None
        made.bias = made.bias if "bias" in params else None
        made._adopt(system, running.ddof)
        made.load_state_dict(state)
        return made

    def micro_batches(self, xs: Sequence[Array], *, update: bool = True, token: Token | None = None) -> list[Array]:
        """Normalize the parts of one batch, as that batch; `backward` takes a list of gradients then, and returns one.

        Results, gradients and running statistics are those of a call with the whole batch, within rounding: for
        gradient accumulation that is exact. See `MicroBatchNorm` for parts that are not in memory together.

        Parameters
        ----------
        xs : sequence of arrays, alike but for their sizes
        update, token
            As for a call.

        Returns
        -------
        list of arrays like those of xs

        Raises
        ------
        FloatingPointError, ValueError, TypeError, BackendError
            As for a call.

        Examples
        --------
        >>> import numpy as np, nbnorm
        >>> whole = np.array([[1.0], [2.0], [6.0]])
        >>> layer, other = (nbnorm.BatchNorm(1, dtype=np.float64) for _ in range(2))
        >>> parts = layer.micro_batches([whole[:2], whole[2:]])
        >>> np.allclose(np.concatenate(parts), other(whole)), np.allclose(layer.running_var, other.running_var)
        (True, True)
        >>> dx = layer.backward([whole[:2], whole[2:]])
        >>> np.allclose(np.concatenate(dx), other.backward(whole))
        True
        """
        takes, xs = self._takes(update, token), list(xs)
        if not xs:
            raise ValueError("xs must have at least one part; got none")
        ys, pullback, found = self._by_running(xs, takes) if self.statistics == "running" else self._by_batch(xs)
        if found is not None and takes:
            self._take_in(found, update, token)
        self._pullback = pullback
        return ys

    def _by_batch(self, xs: Sequence[Array]) -> tuple[list[Array], Pullback, Moments | None]:
        """The parts by the statistics of all of them."""
        norm = MicroBatchNorm(self.weight, self.bias, self.eps, channel_axis=self.channel_axis)
        for x in xs:
            norm.measure(x)

        def pullback(dys: Sequence[Array]) -> Grads:
            pairs = _paired(xs, dys)
            for x, dy in pairs:
                norm.measure_gradient(x, dy)
            return Grads([norm.gradient(x, dy) for x, dy in pairs], **norm.grads)

        return [norm.normalize(x) for x in xs], pullback, norm.moments

    def _by_running(self, xs: Sequence[Array], takes: bool) -> tuple[list[Array], Pullback, Moments | None]:
        """The parts by the running statistics, each on its own."""
        ys, pullbacks, found = zip(*(self._normalize(x, None, takes) for x in xs), strict=True)

        def pullback(dys: Sequence[Array]) -> Grads:
            parts = [back(dy) for back, (_, dy) in zip(pullbacks, _paired(xs, dys), strict=True)]
            totals = (None if part[0] is None else sum(part) for part in list(zip(*parts, strict=True))[1:3])
            return Grads([part.x for part in parts], *totals)

        return list(ys), pullback, reduce(Moments.merge, found) if takes else None

    def to_group_norm(self, num_groups: int | None = None) -> GroupNorm:
        """A group norm with copies of weight and bias, to stand in this layer's place and to be trained on.

        Its result does not depend on the batch; nor is it this layer's result, so a network must be fine-tuned.

        Parameters
        ----------
        num_groups : int
            Must divide the channels; without it the largest divisor up to 32, the default of Wu and He, "Group
            Normalization" (2018).

        Examples
        --------
        >>> import nbnorm
        >>> nbnorm.BatchNorm(48).to_group_norm().num_groups
        24
        """
        if num_groups is None:
            num_groups = max(size for size in range(1, 33) if self.num_features % size == 0)
        dtype = next((param.dtype for param in (self.weight, self.bias) if param is not None), np.dtype(np.float32))
        made = GroupNorm(num_groups, self.num_features, self.eps, channel_axis=self.channel_axis, dtype=dtype)
        made.weight = None if self.weight is None else self.weight.copy()
        made.bias = None if self.bias is None else self.bias.copy()
        made.trainable = self.trainable
        return made

    def _adopt(self, system: Convention, ddof: int) -> None:
        """Take on a convention, before the first batch."""
        self.convention = system
        if self.running is not None:
            self.running = RunningStatistics.initial(self.num_features, ddof)

    def _moments(self, x: Array, mask: Array | None) -> Moments:
        return moments(x, axes_but(x, self.channel_axis), mask=mask)

    def _joined(self, first: Moments, second: Moments) -> Moments:
        return first.merge(second)


class InstanceNorm(TrackingLayer):
    """Instance norm, with running statistics where they are asked for.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, channel_axis, zero_debias, nonfinite, dtype
        As for `BatchNorm`; PyTorch's defaults have neither parameters nor running statistics. What enters these are the
        averages of the samples' means and variances.

    Attributes
    ----------
    As `BatchNorm`; `pending` has the moments of every sample, (N, C).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.InstanceNorm(2)(np.array([[[1, 3], [10, 30]]], np.float32)).round(3).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """

    _kind = "InstanceNorm"
    _op = staticmethod(instance_norm)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        channel_axis: int = 1,
        zero_debias: bool = False,
        nonfinite: NonFinite = "raise",
        dtype: DTypeLike = np.float32,
    ) -> None:
        keys: dict[str, Any] = {"channel_axis": channel_axis, "zero_debias": zero_debias, "nonfinite": nonfinite}
        super().__init__(num_features, eps, momentum, affine, track_running_stats, **keys, dtype=dtype)

    def _moments(self, x: Array, mask: Array | None) -> Moments:
        return moments(x, tuple(axis for axis in axes_but(x, self.channel_axis) if axis), mask=mask)

    def _joined(self, first: Moments, second: Moments) -> Moments:
        pairs = zip(_fields(first), _fields(second), strict=True)
        return Moments(*(np.concatenate(pair) for pair in pairs))


def _paired(xs: Sequence[Array], dys: Sequence[Array]) -> list[tuple[Array, Array]]:
    if len(dys) != len(xs):
        raise ValueError(f"dy must be a sequence of {len(xs)} parts, as x was; got {len(dys)}")
    return list(zip(xs, dys, strict=True))


def finite(found: Moments, policy: NonFinite) -> Moments:
    """The moments without those that are not finite, which count no elements then; FloatingPointError by "raise"."""
    spoilt = ~(np.isfinite(found.mean) & np.isfinite(found.m2)) & (np.asarray(found.count) > 0)
    if not spoilt.any():
        return found
    if policy == "raise":
        channels = sorted(set(np.nonzero(spoilt)[-1].tolist()))
        raise FloatingPointError(
            f"x must have finite statistics to update the running ones; got NaN, Inf or an overflow in channels "
            f'{channels}. nonfinite="skip" leaves such batches out, "skip_channel" such channels'
        )
    out = spoilt if policy == "skip_channel" else np.ones_like(spoilt)
    count, mean, m2, residual = (np.where(out, 0, field) for field in _fields(found))
    return Moments(count, mean, m2, residual)


def _fields(found: Moments) -> tuple[Any, ...]:
    return np.broadcast_to(found.count, found.mean.shape), found.mean, found.m2, found.residual
