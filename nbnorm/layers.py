"""Layers for a training loop of one's own: parameters, running statistics and modes around the functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from nbnorm.arrays import DTYPES, Array, dtype_name
from nbnorm.backend import Grads
from nbnorm.checks import check_flag, check_index, check_length, check_number
from nbnorm.operation import vjp
from nbnorm.ops import batch_norm, group_norm, layer_norm

State = dict[str, NDArray[Any]]


class _Layer(ABC):
    """A norm with weight and bias, and the gradient of its last call.

    Attributes
    ----------
    weight, bias : ndarray, or None without `affine`
    training : bool
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.
    """

    def __init__(self, shape: tuple[int, ...], affine: bool, dtype: DTypeLike) -> None:
        if dtype_name(np.dtype(dtype)) == "":
            raise TypeError(f"dtype must be {', '.join(DTYPES)}; got {np.dtype(dtype)}")
        check_flag("affine", affine)
        self.weight = np.ones(shape, dtype) if affine else None
        self.bias = np.zeros(shape, dtype) if affine else None
        self.training = True
        self.grads: dict[str, Array] = {}
        self._pullback: Callable[[Any], Grads] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the pullback: a copy of the layer, or a pickled one, begins before its first call."""
        return self.__dict__ | {"_pullback": None}

    @abstractmethod
    def _forward(self, x: Array) -> tuple[Array, Callable[[Any], Grads]]:
        """The result and its pullback, in the layer's mode."""

    def __call__(self, x: Array) -> Array:
        """Normalize x, and keep what `backward` needs until the next call."""
        y, self._pullback = self._forward(x)
        return y

    def backward(self, dy: Array) -> Array:
        """The gradient of x for the last call; those of weight and bias go to `grads`.

        Raises
        ------
        RuntimeError
            If the layer has not been called since it was made.
        """
        if self._pullback is None:
            raise RuntimeError("backward needs a call of the layer before it")
        found = self._pullback(dy)
        self.grads = {name: grad for name, grad in (("weight", found.weight), ("bias", found.bias)) if grad is not None}
        return found.x

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, or with False to evaluation; returns the layer."""
        self.training = check_flag("mode", mode)
        return self

    def eval(self) -> Self:
        """Switch to evaluation mode; returns the layer."""
        return self.train(False)

    def state_dict(self) -> State:
        """Copies of the parameters and statistics under PyTorch's key names."""
        return {name: np.copy(array) for name, array in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`, in place.

        Raises
        ------
        ValueError
            If keys are missing or unknown, or a shape differs; nothing has been changed then.
        """
        own = self._state()
        if set(own) != set(state):
            raise ValueError(f"state must have the keys {sorted(own)}; got {sorted(state)}")
        new = {}
        for name, value in state.items():
            if isinstance(value, np.ma.MaskedArray):
                raise ValueError(f"state[{name!r}] must be a plain array; got a masked one")
            new[name] = np.array(value)  # a copy: the values may be this layer's own, under other names
        for name, array in own.items():
            if new[name].shape != array.shape:
                raise ValueError(f"state[{name!r}] must have shape {array.shape}; got {new[name].shape}")
            if not np.can_cast(new[name].dtype, array.dtype, "same_kind"):
                raise ValueError(f"state[{name!r}] must cast to {array.dtype}; got {new[name].dtype}")
        for name, array in own.items():
            array[...] = new[name]

    def _state(self) -> State:
        found = {"weight": self.weight, "bias": self.bias}
        return {name: array for name, array in found.items() if array is not None}


class BatchNorm(_Layer):
    """Batch norm with running statistics: training mode updates them, evaluation mode uses them.

    Parameters
    ----------
    num_features : int
        Channels.
    eps, momentum : float
        As for `batch_norm`.
    affine : bool
        Have weight and bias.
    channel_axis : int
        Axis of the channels.
    dtype : dtype of parameters and statistics

    Attributes
    ----------
    weight, bias : ndarray, or None without `affine`
    running_mean, running_var, num_batches_tracked : ndarray
    training : bool
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer = nbnorm.BatchNorm(2, dtype=np.float64)
    >>> y = layer(np.array([[1.0, 10.0], [3.0, 30.0]]))
    >>> layer.running_mean.tolist(), int(layer.num_batches_tracked)
    ([0.2, 2.0], 1)
    >>> layer.backward(np.ones((2, 2))).round(6).tolist(), layer.grads["bias"].tolist()
    ([[0.0, 0.0], [0.0, 0.0]], [2.0, 2.0])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        *,
        channel_axis: int = 1,
        dtype: DTypeLike = np.float32,
    ) -> None:
        super().__init__((check_length("num_features", num_features),), affine, dtype)
        self.eps, self.momentum = check_number("eps", eps), check_number("momentum", momentum)
        self.channel_axis = check_index("channel_axis", channel_axis)
        self.running_mean = np.zeros(num_features, dtype)
        self.running_var = np.ones(num_features, dtype)
        self.num_batches_tracked = np.array(0, np.int64)

    def _forward(self, x: Array) -> tuple[Array, Callable[[Any], Grads]]:
        result = vjp(
            batch_norm,
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
            channel_axis=self.channel_axis,
        )
        if self.training:
            self.num_batches_tracked += 1
        return result

    def _state(self) -> State:
        return super()._state() | {
            "running_mean": self.running_mean,
            "running_var": self.running_var,
            "num_batches_tracked": self.num_batches_tracked,
        }


class LayerNorm(_Layer):
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
    training : bool
        Has no effect on this norm.
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.LayerNorm(2)(np.array([[1, 3]], np.float32)).round(3).tolist()
    [[-1.0, 1.0]]
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        affine: bool = True,
        *,
        dtype: DTypeLike = np.float32,
    ) -> None:
        given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
        self.normalized_shape = tuple(check_length("normalized_shape", length) for length in given)
        if not given:
            raise ValueError("normalized_shape must have at least one length; got none")
        super().__init__(self.normalized_shape, affine, dtype)
        self.eps = check_number("eps", eps)

    def _forward(self, x: Array) -> tuple[Array, Callable[[Any], Grads]]:
        return vjp(layer_norm, x, self.normalized_shape, self.weight, self.bias, self.eps)


class GroupNorm(_Layer):
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
    training : bool
        Has no effect on this norm.
    grads : dict
        Gradients of weight and bias, as the last `backward` left them.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.GroupNorm(2, 4)(np.array([[1, 3, 10, 30]], np.float32)).round(3).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """

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

    def _forward(self, x: Array) -> tuple[Array, Callable[[Any], Grads]]:
        return vjp(group_norm, x, self.num_groups, self.weight, self.bias, self.eps, channel_axis=self.channel_axis)
