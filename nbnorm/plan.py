"""Calls that are made again and again: their arguments are checked once, and later only whether the arrays are like the
first ones.

A call of a norm with nothing but arrays of NumPy's, weight and bias to it is remembered by what its checks depend on.
`plan` does the same in the open, for one call, and for every option.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine
from nbnorm.arguments import check_out
from nbnorm.arrays import overlap
from nbnorm.backend import Epilogue
from nbnorm.engine import Call, check_like

ARRAYS = ("x", "weight", "bias")
MOST = 1024  # calls that are remembered; then they are forgotten, and remembered anew
Again = Callable[..., NDArray[Any]]
Place = int | str | None  # of an argument: its position, its keyword, or not given


class Remembered:
    """How to run a call again, and where its arrays stand among the arguments."""

    def __init__(self, again: Again, places: tuple[Place, Place, Place]) -> None:
        self._again = again
        self._x, self._weight, self._bias = places

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NDArray[Any]:
        x = _given(self._x, args, kwargs)
        return self._again(x, _given(self._weight, args, kwargs), _given(self._bias, args, kwargs), None)


def _given(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if place is None:
        return None
    return args[place] if isinstance(place, int) else kwargs[place]


def key_of(op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All that the checks of a call, and the choice of its backend, depend on: of arrays of NumPy's not the content."""
    key: list[Any] = [op, dispatch.preferred()]
    for arg in args:
        if arg.__class__ is np.ndarray:
            key += arg.shape, arg.strides, arg.dtype
        else:
            key += arg.__class__, arg
    for name, arg in kwargs.items():
        if arg.__class__ is np.ndarray:
            key += name, arg.shape, arg.strides, arg.dtype
        else:
            key += name, arg.__class__, arg
    return tuple(key)


def recall(key: tuple[Any, ...]) -> Remembered | None:
    """What was remembered under a key, unless a trace wants to see the decision."""
    try:
        return None if dispatch.traced() else dispatch.registry.calls.get(key)
    except TypeError:  # an argument that cannot be hashed
        return None


def remember(
    key: tuple[Any, ...], op: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], call: Any
) -> None:
    """Keep how to run a call again that has just run, if it is of the kind."""
    calls = dispatch.registry.calls
    if not isinstance(call, Call) or call.out is not None or dispatch.traced():
        return
    again = repeated(call)
    if again is None:
        return
    names = list(inspect.signature(op).parameters)
    places = [names.index(name) if name in names[: len(args)] else name if name in kwargs else None for name in ARRAYS]
    if len(calls) >= MOST:
        calls.clear()
    try:
        calls[key] = Remembered(again, (places[0], places[1], places[2]))
    except TypeError:
        return


def repeated(call: Call, *, bound: bool = False) -> Again | None:
    """A function (x, weight, bias, out) that does what the call does, for arrays as it had; with `bound` of (x, out),
    for weight and bias as they will be. None where there is more to the call than these."""
    more = call.mask, call.residual, call.addend, call.fixed, call.running, call.renorm, call.dropout, call.dropped
    if any(part is not None for part in more) or call.return_moments or call.weight_offset or not call.x.view.size:
        return None
    operands = [operand for operand in (call.x, call.weight, call.bias) if operand is not None]
    if any(type(operand.given) is not np.ndarray or not engine.plain(operand.view) for operand in operands):
        return None
    placed = engine.place(call)
    if placed.copied or placed.plan.order != tuple(range(len(placed.plan.order))):
        return None
    decision = dispatch.decide(engine.request(call, placed.plan), call.backend)
    backend = dispatch.backend_of(decision, call.backend)
    weight, bias = (
        None if param is None else param.view.reshape(placed.plan.param_shape) for param in (call.weight, call.bias)
    )
    epilogue = Epilogue(call.activation, call.order)
    keys: dict[str, Any] = {"center": call.center, "epilogue": epilogue, "shape": call.x.view.shape, "bound": bound}
    return backend.repeated(placed.five_axes(), weight, bias, call.eps, **keys)


class Plan:
    """One call of a norm, checked, to be run on other arrays; made by `nbnorm.plan`."""

    def __init__(self, call: Call) -> None:
        self._call = call
        x = call.x.view
        self._shape, self._strides, self._dtype = x.shape, x.strides, x.dtype
        self._again = repeated(call, bound=True)

    def __call__(self, x: Any, *, out: Any = None) -> Any:
        """Run the call on another x.

        Parameters
        ----------
        x : array of the shape, dtype and kind of the one that the plan was made with
        out : array like x
            Where to write the result; x itself, or memory apart from it.

        Returns
        -------
        What the norm returns.

        Raises
        ------
        ValueError, TypeError
            Naming the argument, what was expected and what came; nothing has been written.
        """
        again = self._again
        if again is not None and self._fits(x) and (out is None or (self._fits(out) and out.flags.writeable)):
            y = again(x, out)
            if y is not None:
                return y
        return self._checked(x, out).forward()

    def _fits(self, array: Any) -> bool:
        return (
            array.__class__ is np.ndarray
            and array.shape == self._shape
            and array.dtype == self._dtype
            and array.strides == self._strides
        )

    def _checked(self, x: Any, out: Any) -> Call:
        """The call with these arrays."""
        first = self._call
        operand = check_like(first.x, x, "x", as_="the first x")
        if operand.adapter is not first.x.adapter:
            raise TypeError(f"x must be an array as the plan was made with, {first.x.adapter.kind}; got {type(x)}")
        call = replace(first, x=operand)
        if out is not None:
            inputs = {"weight": first.weight, "bias": first.bias, "residual": first.residual}
            call.out = check_out(operand, out, inputs)
            for name, other in (("mask", first.mask), *_statistics(first)):
                if other is not None and overlap(call.out.view, other):
                    raise ValueError(f"out must not overlap {name}")
        return call


def _statistics(call: Call) -> list[tuple[str, NDArray[Any]]]:
    given = call.fixed or (() if call.running is None else (call.running.mean, call.running.var))
    return [(name, operand.view) for name, operand in zip(("running_mean", "running_var"), given, strict=False)]


def plan(op: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Plan:
    """Check the arguments of a norm once, to run it on other arrays of x's shape and dtype with little more than its
    kernel.

    Parameters
    ----------
    op : one of the norms, such as `nbnorm.batch_norm`
    x : array
        Like those that the plan will run on. It is not computed with.
    *args, **kwargs
        The norm's other arguments, but `out`, which the plan takes. They are kept, not copied: the plan sees what is
        written to weight and bias later, and updates running statistics in each run.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError, TypeError, BackendError
        As `op` does; TypeError where `op` has no plan.

    Notes
    -----
    For layer, RMS and other norms along the last axes of small NumPy arrays the Numba backend compiles a function of
    its own, once for each dtype and number of axes: about 2 s, or 0.2 s from its cache on disk.

    Examples
    --------
    >>> import numpy as np, nbnorm
    >>> x = np.array([[1.0, 3.0], [10.0, 30.0]])
    >>> normalize = nbnorm.plan(nbnorm.layer_norm, x, 2, eps=1e-9)
    >>> out = np.empty_like(x)
    >>> normalize(x * 5, out=out) is out
    True
    >>> out.round(6).tolist()
    [[-1.0, 1.0], [-1.0, 1.0]]
    """
    from nbnorm.operation import prepared  # noqa: PLC0415  which runs what is remembered here

    if "out" in kwargs:
        raise TypeError("out must be given to the plan, plan(x, out=...), not to nbnorm.plan")
    call = prepared(op, (x, *args), kwargs)
    if not isinstance(call, Call) or call.op == "moments" or call.out is not None:
        raise TypeError(f"op must be a norm of one result for a plan; got {op!r} with {', '.join(kwargs) or 'x'}")
    return Plan(call)
