"""The five norms for callers that Numba compiles: a training loop inside one ``@njit`` function calls these.

They run in the calling thread, without the GIL and without Python objects, by the Numba backend's own kernels: what
they write has the same bits as what `nbnorm.batch_norm` and the like return (where an axis that matters has length 1,
or a batch has 1024 samples and 6 million elements, the same values within rounding). They can be called from Python
too, and from the body of a ``prange`` loop.

Arrays are C-contiguous, float32 or float64, all of x's dtype but the statistics; channels lie on axis 1. Every result
goes to an array that the caller gives. Weights, biases, statistics and the gradients of parameters may be None, which
is part of the type. The sources are those of the public norms.

Layer and RMS norm and their gradients take each array from memory once; the others once where a group fits in the cache
(batch norm of (N, C): where x does), else twice. A call allocates some float64 numbers for each group and parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm_backends.numba_cpu import checks, embedded
from nbnorm_backends.numba_cpu.kernels import KERNEL, MEAN, RSTD, STATISTICS

__all__ = [
    "batch_norm",
    "batch_norm_backward",
    "group_norm",
    "group_norm_backward",
    "instance_norm",
    "instance_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
]

Array = NDArray[Any]


# ---- layer and RMS norm ----------------------------------------------------------------------------------------------


@KERNEL
def layer_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array | None = None,
    rstd: Array | None = None,
) -> None:
    """Normalize over the last axis, as `nbnorm.layer_norm` does.

    Parameters
    ----------
    x : array (..., K), float32 or float64
    weight, bias : arrays (K,) of x's dtype, or None
    eps : float
        Added to the variance.
    out : array of x's shape and dtype
        Takes the result; x itself, or memory apart from every other argument.
    mean, rstd : float64 arrays of one element for each row, such as (...), or None
        Take the rows' means and ``1 / sqrt(var + eps)``, for `layer_norm_backward`.

    Raises
    ------
    ValueError
        Naming the argument whose shape does not fit, or `out` where it overlaps x in part; nothing has been written.
        Numba never frees the arrays of a compiled function that raised.
    numba.core.errors.TypingError
        When it is compiled: naming the argument, what was expected and what came.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> from numba import njit
    >>> @njit
    ... def normalized(x):
    ...     y = np.empty_like(x)
    ...     norms.layer_norm(x, None, None, 1e-9, y)
    ...     return y
    >>> print(normalized(np.array([[1, 3], [10, 30]], np.float32)).round(3))
    [[-1.  1.]
     [-1.  1.]]
    """
    axes = embedded.row_axes(checks.check_x(x))
    embedded.forward(x, axes, weight, bias, True, eps, out, mean, rstd)


@KERNEL
def layer_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    dx: Array,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> None:
    """The gradients of `layer_norm`.

    Parameters
    ----------
    dy, x : arrays (..., K)
        The gradient of the result, and what was normalized.
    weight : array (K,), or None
    mean, rstd : float64 arrays, as `layer_norm` left them
    dx : array of x's shape and dtype
        Takes the gradient of x; dy or x itself, or memory apart from every other argument.
    dweight, dbias : arrays (K,) of x's dtype, or None
        Take the gradients of weight and bias, which are not added to what stands there.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x, dy = np.array([[1, 2, 4]], np.float32), np.array([[1, 0, 0]], np.float32)
    >>> y, dx, mean, rstd = np.empty_like(x), np.empty_like(x), np.empty(1), np.empty(1)
    >>> norms.layer_norm(x, None, None, 1e-5, y, mean, rstd)
    >>> norms.layer_norm_backward(dy, x, None, mean, rstd, dx)
    >>> print(dx.round(3))
    [[ 0.229 -0.344  0.115]]
    """
    axes = embedded.row_axes(checks.check_x(x))
    embedded.backward(dy, x, axes, weight, True, False, mean, rstd, dx, dweight, dbias)


@KERNEL
def rms_norm(x: Array, weight: Array | None, eps: float, out: Array, rstd: Array | None = None) -> None:
    """Divide by the root mean square over the last axis, as `nbnorm.rms_norm` does.

    Parameters
    ----------
    x : array (..., K), float32 or float64
    weight : array (K,) of x's dtype, or None
    eps : float
        Added to the mean square.
    out : array of x's shape and dtype
        As for `layer_norm`.
    rstd : float64 array of one element for each row, or None
        Takes ``1 / sqrt(mean(x*x) + eps)``, for `rms_norm_backward`.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x = np.array([[3, 4]], np.float32)
    >>> norms.rms_norm(x, None, 0.0, x)
    >>> print(x.round(3))
    [[0.849 1.131]]
    """
    axes = embedded.row_axes(checks.check_x(x))
    embedded.forward(x, axes, weight, None, False, eps, out, None, rstd)


@KERNEL
def rms_norm_backward(
    dy: Array, x: Array, weight: Array | None, rstd: Array, dx: Array, dweight: Array | None = None
) -> None:
    """The gradients of `rms_norm`.

    Parameters
    ----------
    dy, x, weight, dx, dweight
        As for `layer_norm_backward`.
    rstd : float64 array, as `rms_norm` left it

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x, dy = np.array([[3, 4]], np.float32), np.array([[1, 0]], np.float32)
    >>> y, dx, rstd = np.empty_like(x), np.empty_like(x), np.empty(1)
    >>> norms.rms_norm(x, None, 0.0, y, rstd)
    >>> norms.rms_norm_backward(dy, x, None, rstd, dx)
    >>> print(dx.round(3))
    [[ 0.181 -0.136]]
    """
    axes = embedded.row_axes(checks.check_x(x))
    embedded.backward(dy, x, axes, weight, False, False, np.zeros(axes[0][0]), rstd, dx, dweight, None)


# ---- group and instance norm -----------------------------------------------------------------------------------------


@KERNEL
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array | None = None,
    rstd: Array | None = None,
) -> None:
    """Normalize each group of channels of each sample, as `nbnorm.group_norm` does.

    Parameters
    ----------
    x : array (N, C, ...), float32 or float64
    num_groups : int
        Must divide C.
    weight, bias : arrays (C,) of x's dtype, or None
    eps, out
        As for `layer_norm`.
    mean, rstd : float64 arrays (N, num_groups), or None
        Take the groups' means and ``1 / sqrt(var + eps)``, for `group_norm_backward`.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x = np.array([[1, 3, 10, 30]], np.float32)
    >>> norms.group_norm(x, 2, None, None, 1e-9, x)
    >>> print(x.round(3))
    [[-1.  1. -1.  1.]]
    """
    axes = embedded.group_axes(x, checks.check_groups(checks.check_channels(x), num_groups))
    embedded.forward(x, axes, weight, bias, True, eps, out, mean, rstd)


@KERNEL
def group_norm_backward(
    dy: Array,
    x: Array,
    num_groups: int,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    dx: Array,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> None:
    """The gradients of `group_norm`.

    Parameters
    ----------
    dy, x : arrays (N, C, ...)
        The gradient of the result, and what was normalized.
    num_groups : int
    weight : array (C,), or None
    mean, rstd : float64 arrays (N, num_groups), as `group_norm` left them
    dx : array of x's shape and dtype
        As for `layer_norm_backward`.
    dweight, dbias : arrays (C,) of x's dtype, or None
        Take the gradients of weight and bias, which are not added to what stands there.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x, dy = np.array([[1, 2, 4, 0, 7, 9]], np.float32), np.array([[1, 0, 0, 0, 0, 0]], np.float32)
    >>> y, dx, mean, rstd = np.empty_like(x), np.empty_like(x), np.empty((1, 2)), np.empty((1, 2))
    >>> norms.group_norm(x, 2, None, None, 1e-5, y, mean, rstd)
    >>> norms.group_norm_backward(dy, x, 2, None, mean, rstd, dx)
    >>> print(dx.round(3))
    [[ 0.229 -0.344  0.115  0.     0.     0.   ]]
    """
    axes = embedded.group_axes(x, checks.check_groups(checks.check_channels(x), num_groups))
    embedded.backward(dy, x, axes, weight, True, False, mean, rstd, dx, dweight, dbias)


@KERNEL
def instance_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    out: Array,
    mean: Array | None = None,
    rstd: Array | None = None,
) -> None:
    """Normalize each channel of each sample over space, as `nbnorm.instance_norm` does without running statistics.

    Parameters
    ----------
    x : array (N, C, ...) with at least one axis of space, float32 or float64
    weight, bias : arrays (C,) of x's dtype, or None
    eps : float
        Added to the variance; must be positive.
    out : array of x's shape and dtype
        As for `layer_norm`.
    mean, rstd : float64 arrays (N, C), or None
        Take the instances' means and ``1 / sqrt(var + eps)``, for `instance_norm_backward`.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`; where x has not more than one value for each channel of a sample.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x = np.array([[[1, 3], [10, 30]]], np.float32)
    >>> norms.instance_norm(x, None, None, 1e-9, x)
    >>> print(x.round(3))
    [[[-1.  1.]
      [-1.  1.]]]
    """
    axes = embedded.group_axes(checks.check_space(x), x.shape[1])
    checks.check_variance(x, axes[0][4], eps)
    embedded.forward(x, axes, weight, bias, True, eps, out, mean, rstd)


@KERNEL
def instance_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    rstd: Array,
    dx: Array,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> None:
    """The gradients of `instance_norm`.

    Parameters
    ----------
    dy, x, weight, dx, dweight, dbias
        As for `group_norm_backward`.
    mean, rstd : float64 arrays (N, C), as `instance_norm` left them

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x, dy = np.array([[[1, 2, 4]]], np.float32), np.array([[[1, 0, 0]]], np.float32)
    >>> y, dx, mean, rstd = np.empty_like(x), np.empty_like(x), np.empty((1, 1)), np.empty((1, 1))
    >>> norms.instance_norm(x, None, None, 1e-5, y, mean, rstd)
    >>> norms.instance_norm_backward(dy, x, None, mean, rstd, dx)
    >>> print(dx.round(3))
    [[[ 0.229 -0.344  0.115]]]
    """
    axes = embedded.group_axes(checks.check_space(x), x.shape[1])
    embedded.backward(dy, x, axes, weight, True, False, mean, rstd, dx, dweight, dbias)


# ---- batch norm ------------------------------------------------------------------------------------------------------


@KERNEL
def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None,
    bias: Array | None,
    training: bool,
    momentum: float,
    eps: float,
    out: Array,
    mean: Array | None = None,
    rstd: Array | None = None,
) -> None:
    """Normalize each channel over the batch and space, as `nbnorm.batch_norm` does.

    Parameters
    ----------
    x : array (N, C, ...), float32 or float64
    running_mean, running_var : arrays (C,) of float32 or float64, both or neither
        In training they are updated, after `out` is written; otherwise they normalize.
    weight, bias : arrays (C,) of x's dtype, or None
    training : bool
        Normalize with x's own statistics. May differ from call to call: it is not compiled in.
    momentum : float
        Weight of the new batch in the running statistics. The running variance takes the unbiased variance.
    eps : float
        Added to the variance; must be positive in training.
    out : array of x's shape and dtype
        As for `layer_norm`.
    mean, rstd : float64 arrays (C,), or None
        Take the means, and ``1 / sqrt(var + eps)``, that have normalized, for `batch_norm_backward`.

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`; in training where x has not more than one value for each channel; otherwise where there
        are no running statistics.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x = np.array([[[1], [10]], [[3], [30]]], np.float32)
    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> norms.batch_norm(x, running_mean, running_var, None, None, True, 0.1, 1e-9, x)
    >>> print(x[:, :, 0].round(3))
    [[-1. -1.]
     [ 1.  1.]]
    >>> running_mean.tolist(), running_var.tolist()
    ([0.2, 2.0], [1.1, 20.9])
    """
    axes, channels = embedded.channel_axes(checks.check_channels(x)), x.shape[1]
    count = x.shape[0] * axes[0][4]
    checks.check_training(training)
    checks.check_running(running_mean, running_var, training, momentum, channels)
    checks.check_forward(x, weight, bias, eps, out, mean, rstd, channels, channels)
    stats = np.zeros((STATISTICS, channels))
    if training:
        checks.check_variance(x, count, eps)
    else:
        embedded.fix(running_mean, running_var, eps, stats)
    if x.ndim == 2:
        weights, biases = embedded.widened(weight), embedded.widened(bias)
        embedded.columns_forward(x, weights, biases, float(eps), bool(training), stats, out)
    else:
        embedded.apply(x, axes, weight, bias, True, eps, training, stats, out)
    if training:
        embedded.blend(running_mean, running_var, float(momentum), count, stats)
    embedded.save(mean, stats[MEAN])
    embedded.save(rstd, stats[RSTD])


@KERNEL
def batch_norm_backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    training: bool,
    mean: Array,
    rstd: Array,
    dx: Array,
    dweight: Array | None = None,
    dbias: Array | None = None,
) -> None:
    """The gradients of `batch_norm`.

    Parameters
    ----------
    dy, x, weight, dx, dweight, dbias
        As for `group_norm_backward`.
    training : bool
        As in the forward: False where the running statistics have normalized, through which no gradient flows.
    mean, rstd : float64 arrays (C,), as `batch_norm` left them

    Raises
    ------
    ValueError, numba.core.errors.TypingError
        As for `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm.interop.numba as norms
    >>> x, dy = np.array([[[1, 2, 4]]], np.float32), np.array([[[1, 0, 0]]], np.float32)
    >>> y, dx, mean, rstd = np.empty_like(x), np.empty_like(x), np.empty(1), np.empty(1)
    >>> norms.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, y, mean, rstd)
    >>> norms.batch_norm_backward(dy, x, None, True, mean, rstd, dx)
    >>> print(dx.round(3))
    [[[ 0.229 -0.344  0.115]]]
    """
    axes = embedded.channel_axes(checks.check_channels(x))
    checks.check_training(training)
    if x.ndim == 2:
        embedded.columns_backward(dy, x, weight, not training, mean, rstd, dx, dweight, dbias)
    else:
        embedded.backward(dy, x, axes, weight, True, not training, mean, rstd, dx, dweight, dbias)
