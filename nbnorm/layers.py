"""Layers for a training loop of one's own: parameters, modes, gradients and state around the functions.

Those with running statistics are in `nbnorm.tracking`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.arrays import DTYPES, Array, dtype_name
from nbnorm.backend import Grads
from nbnorm.checks import check_flag, check_index, check_length, check_number
from nbnorm.conventions import State, numpy_copy
from nbnorm.errors import StateError
from nbnorm.operation import vjp
from nbnorm.ops import group_norm, layer_norm, rms_norm

Statistics = Literal["batch", "running"]
Pullback = Callable[[Any], Grads]


@dataclass(frozen=True, slots=True)
class Mode:
    """The three switches of a layer. `train`, `eval` and `freeze` are named settings of them."""

    statistics: Statistics = "batch"
    tracking: bool = True
    trainable: bool = True


class Layer(ABC):
    """A norm with weight and bias, and the gradient of its last call.

    Attributes
    ----------
    weight, bias : ndarray, or None where there is none
    trainable : bool
        Whether `backward` leaves gradients of weight and bias.
    training : bool
        Which of `train` and `eval` was called last.
    frozen : bool
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.
    """

    eps: float | None

    def __init__(self, shape: tuple[int, ...], affine: bool, dtype: DTypeLike) -> None:
        if dtype_name(np.dtype(dtype)) == "":
            raise TypeError(f"dtype must be {', '.join(DTYPES)}; got {np.dtype(dtype)}")
        check_flag("affine", affine)
        self.weight: NDArray[Any] | None = np.ones(shape, dtype) if affine else None
        self.bias: NDArray[Any] | None = np.zeros(shape, dtype) if affine else None
        self.grads: dict[str, Array] = {}
        self._pullback: Pullback | None = None
        self._training = True
        self._mode = Mode()
        self._thawed: Mode | None = None  # of a frozen layer: what `unfreeze` goes back to

    def __getstate__(self) -> dict[str, Any]:
        """Without the pullback: a copy of the layer, or a pickled one, begins before its first call."""
        return self.__dict__ | {"_pullback": None}

    @abstractmethod
    def _forward(self, x: Array, mask: Array | None) -> tuple[Array, Pullback]:
        """The result and its pullback."""

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalize x, and keep what `backward` needs until the next call; mask as for `batch_norm`."""
        y, self._pullback = self._forward(x, mask)
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient of x for the last call; those of weight and bias go to `grads`, unless they do not train.

        Raises
        ------
        RuntimeError
            If the layer has not been called since it was made.
        """
        if self._pullback is None:
            raise RuntimeError("backward needs a call of the layer before it")
        found = self._pullback(dy)
        pairs = (("weight", found.weight), ("bias", found.bias)) if self.trainable else ()
        self.grads = {name: grad for name, grad in pairs if grad is not None}
        return found.x

    # ---- modes -------------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Which of `train` and `eval` was called last."""
        return self._training

    @property
    def frozen(self) -> bool:
        """Whether `train` and `eval` wait for `unfreeze`."""
        return self._thawed is not None

    @property
    def trainable(self) -> bool:
        """Whether `backward` leaves gradients of weight and bias."""
        return self._mode.trainable

    @trainable.setter
    def trainable(self, value: bool) -> None:
        self._mode = replace(self._mode, trainable=check_flag("trainable", value))

    def train(self, mode: bool = True) -> Self:
        """Normalize with the batch's statistics and update the running ones, or with False as `eval`.

        Weight and bias train or not as before. A frozen layer stays as it is, until `unfreeze`.

        Returns
        -------
        The layer.
        """
        self._training = check_flag("mode", mode)
        statistics: Statistics = "batch" if mode else "running"
        if self._thawed is None:
            self._mode = replace(self._mode, statistics=statistics, tracking=mode)
        else:
            self._thawed = replace(self._thawed, statistics=statistics, tracking=mode)
        return self

    def eval(self) -> Self:
        """Normalize with the running statistics, and leave them as they are.

        Returns
        -------
        The layer.
        """
        return self.train(False)

    def freeze(self, affine: bool = True) -> Self:
        """As `eval`, and weight and bias do not train; so it stays, whatever `train` and `eval` say, until `unfreeze`.

        Parameters
        ----------
        affine : bool
            False lets weight and bias go on training, if they do: everything is frozen but the affine parameters.

        Returns
        -------
        The layer.
        """
        trainable = self.trainable and not check_flag("affine", affine)
        if self._thawed is None:
            self._thawed = self._mode
        self._mode = Mode("running", tracking=False, trainable=trainable)
        return self

    def unfreeze(self) -> Self:
        """Go back to what was before `freeze`, or to what `train` and `eval` asked for since.

        Returns
        -------
        The layer.
        """
        if self._thawed is not None:
            self._mode, self._thawed = self._thawed, None
        return self

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Copies of the parameters and statistics under PyTorch's key names, and what they mean in `State.metadata`."""
        return State({name: np.copy(array) for name, array in self._arrays().items()}, self._metadata())

    def load_state_dict(self, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
        """Take over a `state_dict`.

        Parameters
        ----------
        state : mapping from str to array
        metadata : mapping from str to str
            What the arrays mean; without it, what `State.metadata` says. Without any the state is PyTorch's. The layer
            keeps its own momentum.

        Raises
        ------
        StateError
            If keys are missing or unknown, a shape differs, a dtype is not one that the layer's holds all numbers of, a
            number makes no sense, or the state belongs to another kind of layer; nothing has been changed then.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping from names to arrays; got {type(state).__name__}")
        said = dict(getattr(state, "metadata", {}) if metadata is None else metadata)
        mine = self._metadata()
        for name in self._checked_metadata:
            if said.get(name, mine.get(name)) != mine.get(name):
                raise StateError(f"state's {name} must be {mine.get(name)}, as the layer's; got {said[name]}")
        arrays = self._checked_arrays(state)
        self._take_over(arrays, said)

    _kind: str  # in a state's metadata; that of a derived class is its base's
    _checked_metadata: tuple[str, ...] = ("layer", "eps")

    def _arrays(self) -> dict[str, NDArray[Any]]:
        found = {"weight": self.weight, "bias": self.bias}
        return {name: array for name, array in found.items() if array is not None}

    def _metadata(self) -> dict[str, str]:
        return {"layer": self._kind, "eps": repr(self.eps)}

    def _checked_arrays(self, state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Copies of the state's arrays: they may be this layer's own, under other names."""
        own = self._arrays()
        if set(own) != set(state):
            raise StateError(f"state must have the keys {sorted(own)}; got {sorted(state)}")
        found = {}
        for name, array in own.items():
            value = numpy_copy(state[name], f"state[{name!r}]")
            if value.shape != array.shape:
                raise StateError(f"state[{name!r}] must have shape {array.shape}; got {value.shape}")
            floats = [bool(dtype_name(each.dtype)) for each in (value, array)]
            if floats[0] != floats[1] or not np.can_cast(value.dtype, array.dtype, "safe"):
                raise StateError(f"state[{name!r}] must be of dtype {array.dtype}, as the layer's; got {value.dtype}")
            if not np.isfinite(value).all():
                raise StateError(f"state[{name!r}] must be finite; got NaN or Inf")
            found[name] = value
        return found

    def _take_over(self, arrays: dict[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
        """What was checked becomes the layer's own."""
        for array, name in ((self.weight, "weight"), (self.bias, "bias")):
            if array is not None:
                array[...] = arrays[name]


class LayerNorm(Layer):
    """Layer norm over the trailing axes, with weight and bias.

    Parameters
    ----------
    normalized_shape : int or ints
        Lengths of the trailing axes.
    eps : float
        As for `layer_norm`.
    affine : bool
        Have weight and bias.
    dtype : dtype of the parameters

    Attributes
    ----------
    weight, bias : ndarray, or None without `affine`
    grads : dict
        Gradients, as the last `backward` left them; none while the layer is frozen, or ``trainable`` is False.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.LayerNorm(2)(np.array([[1, 3]], np.float32)).round(3).tolist()
    [[-1.0, 1.0]]
    """

    _kind = "LayerNorm"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _lengths(normalized_shape)
        super().__init__(self.normalized_shape, affine, dtype)
        self.eps = check_number("eps", eps)

    def _forward(self, x: Array, mask: Array | None) -> tuple[Array, Pullback]:
        return vjp(layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps, mask=mask)


class RMSNorm(Layer):
    """RMS norm over the trailing axes, with weight.

    Parameters
    ----------
    normalized_shape : int or ints
        Lengths of the trailing axes.
    eps : float or None
        As for `rms_norm`.
    affine : bool
        Have a weight.
    dtype : dtype of the weight

    Attributes
    ----------
    weight : ndarray, or None without `affine`
    grads : dict
        Gradients, as the last `backward` left them; none while the layer is frozen, or ``trainable`` is False.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.RMSNorm(2, eps=0.0)(np.array([[1, -1]], np.float32)).tolist()
    [[1.0, -1.0]]
    """

    _kind = "RMSNorm"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.normalized_shape = _lengths(normalized_shape)
        super().__init__(self.normalized_shape, affine, dtype)
        self.bias = None
        self.eps = None if eps is None else check_number("eps", eps)

    def _forward(self, x: Array, mask: Array | None) -> tuple[Array, Pullback]:
        return vjp(rms_norm, x, self.normalized_shape, self.weight, self.eps, mask=mask)


class GroupNorm(Layer):
    """Group norm with weight and bias.

    Parameters
    ----------
    num_groups, num_channels : int
        The first must divide the second.
    eps : float
        As for `group_norm`.
    affine : bool
        Have weight and bias.
    channel_axis : int
        Axis of the channels.
    dtype : dtype of the parameters

    Attributes
    ----------
    weight, bias : ndarray, or None without `affine`
    grads : dict
        Gradients, as the last `backward` left them; none while the layer is frozen, or ``trainable`` is False.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.GroupNorm(2, 4)(np.array([[1, 3, 10, 30]], np.float32)).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

    _kind = "GroupNorm"

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_groups, channels = check_length("num_groups", num_groups), check_length("num_channels", num_channels)
        if channels % self.num_groups:
            raise ValueError(f"num_groups must divide num_channels {channels}; got {self.num_groups}")
        super().__init__((channels,), affine, dtype)
        self.eps, self.channel_axis = check_number("eps", eps), check_index("channel_axis", channel_axis)

    def _forward(self, x: Array, mask: Array | None) -> tuple[Array, Pullback]:
        keys = {"channel_axis": self.channel_axis, "mask": mask}
        return vjp(group_norm, x, self.num_groups, self.weight, self.bias, self.eps, **keys)


def _lengths(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    if not given:
        raise ValueError("normalized_shape must have at least one length; got none")
    return tuple(check_length("normalized_shape", length) for length in given)
