"""Checks of the arguments of operations: each names the argument, what was expected and what came.

What passes has become an `Operand`, or a field of the `Call`. Nothing is written here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import layout
from nbnorm.arrays import HALF, Array, adapter_of, float_view, overlap
from nbnorm.backend import ACTIVATIONS, ORDERS, Backend
from nbnorm.checks import check_flag, check_index, check_number
from nbnorm.devices import on_host
from nbnorm.engine import Call, Operand, Running, check_beside, check_like
from nbnorm.layout import Axes


def check_x(x: Array, *, least: int) -> tuple[Operand, str]:
    adapter, view, dtype = float_view(x, "x")
    if view.ndim < least:
        raise ValueError(f"x must have at least {least} axes; got shape {view.shape}")
    return Operand(x, adapter, view), dtype


def check_call(
    call: Call,
    weight: Array | None,
    bias: Array | None,
    mask: Array | None = None,
    activation: str | None = None,
    order: str = "norm_act",
    residual: Array | None = None,
    out: Array | None = None,
    return_moments: bool = False,
    backend: str | Backend | None = None,
) -> Call:
    """What every norm has: parameters, mask, activation, order, residual, out, return_moments, backend."""
    call.weight = _check_param(call, weight, "weight")
    call.bias = _check_param(call, bias, "bias")
    call.mask = None if mask is None else check_mask(call.x, mask)
    call.activation = None if activation is None else _check_choice("activation", activation, ACTIVATIONS, ", or None")
    call.order = _check_choice("order", order, ORDERS)
    call.residual = None if residual is None else check_like(call.x, residual, "residual")
    call.return_moments = check_flag("return_moments", return_moments)
    call.backend = check_backend(backend)
    if out is not None:
        check_out_of(call, out)
    return call


def check_out_of(call: Call, out: Array) -> None:
    """`out` beside all that the call reads, but the statistics: of those `check_apart` has the word."""
    inputs = {"weight": call.weight, "bias": call.bias, "residual": call.residual or call.addend}
    call.out = check_out(call.x, out, inputs)
    if call.mask is not None and overlap(call.out.view, call.mask):
        raise ValueError("out must not overlap mask")


def _check_choice(name: str, value: Any, choices: tuple[str, ...], more: str = "") -> str:
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"{name} must be one of {', '.join(choices)}{more}; got {value!r}")
    return value


def check_mask(x: Operand, mask: Array) -> NDArray[np.bool_]:
    """The mask with as many axes as x, each 1 or full."""
    adapter = adapter_of(mask, "mask")
    view = adapter.view(mask, "mask")
    check_beside(x, adapter, view, "mask")
    if view.dtype != np.bool_:
        raise TypeError(f"mask must be of dtype bool, True where an element is valid; got {view.dtype}")
    shape = (1,) * (x.view.ndim - view.ndim) + view.shape
    if len(shape) != x.view.ndim or any(have not in (1, n) for have, n in zip(shape, x.view.shape, strict=True)):
        raise ValueError(f"mask must broadcast to x {x.view.shape}; got shape {view.shape}")
    return view.reshape(shape)


def check_rms_eps(eps: float | None, dtype: str) -> float:
    """eps; None stands for the epsilon of the type computed in."""
    if eps is None:
        return float(np.finfo(np.float64 if dtype == "float64" else np.float32).eps)
    return check_number("eps", eps)


def _check_param(call: Call, param: Array | None, name: str) -> Operand | None:
    if param is None:
        return None
    adapter, view, dtype = float_view(param, name)
    check_beside(call.x, adapter, view, name)
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


def check_out(x: Operand, out: Array, inputs: dict[str, Operand | None]) -> Operand:
    """`out` is x itself or memory of its own, apart from every other input."""
    adapter, view, _ = float_view(out, "out")
    check_beside(x, adapter, view, "out")
    if view.shape != x.view.shape or view.dtype != x.view.dtype:
        raise ValueError(
            f"out must have x's shape {x.view.shape} and dtype {x.view.dtype}; got {view.shape} and {view.dtype}"
        )
    if not view.flags.writeable:
        raise ValueError("out must be writable; got a read-only array")
    same = view.ctypes.data == x.view.ctypes.data and _long_strides(view) == _long_strides(x.view)
    if not same and overlap(view, x.view):
        raise ValueError("out must be x itself or memory apart from it; got memory that overlaps x in part")
    _check_memory_of_its_own("out", view)
    for name, operand in inputs.items():
        if operand is not None and overlap(view, operand.view):
            raise ValueError(f"out must not overlap {name}")
    return Operand(out, adapter, view)


def _long_strides(array: NDArray[Any]) -> list[int]:
    """Strides, without those of axes of length 1, which mean nothing."""
    return [stride for length, stride in zip(array.shape, array.strides, strict=True) if length > 1]


def _check_memory_of_its_own(name: str, view: NDArray[Any]) -> None:
    """ValueError unless the strides keep all elements apart: each axis steps over all that the smaller ones reach."""
    if not view.size:
        return  # NumPy gives an empty array strides of 0
    reach = view.itemsize
    axes = sorted((abs(stride), length) for length, stride in zip(view.shape, view.strides, strict=True) if length > 1)
    for stride, length in axes:
        if stride < reach:
            raise ValueError(f"{name} must have memory of its own for each element; got strides {view.strides}")
        reach += stride * (length - 1)


def check_statistics(
    call: Call, mean: Array | None, var: Array | None, use_batch: bool, momentum: float, switch: str
) -> tuple[Operand, Operand] | None:
    """The statistics that normalize, and the running ones to update; returned where they are given."""
    if (mean is None) != (var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise ValueError(f"running_mean and running_var must be given together; {missing} is missing")
    check_flag(switch, use_batch)
    weight_of_new = check_number("momentum", momentum)
    statistics = None
    if mean is not None:
        statistics = _check_running(call, mean, "running_mean"), _check_running(call, var, "running_var")
        check_apart(call, statistics)
    if not use_batch:
        if statistics is None:
            raise ValueError(f"{call.op} without {switch}=True needs running_mean and running_var; got none")
        call.fixed = statistics
        return statistics
    size, count = call.x.view.size, call.axes.count
    if size and count == 1 and call.mask is None:
        raise ValueError(
            f"x must have more than 1 value per channel with {switch}=True, to have a variance; got {call.x.view.shape}"
        )
    if call.eps <= 0:
        raise ValueError(f"eps must be positive with {switch}=True; got {call.eps}")
    if statistics is not None and not call.return_moments:
        check_writable(call, statistics)
        call.running = Running(*statistics, weight_of_new)
    return statistics


def check_ghost_batch_size(call: Call, value: Any, channel: int) -> int:
    size = check_index("ghost_batch_size", value)
    shape = call.x.view.shape
    if not on_host(call.x.view):
        raise TypeError(
            f"ghost_batch_size needs x in host memory, where its parts are joined; got {call.x.view.device}"
        )
    if size < 1:
        raise ValueError(f"ghost_batch_size must be at least 1; got {size}")
    if channel == 0:
        raise ValueError(f"ghost_batch_size needs the samples on axis 0 of x {shape}; got the channels there")
    samples = shape[0] % size or min(size, shape[0])  # of the smallest ghost batch
    if call.fixed is None and call.x.view.size and call.mask is None and samples * call.axes.count == shape[0]:
        raise ValueError(
            f"ghost_batch_size must leave more than 1 value per channel in each ghost batch, to have a variance; got "
            f"{size} for x {shape}"
        )
    return size


def _check_running(call: Call, array: Array, name: str) -> Operand:
    adapter, view, dtype = float_view(array, name)
    check_beside(call.x, adapter, view, name)
    shape = _param_shape(call)
    if view.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape}, one value per channel of x {call.x.view.shape}; got {view.shape}"
        )
    if dtype not in (call.dtype, "float32", "float64"):
        raise TypeError(f"{name} must be of dtype {call.dtype}, float32 or float64; got {dtype}")
    return Operand(array, adapter, view)


def check_writable(call: Call, statistics: tuple[Operand, Operand]) -> None:
    mean, var = (statistic.view for statistic in statistics)
    for view, name in ((mean, "running_mean"), (var, "running_var")):
        if not view.flags.writeable:
            raise TypeError(
                f"{name} cannot be written in place: pass return_moments=True and keep the arrays that "
                "moments.update(running_mean, running_var, momentum) returns"
            )
        _check_memory_of_its_own(name, view)
        for other, others_name in ((call.x, "x"), (call.weight, "weight"), (call.bias, "bias")):
            if other is not None and overlap(view, other.view):
                raise ValueError(f"{name} must not overlap {others_name} when it is to be updated")
    if overlap(mean, var):
        raise ValueError("running_mean and running_var must not overlap when they are to be updated")


def check_apart(call: Call, statistics: tuple[Operand, Operand]) -> None:
    for statistic, name in zip(statistics, ("running_mean", "running_var"), strict=True):
        if call.out is not None and overlap(statistic.view, call.out.view):
            raise ValueError(f"out must not overlap {name}")


def check_axis(name: str, value: Any, x: NDArray[Any], *, after_batch: bool = False) -> int:
    axis = check_index(name, value)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{name} must be an axis of x {x.shape}, from {-x.ndim} to {x.ndim - 1}; got {axis}")
    axis %= x.ndim
    if after_batch and axis == 0:
        raise ValueError(f"{name} must not be the batch axis 0 of x {x.shape}; got {value}")
    return axis


def check_axes(value: int | Sequence[int], x: NDArray[Any]) -> tuple[int, ...]:
    if isinstance(value, np.ndarray) and value.ndim:
        raise TypeError(f"axis must be an integer or a sequence of them; got {value!r}")
    given = value if isinstance(value, Sequence) else (value,)
    axes = tuple(sorted(check_axis("axis", axis, x) for axis in given))
    if len(set(axes)) != len(axes):
        raise ValueError(f"axis must name each axis once; got {value}")
    if not axes:
        raise ValueError("axis must name at least one axis; got none")
    return axes


def check_backend(backend: Any) -> str | Backend | None:
    if backend is not None and not isinstance(backend, str | Backend):
        raise TypeError(f"backend must be a name or a Backend; got {backend!r}")
    return backend


def normalized_axes(
    x: NDArray[Any], normalized_shape: int | Sequence[int] | None, axis: int | Sequence[int] | None
) -> Axes:
    if (normalized_shape is None) == (axis is None):
        came = "neither" if axis is None else "both"
        raise ValueError(f"give one of normalized_shape and axis; got {came}")
    if axis is not None:
        return layout.over(x.shape, check_axes(axis, x))
    given = normalized_shape if isinstance(normalized_shape, Sequence) else (normalized_shape,)
    shape = tuple(check_index("normalized_shape", length) for length in given)
    if not shape or x.shape[max(x.ndim - len(shape), 0) :] != shape:
        raise ValueError(f"normalized_shape must be the trailing lengths of x {x.shape}; got {shape}")
    return layout.over(x.shape, tuple(range(x.ndim - len(shape), x.ndim)))
