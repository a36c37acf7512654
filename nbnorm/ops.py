"""The public operations: each checks its arguments and builds a `Call`; the engine does the rest."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine, layout
from nbnorm.arrays import HALF, Array, float_view
from nbnorm.backend import ACTIVATIONS, Backend
from nbnorm.checks import check_flag, check_index, check_number
from nbnorm.engine import Call, Operand, Pullback, Running
from nbnorm.layout import Axes
from nbnorm.statistics import Moments

P = ParamSpec("P")
_prepare: dict[Callable[..., Any], Callable[..., Call]] = {}


def _op(prepare: Callable[P, Call]) -> Callable[P, Any]:
    """The public function that runs what `prepare` checked; `vjp` and `explain` find `prepare` through it."""

    @functools.wraps(prepare)
    def run(*args: P.args, **kwargs: P.kwargs) -> Any:
        return engine.forward(prepare(*args, **kwargs))

    run.__annotations__ = {**prepare.__annotations__, "return": "Array | tuple[Array, Moments]"}
    run.__signature__ = inspect.signature(prepare).replace(return_annotation="Array | tuple[Array, Moments]")  # type: ignore[attr-defined]
    _prepare[run] = prepare
    return run


@_op
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
    activation: str | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
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
    activation : "relu", "leaky_relu", "silu", "gelu", "gelu_tanh", "sigmoid" or "tanh"
        Applied to the result; leaky_relu has slope 0.01 below zero.
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
        Of x's kind, dtype, shape and memory order; ``(y, Moments)`` with `return_moments`.

    Raises
    ------
    ValueError, TypeError
        Naming the argument, what was expected and what came; nothing has been written.
    BackendError
        If no backend takes the request.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift"
    (2015). On the Numba backend x is read twice and y written once; x comes from memory
    once where a channel fits in the cache.

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
    operand, dtype = _check_x(x, least=2)
    channel = _check_axis("channel_axis", channel_axis, operand.view)
    axes = layout.batch(operand.view.shape, channel)
    call = Call("batch_norm", operand, dtype, axes, eps=check_number("eps", eps))
    _check_call(call, weight, bias, activation, out, return_moments, backend)
    _check_statistics(call, running_mean, running_var, training, momentum, "training")
    return call


@_op
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
    activation: str | None = None,
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
    momentum, eps, channel_axis, activation, out, backend
        As for `batch_norm`.
    return_moments : bool
        As for `batch_norm`; the moments have shape (N, C).

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
    Ulyanov, Vedaldi and Lempitsky, "Instance Normalization: The Missing Ingredient for Fast Stylization" (2016).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[[1.0, 3.0], [10.0, 30.0]]])
    >>> nbnorm.instance_norm(x, eps=1e-9).round(6).tolist()
    [[[-1.0, 1.0], [-1.0, 1.0]]]
    """
    operand, dtype = _check_x(x, least=3)
    channel = _check_axis("channel_axis", channel_axis, operand.view, after_batch=True)
    axes = layout.instance(operand.view.shape, channel)
    call = Call("instance_norm", operand, dtype, axes, eps=check_number("eps", eps))
    _check_call(call, weight, bias, activation, out, return_moments, backend)
    _check_statistics(call, running_mean, running_var, use_input_stats, momentum, "use_input_stats")
    return call


@_op
def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    channel_axis: int = 1,
    activation: str | None = None,
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
    eps, channel_axis, activation, out, backend
        As for `batch_norm`; eps may be any finite number.
    return_moments : bool
        Return ``(y, Moments)``; the moments have shape (N, num_groups).

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
    Wu and He, "Group Normalization" (2018). Its result does not depend on the batch, so it serves small batches.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=1e-9).round(6).tolist()
    [[-1.0, 1.0, -1.0, 1.0]]
    """
    operand, dtype = _check_x(x, least=2)
    shape = operand.view.shape
    channel = _check_axis("channel_axis", channel_axis, operand.view, after_batch=True)
    groups = check_index("num_groups", num_groups)
    if groups < 1 or shape[channel] % groups:
        raise ValueError(f"num_groups must divide the {shape[channel]} channels of x {shape}; got {groups}")
    axes = layout.group(shape, groups, channel)
    call = Call("group_norm", operand, dtype, axes, eps=check_number("eps", eps))
    return _check_call(call, weight, bias, activation, out, return_moments, backend)


@_op
def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
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
    activation, out, backend
        As for `batch_norm`.
    return_moments : bool
        Return ``(y, Moments)``; the moments have the shape of the axes that are kept.

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
    Ba, Kiros and Hinton, "Layer Normalization" (2016). On the Numba backend x comes from memory once and y goes there
    once.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=1e-9).round(6).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    operand, dtype = _check_x(x, least=1)
    axes = _normalized_axes(operand.view, normalized_shape, axis)
    call = Call("layer_norm", operand, dtype, axes, eps=check_number("eps", eps))
    return _check_call(call, weight, bias, activation, out, return_moments, backend)


@_op
def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int] | None = None,
    weight: Array | None = None,
    eps: float | None = None,
    *,
    axis: int | Sequence[int] | None = None,
    activation: str | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """Divide by the root mean square over the trailing axes, or over `axis`: ``x / sqrt(mean(x*x) + eps) * weight``.

    Parameters
    ----------
    x : array of shape ``(..., *normalized_shape)``
    normalized_shape, weight, axis, activation, out, backend
        As for `layer_norm`.
    eps : float
        None stands for the epsilon of the type computed in: float64's for float64, float32's for the others.
    return_moments : bool
        Return ``(y, Moments)``; these are moments about zero: mean 0 and m2 = sum(x*x).

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
    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> nbnorm.rms_norm(np.array([[3.0, 4.0]]), 2, eps=0.0).round(6).tolist()
    [[0.848528, 1.131371]]
    """
    operand, dtype = _check_x(x, least=1)
    axes = _normalized_axes(operand.view, normalized_shape, axis)
    if eps is None:
        eps = float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    call = Call("rms_norm", operand, dtype, axes, eps=check_number("eps", eps), center=False)
    return _check_call(call, weight, None, activation, out, return_moments, backend)


def moments(x: Array, axis: int | Sequence[int] | None = None, *, backend: str | Backend | None = None) -> Moments:
    """Count, mean and sum of squared deviations over `axis`, in float64, ready to merge.

    Parameters
    ----------
    x : array; float32, float64, float16 or bfloat16
    axis : int or ints
        The axes to reduce over; None for all.
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
    return engine.moments(_prepare_moments(x, axis, backend=backend))


def _prepare_moments(
    x: Array, axis: int | Sequence[int] | None = None, *, backend: str | Backend | None = None
) -> Call:
    operand, dtype = _check_x(x, least=0)
    every = tuple(range(operand.view.ndim))
    axes = layout.over(operand.view.shape, every if axis is None else _check_axes(axis, operand.view), params=False)
    return Call("moments", operand, dtype, axes, backend=_check_backend(backend))


def vjp(op: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Pullback]:
    """Run a norm and return its result with the function that takes gradients back through it.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`
    *args, **kwargs
        Its arguments. `out` must not overlap x.

    Returns
    -------
    (result, pullback)
        What `op` returns, and a function of dy that gives `Grads`. The inputs must not change before it runs.

    Raises
    ------
    ValueError, TypeError, BackendError
        As `op` does; TypeError when `op` is not a norm.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x, w = np.array([[1.0, 2.0, 4.0]]), np.ones(3)
    >>> y, pullback = nbnorm.vjp(nbnorm.layer_norm, x, 3, weight=w)
    >>> grads = pullback(np.array([[1.0, 0.0, 0.0]]))
    >>> grads.weight.round(4).tolist(), grads.bias
    ([-1.069, 0.0, 0.0], None)
    """
    call = _prepared(op, _prepare, args, kwargs)
    if call.out is not None and _overlap(call.out.view, call.x.view):
        raise ValueError("out must not overlap x under vjp: the gradient needs x as it was")
    return engine.vjp(call)


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> dispatch.Decision:
    """Which backend would run a call, from which source, and why the others would not; nothing is run.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`, or `nbnorm.moments`
    *args, **kwargs
        Its arguments, which are checked as in a call.

    Returns
    -------
    Decision

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.zeros((4, 3), np.float32)
    >>> print(nbnorm.explain(nbnorm.layer_norm, x, 3, backend="numpy"))
    layer_norm on cpu, float32: numpy (named by backend=)
    """
    return engine.explain(_prepared(op, _prepare | {moments: _prepare_moments}, args, kwargs))


def _prepared(
    op: Callable[..., Any],
    preparations: dict[Callable[..., Any], Callable[..., Call]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Call:
    prepare = preparations.get(op) if callable(op) else None
    if prepare is None:
        known = ", ".join(f"nbnorm.{run.__name__}" for run in preparations)
        raise TypeError(f"op must be one of {known}; got {op!r}")
    return prepare(*args, **kwargs)


# ---- checks: each names the argument, what was expected and what came ------------------------------------------------


def _check_x(x: Array, *, least: int) -> tuple[Operand, str]:
    adapter, view, dtype = float_view(x, "x")
    if view.ndim < least:
        raise ValueError(f"x must have at least {least} axes; got shape {view.shape}")
    return Operand(x, adapter, view), dtype


def _check_call(
    call: Call,
    weight: Array | None,
    bias: Array | None,
    activation: str | None,
    out: Array | None,
    return_moments: bool,
    backend: str | Backend | None,
) -> Call:
    """What every norm has: parameters, activation, out, return_moments, backend."""
    call.weight = _check_param(call, weight, "weight")
    call.bias = _check_param(call, bias, "bias")
    if activation is not None and not (isinstance(activation, str) and activation in ACTIVATIONS):
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, or None; got {activation!r}")
    call.activation = activation
    call.return_moments = check_flag("return_moments", return_moments)
    call.backend = _check_backend(backend)
    if out is not None:
        call.out = _check_out(call, out)
    return call


def _check_param(call: Call, param: Array | None, name: str) -> Operand | None:
    if param is None:
        return None
    adapter, view, dtype = float_view(param, name)
    shape = _param_shape(call)
    if view.shape != shape:
        raise ValueError(f"{name} must have shape {shape} for x {call.x.view.shape}; got {view.shape}")
    if dtype != call.dtype and not (call.dtype in HALF and dtype == "float32"):
        allowed = f"{call.dtype} or float32" if call.dtype in HALF else call.dtype
        raise TypeError(f"{name} must be of dtype {allowed}, as x is {call.dtype}; got {dtype}")
    return Operand(param, adapter, view)


def _param_shape(call: Call) -> tuple[int, ...]:
    """The caller's shape of weight and bias: groups and their channels are one axis there."""
    shape = call.axes.param_shape
    return (math.prod(shape),) if call.op == "group_norm" else shape


def _check_out(call: Call, out: Array) -> Operand:
    adapter, view, _ = float_view(out, "out")
    x = call.x.view
    if view.shape != x.shape or view.dtype != x.dtype:
        raise ValueError(f"out must have x's shape {x.shape} and dtype {x.dtype}; got {view.shape} and {view.dtype}")
    if not view.flags.writeable:
        raise ValueError("out must be writable; got a read-only array")
    same = view.ctypes.data == x.ctypes.data and _long_strides(view) == _long_strides(x)
    if not same and _overlap(view, x):
        raise ValueError("out must be x itself or memory apart from it; got memory that overlaps x in part")
    _check_memory_of_its_own("out", view)
    for param, name in ((call.weight, "weight"), (call.bias, "bias")):
        if param is not None and _overlap(view, param.view):
            raise ValueError(f"out must not overlap {name}")
    return Operand(out, adapter, view)


def _long_strides(array: NDArray[Any]) -> list[int]:
    """Strides, without those of axes of length 1, which mean nothing."""
    return [stride for length, stride in zip(array.shape, array.strides, strict=True) if length > 1]


def _check_memory_of_its_own(name: str, view: NDArray[Any]) -> None:
    """ValueError unless the strides keep all elements apart: each axis steps over all that the smaller ones reach."""
    reach = view.itemsize
    axes = sorted((abs(stride), length) for length, stride in zip(view.shape, view.strides, strict=True) if length > 1)
    for stride, length in axes:
        if stride < reach:
            raise ValueError(f"{name} must have memory of its own for each element; got strides {view.strides}")
        reach += stride * (length - 1)


def _overlap(a: NDArray[Any], b: NDArray[Any]) -> bool:
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]  # NumPy's stubs know only 0 and -1
    except np.exceptions.TooHardError:
        return True  # undecided within the work allowed: strides as tangled as that are refused


def _check_statistics(
    call: Call, mean: Array | None, var: Array | None, use_batch: bool, momentum: float, switch: str
) -> None:
    """The statistics that normalize, and the running ones to update."""
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"running_mean and running_var must be given together; {missing} is missing")
    check_flag(switch, use_batch)
    weight_of_new = check_number("momentum", momentum)
    statistics = None
    if mean is not None:
        statistics = _check_running(call, mean, "running_mean"), _check_running(call, var, "running_var")
        _check_apart(call, statistics)
    if not use_batch:
        if statistics is None:
            raise ValueError(f"{call.op} without {switch}=True needs running_mean and running_var; got none")
        call.fixed = statistics
        return
    size, count = call.x.view.size, call.axes.count
    if size and count == 1:
        raise ValueError(
            f"x must have more than 1 value per channel with {switch}=True, to have a variance; got {call.x.view.shape}"
        )
    if call.eps <= 0:
        raise ValueError(f"eps must be positive with {switch}=True; got {call.eps}")
    if statistics is not None and not call.return_moments:
        _check_writable(call, statistics)
        call.running = Running(*statistics, weight_of_new)


def _check_running(call: Call, array: Array, name: str) -> Operand:
    adapter, view, dtype = float_view(array, name)
    shape = _param_shape(call)
    if view.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one value per channel of x {call.x.view.shape}; got {view.shape}"
        )
    if dtype not in (call.dtype, "float32", "float64"):
        raise TypeError(f"{name} must be of dtype {call.dtype}, float32 or float64; got {dtype}")
    return Operand(array, adapter, view)


def _check_writable(call: Call, statistics: tuple[Operand, Operand]) -> None:
    mean, var = (statistic.view for statistic in statistics)
    for view, name in ((mean, "running_mean"), (var, "running_var")):
        if not view.flags.writeable:
            raise TypeError(
                f"{name} cannot be written in place: pass return_moments=True and keep the arrays that "
                "moments.update(running_mean, running_var, momentum) returns"
            )
        _check_memory_of_its_own(name, view)
        for other, others_name in ((call.x, "x"), (call.weight, "weight"), (call.bias, "bias")):
            if other is not None and _overlap(view, other.view):
                raise ValueError(f"{name} must not overlap {others_name} when it is to be updated")
    if _overlap(mean, var):
        raise ValueError("running_mean and running_var must not overlap when they are to be updated")


def _check_apart(call: Call, statistics: tuple[Operand, Operand]) -> None:
    for statistic, name in zip(statistics, ("running_mean", "running_var"), strict=True):
        if call.out is not None and _overlap(statistic.view, call.out.view):
            raise ValueError(f"out must not overlap {name}")


def _check_axis(name: str, value: Any, x: NDArray[Any], *, after_batch: bool = False) -> int:
    axis = check_index(name, value)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{name} must be an axis of x {x.shape}, from {-x.ndim} to {x.ndim - 1}; got {axis}")
    axis %= x.ndim
    if after_batch and axis == 0:
        raise ValueError(f"{name} must not be the batch axis 0 of x {x.shape}; got {value}")
    return axis


def _check_axes(value: int | Sequence[int], x: NDArray[Any]) -> tuple[int, ...]:
    given = value if isinstance(value, Sequence) else (value,)
    axes = tuple(sorted(_check_axis("axis", axis, x) for axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must name each axis once; got {value}")
    if not axes:
        raise ValueError("axis must name at least one axis; got none")
    return axes


def _check_backend(backend: Any) -> str | Backend | None:
    if backend is not None and not isinstance(backend, str | Backend):
        raise TypeError(f"backend must be a name or a Backend; got {backend!r}")
    return backend


def _normalized_axes(
    x: NDArray[Any], normalized_shape: int | Sequence[int] | None, axis: int | Sequence[int] | None
) -> Axes:
    if (normalized_shape is None) == (axis is None):
        came = "neither" if axis is None else "both"
        raise ValueError(f"give one of normalized_shape and axis; got {came}")
    if axis is not None:
        return layout.over(x.shape, _check_axes(axis, x))
    given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    shape = tuple(check_index("normalized_shape", length) for length in given)
    if not shape or x.shape[max(x.ndim - len(shape), 0) :] != shape:
        raise ValueError(f"normalized_shape must be the trailing lengths of x {x.shape}; got {shape}")
    return layout.over(x.shape, tuple(range(x.ndim - len(shape), x.ndim)))
