"""Folding a batch norm into the linear map before it, for deployment."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm.arrays import Array, NumpyArrays, float_view
from nbnorm.checks import check_index
from nbnorm.tracking import BatchNorm


def fold_batch_norm(
    weight: Array,
    bias: Array | None,
    layer: BatchNorm,
    *,
    output_axis: int = 0,
    activation: str | None = None,
) -> tuple[Array, Array]:
    """Weight and bias of a linear layer or convolution that does what it and the batch norm after it do in evaluation.

    With running statistics batch norm is a factor and a shift for each channel, and a linear map takes both in:
    ``W' = W * s, b' = (b - mean) * s + beta``, with ``s = gamma / sqrt(var + eps)``. Any padding, stride or dilation of
    a convolution stays as it is.

    Parameters
    ----------
    weight : array
        Of the map: (outputs, inputs) or (outputs, inputs, ...) as in PyTorch. Keras has the outputs last,
        ``output_axis=-1``; PyTorch's transposed convolutions, without groups, on axis 1.
    bias : array (outputs,), or None for zeros
    layer : BatchNorm
        With `statistics` "running".
    output_axis : int
        The axis of `weight` that has the outputs.
    activation : str or None
        The name of what stands between the map and the batch norm, if something does. It is refused: only a linear map
        takes a factor in.

    Returns
    -------
    (weight, bias) : new arrays, of the kind and dtype of `weight`
        Computed in float64.

    Raises
    ------
    ValueError
        With an activation between, for a layer that normalizes with batch statistics, where numbers of channels differ,
        and where a result does not fit into the dtype.

    Notes
    -----
    Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference" (2018),
    section 3.2.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> layer = nbnorm.BatchNorm(2, dtype=np.float64)
    >>> x, weight = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[1.0, 0.0], [1.0, 1.0]])
    >>> y = layer(x @ weight.T)
    >>> folded, bias = nbnorm.fold_batch_norm(weight, None, layer.eval())
    >>> np.allclose(x @ folded.T + bias, layer(x @ weight.T))
    True
    """
    if activation is not None:
        raise ValueError(f"activation must be None: only a linear map takes a batch norm in; got {activation!r}")
    if not isinstance(layer, BatchNorm):
        raise TypeError(f"layer must be a BatchNorm; got {type(layer).__name__}")
    if layer.statistics != "running" or layer.running is None:
        raise ValueError("layer must normalize with running statistics to be folded: call eval(); got batch statistics")
    kind, view, _ = float_view(weight, "weight")
    axis = check_index("output_axis", output_axis)
    if not -view.ndim <= axis < view.ndim:
        raise ValueError(f"output_axis must be an axis of weight {view.shape}; got {axis}")
    channels = layer.num_features
    if view.shape[axis] != channels:
        raise ValueError(f"weight must have {channels} outputs on axis {output_axis}, as layer has; got {view.shape}")
    shift = np.zeros(channels) if bias is None else _bias(bias, channels)
    scale = _parameter(layer.weight, 1.0) / np.sqrt(layer.running.var + layer.eps)
    along = [1] * view.ndim
    along[axis] = channels
    folded = view.astype(np.float64) * scale.reshape(along)
    moved = (shift - layer.running.mean) * scale + _parameter(layer.bias, 0.0)
    return _as("weight", folded, view, kind, weight), _as("bias", moved, view, kind, weight)


def _bias(bias: Array, channels: int) -> NDArray[np.float64]:
    _, view, _ = float_view(bias, "bias")
    if view.shape != (channels,):
        raise ValueError(f"bias must have shape ({channels},), as layer has channels; got {view.shape}")
    return view.astype(np.float64)


def _parameter(param: NDArray[Any] | None, absent: float) -> Any:
    return absent if param is None else param.astype(np.float64)


def _as(name: str, values: Any, view: NDArray[Any], kind: NumpyArrays, like: Array) -> Array:
    with np.errstate(over="ignore"):
        found = np.asarray(values, view.dtype.newbyteorder("="))
    if not np.isfinite(found).all():
        raise ValueError(
            f"{name} must be finite when folded, and fit into {found.dtype}; got {float(abs(values).max())}"
        )
    return kind.wrap(found, like)
