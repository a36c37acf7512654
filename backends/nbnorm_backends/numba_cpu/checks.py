"""Checks of what compiled callers give: types when the caller is compiled, sizes when it runs, before anything is
written.

Messages about sizes are constants: without Python objects there is nothing to make others of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.core.errors import TypingError

from nbnorm_backends.numba_cpu.elements import chosen
from nbnorm_backends.numba_cpu.kernels import PLAIN

REAL = types.float32, types.float64
Kind = tuple[str, Callable[[Any], bool]]  # of an array, in words and as a condition


# ---- x, which comes first: what the other checks are given is taken from its shape -----------------------------------


@chosen(counted=True)
def check_x(x):
    """With an axis at least."""
    return _checked_x(x, 1)


@chosen(counted=True)
def check_channels(x):
    """With channels on axis 1."""
    return _checked_x(x, 2)


@chosen(counted=True)
def check_space(x):
    """With channels on axis 1, and space."""
    return _checked_x(x, 3)


def _checked_x(x: Any, least: int) -> Callable[..., Any]:
    axes = f"at least {least} ax{'i' if least == 1 else 'e'}s"
    kind = f"float32 or float64 with {axes}", lambda array: array.dtype in REAL and array.ndim >= least
    _check_arrays(kind, x=x)
    return lambda x: x


# ---- what both passes have -------------------------------------------------------------------------------------------


@chosen
def check_forward(x, weight, bias, eps, out, mean, rstd, channels, groups):
    """For so many channels, or elements of a row, and so many groups, each with statistics of its own."""
    _check_arrays(_vector(x), optional=True, weight=weight, bias=bias)
    _check_number(eps=eps)
    _check_arrays(_like(x), written=True, out=out)
    _check_arrays(STATISTICS, written=True, optional=True, mean=mean, rstd=rstd)
    return _check_forward_sizes


def _check_forward_sizes(x, weight, bias, eps, out, mean, rstd, channels, groups):
    if weight is not None and weight.size != channels:
        raise ValueError("weight must have as many elements as x has channels (layer and RMS norm: as its last axis)")
    if bias is not None and bias.size != channels:
        raise ValueError("bias must have as many elements as x has channels (layer norm: as its last axis)")
    if not np.isfinite(eps):
        raise ValueError("eps must be finite")
    if out.shape != x.shape:
        raise ValueError("out must have the shape of x")
    if overlaps_in_part(out, x):
        raise ValueError("out must be x itself or memory apart from it; got memory that overlaps x in part")
    if mean is not None and mean.size != groups:
        raise ValueError("mean must have one element for each set of elements that is normalized with one mean")
    if rstd is not None and rstd.size != groups:
        raise ValueError("rstd must have one element for each set of elements that is normalized with one variance")


@chosen
def check_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, channels, groups):
    _check_arrays(_like(x), dy=dy)
    _check_arrays(_vector(x), optional=True, weight=weight)
    _check_arrays(STATISTICS, mean=mean, rstd=rstd)
    _check_arrays(_like(x), written=True, dx=dx)
    _check_arrays(_vector(x), written=True, optional=True, dweight=dweight, dbias=dbias)
    return _check_backward_sizes


def _check_backward_sizes(dy, x, weight, mean, rstd, dx, dweight, dbias, channels, groups):
    if dy.shape != x.shape:
        raise ValueError("dy must have the shape of x")
    if weight is not None and weight.size != channels:
        raise ValueError("weight must have as many elements as x has channels (layer and RMS norm: as its last axis)")
    if mean.size != groups:
        raise ValueError("mean must have one element for each set of elements that was normalized with one mean")
    if rstd.size != groups:
        raise ValueError("rstd must have one element for each set of elements that was normalized with one variance")
    if dx.shape != x.shape:
        raise ValueError("dx must have the shape of x")
    if overlaps_in_part(dx, x) or overlaps_in_part(dx, dy):
        raise ValueError("dx must be x or dy itself or memory apart from both; got memory that overlaps one in part")
    if dweight is not None and dweight.size != channels:
        raise ValueError("dweight must have as many elements as weight")
    if dbias is not None and dbias.size != channels:
        raise ValueError("dbias must have as many elements as bias")


@PLAIN
def share_memory(a, b):
    """Whether two contiguous arrays do."""
    first, second = a.ctypes.data, b.ctypes.data
    return first < second + b.nbytes and second < first + a.nbytes


@PLAIN
def overlaps_in_part(a, b):
    """Of two contiguous arrays of one shape and type."""
    return a.ctypes.data != b.ctypes.data and share_memory(a, b)


# ---- what some norms have --------------------------------------------------------------------------------------------


@chosen
def check_groups(x, num_groups):
    """The number of groups."""
    _expect(isinstance(num_groups, types.Integer), "num_groups", "an integer", num_groups)
    return _checked_groups


def _checked_groups(x, num_groups):
    if num_groups < 1 or x.shape[1] % num_groups:
        raise ValueError("num_groups must divide the channels of x")
    return np.int64(num_groups)


@chosen
def check_training(training):
    _expect(isinstance(training, types.Boolean | types.BooleanLiteral), "training", "True or False", training)
    return lambda training: None


@chosen
def check_running(running_mean, running_var, training, momentum, channels):
    arrays = {"running_mean": running_mean, "running_var": running_var}
    kind = "one axis and float32 or float64", lambda array: array.dtype in REAL and array.ndim == 1
    _check_arrays(kind, written=True, optional=True, **arrays)
    _check_number(momentum=momentum)
    missing = [name for name, given in arrays.items() if _absent(given)]
    if len(missing) == 1:
        raise TypingError(f"running_mean and running_var must be given together; {missing[0]} is missing")
    return _check_no_running if missing else _check_running_sizes


def _check_no_running(running_mean, running_var, training, momentum, channels):
    if not training:
        raise ValueError("running_mean and running_var must be given where training is False; got None")


def _check_running_sizes(running_mean, running_var, training, momentum, channels):
    if running_mean.size != channels:
        raise ValueError("running_mean must have as many elements as x has channels")
    if running_var.size != channels:
        raise ValueError("running_var must have as many elements as x has channels")
    if not np.isfinite(momentum):
        raise ValueError("momentum must be finite")


@PLAIN
def check_variance(x, count, eps):
    """Where the variances are those of x, each of so many values."""
    if x.size and count == 1:
        raise ValueError("x must have more than 1 value to take each variance of")
    if eps <= 0:
        raise ValueError("eps must be positive where variances are those of x")


# ---- types -----------------------------------------------------------------------------------------------------------

STATISTICS: Kind = "float64", lambda array: array.dtype == types.float64


def _like(x: Any) -> Kind:
    return f"{x.ndim} axes and x's {x.dtype}", lambda array: (array.dtype, array.ndim) == (x.dtype, x.ndim)


def _vector(x: Any) -> Kind:
    return f"one axis and x's {x.dtype}", lambda array: (array.dtype, array.ndim) == (x.dtype, 1)


def _check_arrays(kind: Kind, *, written: bool = False, optional: bool = False, **arrays: Any) -> None:
    words, fits = kind
    expected = f"a C-contiguous array of {words}{', not read-only' * written}{', or None' * optional}"
    for name, given in arrays.items():
        plain = isinstance(given, types.Array) and given.layout == "C" and given.aligned
        fitting = plain and (given.mutable or not written) and fits(given)
        _expect(fitting or (optional and _absent(given)), name, expected, given)


def _check_number(**numbers: Any) -> None:
    for name, given in numbers.items():
        _expect(isinstance(given, types.Float | types.Integer), name, "a number", given)


def _absent(given: Any) -> bool:
    return isinstance(given, types.NoneType)


def _expect(fits: bool, name: str, expected: str, came: Any) -> None:
    if not fits:
        raise TypingError(f"{name} must be {expected}; got {came}")
