"""Calls that are made again and again: checked once, and then found by what their checks depend on.

Remembered is a call of a norm with nothing but arrays of NumPy's, weight and bias to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine
from nbnorm.backend import Epilogue
from nbnorm.engine import Call

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
    key += kwargs
    for arg in (*args, *kwargs.values()):
        if arg.__class__ is np.ndarray:
            key += arg.shape, arg.strides, arg.dtype, arg.flags.aligned
        elif arg.__class__ is tuple:
            key += tuple, arg, *map(type, arg)  # (3,) == (3.0,)
        else:
            key += arg.__class__, arg
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
    try:
        hash(key)
    except TypeError:
        return
    again = repeated(call)
    if again is None:
        return
    names = list(inspect.signature(op).parameters)
    places = [names.index(name) if name in names[: len(args)] else name if name in kwargs else None for name in ARRAYS]
    if len(calls) >= MOST:
        calls.clear()
    calls[key] = Remembered(again, (places[0], places[1], places[2]))


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
