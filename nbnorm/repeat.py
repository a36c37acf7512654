"""Calls that are made again and again: checked once, and then found by what their checks depend on.

Remembered is a call of a norm with nothing but arrays of NumPy's to it: x, weight, bias and running statistics.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nbnorm import dispatch, engine
from nbnorm.backend import Backend, Epilogue
from nbnorm.engine import Call, Operand
from nbnorm.layout import Plan

ARRAYS = ("x", "weight", "bias")
STATISTICS = ("running_mean", "running_var")
MOST = 1024  # calls that are remembered; then they are forgotten, and remembered anew
Again = Callable[..., Any]
Place = int | str | None  # of an argument: its position, its keyword, or not given


class Remembered:
    """How to run a call again, and where its arrays stand among the arguments."""

    def __init__(self, again: Again, places: tuple[Place, Place, Place]) -> None:
        self._again = again
        self._x, self._weight, self._bias = places

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result; None where the call must be checked after all."""
        x = _given(self._x, args, kwargs)
        return self._again(x, _given(self._weight, args, kwargs), _given(self._bias, args, kwargs), None)


class RememberedWithStatistics(Remembered):
    """The same of a call with running statistics."""

    def __init__(self, again: Again, places: tuple[Place, Place, Place], mean: Place, var: Place) -> None:
        super().__init__(again, places)
        self._mean, self._var = mean, var

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x, weight, bias = (_given(place, args, kwargs) for place in (self._x, self._weight, self._bias))
        return self._again(x, weight, bias, _given(self._mean, args, kwargs), _given(self._var, args, kwargs))


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
            flags = arg.flags
            key += arg.shape, arg.strides, arg.dtype, flags.aligned, flags.writeable
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
    names = list(inspect.signature(op).parameters)

    def place(name: str) -> Place:
        return names.index(name) if name in names[: len(args)] else name if name in kwargs else None

    places = place("x"), place("weight"), place("bias")
    found: Remembered | None = None
    if call.running is not None or call.fixed is not None:
        again = repeated_with_statistics(call)
        if again is not None:
            found = RememberedWithStatistics(again, places, *map(place, STATISTICS))
    else:
        again = repeated(call)
        if again is not None:
            found = Remembered(again, places)
    if found is None:
        return
    if len(calls) >= MOST:
        calls.clear()
    calls[key] = found


def repeated(call: Call, *, bound: bool = False) -> Again | None:
    """A function (x, weight, bias, out) that does what the call does, for arrays as it had; with `bound` of (x, out),
    for weight and bias as they will be. None where there is more to the call than these."""
    if call.fixed is not None or call.running is not None:
        return None
    ready = _ready(call, (call.x, call.weight, call.bias))
    if ready is None:
        return None
    placed, backend, epilogue = ready
    weight, bias = _params(call, placed.plan)
    keys: dict[str, Any] = {"center": call.center, "epilogue": epilogue, "shape": call.x.view.shape, "bound": bound}
    return backend.repeated(placed.five_axes(), weight, bias, call.eps, **keys)


def repeated_with_statistics(call: Call) -> Again | None:
    """A function (x, weight, bias, running_mean, running_var) that does what a call with these does; None where there
    is more to it. It returns None, and has done nothing, where statistics to be updated may overlap another array."""
    statistics = call.fixed or (call.running and (call.running.mean, call.running.var)) or ()
    ready = _ready(call, (call.x, call.weight, call.bias, *statistics))
    if ready is None:
        return None
    placed, backend, epilogue = ready
    plan, axes, eps = placed.plan, call.axes, call.eps
    running = call.running
    weight, bias = _params(call, plan)
    keys: dict[str, Any] = {"center": True, "epilogue": epilogue, "shape": call.x.view.shape}
    normalize = backend.repeated(placed.five_axes(), weight, bias, eps, moments=running is not None, **keys)

    def evaluate(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        return normalize(x, weight, bias, None, engine.fixed_stats(mean, var, eps, plan))

    def train(x: Any, weight: Any, bias: Any, mean: Any, var: Any) -> Any:
        assert running is not None
        for other in (x, weight, bias):
            if other is not None and (np.may_share_memory(mean, other) or np.may_share_memory(var, other)):
                return None
        if np.may_share_memory(mean, var):
            return None
        y, found = normalize(x, weight, bias, None)
        batch = engine.logical_moments(found, axes, plan)
        mean[...], var[...] = batch.blend(mean, var, running.momentum)
        return y

    return evaluate if running is None else train


def _params(call: Call, plan: Plan) -> tuple[NDArray[Any] | None, NDArray[Any] | None]:
    """weight and bias on five axes."""
    weight, bias = (
        None if param is None else param.view.reshape(plan.param_shape) for param in (call.weight, call.bias)
    )
    return weight, bias


def _ready(call: Call, operands: tuple[Operand | None, ...]) -> tuple[engine.Placed, Backend, Epilogue] | None:
    """What runs a call of nothing but these operands, NumPy arrays that lie as kernels want them; None for others."""
    more = call.mask, call.residual, call.addend, call.renorm, call.dropout, call.dropped
    if any(part is not None for part in more) or call.return_moments or call.weight_offset or not call.x.view.size:
        return None
    for operand in operands:
        if operand is not None and (type(operand.given) is not np.ndarray or not engine.plain(operand.view)):
            return None
    placed = engine.place(call)
    if placed.copied or placed.plan.order != tuple(range(len(placed.plan.order))):
        return None
    decision = dispatch.decide(engine.request(call, placed.plan), call.backend)
    return placed, dispatch.backend_of(decision, call.backend), Epilogue(call.activation, call.order)
