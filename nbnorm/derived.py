"""Operations made of a norm: of a sum, of a kernel, beside dropout; and the mask of padded sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nbnorm import layout
from nbnorm.arguments import (
    check_axis,
    check_call,
    check_rms_eps,
    check_statistics,
    check_x,
    normalized_axes,
)
from nbnorm.arrays import Array, adapter_of
from nbnorm.backend import Backend
from nbnorm.checks import check_index, check_number
from nbnorm.dropout import Dropout
from nbnorm.engine import Call, Renorm, check_like
from nbnorm.ghost import GhostCall
from nbnorm.operation import Prepared, operation, prepared


@operation("tuple[Array, Array]")
def add_layer_norm(
    x: Array,
    residual: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
    backend: str | Backend | None = None,
) -> Call:
    """Add a residual and normalize the sum, in one pass: ``h = x + residual; y = layer_norm(h)``.

    Parameters
    ----------
    x, residual : arrays of one shape ``(..., *normalized_shape)`` and one dtype
    normalized_shape, weight, bias, eps, axis, backend
        As for `layer_norm`.

    Returns
    -------
    (y, h) : arrays
        h is rounded to x's dtype, and y is the norm of what was rounded. The pullback takes the pair of their
        gradients, of which the second may be None; the gradients of x and residual are one array.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `layer_norm`.

    Notes
    -----
    The step between two blocks of a pre-norm transformer: Xiong et al., "On Layer Normalization in the Transformer
    Architecture" (2020).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, h = nbnorm.add_layer_norm(np.array([[1.0, 2.0]]), np.array([[0.0, 1.0]]), 2, eps=1e-9)
    >>> y.round(6).tolist(), h.tolist()
    ([[-1.0, 1.0]], [[1.0, 3.0]])
    """
    operand, dtype = check_x(x, least=1)
    axes = normalized_axes(operand.view, normalized_shape, axis)
    addend = check_like(operand, residual, "residual")
    call = Call("add_layer_norm", operand, dtype, axes, eps=check_number("eps", eps), addend=addend)
    return check_call(call, weight, bias, backend=backend)


@operation("tuple[Array, Array]")
def add_rms_norm(
    x: Array,
    residual: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    backend: str | Backend | None = None,
) -> Call:
    """Add a residual and normalize the sum, in one pass: ``h = x + residual; y = rms_norm(h)``.

    Parameters
    ----------
    x, residual : arrays of one shape ``(..., *normalized_shape)`` and one dtype
    normalized_shape, weight, eps, axis, backend
        As for `rms_norm`.

    Returns
    -------
    (y, h) : arrays
        As for `add_layer_norm`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `rms_norm`.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> y, h = nbnorm.add_rms_norm(np.array([[1.0, 2.0]]), np.array([[2.0, 2.0]]), 2, eps=0.0)
    >>> y.round(6).tolist(), h.tolist()
    ([[0.848528, 1.131371]], [[3.0, 4.0]])
    """
    operand, dtype = check_x(x, least=1)
    axes = normalized_axes(operand.view, normalized_shape, axis)
    addend = check_like(operand, residual, "residual")
    call = Call("add_rms_norm", operand, dtype, axes, eps=check_rms_eps(eps, dtype), center=False, addend=addend)
    return check_call(call, weight, None, backend=backend)


@operation("Array | tuple[Array, Moments]")
def batch_renorm(
    x: Array,
    running_mean: Array,
    running_var: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
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
    """Batch norm whose training result is drawn to what evaluation gives: ``(xhat * r + d) * weight + bias``.

    r = std / running_std, clipped to [1 / r_max, r_max], and d = (mean - running_mean) / running_std, clipped to
    [-d_max, d_max], so that without clipping the running statistics normalize; no gradient flows through r and d. With
    ``r_max=1, d_max=0`` it is batch norm. Evaluation is that of batch norm.

    Parameters
    ----------
    x, running_mean, running_var, weight, bias, training, momentum, eps
        As for `batch_norm`; the running statistics are needed in training too, and updated as there.
    r_max : float
        At least 1.
    d_max : float
        At least 0.
    channel_axis, mask, activation, order, residual, out, return_moments, backend
        As for `batch_norm`.

    Returns
    -------
    y : array
        Of x's kind, dtype, shape and memory order; ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models" (2017). Costs one
    more pass over x than batch norm.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x, mean, var = np.array([[1.0], [3.0]]), np.array([1.0]), np.array([4.0])
    >>> nbnorm.batch_renorm(x, mean, var, training=True, eps=1e-9).round(6).tolist()
    [[0.0], [1.0]]
    """
    operand, dtype = check_x(x, least=2)
    channel = check_axis("channel_axis", channel_axis, operand.view)
    axes = layout.batch(operand.view.shape, channel)
    call = Call("batch_renorm", operand, dtype, axes, eps=check_number("eps", eps))
    check_call(call, weight, bias, mask, activation, order, residual, out, return_moments, backend)
    if running_mean is None or running_var is None:
        raise ValueError("batch_renorm needs running_mean and running_var; got None")
    limits = check_number("r_max", r_max), check_number("d_max", d_max)
    if limits[0] < 1:
        raise ValueError(f"r_max must be at least 1; got {limits[0]}")
    if limits[1] < 0:
        raise ValueError(f"d_max must not be negative; got {limits[1]}")
    statistics = check_statistics(call, running_mean, running_var, training, momentum, "training")
    if training:
        assert statistics is not None
        call.renorm = Renorm(*statistics, *limits)
    return call


@operation("Array")
def weight_standardization(
    weight: Array,
    eps: float = 1e-5,
    *,
    axis: int = 0,
    out: Array | None = None,
    backend: str | Backend | None = None,
) -> Call:
    """Standardize a kernel: each output channel to mean 0 and variance 1 over all its weights.

    Parameters
    ----------
    weight : array (O, I, ...) of a convolution, or (O, I) of a linear layer
    eps : float
        Added to the variance.
    axis : int
        The axis of the output channels.
    out, backend
        As for `batch_norm`.

    Returns
    -------
    array
        Of the kernel's kind, dtype, shape and memory order.

    Raises
    ------
    ValueError, TypeError, BackendError
        As for `batch_norm`.

    Notes
    -----
    Qiao et al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization" (2019), for kernels
    in front of group norm. The pullback's gradient of the kernel is `Grads.x`.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.weight_standardization(np.array([[1.0, 3.0], [10.0, 30.0]]), eps=1e-9).round(6).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    operand, dtype = check_x(weight, least=2)
    kept = check_axis("axis", axis, operand.view)
    others = tuple(other for other in range(operand.view.ndim) if other != kept)
    axes = layout.over(operand.view.shape, others, params=False)
    call = Call("weight_standardization", operand, dtype, axes, eps=check_number("eps", eps))
    return check_call(call, None, None, out=out, backend=backend)


@operation("Any")
def norm_dropout(
    op: Callable[..., Any], *args: Any, p: float, seed: int, first: str = "norm", **kwargs: Any
) -> Prepared:
    """Normalize, then set elements to 0 at random: ``dropout(op(*args, **kwargs))``.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`
    *args, **kwargs
        Its arguments.
    p : float from 0 to 1
        Probability of an element to become 0; the others are multiplied by ``1 / (1 - p)``. Give 0 in evaluation.
    seed : int from 0, below 2**128
        Chooses the elements. Another one for each call: two calls with one seed drop the same elements.
    first : "norm" or "dropout"
        With "dropout" x is dropped before it is normalized, at the price of a copy of x. In front of batch norm that
        makes the statistics of training wrong for evaluation, of which a warning tells once.

    Returns
    -------
    What `op` returns
        Which elements are 0 follows from the seed and their indices alone: not from threads, backend or memory order.
        The pullback makes the choice anew; no mask is kept.

    Raises
    ------
    ValueError, TypeError, BackendError
        As `op` does, and for p, seed and first.

    Notes
    -----
    Srivastava et al., "Dropout: A Simple Way to Prevent Neural Networks from Overfitting" (2014); on the order: Li et
    al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance Shift" (2019).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 3.0, 1.0, 3.0]])
    >>> nbnorm.norm_dropout(nbnorm.layer_norm, x, 4, eps=1e-9, p=0.5, seed=1).round(6).tolist()
    [[0.0, 0.0, -2.0, 2.0]]
    """
    if op is norm_dropout:
        raise TypeError("op must be a norm by mean and variance; got nbnorm.norm_dropout")
    call = prepared(op, args, kwargs)
    whole = call.whole if isinstance(call, GhostCall) else call
    if not isinstance(whole, Call) or whole.op == "moments":
        raise TypeError(f"op must be a norm by mean and variance; got nbnorm.{op.__name__}")
    dropout = Dropout(check_number("p", p), check_index("seed", seed))
    if not 0 <= dropout.p <= 1:
        raise ValueError(f"p must be from 0 to 1; got {p}")
    if not 0 <= dropout.seed < 2**128:
        raise ValueError(f"seed must be from 0, below 2**128; got {seed}")
    if first not in ("norm", "dropout"):
        raise ValueError(f"first must be norm or dropout; got {first!r}")
    if first == "norm":
        whole.dropout = dropout
    elif whole.addend is not None:
        raise ValueError(f"first must be norm for nbnorm.{op.__name__}; got 'dropout'")
    else:
        whole.dropped = dropout
    return call


def lengths_to_mask(lengths: Any, max_length: int | None = None) -> Any:
    """The mask of padded sequences: True for the first ``lengths[i]`` steps of sequence i.

    Parameters
    ----------
    lengths : integers (N,), a sequence or an array of any supported kind
    max_length : int
        Steps of the padded array, T; by default the longest length.

    Returns
    -------
    numpy array of bool (N, T)
        For x (N, T, C) pass ``mask[..., None]``.

    Raises
    ------
    ValueError, TypeError
        Where lengths are not one axis of whole numbers from 0 to max_length.

    Examples
    --------
    >>> import nbnorm
    >>> nbnorm.lengths_to_mask([2, 0, 3]).astype(int).tolist()
    [[1, 1, 0], [0, 0, 0], [1, 1, 1]]
    """
    known = isinstance(lengths, np.ndarray | Sequence)
    try:
        counts = np.asarray(lengths if known else adapter_of(lengths, "lengths").view(lengths, "lengths"))
    except ValueError as error:
        raise ValueError(f"lengths must have one axis; got {lengths!r}") from error
    if counts.ndim != 1:
        raise ValueError(f"lengths must have one axis; got shape {counts.shape}")
    if counts.dtype.kind not in "iu" and counts.size:
        raise TypeError(f"lengths must be whole numbers; got dtype {counts.dtype}")
    longest = int(counts.max(initial=0))
    steps = longest if max_length is None else check_index("max_length", max_length)
    if steps < 0:
        raise ValueError(f"max_length must not be negative; got {max_length}")
    if counts.size and (int(counts.min()) < 0 or longest > steps):
        raise ValueError(f"lengths must be from 0 to {steps}; got {int(counts.min())} to {longest}")
    return np.arange(steps) < counts[:, None]
