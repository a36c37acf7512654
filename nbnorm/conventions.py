"""How other systems keep the statistics of batch norm: what their arguments are called and mean, and how one state
becomes another's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import adapter_of
from nbnorm.checks import check_flag, check_length
from nbnorm.errors import StateError
from nbnorm.running import RunningStatistics, check_momentum


class State(dict[str, NDArray[Any]]):
    """Arrays by name, as `state_dict` gives them, and in `metadata` what the numbers mean.

    A dict: whatever takes PyTorch's state dicts takes the arrays. The metadata are text, so that a file can keep them.

    Parameters
    ----------
    arrays : mapping from str to ndarray
    metadata : mapping from str to str

    Examples
    --------
    >>> import nbnorm
    >>> state = nbnorm.BatchNorm(3).state_dict()
    >>> list(state), state.metadata["convention"], state.metadata["momentum"]
    (['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'], 'torch', '0.1')
    """

    def __init__(self, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str] | None = None) -> None:
        super().__init__(arrays)
        self.metadata: dict[str, str] = dict(metadata or {})

    def copy(self) -> State:
        """A state of its own with the same arrays: a dict's copy would lose the metadata."""
        return State(self, self.metadata)


@dataclass(frozen=True, slots=True)
class Convention:
    """What one system means by the arguments and the state of batch norm.

    Attributes
    ----------
    name : str
    momentum_weighs : "new" or "old"
        What the system's momentum is the weight of: the new batch, or the running statistics before it.
    momentum, eps : float
        The system's defaults, in its own sense.
    ddof : 0 or 1
        Whether its running variance is made of biased or unbiased variances of batches.
    channel_axis : int
        Its default.
    freezing : str
        How its running statistics are kept from changing.
    source : str
        Where this is said.
    arguments : mapping from the system's names to those of `BatchNorm`, and to settings
    training : bool
        Whether the system trains unless told.
    trainable_stops_statistics : bool
        Whether ``trainable=False`` freezes the running statistics with weight and bias.
    """

    name: str
    momentum_weighs: Literal["new", "old"]
    momentum: float
    eps: float
    ddof: int
    channel_axis: int
    freezing: str
    source: str
    arguments: Mapping[str, str] = field(repr=False)
    training: bool = True
    trainable_stops_statistics: bool = False

    def weight_of_new(self, momentum: float | None) -> float | None:
        """The system's momentum as the weight of the new batch, or that as the system's momentum: 1 - momentum, as
        decimal numbers, so that 0.1 becomes 0.9, and 0.1 again."""
        if check_momentum(momentum) is None or self.momentum_weighs == "new":
            return momentum
        return float(1 - Decimal(repr(float(momentum))))  # type: ignore[arg-type]  # None is gone by now


RUNNING = ("running_mean", "running_var", "num_batches_tracked")
FLAGS = ("weight", "bias", "trainable", "training", "evaluating", "fused")
CENTER_AND_SCALE = {
    "axis": "channel_axis",
    "momentum": "momentum",
    "epsilon": "eps",
    "scale": "weight",
    "center": "bias",
}
CONVENTIONS = {
    convention.name: convention
    for convention in (
        Convention(
            "torch",
            "new",
            0.1,
            1e-5,
            ddof=1,
            channel_axis=1,
            freezing="eval(), until train(); not by requires_grad=False",
            source="https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html",
            arguments={name: name for name in ("momentum", "eps", "affine", "track_running_stats")},
        ),
        Convention(
            "keras",
            "old",
            0.99,
            1e-3,
            ddof=0,
            channel_axis=-1,
            freezing="trainable=False, with weight and bias",
            source="https://keras.io/api/layers/normalization_layers/batch_normalization/",
            arguments=CENTER_AND_SCALE | {"trainable": "trainable"},
            trainable_stops_statistics=True,
        ),
        Convention(
            "tf1",
            "old",
            0.99,
            1e-3,
            ddof=1,
            channel_axis=-1,
            freezing="training=False; not by trainable=False",
            source="https://www.tensorflow.org/api_docs/python/tf/compat/v1/layers/batch_normalization, and for the "
            "variance TensorFlow's core/kernels/fused_batch_norm_op.cc",
            arguments=CENTER_AND_SCALE | {"trainable": "trainable", "training": "training", "fused": "fused"},
            training=False,
        ),
        Convention(
            "flax",
            "old",
            0.99,
            1e-5,
            ddof=0,
            channel_axis=-1,
            freezing="use_running_average=True",
            source="https://flax.readthedocs.io/en/latest/api_reference/flax.linen/layers.html",
            arguments={
                "axis": "channel_axis",
                "momentum": "momentum",
                "epsilon": "eps",
                "use_scale": "weight",
                "use_bias": "bias",
                "use_running_average": "evaluating",
            },
        ),
        Convention(
            "onnx",
            "old",
            0.9,
            1e-5,
            ddof=0,
            channel_axis=1,
            freezing="training_mode=0, the default",
            source="https://onnx.ai/onnx/operators/onnx__BatchNormalization.html",
            arguments={"momentum": "momentum", "epsilon": "eps", "training_mode": "training"},
            training=False,
        ),
    )
}


def convention_named(name: str) -> Convention:
    """The convention of a name; ValueError where there is none."""
    found = CONVENTIONS.get(name) if isinstance(name, str) else None
    if found is None:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}; got {name!r}")
    return found


def table() -> None:
    """Print how the systems differ: which way momentum counts, defaults, variance, axis, and how they freeze.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.conventions.table()
    system  momentum weighs  default  eps    running var  axis  statistics stop by
    torch   new batch        0.1      1e-05  unbiased     1     eval(), until train(); not by requires_grad=False
    keras   old statistics   0.99     0.001  biased       -1    trainable=False, with weight and bias
    tf1     old statistics   0.99     0.001  unbiased *   -1    training=False; not by trainable=False
    flax    old statistics   0.99     1e-05  biased       -1    use_running_average=True
    onnx    old statistics   0.9      1e-05  biased       1     training_mode=0, the default
    * with the fused kernel, the default for four axes; biased with fused=False
    """
    rows = [("system", "momentum weighs", "default", "eps", "running var", "axis", "statistics stop by")]
    for each in CONVENTIONS.values():
        weighs = "new batch" if each.momentum_weighs == "new" else "old statistics"
        variance = ("unbiased" if each.ddof else "biased") + (" *" if "fused" in each.arguments else "")
        numbers = str(each.momentum), str(each.eps), variance, str(each.channel_axis)
        rows.append((each.name, weighs, *numbers, each.freezing))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("* with the fused kernel, the default for four axes; biased with fused=False")


class Translation(NamedTuple):
    """A system's arguments as those of `BatchNorm`, and the settings that they ask for."""

    arguments: dict[str, Any]
    ddof: int
    weight: bool
    bias: bool
    training: bool
    trainable: bool
    frozen: bool


def translate(convention: Convention, given: Mapping[str, Any]) -> Translation:
    """Read a system's own arguments; TypeError for one that it does not have."""
    for name in given:
        if name not in convention.arguments:
            known = ", ".join(convention.arguments)
            raise TypeError(f"{convention.name} has no argument {name!r} that matters here; it has {known}")
    flags = dict.fromkeys(FLAGS, True) | {"training": convention.training, "evaluating": False}
    rest: dict[str, Any] = {
        "eps": convention.eps,
        "channel_axis": convention.channel_axis,
        "momentum": convention.momentum,
    }
    for theirs, value in given.items():
        ours = convention.arguments[theirs]
        if ours not in FLAGS:
            rest[ours] = value
        elif value is not None:  # None leaves the choice to the system
            flags[ours] = check_flag(theirs, bool(value) if value in (0, 1) else value)
    rest["momentum"] = convention.weight_of_new(rest["momentum"])
    training = flags["training"] and not flags["evaluating"]
    frozen = convention.trainable_stops_statistics and not flags["trainable"]
    ddof = convention.ddof if flags["fused"] else 0
    return Translation(rest, ddof, flags["weight"], flags["bias"], training, flags["trainable"], frozen)


def convert(state: State, to: str, *, elements_per_batch: int | None = None, num_batches: int | None = None) -> State:
    """A batch norm's state as another system would have it after the same batches.

    The momentum changes its sense. The running variance changes between biased and unbiased, exactly: each batch of n
    elements for a channel entered with n / (n - 1) more or less, and the initial value, 1, did not.

    Parameters
    ----------
    state : State
        From `BatchNorm.state_dict` or `nbnorm.exchange`.
    to : "torch", "keras", "tf1", "flax" or "onnx"
    elements_per_batch : int
        Elements of each channel in every batch, where the state does not know it.
    num_batches : int
        Batches that entered, where the state does not know it; then the momentum is taken to have been one throughout.

    Returns
    -------
    State
        With arrays of its own.

    Raises
    ------
    StateError
        If the state says nothing of its convention, or the variance has no exact counterpart: what is missing is named.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer = nbnorm.BatchNorm(1, momentum=0.1)
    >>> y = layer(np.array([[1.0], [3.0]], np.float32))
    >>> there = nbnorm.conventions.convert(layer.state_dict(), "keras")
    >>> there.metadata["momentum"], there["running_var"].tolist()  # 0.9 * 1 + 0.1 * 1, from 0.9 * 1 + 0.1 * 2
    ('0.9', [1.0])
    """
    target = convention_named(to)
    source, momentum = convention_of(state)
    running = running_of(state)
    if num_batches is not None:
        if not np.isnan(running.initial_weight).any():
            raise StateError(f"num_batches must be None, as the state knows its history; got {num_batches}")
        weight = initial_weight(source.weight_of_new(momentum), check_length("num_batches", num_batches))
        running = replace(running, batches=num_batches, initial_weight=weight)
    ddof = running.ddof if to == source.name else target.ddof
    running = running.with_ddof(ddof, elements_per_batch)
    theirs = target.weight_of_new(source.weight_of_new(momentum))
    arrays = {name: np.copy(array) for name, array in state.items()} | arrays_of(running)
    return State(arrays, state.metadata | running.history() | {"convention": to, "momentum": repr(theirs)})


def numpy_copy(value: Any, name: str) -> NDArray[Any]:
    """An array of a state, of any supported kind, as a NumPy array of its own; StateError where it is none."""
    if isinstance(value, np.ma.MaskedArray):
        raise StateError(f"{name} must be a plain array; got a masked one")
    try:
        foreign = hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray)
        return np.array(adapter_of(value, name).view(value, name) if foreign else value)
    except (TypeError, ValueError) as error:
        raise StateError(f"{name} must be an array: {error}") from error


def initial_weight(momentum: float | None, num_batches: int) -> float:
    """What the initial value weighs after so many batches, if the momentum was one throughout."""
    return float(num_batches == 0) if momentum is None else (1.0 - momentum) ** num_batches


def arrays_of(running: RunningStatistics) -> dict[str, NDArray[Any]]:
    """Copies of running statistics under PyTorch's names."""
    return {
        "running_mean": np.array(running.mean),
        "running_var": np.array(running.var),
        "num_batches_tracked": np.array(running.num_batches_tracked, np.int64),
    }


def convention_of(state: State) -> tuple[Convention, float | None]:
    """The convention that a state names, and its momentum in that system's sense; StateError where it names none."""
    for name in ("convention", "momentum"):
        if name not in getattr(state, "metadata", {}):
            raise StateError(f"state must say its {name} in its metadata; got none")
    name = state.metadata["convention"]
    if name not in CONVENTIONS:
        raise StateError(f"state's convention must be one of {', '.join(CONVENTIONS)}; got {name!r}")
    return CONVENTIONS[name], momentum_of(state.metadata)


def momentum_of(metadata: Mapping[str, str]) -> float | None:
    """The momentum that a state names; StateError where it is none."""
    momentum = metadata["momentum"]
    try:
        return check_momentum(None if momentum == "None" else float(momentum))
    except ValueError as error:
        raise StateError(f"state's momentum must be a number from 0 to 1, or None; got {momentum!r}") from error


def running_of(state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> RunningStatistics:
    """The running statistics in a state; StateError where they are none."""
    history = dict(getattr(state, "metadata", {}) if metadata is None else metadata)
    try:
        mean, var, count = (numpy_copy(state[name], name) for name in RUNNING)
        return RunningStatistics.from_history(mean, var, count, history)
    except KeyError as error:
        raise StateError(f"state must have the key {error}; got {sorted(state)}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise StateError(f"state's running statistics are no such thing: {error}") from error
