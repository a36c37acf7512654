"""The five norms and their statistics: each checks its arguments and builds a `Call`; the engine does the rest."""

from __future__ import annotations

from collections.abc import Sequence

from nbnorm import engine, layout
from nbnorm.arguments import (
    check_axes,
    check_axis,
    check_backend,
    check_call,
    check_ghost_batch_size,
    check_mask,
    check_rms_eps,
    check_statistics,
    check_x,
    normalized_axes,
)
from nbnorm.arrays import Array
from nbnorm.backend import Backend
from nbnorm.checks import check_index, check_number
from nbnorm.engine import Call
from nbnorm.ghost import GhostCall
from nbnorm.operation import PREPARATIONS, operation
from nbnorm.statistics import Moments


@operation("Array | tuple[Array, Moments]")
def batch_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    ghost_batch_size: int | None = None,
    backend: str | Backend | None = None,
) -> Call | GhostCall:
    """Normalize each channel over the batch and space: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    In training the statistics are those of x, and the running statistics, where given, are updated in place, once,
    after everything else succeeded; otherwise the running statistics normalize.

    Parameters
    ----------
    x : array (N, C, ...), or with the channels on `channel_axis`; float32, float64, float16 or bfloat16
    running_mean, running_var : arrays (C,), both or neither
        Of x's dtype, float32 or float64.
    weight, bias : arrays (C,)
        Of x's dtype; float32 too where x is a half type.
    training : bool
        Normalize with x's own statistics.
    momentum : float
        Weight of the new batch in the running statistics (PyTorch's sense). The running variance takes the unbiased
        variance; the output is normalized with the biased one.
    eps : float
        Added to the variance; must be positive in training.
    channel_axis : int
        Axis of the channels; negative counts from the end.
    mask : array of bool, broadcastable to x
        True where an element is valid. Statistics, running statistics and gradients are those of the valid elements;
        the others come out as 0, whatever stands there. A channel without a valid element updates nothing; one with a
        single valid element has variance 0 and leaves its running variance alone.
    activation : "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid" or "tanh"
        leaky_relu has slope 0.01 below zero.
    order : "norm_act" or "act_norm"
        ``activation(norm(x) + residual)``, or ``norm(activation(x)) + residual``.
    residual : array of x's shape and dtype
        Added, as `order` says.
    ghost_batch_size : int
        In training, normalize so many samples at a time, each with statistics of their own; the last ones may be
        fewer. The running statistics, and the moments, are those of the whole batch. Ignored in evaluation.
    out : array like x
        Where to write the result; x itself, or memory apart from it.
    return_moments : bool
        Return ``(y, Moments)`` and leave the running statistics alone, which then need not be writable. In evaluation
        the moments are None.
    backend : str or Backend
        The one backend to use; BackendError where it refuses.

    Returns
    -------
    y : array
        Of x's kind, dtype and shape, and of its memory order unless x must be copied (`explain` tells);
        ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; nothing has been written.
    BackendError
        If no backend takes the request.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift"
    (2015); ghost batches: Hoffer, Hubara and Soudry, "Train longer, generalize better: closing the generalization gap
    in large batch training of neural networks" (2017). On the Numba backend x is read twice and y written once; x comes
    from memory once where a channel fits in the cache.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> mean, var = np.zeros(2), np.ones(2)
    >>> nbnorm.batch_norm(x, mean, var, training=True, eps=1e-9).round(6).tolist()
    [[-1.0, -1.0], [1.0, 1.0]]
    >>> mean.tolist(), var.tolist()
    ([0.2, 2.0], [1.1, 20.9])
    """
    operand, dtype = check_x(x, least=2)
    channel = check_axis("channel_axis", channel_axis, operand.view)
    axes = layout.batch(operand.view.shape, channel)
    call = Call("batch_norm", operand, dtype, axes, eps=check_number("eps", eps))
    check_call(call, weight, bias, mask, activation, order, residual, out, return_moments, backend)
    check_statistics(call, running_mean, running_var, training, momentum, "training")
    ghost = None if ghost_batch_size is None else check_ghost_batch_size(call, ghost_batch_size, channel)
    return GhostCall(call, ghost) if ghost is not None and training else call


@operation("Array | tuple[Array, Moments]")
def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """Normalize each channel of each sample over space.

    Parameters
    ----------
    x : array (N, C, ...) with at least one axis of space, or with the channels on `channel_axis`
    running_mean, running_var : arrays (C,), both or neither
        With `use_input_stats` updated in place after success with the averages, over the samples, of the means and
        of the unbiased variances, as PyTorch does; without it they normalize.
    weight, bias : arrays (C,)
    use_input_stats : bool
    momentum, eps, channel_axis, mask, activation, order, residual, out, backend
        As for `batch_norm`.
    return_moments : bool
        As for `batch_norm`; the moments have shape (N, C).

    Returns
    -------
    y : array
        Of x's kind, dtype and shape, and of its memory order unless x must be copied (`explain` tells);
        ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization" (2016).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> nbnorm.instance_norm(x, eps=1e-9).round(6).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    operand, dtype = check_x(x, least=3)
    channel = check_axis("channel_axis", channel_axis, operand.view, after_batch=True)
    axes = layout.instance(operand.view.shape, channel)
    call = Call("instance_norm", operand, dtype, axes, eps=check_number("eps", eps))
    check_call(call, weight, bias, mask, activation, order, residual, out, return_moments, backend)
    check_statistics(call, running_mean, running_var, use_input_stats, momentum, "use_input_stats")
    return call


@operation("Array | tuple[Array, Moments]")
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """Normalize each group of channels of each sample, over the group's channels and space.

    Parameters
    ----------
    x : array (N, C, ...), or with the channels on `channel_axis`
    num_groups : int
        Must divide C.
    weight, bias : arrays (C,)
    eps, channel_axis, mask, activation, order, residual, out, backend
        As for `batch_norm`; eps may be any finite number.
    return_moments : bool
        Return ``(y, Moments)``; the moments have shape (N, num_groups).

    Returns
    -------
    y : array
        Of x's kind, dtype and shape, and of its memory order unless x must be copied (`explain` tells);
        ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Wu and He, "Group Normalization" (2018). Its result does not depend on the batch, so it serves small batches.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=1e-9).round(6).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    operand, dtype = check_x(x, least=2)
    shape = operand.view.shape
    channel = check_axis("channel_axis", channel_axis, operand.view, after_batch=True)
    groups = check_index("num_groups", num_groups)
    if groups < 1 or shape[channel] % groups:
        raise ValueError(f"num_groups must divide the {shape[channel]} channels of x {shape}; got {groups}")
    axes = layout.group(shape, groups, channel)
    call = Call("group_norm", operand, dtype, axes, eps=check_number("eps", eps))
    return check_call(call, weight, bias, mask, activation, order, residual, out, return_moments, backend)


@operation("Array | tuple[Array, Moments]")
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """Normalize over the trailing axes, or over `axis`.

    Parameters
    ----------
    x : array of shape ``(..., *normalized_shape)``
    normalized_shape : int or ints
        Lengths of the trailing axes to normalize over. Give this or `axis`.
    weight, bias : arrays of shape normalized_shape; with `axis`, of those axes' lengths, ascending
    eps : float
    axis : int or ints
        The axes to normalize over.
    mask, activation, order, residual, out, backend
        As for `batch_norm`.
    return_moments : bool
        Return ``(y, Moments)``; the moments have the shape of the axes that are kept.

    Returns
    -------
    y : array
        Of x's kind, dtype and shape, and of its memory order unless x must be copied (`explain` tells);
        ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Ba, Kiros and Hinton, "Layer Normalization" (2016). On the Numba backend x comes from memory once and y goes there
    once.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=1e-9).round(6).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    operand, dtype = check_x(x, least=1)
    axes = normalized_axes(operand.view, normalized_shape, axis)
    call = Call("layer_norm", operand, dtype, axes, eps=check_number("eps", eps))
    return check_call(call, weight, bias, mask, activation, order, residual, out, return_moments, backend)


@operation("Array | tuple[Array, Moments]")
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    weight_offset: float = 0.0,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """Divide by the root mean square over the trailing axes, or over `axis`: ``x / sqrt(mean(x*x) + eps) * weight``.

    Parameters
    ----------
    x : array of shape ``(..., *normalized_shape)``
    normalized_shape, weight, axis, mask, activation, order, residual, out, backend
        As for `layer_norm`.
    eps : float
        None stands for the epsilon of the type computed in: float64's for float64, float32's for the others.
    weight_offset : float
        Added to the weight, in float64; 1.0 for weights that are stored as their distance from 1.
    return_moments : bool
        Return ``(y, Moments)``; these are moments about zero: mean 0 and m2 = sum(x*x).

    Returns
    -------
    y : array
        Of x's kind, dtype and shape, and of its memory order unless x must be copied (`explain` tells);
        ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.rms_norm(np.array([[3.0, 4.0]]), 2, eps=0.0).round(6).tolist()
    [[0.848528, 1.131371]]
    """
    operand, dtype = check_x(x, least=1)
    axes = normalized_axes(operand.view, normalized_shape, axis)
    call = Call("rms_norm", operand, dtype, axes, eps=check_rms_eps(eps, dtype), center=False)
    call.weight_offset = check_number("weight_offset", weight_offset)
    if call.weight_offset and weight is None:
        raise ValueError(f"weight_offset is added to weight, which must be given; got weight_offset {weight_offset}")
    return check_call(call, weight, None, mask, activation, order, residual, out, return_moments, backend)


def moments(
    x: Array,
    axis: int | Sequence[int] | None = None,
    *,
    mask: Array | None = None,
    backend: str | Backend | None = None,
) -> Moments:
    """Count, mean and sum of squared deviations over `axis`, in float64, ready to merge.

    Parameters
    ----------
    x : array; float32, float64, float16 or bfloat16
    axis : int or ints
        The axes to reduce over; None for all.
    mask : array of bool, broadcastable to x
        True where an element counts.
    backend : str or Backend

    Returns
    -------
    Moments
        NumPy arrays of the shape of the axes that are kept.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> m = nbnorm.moments(np.array([[1.0, 2.0], [3.0, 6.0]]), axis=0)
    >>> m.count, m.mean.tolist(), m.var().tolist()
    (2, [2.0, 4.0], [1.0, 4.0])
    """
    return engine.moments(_prepare_moments(x, axis, mask=mask, backend=backend))


def _prepare_moments(
    x: Array,
    axis: int | Sequence[int] | None = None,
    *,
    mask: Array | None = None,
    backend: str | Backend | None = None,
) -> Call:
    operand, dtype = check_x(x, least=0)
    every = tuple(range(operand.view.ndim))
    axes = layout.over(operand.view.shape, every if axis is None else check_axes(axis, operand.view), params=False)
    valid = None if mask is None else check_mask(operand, mask)
    return Call("moments", operand, dtype, axes, mask=valid, backend=check_backend(backend))


PREPARATIONS[moments] = _prepare_moments
